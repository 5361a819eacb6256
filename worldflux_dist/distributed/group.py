"""A group of learners: ranks that share every batch and hold the same weights.

A rank that dies takes the others with it, since they wait for it in the middle of a step. The group
is then started anew from the newest checkpoint with the next generation; what the old one may still
want to publish is refused. Gradient steps go on counting upwards; those that were lost with the
ranks are told, so that they can be taken again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError, RayError
from torch.distributed import TCPStore

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.config import Config
from worldflux_dist.data import Batch
from worldflux_dist.distributed.shard import shard_name
from worldflux_dist.distributed.weights import WEIGHTS
from worldflux_dist.learner import Learner
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath


class GroupLostError(RuntimeError):
    """A rank died; the message says what is known of it."""


class Rank:
    """A learner among others. Batches come as references and are fetched before a step begins.

    `shards` get the losses of prioritized windows; `generation` counts the group's restarts.
    """

    def __init__(
        self, learner: Learner, store: Any, shards: Sequence[Any], generation: int
    ) -> None:
        self.learner, self.store, self.generation = learner, store, generation
        self._shards = shards
        self._idle_since = time.monotonic()

    def step(self, shard: int, given: tuple[Batch, np.ndarray] | Imagined) -> dict[str, float]:
        """One gradient step; metrics, with seconds spent stepping and waiting for work."""
        start = time.monotonic()
        batch, ids = given if isinstance(given, tuple) else (given, None)
        metrics = self.learner.step(batch)
        if self.learner.rows and ids is not None:
            self._shards[shard].prioritize.remote(ids, self.learner.row_losses)
        end = time.monotonic()
        metrics["time/learner_step"] = end - start
        metrics["time/learner_wait"] = start - self._idle_since
        self._idle_since = end
        return metrics

    def publish(self) -> None:
        """Send the inference weights to the store; their version is the gradient steps."""
        version = (self.generation, self.learner.gradient_steps)
        state = self.learner.agent.inference_state(self.learner.part)
        with suppress(RayActorError):  # a store that is away is brought up to date by the next one
            ray.get(self.store.publish.remote(self.learner.part, version, state))


def trains_on_rows(config: Config, part: str) -> bool:
    """Whether shards want to know the losses of the windows that `part` is trained on."""
    return config.replay.prioritized > 0 and part != "behavior"


class LearnerActor(Rank):
    """One rank in a process of its own, which finds the others by their names."""

    def __init__(
        self, config: Config, spaces: Spaces, part: str, rank: int, generation: int
    ) -> None:
        torch.manual_seed(config.seed * 1000 + rank + 17 * generation)
        agent, rows = config.make_agent(spaces), trains_on_rows(config, part)
        num = config.scale.num_shards if rows else 0
        shards = [ray.get_actor(shard_name(i)) for i in range(num)]
        learner = Learner(agent, config.learner, part, rows)
        super().__init__(learner, ray.get_actor(WEIGHTS), shards, generation)
        self.rank = rank
        self.patience = config.scale.patience  # the longest that ranks wait for each other
        self.learner.rank = rank  # each has its own random state, in a checkpoint too

    def open(self) -> tuple[str, int]:
        """Where the ranks meet: a store that rank 0 keeps on a free port of its node."""
        host = ray.util.get_node_ip_address()
        self._meeting = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._meeting.port

    def join(self, meeting: tuple[str, int], num_ranks: int) -> None:
        """Meet the other ranks; afterwards all have rank 0's weights."""
        store = self._meeting if self.rank == 0 else TCPStore(*meeting, is_master=False)
        store.set_timeout(timedelta(seconds=self.patience))
        self.learner.join(store, self.rank, num_ranks, self.patience)

    def load(self, folder: UPath, gradient_steps: int) -> None:
        """Go on from a checkpoint, counting on from `gradient_steps`."""
        self.learner.load(folder, gradient_steps)

    def count_from(self, gradient_steps: int) -> None:
        self.learner.gradient_steps = gradient_steps

    def agent_arrays(self) -> dict[str, np.ndarray]:
        """All weights of the group's part, for evaluation elsewhere."""
        return self.learner.agent.part_arrays(self.learner.part)

    def save(self, folder: UPath) -> None:
        self.learner.save(folder)


class LearnerGroup:
    """The driver's view of the ranks that train one part. Owns their handles and generation."""

    def __init__(
        self, config: Config, spaces: Spaces, part: str, options: Sequence[dict[str, Any]]
    ) -> None:
        self.config, self.spaces, self.part, self.options = config, spaces, part, options
        self.ranks: list[Any] = []
        self._loading: list[ObjectRef] = []
        self._store = ray.get_actor(WEIGHTS)
        self.generation, self.gradient_steps, self.lost_steps = 0, 0, 0

    @property
    def effective_steps(self) -> int:
        """Gradient steps behind the weights: those taken less those lost with dead ranks."""
        return self.gradient_steps - self.lost_steps

    def start(self, folder: UPath | None, gradient_steps: int) -> None:
        """Start all ranks, from a checkpoint where there is one; `meet` waits for them."""
        self.kill()
        self.generation, self.gradient_steps = self.generation + 1, gradient_steps
        self._store.fence.remote(self.part, self.generation)
        make: Any = ray.remote(LearnerActor)
        self.ranks = [
            make.options(**options).remote(
                self.config, self.spaces, self.part, rank, self.generation
            )
            for rank, options in enumerate(self.options)
        ]
        self._loading = [
            rank.count_from.remote(gradient_steps)
            if folder is None
            else rank.load.remote(folder, gradient_steps)
            for rank in self.ranks
        ]

    def meet(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Wait until all ranks have started and met.

        Raises GroupLostError where one of them dies on the way, or when told to stop.
        """
        self._wait(self._loading, stopping)
        if len(self.ranks) > 1:
            (meeting,) = self._wait([self.ranks[0].open.remote()], stopping)
            joining = [rank.join.remote(meeting, len(self.ranks)) for rank in self.ranks]
            self._wait(joining, stopping)

    def step(self, shards: Sequence[int], given: Sequence[ObjectRef]) -> list[ObjectRef]:
        """Begin one gradient step on a batch per rank; `result` takes what this gives."""
        parts = zip(self.ranks, shards, given, strict=True)
        return [rank.step.remote(shard, ref) for rank, shard, ref in parts]

    def result(self, refs: Sequence[ObjectRef]) -> dict[str, float]:
        """Wait for a step: rank 0's metrics. Raises GroupLostError, or an error of our own."""
        metrics: dict[str, float] = self._wait(refs)[0]
        self.gradient_steps += 1
        return metrics

    def publish(self) -> None:
        """Have the newest weights published; `published` is done when they are."""
        self._store.fence.remote(self.part, self.generation)  # it may have been restarted
        self.published: ObjectRef = self.ranks[0].publish.remote()

    def agent_arrays(self) -> ObjectRef:
        return self.ranks[0].agent_arrays.remote()

    def save(self, folder: UPath) -> list[ObjectRef]:
        """Have every rank write its files; does not wait."""
        return [rank.save.remote(folder) for rank in self.ranks]

    def kill(self) -> None:
        """End all ranks, also those that wait for a dead one."""
        for rank in self.ranks:
            with suppress(RayError):
                ray.kill(rank, no_restart=True)
        self.ranks = []

    def _wait(
        self, refs: Sequence[ObjectRef], stopping: Callable[[], bool] = lambda: False
    ) -> list[Any]:
        """All results. Raises GroupLostError where a rank died, or the first error of our own: the
        survivors of either only know that a connection broke."""
        refs = list(refs)
        waiting = refs
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=1.0)
            if not done and stopping():
                raise GroupLostError(f"told to stop before the learners of {self.part} had started")
            if done and (error := _error_of(done[0])) is not None:
                time.sleep(0.2)  # what the others say comes at about the same time
                others, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                errors = [error, *filter(None, map(_error_of, others))]
                own = next((e for e in errors if not _is_loss(e)), None)
                if own is not None:
                    raise own
                raise GroupLostError(str(errors[0])) from error
        return ray.get(refs)


def failed(refs: Sequence[ObjectRef]) -> bool:
    """Whether any of some finished steps failed, so that the others need not be waited for."""
    return any(_error_of(ref) is not None for ref in refs)


def _error_of(ref: ObjectRef) -> Exception | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _is_loss(error: Exception) -> bool:
    """Whether a process or what it was sent is gone, or its connection to another rank broke."""
    if "creation task" in str(error):
        return False  # it could not start, and would not another time
    cause = getattr(error, "cause", error)
    lost = (RayActorError, ObjectLostError)
    if isinstance(error, lost) or isinstance(cause, (*lost, torch.distributed.DistError)):
        return True
    return isinstance(cause, RuntimeError) and "gloo" in str(cause)  # its own errors have no class

"""A group of learners: ranks that share every batch and hold the same weights.

A rank that dies takes the others with it, since they wait for it in the middle of a step. The group
is then started anew from the newest checkpoint with the next generation; what the old one may still
want to publish is refused. Gradient steps go on counting upwards; those that were lost with the
ranks are told, so that they can be taken again.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import ray
import torch
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from torch.distributed import FileStore, Store, TCPStore

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.config import Config
from worldflux_dist.data import Batch
from worldflux_dist.distributed.ending import sentence
from worldflux_dist.distributed.shard import shard_name
from worldflux_dist.distributed.weights import COMPILE_S, WEIGHTS
from worldflux_dist.learner import Learner
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath


Meeting = tuple[str, int]  # a host and its port, or a file and 0
RETRY_S = 1.0  # after a publication that failed


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
        self._stepped = self._idle_since = time.monotonic()
        self._waited = 0.0  # seconds without a batch since the last step
        if learner.config.compile:
            self._tell_compiling()

    def step(self, shard: int, given: tuple[Batch, np.ndarray] | Imagined) -> dict[str, float]:
        """One gradient step; metrics, with the seconds that it took, those without a batch before
        it, and those since the last step in all."""
        start = time.monotonic()
        with self._busy():
            batch, ids = given if isinstance(given, tuple) else (given, None)
            metrics = self.learner.step(batch)
            if self.learner.rows and ids is not None:
                self._shards[shard].prioritize.remote(ids, self.learner.row_losses)
        end = self._idle_since
        metrics["time/learner_step"] = end - start
        metrics["time/learner_wait"] = self._waited
        metrics["time/learner_wall"] = end - self._stepped
        self._waited, self._stepped = 0.0, end
        return metrics

    def publish(self) -> None:
        """Send the inference weights to the store; their version is the gradient steps.

        Raises RayError where it did not get them.
        """
        with self._busy():
            version = (self.generation, self.learner.gradient_steps)
            state = self.learner.agent.inference_state(self.learner.part)
            ray.get(self.store.publish.remote(self.learner.part, version, state))

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """What happens in here is no waiting for a batch."""
        self._waited += time.monotonic() - self._idle_since
        try:
            yield
        finally:
            self._idle_since = time.monotonic()

    def _tell_compiling(self) -> None:
        """From now on, tell the store when torch.compile is at work: it may take minutes."""
        from torch._dynamo import callback  # takes seconds

        def note(begins: bool) -> None:
            who = self.learner.part, self.generation, self.learner.rank
            self.store.note_compiling.remote(*who, begins)

        callback.on_compile_start(lambda _: note(True))
        callback.on_compile_end(lambda _: note(False))


def stall(means: Mapping[str, float]) -> float:
    """The share of the learner's wall-clock in which it had no batch, from the means of its steps'
    metrics; 1 where there was no step."""
    return means.get("time/learner_wait", 1.0) / means.get("time/learner_wall", 1.0)


def interface_of(address: str) -> str:
    """The network interface that has an address. Raises RuntimeError where this node has none."""
    for name, found in psutil.net_if_addrs().items():
        if address in (each.address for each in found):
            return name
    raise RuntimeError(
        f"this node has no network interface with the address {address}, by which Ray knows it: "
        "start Ray with --node-ip-address and an address of its own"
    )


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
        self.learner.rank = rank  # each has its own random state, in a checkpoint too

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def open(self, one_node: bool) -> Meeting:
        """Where the ranks meet: a file that only this user can open, or a free port of this node's
        address where they are on several nodes."""
        if one_node:
            ray_files = ray.get_runtime_context().get_temp_dir()
            return os.path.join(tempfile.mkdtemp(prefix="ranks-", dir=ray_files), "store"), 0
        host = ray.util.get_node_ip_address()
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        fd = listening.detach()  # TCPStore's own socket would listen on all addresses
        self._meeting = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd
        )
        return host, port

    def join(self, meeting: Meeting, num_ranks: int, timeout_s: float) -> None:
        """Meet the other ranks; afterwards all have rank 0's weights. They wait for each other for
        `timeout_s` at most, and longer where one of them may compile."""
        where, port = meeting
        store: Store
        if not port:
            store = FileStore(where, num_ranks)
        else:
            store = self._meeting if self.rank == 0 else TCPStore(where, port, is_master=False)
        own = ray.util.get_node_ip_address() if port else "127.0.0.1"
        for library in ("GLOO", "NCCL"):  # would listen on the address of the host's name, or all
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_of(own))
        store.set_timeout(timedelta(seconds=timeout_s))
        if self.learner.config.compile:
            timeout_s = max(timeout_s, COMPILE_S)
        self.learner.join(store, self.rank, num_ranks, timeout_s)

    def load(self, folder: UPath, gradient_steps: int) -> None:
        """Go on from a checkpoint, counting on from `gradient_steps`."""
        self.learner.load(folder, gradient_steps)

    def count_from(self, gradient_steps: int) -> None:
        self.learner.gradient_steps = gradient_steps

    def agent_arrays(self) -> dict[str, np.ndarray]:
        """All weights of the group's part, for evaluation elsewhere."""
        with self._busy():
            return self.learner.agent.part_arrays(self.learner.part)

    def save(self, folder: UPath) -> None:
        with self._busy():
            self.learner.save(folder)


class LearnerGroup:
    """The driver's view of the ranks that train one part. Owns their handles and generation.

    Publishes by itself after `publish_every` gradient steps; `patience` is how long ranks may be
    silent.
    """

    kind: type = LearnerActor
    publish_every = 16
    say: Callable[[str], None] = staticmethod(print)

    def __init__(
        self, config: Config, spaces: Spaces, part: str, options: Sequence[dict[str, Any]]
    ) -> None:
        self.config, self.spaces, self.part, self.options = config, spaces, part, options
        self.ranks: list[Any] = []
        self._loading: list[ObjectRef] = []
        self._store = ray.get_actor(WEIGHTS)
        self.generation, self.gradient_steps, self.lost_steps = 0, 0, 0
        self.patience = config.scale.patience
        self.publications = Publications()

    @property
    def effective_steps(self) -> int:
        """Gradient steps behind the weights: those taken less those lost with dead ranks."""
        return self.gradient_steps - self.lost_steps

    def start(self, folder: UPath | None, gradient_steps: int) -> None:
        """Start all ranks, from a checkpoint where there is one; `meet` waits for them."""
        self.kill()
        self.generation, self.gradient_steps = self.generation + 1, gradient_steps
        self.publications.forget()
        self._store.fence.remote(self.part, self.generation)
        make: Any = ray.remote(self.kind)
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
            places = self._wait([rank.node.remote() for rank in self.ranks], stopping)
            one_node = len(set(places)) == 1
            (meeting,) = self._wait([self.ranks[0].open.remote(one_node)], stopping)
            # The driver loses its patience first, and then says so.
            given = (meeting, len(self.ranks), 2 * self.patience)
            joining = [rank.join.remote(*given) for rank in self.ranks]
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
        self.publications.begun(self.published, self.gradient_steps)

    def keep_published(self) -> None:
        """Publish where it is time to, and again where it failed. Does not wait."""
        if why := self.publications.look():
            self.say(f"the newest weights of {self.part} are not published, trying again: {why}")
        if self.publications.due(self.gradient_steps, self.publish_every):
            self.publish()

    def compiling(self) -> bool:
        """Whether ranks are silent because they compile."""
        with suppress(RayError):
            ref: Any = self._store.compiling.remote(self.part, self.generation)
            return bool(ray.get(ref, timeout=5))
        return False

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


class Publications:
    """What became of a group's publications. `steps` are the gradient steps behind the one that was
    last asked for, `failures` counts those that the store did not get."""

    def __init__(self) -> None:
        self.failures = 0
        self.forget()

    def forget(self) -> None:
        """Those who were asked are gone."""
        self.steps, self._retry_at, self._failing = -1, math.inf, False
        self._under_way: list[ObjectRef] = []

    def begun(self, ref: ObjectRef, steps: int) -> None:
        self.steps, self._retry_at = steps, math.inf
        self._under_way.append(ref)

    def look(self) -> str:
        """Take in those that have ended; why one failed, where those before it had not."""
        why = ""
        while self._under_way and ray.wait(self._under_way[:1], timeout=0)[0]:
            error = _error_of(self._under_way.pop(0))
            if error is None:
                self._failing, self._retry_at = False, math.inf
            elif isinstance(error, RayTaskError):  # else the rank is dead, as its steps will show
                why = self.failed(error) or why
        return why

    def failed(self, error: Exception) -> str:
        """One failed; why, where the one before it had not."""
        known, self._failing = self._failing, True
        self.failures += 1
        self._retry_at = time.monotonic() + RETRY_S
        return "" if known else sentence(error)

    def due(self, gradient_steps: int, every: int) -> bool:
        """Whether the next one is due after so many gradient steps."""
        if time.monotonic() > self._retry_at:
            return True
        return self.steps >= 0 and gradient_steps - self.steps >= every


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

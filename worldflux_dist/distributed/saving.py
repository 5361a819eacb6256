"""Checkpoints while training goes on.

First every shard notes its state and the learners are asked to write theirs, which takes
milliseconds of the shards' time; replay itself is on disk already, in segments that never change.
When all have written, the manifest is: a checkpoint without one does not exist. What must stay
true: the learners' steps and the counters belong together, since both are of the moment between two
rounds, and `env_steps` counts what the shards had noted, plus what a killed shard lost for good.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray import ObjectRef

from worldflux_dist import checkpoint
from worldflux_dist.distributed.ending import sentence
from worldflux_dist.distributed.ports import RayPorts
from worldflux_dist.replay.limiter import Limiter

if TYPE_CHECKING:
    from upath import UPath


@dataclass
class Writing:
    """A checkpoint that is being written."""

    folder: UPath
    step: int
    counters: dict[str, Any]
    learners: list[ObjectRef]
    shards: list[ObjectRef]
    placing: Future[Any] | None = None

    @property
    def refs(self) -> list[ObjectRef]:
        return [*self.learners, *self.shards]


class Saver:
    """Owns the checkpoint that is being written; one at a time. `keep` stay on disk."""

    def __init__(self, ports: RayPorts, limiter: Limiter, keep: int = 2) -> None:
        self.ports, self.limiter, self.keep = ports, limiter, keep
        self.writing: Writing | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # Steps that runners have not reported yet are counted by the shards.
        self._before = limiter.env_steps - self._total_steps()
        ports.settle = self.settle

    def begin(self, episodes: int) -> None:
        """Between two rounds: have everyone note or write what belongs to this moment.

        Raises RayActorError where a shard is being restarted.
        """
        assert self.writing is None
        roles = self.ports.roles
        step = roles.model.gradient_steps
        folder = checkpoint.begin(roles.root, step)
        try:
            stored = sum(ray.get([shard.seal.remote() for shard in roles.shards]))
        except BaseException:
            checkpoint.abandon(folder)
            raise
        limiter = copy.deepcopy(self.limiter)
        limiter.inserted(max(0, self._before + stored - limiter.env_steps))
        counters = {
            "limiter": limiter.state_dict(),
            "episodes": episodes,
            "gradient_steps": {group.part: group.gradient_steps for group in roles.groups},
            "effective_steps": {group.part: group.effective_steps for group in roles.groups},
            "lost_steps": {group.part: group.lost_steps for group in roles.groups},
        }
        learners = [ref for group in roles.groups for ref in group.save(folder)]
        shards = [shard.sealed.remote() for shard in roles.shards]
        self.writing = Writing(folder, step, counters, learners, shards)

    def finish(self, wait: bool) -> bool:
        """Put the checkpoint in place if all have written (with `wait`, wait for them).

        True where that is done. Raises what went wrong with it; it is given up then.
        """
        writing = self.writing
        if writing is None:
            return True
        try:
            if writing.placing is None:
                done, _ = ray.wait(
                    writing.refs, num_returns=len(writing.refs), timeout=None if wait else 0
                )
                if len(done) < len(writing.refs):
                    return False
                ray.get(writing.learners)
                counters = writing.counters | {"shards": ray.get(writing.shards)}
                # In a thread, since every file is read again for its hash.
                writing.placing = self._thread.submit(
                    checkpoint.commit,
                    *(self.ports.roles.root, writing.folder, writing.step, self.keep, counters),
                )
            if not (wait or writing.placing.done()):
                return False
            writing.placing.result()
        except BaseException:
            self.give_up()
            raise
        self.writing = None
        self._tidy()
        return True

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; where it fails, say so and go on."""
        try:
            self.finish(wait=True)
        except Exception as error:  # whatever a storage raises
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Give up the checkpoint that is being written, and say why."""
        self.give_up()
        self.ports.say(f"no checkpoint this time: {sentence(error)}")

    def give_up(self) -> None:
        """Forget the checkpoint that is being written."""
        if self.writing is not None:
            checkpoint.abandon(self.writing.folder)
            self.writing = None

    def _total_steps(self) -> int:
        while len(self.ports.sizes) < len(self.ports.roles.shards):  # one died at once
            time.sleep(0.5)
            self.ports.ask_sizes()
        return sum(report.total_steps for report in self.ports.sizes.values())

    def _tidy(self) -> None:
        """Let shards delete the segments that neither they nor a checkpoint needs."""
        names = segments_of(checkpoint.kept(self.ports.roles.root))
        for shard in self.ports.roles.shards:
            shard.retain.remote(names)


def segments_of(manifests: Iterable[dict[str, Any]]) -> set[str]:
    """Names of the replay segments that checkpoints refer to."""
    states = [state for manifest in manifests for state in manifest["counters"]["shards"]]
    return {segment["name"] for state in states for segment in state["segments"]}

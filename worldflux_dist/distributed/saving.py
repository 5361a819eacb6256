"""Checkpoints while training goes on.

First every shard notes its state and the learners are asked to write theirs, which takes
milliseconds of the shards' time; replay itself is on disk already, in segments that never change.
When all have written, the manifest is: a checkpoint without one does not exist. What must stay
true: the learners' steps and the counters belong together, since both are of the moment between two
rounds, and `env_steps` counts what the shards had noted, plus what a killed shard lost for good.
The driver itself never blocks in the storage: it looks whether the run is to stop meanwhile.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import ObjectRef

from worldflux_dist import checkpoint
from worldflux_dist.distributed.ending import StoppedError, background, sentence
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.group import ActorGroup
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.replay.limiter import Limiter

if TYPE_CHECKING:
    from upath import UPath

WAIT_S = 0.2  # between two looks at whether the run is to stop
STOP_S = 6.0  # from a signal on, for a checkpoint that was waiting when it came
LAST_SAVE_S = 60.0  # from a signal on, for one that is begun then
T = TypeVar("T")


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
    """Owns the checkpoint that is being written; one at a time. `keep` stay on disk.

    `last` is the newest one in place.
    """

    def __init__(
        self,
        groups: Sequence[ActorGroup],
        shards: Shards,
        limiter: Limiter,
        root: UPath,
        driver: Driver,
        last: UPath | None = None,
        keep: int = 2,
    ) -> None:
        self.groups, self.shards, self.limiter = groups, shards, limiter
        self.root, self.driver, self.keep = root, driver, keep
        self.last = last
        self.writing: Writing | None = None
        self._since = math.inf  # when a checkpoint was begun, until one is in place
        # Steps that runners have not reported yet are counted by the shards.
        self._before = limiter.env_steps - self._total_steps()
        driver.settle, driver.check_stop = self.settle, self.check_stop

    def begin(self, episodes: int) -> None:
        """Between two rounds: have everyone note or write what belongs to this moment.

        Raises RayActorError where a shard is being restarted, StoppedError as `check_stop`.
        """
        assert self.writing is None
        self._since = min(self._since, time.monotonic())
        groups, shards = self.groups, self.shards.handles
        step = groups[0].gradient_steps
        folder = self._result(background(checkpoint.begin, self.root, step))
        try:
            stored = sum(self._all([shard.seal.remote() for shard in shards]))
        except BaseException:
            self._abandon(folder)
            raise
        limiter = copy.deepcopy(self.limiter)
        limiter.inserted(max(0, self._before + stored - limiter.env_steps))
        counters = {
            "limiter": limiter.state_dict(),
            "episodes": episodes,
            "gradient_steps": {group.part: group.gradient_steps for group in groups},
            "effective_steps": {group.part: group.effective_steps for group in groups},
            "lost_steps": {group.part: group.lost_steps for group in groups},
        }
        learners = [ref for group in groups for ref in group.save(folder)]
        sealed = [shard.sealed.remote() for shard in shards]
        self.writing = Writing(folder, step, counters, learners, sealed)

    def finish(self, wait: bool) -> bool:
        """Put the checkpoint in place if all have written (with `wait`, wait for them).

        True where that is done. Raises what went wrong with it; it is given up then.
        """
        writing = self.writing
        if writing is None:
            return True
        try:
            if writing.placing is None:
                if not (wait or _all_done(writing.refs, timeout=0)):
                    return False
                self._all(writing.learners)
                counters = writing.counters | {"shards": self._all(writing.shards)}
                # Every file is read again for its hash.
                writing.placing = background(self._place, writing, counters)
            if not (wait or writing.placing.done()):
                return False
            self.last, segments = self._result(writing.placing)
        except BaseException:
            self.give_up()
            raise
        self.writing, self._since = None, math.inf
        for shard in self.shards.handles:
            shard.retain.remote(segments)
        return True

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; where it fails, say so and go on.

        Raises StoppedError as `check_stop`.
        """
        try:
            self.finish(wait=True)
        except StoppedError:
            raise
        except Exception as error:  # storages raise errors of any kind
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Give up the checkpoint that is being written, and say why."""
        self.give_up()
        self.driver.say(f"no checkpoint this time: {sentence(error)}")

    def give_up(self) -> None:
        """Forget the checkpoint that is being written."""
        if self.writing is not None:
            folder, self.writing = self.writing.folder, None
            self._abandon(folder)

    def check_stop(self, error: Exception | None = None) -> None:
        """Raises StoppedError where the run was told to stop and has waited for long enough: the
        storage must not keep it. `error` is what went wrong last."""
        stopped = self.driver.since_stop()
        waited_for = self._since < time.monotonic() - stopped  # already when the signal came
        if stopped <= (STOP_S if waited_for else LAST_SAVE_S):
            return
        why = sentence(error) if error else f"{self.root} was not written in time"
        good = f"the last good one is {self.last}" if self.last else "there is no earlier one"
        raise StoppedError(
            f"stopped without a last checkpoint, since {why}; {good}: the same command goes on"
        ) from error

    def _result(self, future: Future[T]) -> T:
        """What a call in the background gives. Raises StoppedError as `check_stop`."""
        while not futures.wait([future], WAIT_S).done:
            self.check_stop()
        return future.result()

    def _all(self, refs: Sequence[ObjectRef]) -> list[Any]:
        """What calls of others give. Raises StoppedError as `check_stop`."""
        while not _all_done(refs, WAIT_S):
            self.check_stop()
        return ray.get(list(refs))

    def _place(self, writing: Writing, counters: dict[str, Any]) -> tuple[UPath, set[str]]:
        """Commit; gives the checkpoint, and the segments of replay that those in place need."""
        root = self.root
        final = checkpoint.commit(root, writing.folder, writing.step, self.keep, counters)
        return final, segments_of(checkpoint.kept(root))

    def _abandon(self, folder: UPath) -> None:
        with suppress(StoppedError):
            self._result(background(checkpoint.abandon, folder))

    def _total_steps(self) -> int:
        while len(self.shards.sizes) < len(self.shards.handles):  # one died at once
            time.sleep(0.5)
            self.shards.ask()
        return sum(report.total_steps for report in self.shards.sizes.values())


def _all_done(refs: Sequence[ObjectRef], timeout: float) -> bool:
    done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout)
    return len(done) == len(refs)


def segments_of(manifests: Iterable[dict[str, Any]]) -> set[str]:
    """Names of the replay segments that checkpoints refer to."""
    states = [state for manifest in manifests for state in manifest["counters"]["shards"]]
    return {segment["name"] for state in states for segment in state["segments"]}

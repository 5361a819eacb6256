"""What learners train on, on its way to them: replayed batches, or imagined ones.

References only. A source asks ahead, a little, also for the round to come, so that a learner finds
the next batch beside it; what a dead process owed is asked for again elsewhere.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError

from worldflux_dist.distributed.actors import ImaginedReport
from worldflux_dist.distributed.group import GroupLostError, LearnerGroup, failed
from worldflux_dist.distributed.shard import ShardReport
from worldflux_dist.distributed.supervision import Budget, raise_if_gone

SAMPLES_AHEAD = 2  # steps whose batches are being gathered beside those under way
STEPS_AHEAD = 2  # steps given to learners and not finished: one in work, one waiting
Fed = tuple[int, ObjectRef]  # the shard that something came from, and the thing itself


class Source(Protocol):
    """Where a group's batches come from."""

    def pump(self, needed: int) -> None:
        """Take in what has come; ask for more, to have up to `needed`. Does not wait."""

    def take(self, num: int) -> list[Fed] | None:
        """`num` batches, or None where there are not as many yet."""

    def waiting(self) -> list[ObjectRef]:
        """What the source is waiting for."""

    def restart_stuck(self) -> None:
        """Have the processes that it waits for started again."""


class ReplaySource:
    """Asks shards for batches, in proportion to what they hold: all steps are equally likely.

    `sizes` is what is known of the shards; one that dies or is empty leaves it until a runner
    reports it alive and filled.
    """

    def __init__(
        self,
        shards: Sequence[Any],
        sizes: dict[int, ShardReport],
        batch_size: int,
        rng: np.random.Generator,
        online: bool = True,
    ) -> None:
        self.shards, self.sizes, self.batch_size = shards, sizes, batch_size
        self.online = online
        self._rng = rng
        self._asked: dict[ObjectRef, Fed] = {}
        self._come: deque[Fed] = deque()

    def pump(self, needed: int) -> None:
        for ref in _done(self._asked):
            fed = self._asked.pop(ref)
            try:
                filled = ray.get(ref)
            except (RayActorError, ObjectLostError) as error:
                raise_if_gone(error)
                filled = False
            if filled:
                self._come.append(fed)
            else:
                self.sizes.pop(fed[0], None)
        while len(self._come) + len(self._asked) < needed and self.ready:
            shard = self._choose()
            ref, batch = self.shards[shard].sample.remote(self.batch_size, self.online)
            self._asked[ref] = (shard, batch)

    def take(self, num: int) -> list[Fed] | None:
        # What came from a shard that has died may be gone with its node.
        self._come = deque(fed for fed in self._come if fed[0] in self.sizes)
        if len(self._come) < num:
            return None
        return [self._come.popleft() for _ in range(num)]

    def waiting(self) -> list[ObjectRef]:
        return list(self._asked)

    def restart_stuck(self) -> None:
        for shard in {shard for shard, _ in self._asked.values()}:
            ray.kill(self.shards[shard], no_restart=False)

    @property
    def ready(self) -> bool:
        """Whether any shard is known to have something to sample."""
        return any(report.ready for report in self.sizes.values())

    def _choose(self) -> int:
        ready = [index for index, report in self.sizes.items() if report.ready]
        weights = np.array([self.sizes[index].num_steps for index in ready], float)
        return int(self._rng.choice(ready, p=weights / weights.sum()))


class ImaginedSource:
    """A bounded queue of imagined batches, kept full by imaginers that start from replay.

    A batch that is more than `max_staleness` gradient steps behind is thrown away and counted.
    `steps()` gives those of model and policy.
    """

    def __init__(
        self,
        imaginers: Sequence[Any],
        replay: ReplaySource,
        queue_size: int,
        max_staleness: int,
        steps: Callable[[], tuple[int, int]],
    ) -> None:
        self.imaginers, self.replay, self.queue_size = imaginers, replay, queue_size
        self.max_staleness, self.steps = max_staleness, steps
        self.budget = Budget("imaginer", imaginers)
        self.stale = 0
        self.reports: list[ImaginedReport] = []
        self._asked: dict[ObjectRef, tuple[int, Fed]] = {}
        self._queue: deque[tuple[ImaginedReport, Fed]] = deque()

    def pump(self, needed: int) -> None:
        for ref in _done(self._asked):
            index, fed = self._asked.pop(ref)
            try:
                report: ImaginedReport = ray.get(ref)
            except (RayActorError, ObjectLostError) as error:
                raise_if_gone(error)
                if not self.budget.away(index):  # one death, however many batches it owed
                    self.budget.lost(index)
                continue
            self.budget.brought(index)
            self.reports.append(report)
            self._queue.append((report, fed))
        fresh = [x for x in self._queue if self._staleness(x[0]) <= self.max_staleness]
        self.stale += len(self._queue) - len(fresh)
        self._queue = deque(fresh)
        busy = Counter(index for index, _ in self._asked.values())
        free = [i for i in range(len(self.imaginers)) if not self.budget.away(i)]
        room = self.queue_size - len(self._queue) - len(self._asked)
        self.replay.pump(room)
        while room > 0 and free and (found := self.replay.take(1)):
            index = min(free, key=lambda i: busy[i])
            ((shard, batch),) = found
            ref, imagined = self.imaginers[index].imagine.remote(batch)
            self._asked[ref] = (index, (shard, imagined))
            busy[index] += 1
            room -= 1

    def take(self, num: int) -> list[Fed] | None:
        if len(self._queue) < num:
            return None
        return [self._queue.popleft()[1] for _ in range(num)]

    def waiting(self) -> list[ObjectRef]:
        return [*self._asked, *self.replay.waiting()]

    def restart_stuck(self) -> None:
        for index in {index for index, _ in self._asked.values()}:
            ray.kill(self.imaginers[index], no_restart=False)
        self.replay.restart_stuck()

    def _staleness(self, report: ImaginedReport) -> int:
        model, policy = self.steps()
        return max(model - report.model_version, policy - report.policy_version)


@dataclass
class Stepper:
    """Keeps one group busy with the steps it is to take in a round. Owns the steps under way."""

    group: LearnerGroup
    source: Source

    def __post_init__(self) -> None:
        self.wanted = 0
        self.taken: list[dict[str, float]] = []
        self._stepping: deque[list[ObjectRef]] = deque()

    def begin(self, num: int) -> None:
        """`num` steps are to be taken."""
        self.wanted, self.taken = num, []

    def pump(self, stopping: bool) -> None:
        """Take in finished steps, and begin more unless `stopping`. Does not wait.

        Raises GroupLostError; the steps under way are forgotten then.
        """
        while self._stepping:
            refs = self._stepping[0]
            done = _done(refs)
            if len(done) < len(refs) and not failed(done):
                break
            self._stepping.popleft()
            try:
                self.taken.append(self.group.result(refs))
            except BaseException:
                self._stepping.clear()
                raise
        self.group.keep_published()  # before the next steps begin, which would delay it
        ranks = len(self.group.ranks)
        begun = len(self.taken) + len(self._stepping)
        if stopping:
            return
        if self.wanted:
            self.source.pump(SAMPLES_AHEAD * ranks)
        while begun < self.wanted and len(self._stepping) < STEPS_AHEAD:
            found = self.source.take(ranks)
            if found is None:
                return
            shards, refs = zip(*found, strict=True)
            self._stepping.append(self.group.step(shards, refs))
            begun += 1

    def restart_stuck(self) -> None:
        """Nothing has come for too long: have whoever is waited for started again.

        Raises GroupLostError where that is the group.
        """
        self.source.restart_stuck()
        if self._stepping:
            self._stepping.clear()
            raise GroupLostError("no step was finished for scale.patience seconds")

    @property
    def stepping(self) -> bool:
        return bool(self._stepping)

    @property
    def done(self) -> bool:
        return len(self.taken) >= self.wanted and not self._stepping

    def waiting(self) -> list[ObjectRef]:
        """What has to come before `pump` can do more."""
        return [*(self._stepping[0] if self._stepping else ()), *self.source.waiting()]


def _done(refs: Sequence[ObjectRef] | dict[ObjectRef, Any]) -> list[ObjectRef]:
    if not refs:
        return []
    return ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0]

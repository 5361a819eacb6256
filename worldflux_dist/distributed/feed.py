"""What learners train on, on its way to them: replayed batches, or imagined ones.

References only. A source asks ahead, a little, also for the round to come, so that a learner finds
the next batch beside it; what a dead process owed is asked for again elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError

from worldflux_dist.distributed.model_actor import ImaginedReport
from worldflux_dist.distributed.shard import ShardReport
from worldflux_dist.distributed.supervision import RETURN_S, Budget, raise_if_gone

Fed = tuple[int, ObjectRef]  # the shard that something came from, and the thing itself


class Shards:
    """The driver's view of replay: the shards' handles, and in `sizes` the newest report of each
    one that is known to be there. `restarts` counts their deaths."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles
        self.sizes: dict[int, ShardReport] = {}
        self.restarts = 0
        self._owners: dict[int, list[str]] = {}

    @property
    def ready(self) -> bool:
        """Whether any shard is known to have something to sample."""
        return any(report.ready for report in self.sizes.values())

    def know(self, reports: Mapping[int, ShardReport]) -> None:
        """Take in what shards say; another owner is another process, hence a death."""
        for index, report in reports.items():
            owners = self._owners.setdefault(index, [report.owner])
            if report.owner not in owners:
                owners.append(report.owner)
                self.restarts += 1
            if report.owner == owners[-1]:  # not what the one before said late
                self.sizes[index] = report

    def ask(self) -> None:
        """What every shard holds now; in between, runners' reports keep it roughly up to date."""
        refs = [shard.report.remote() for shard in self.handles]
        for index, ref in enumerate(refs):
            try:
                report: ShardReport = ray.get(ref)
                self.know({index: report})
            except RayActorError as error:
                raise_if_gone(error)
                self.sizes.pop(index, None)

    def wait_ready(self, stopping: Callable[[], bool]) -> bool:
        """Whether there is something to sample; a shard that died is waited for."""
        deadline = time.monotonic() + RETURN_S
        while not self.ready and time.monotonic() < deadline and not stopping():
            self.ask()
            time.sleep(0.5)
        return self.ready or stopping()


class Source(Protocol):
    """Where a group's batches come from."""

    def pump(self, needed: int) -> None:
        """Take in what has come; ask for more, to have up to `needed`. Does not wait."""

    def take(self, num: int) -> list[Fed] | None:
        """`num` batches, or None where there are not as many yet."""

    def waiting(self) -> list[ObjectRef]:
        """What the source is waiting for."""

    def restart_stuck(self) -> None:
        """Restart the processes that it waits for."""


class ReplaySource:
    """Asks shards for batches, in proportion to what they hold: all steps are equally likely. One
    that dies or is empty is left out until a runner reports it alive and filled."""

    def __init__(
        self, shards: Shards, batch_size: int, rng: np.random.Generator, online: bool = True
    ) -> None:
        self.shards, self.batch_size, self.online = shards, batch_size, online
        self._rng = rng
        self._asked: dict[ObjectRef, Fed] = {}
        self._come: deque[Fed] = deque()

    def pump(self, needed: int) -> None:
        for ref in done_of(self._asked):
            fed = self._asked.pop(ref)
            try:
                filled = ray.get(ref)
            except (RayActorError, ObjectLostError) as error:
                raise_if_gone(error)
                filled = False
            if filled:
                self._come.append(fed)
            else:
                self.shards.sizes.pop(fed[0], None)
        while len(self._come) + len(self._asked) < needed and self.shards.ready:
            index = self._choose()
            shard = self.shards.handles[index]
            ref, batch = shard.sample.remote(self.batch_size, self.online)
            self._asked[ref] = (index, batch)

    def take(self, num: int) -> list[Fed] | None:
        # What came from a shard that has died may be gone with its node.
        self._come = deque(fed for fed in self._come if fed[0] in self.shards.sizes)
        if len(self._come) < num:
            return None
        return [self._come.popleft() for _ in range(num)]

    def waiting(self) -> list[ObjectRef]:
        return list(self._asked)

    def restart_stuck(self) -> None:
        for index in {index for index, _ in self._asked.values()}:
            ray.kill(self.shards.handles[index], no_restart=False)

    def _choose(self) -> int:
        sizes = {i: report.num_steps for i, report in self.shards.sizes.items() if report.ready}
        weights = np.array(list(sizes.values()), float)
        return int(self._rng.choice(list(sizes), p=weights / weights.sum()))


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
        for ref in done_of(self._asked):
            index, fed = self._asked.pop(ref)
            try:
                report: ImaginedReport = ray.get(ref)
            except (RayActorError, ObjectLostError) as error:
                raise_if_gone(error)
                if not self.budget.away(index):  # one death, however many batches it owed
                    self.budget.lost(index)
                continue
            self.budget.finished(index)
            self.reports.append(report)
            self._queue.append((report, fed))
        fresh = [x for x in self._queue if self._staleness(x[0]) <= self.max_staleness]
        self.stale += len(self._queue) - len(fresh)
        self._queue = deque(fresh)
        busy = Counter(index for index, _ in self._asked.values())
        free = [i for i in range(len(self.imaginers)) if not self.budget.away(i)]
        room = self.queue_size - len(self._queue) - len(self._asked)
        self.replay.pump(room)
        while room > 0 and free and (taken := self.replay.take(1)):
            index = min(free, key=lambda i: busy[i])
            ((shard, batch),) = taken
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


def done_of(refs: Sequence[ObjectRef] | Mapping[ObjectRef, Any]) -> list[ObjectRef]:
    """Those whose results are there; does not wait."""
    if not refs:
        return []
    return ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0]

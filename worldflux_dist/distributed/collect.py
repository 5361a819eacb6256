"""The driver's side of env runners: the collect calls under way, and runners that die or hang."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayActorError

from worldflux_dist.config import Config
from worldflux_dist.distributed.env_runner import RunnerReport
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.supervision import Budget, Driver, Patience, raise_if_gone


class Collector(ABC):
    """Gives runners work and takes in their reports; the steps themselves go to the shards.

    `acting_losses` counts reports of runners that lost the process which acts for them.
    """

    def __init__(self, config: Config, shards: Shards, learners: Learners, driver: Driver) -> None:
        self.config, self.shards, self.learners, self.driver = config, shards, learners, driver
        self.patience = Patience(config.scale.patience, driver.say)
        self.acting_losses = 0

    @property
    @abstractmethod
    def num_under_way(self) -> int:
        """Collect calls under way."""

    @abstractmethod
    def start(self) -> None:
        """Give every idle runner work; does not wait."""

    @abstractmethod
    def finished(self, wait: bool) -> list[RunnerReport]:
        """Reports that have come in; with `wait`, at least one unless all runners are restarting.
        A runner that is silent for too long is restarted."""

    def drain(self, seconds: float) -> list[RunnerReport]:
        """Wait for the collect calls under way, at most so long: afterwards nothing moves."""
        reports, deadline = [], time.monotonic() + seconds
        while self.num_under_way and time.monotonic() < deadline:
            reports += self.finished(wait=True)
        return reports + self.finished(wait=False)

    def _take_in(self, report: RunnerReport) -> None:
        self.shards.know(report.shards)
        self.learners.staleness.note(report.acted)
        self.acting_losses += report.acting_losses > 0


class RayCollector(Collector):
    """Runners that are actors and that Ray restarts; what they were doing is asked for again."""

    def __init__(
        self,
        config: Config,
        runners: list[Any],
        shards: Shards,
        learners: Learners,
        driver: Driver,
    ) -> None:
        super().__init__(config, shards, learners, driver)
        self.runners, self.budget = runners, Budget("runner", runners)
        self._calls: dict[ObjectRef, tuple[int, float]] = {}

    @property
    def num_under_way(self) -> int:
        return len(self._calls)

    @property
    def restarts(self) -> dict[str, int]:
        """Processes that died, by role."""
        return {"runner": self.budget.losses, "acting": self.acting_losses}

    def start(self) -> None:
        busy = {index for index, _ in self._calls.values()}
        for index, runner in enumerate(self.runners):
            if index not in busy and not self.budget.away(index):
                ref = runner.collect.remote(self.config.scale.chunk_length)
                self._calls[ref] = index, time.monotonic()

    def finished(self, wait: bool) -> list[RunnerReport]:
        reports: list[RunnerReport] = []
        if wait and not self._calls:
            time.sleep(0.1)  # all runners are restarting
        while self._calls:
            refs = list(self._calls)
            timeout = 1.0 if wait and not reports else 0.0
            num = len(refs) if timeout == 0 else 1
            done, silent = ray.wait(refs, num_returns=num, timeout=timeout)
            reports += [report for ref in done if (report := self._result(ref))]
            for ref in silent:
                self._restart_if_stuck(ref)
            self.learners.keep_published()
            if timeout == 0 or self.driver.stopping():
                break
        return reports

    def _result(self, ref: ObjectRef) -> RunnerReport | None:
        index, _ = self._calls.pop(ref)
        try:
            report: RunnerReport = ray.get(ref)
        except RayActorError as error:
            raise_if_gone(error)
            self.budget.lost(index)
            return None
        self.budget.finished(index)
        self._take_in(report)
        return report

    def _restart_if_stuck(self, ref: ObjectRef) -> None:
        index, since = self._calls[ref]
        if time.monotonic() - since > self.patience.seconds:
            self.patience.lose(f"runner {index}")
            ray.kill(self.runners[index], no_restart=False)
            # Ray fails no call to a process that dies before it has ever started.
            del self._calls[ref]
            self.budget.lost(index)

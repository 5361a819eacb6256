"""RLlib's env runners as the flow's collector: RLlib starts them, asks them and restarts them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS

from worldflux_dist.config import Config
from worldflux_dist.distributed.collect import Collector
from worldflux_dist.distributed.env_runner import RunnerReport
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.supervision import Driver

logger = logging.getLogger(__name__)

COLLECT = "collect"  # the tag of RLlib's calls that are ours
POLL_S = 0.02


class RLlibCollector(Collector):
    """The collect calls under way. `metrics` is the algorithm's logger, `store` has the newest
    weights. A runner of this process has collected when `start` returns."""

    def __init__(
        self,
        config: Config,
        runners: EnvRunnerGroup,
        shards: Shards,
        learners: Learners,
        store: Any,
        metrics: Any,
    ) -> None:
        super().__init__(config, shards, learners, Driver())
        self.runners, self.store, self.metrics = runners, store, metrics
        self._here: list[RunnerReport] = []
        self._since: dict[int, float] = {}  # when runners were asked

    @property
    def num_under_way(self) -> int:
        return int(self.runners.num_in_flight_async_reqs(tag=COLLECT))

    def start(self) -> None:
        given = self.store, list(self.shards.handles)
        if self.runners.num_remote_env_runners() == 0:
            if not self._here:
                self._here += self._results([self.runners.local_env_runner.collect(*given)])
            return
        # Those that still collect are left alone: RLlib gives each of them one call at a time.
        collect = partial(_collect, store=given[0], shards=given[1])
        self.runners.foreach_env_runner_async(collect, tag=COLLECT)
        now = time.monotonic()
        self._since = {i: self._since.get(i, now) for i in self.runners.healthy_env_runner_ids()}

    def finished(self, wait: bool) -> list[RunnerReport]:
        reports, self._here = self._here, []
        deadline = time.monotonic() + 1.0
        while self.runners.num_remote_env_runners():
            ready = self.runners.fetch_ready_async_reqs(
                tags=COLLECT, timeout_seconds=POLL_S if wait else 0.0
            )
            reports += self._results([result for _, result in ready])
            for index, _ in ready:
                self._since.pop(index, None)
            if reports or not wait or time.monotonic() > deadline:
                break
            if not self.num_under_way:
                time.sleep(POLL_S)  # all runners are restarting
        for index in [i for i, since in self._since.items() if self._silent(since)]:
            self.patience.lose(f"env runner {index}")
            del self._since[index]
            ray.kill(self.runners._worker_manager.actors()[index], no_restart=False)
        return reports

    def _silent(self, since: float) -> bool:
        return time.monotonic() - since > self.patience.seconds

    def _results(
        self, results: Sequence[tuple[RunnerReport, Any] | Exception]
    ) -> list[RunnerReport]:
        """Take in reports and RLlib's metrics. Raises what went wrong in a runner."""
        taken = []
        for each in results:
            if isinstance(each, Exception):
                raise each
            taken.append(each)
        if taken:
            self.metrics.aggregate([metrics for _, metrics in taken], key=ENV_RUNNER_RESULTS)
        for report, _ in taken:
            self._take_in(report)
        return [report for report, _ in taken]


def _collect(runner: Any, store: Any, shards: list[Any]) -> Any:
    """What a runner collected, or what went wrong, which the algorithm raises.

    RLlib would restart a runner that raises again and again, silently: right for a process that
    died, but environments that fail were rebuilt already, as often as `env.max_failures` allows.
    """
    try:
        return runner.collect(store, shards)
    except RayTaskError as error:  # a shard refused it
        return error.cause
    except RayError:
        raise
    except Exception as error:
        logger.exception("an env runner failed")
        return RuntimeError(f"an env runner failed: {type(error).__name__}: {error}")

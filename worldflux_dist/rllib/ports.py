"""The flow's ports, bound to RLlib's env runners and learners.

Replay, imaginers, weights and what feeds learners are the same as without RLlib; env runners,
learners and their restarts are RLlib's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.rllib.core.learner.learner_group import LearnerGroup as RLlibLearnerGroup
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS

from worldflux_dist.distributed.actors import RunnerReport
from worldflux_dist.distributed.feeding import Stepper
from worldflux_dist.distributed.group import GroupLostError, LearnerGroup, Publications
from worldflux_dist.distributed.ports import RayPorts
from worldflux_dist.rllib.learner import WorldFluxLearner

logger = logging.getLogger(__name__)

COLLECT = "collect"  # the tag of RLlib's calls that are ours
POLL_S = 0.02


class Learners(LearnerGroup):
    """The learners of an RLlib group as the flow sees them: handles, generation and steps."""

    def __init__(self, group: RLlibLearnerGroup, part: str) -> None:
        self.group, self.part = group, part
        self.generation = self.gradient_steps = self.lost_steps = 0
        self.publications = Publications()

    def connect(self, store: Any, shards: Sequence[Any]) -> None:
        """Have the learners, as they are now, publish to `store` with a generation of their own."""
        self._store = store
        self.generation += 1
        self.publications.forget()
        connect = partial(_connect, store=store, shards=list(shards), generation=self.generation)
        self.gradient_steps, *_ = [done.get() for done in self.group.foreach_learner(connect)]
        self.ranks = (
            [handle.get() for handle in self.group.foreach_learner(_handle)]
            if self.group.is_remote
            else [Here(self.group._learner)]
        )

    def publish(self) -> None:
        try:
            super().publish()
        except RayActorError as error:  # of a learner in this process
            self.publications.failed(error)

    def hand_over(self, part: str, other: Learners) -> None:
        """Have `other` hold what these learners hold of a part of the agent."""
        first, *_ = self.group.foreach_learner(partial(_arrays, part=part))
        for done in other.group.foreach_learner(partial(_load, arrays=first.get())):
            done.get()


class Here:
    """A learner in this process, called like an actor; a call is done when it returns."""

    def __init__(self, learner: WorldFluxLearner) -> None:
        self.learner = learner

    def __getattr__(self, name: str) -> Call:
        return Call(getattr(self.learner, name))


@dataclass
class Call:
    method: Any

    def remote(self, *given: Any) -> ObjectRef:
        arguments = [ray.get(x) if isinstance(x, ObjectRef) else x for x in given]
        return ray.put(self.method(*arguments))


@dataclass
class RLlibPorts(RayPorts):
    """The calls under way. `metrics` is the algorithm's logger, `store` has the newest weights."""

    runners: EnvRunnerGroup | None = None
    metrics: Any = None
    store: Any = None

    def __post_init__(self) -> None:
        self._here: list[RunnerReport] = []
        self._since: dict[int, float] = {}  # when runners were asked
        super().__post_init__()

    @property
    def num_collects(self) -> int:
        assert self.runners is not None
        return self.runners.num_in_flight_async_reqs(tag=COLLECT)

    def start_collect(self) -> None:
        assert self.runners is not None
        store, shards = self.store, list(self.roles.shards)
        if self._here:
            return  # the runner of this process has collected already
        if self.runners.num_remote_env_runners() == 0:
            self._here += self._take_in([self.runners.local_env_runner.collect(store, shards)])
            return
        # Those that still collect are left alone: RLlib gives each of them one call at a time.
        self.runners.foreach_env_runner_async(
            partial(_collect, store=store, shards=shards), tag=COLLECT
        )
        now = time.monotonic()
        self._since = {i: self._since.get(i, now) for i in self.runners.healthy_env_runner_ids()}

    def finished_collects(self, wait: bool) -> list[RunnerReport]:
        """Finished reports. Runners that died are restarted by RLlib."""
        assert self.runners is not None
        reports, self._here = self._here, []
        deadline = time.monotonic() + 1.0
        while self.runners.num_remote_env_runners():
            ready = self.runners.fetch_ready_async_reqs(
                tags=COLLECT, timeout_seconds=POLL_S if wait else 0.0
            )
            reports += self._take_in([result for _, result in ready])
            for index, _ in ready:
                self._since.pop(index, None)
            if reports or not wait or time.monotonic() > deadline:
                break
            if not self.num_collects:
                time.sleep(POLL_S)  # all runners are restarting
        self._end_silent()
        return reports

    def _end_silent(self) -> None:
        """Kill runners that have not answered for `patience` seconds: RLlib restarts them."""
        assert self.runners is not None
        for index, since in list(self._since.items()):
            if time.monotonic() - since > self.patience("runner"):
                self._lose_patience("runner", f"env runner {index}")
                del self._since[index]
                ray.kill(self.runners._worker_manager.actors()[index], no_restart=False)

    def drain(self, seconds: float) -> list[RunnerReport]:
        reports, deadline = [], time.monotonic() + seconds
        while self.num_collects and time.monotonic() < deadline:
            reports += self.finished_collects(wait=True)
        return reports + self.finished_collects(wait=False)

    def _take_in(
        self, results: Sequence[tuple[RunnerReport, Any] | Exception]
    ) -> list[RunnerReport]:
        taken = []
        for each in results:
            if isinstance(each, Exception):
                raise each
            taken.append(each)
        if taken:
            self.metrics.aggregate([metrics for _, metrics in taken], key=ENV_RUNNER_RESULTS)
        for report, _ in taken:
            self._know(report.shards)
            self._note_lags(report)
        return [report for report, _ in taken]

    def _restart(self, stepper: Stepper, error: GroupLostError) -> None:
        raise RuntimeError(
            f"a learner of {stepper.group.part}, or its batch, was lost ({error}): RLlib does not "
            "start learners again, so restore the last checkpoint, or let Tune do it with "
            "FailureConfig(max_failures=1)"
        ) from error


def _connect(learner: WorldFluxLearner, store: Any, shards: list[Any], generation: int) -> int:
    learner.connect(store, shards, generation)
    return learner.learner.gradient_steps


def _handle(learner: WorldFluxLearner) -> Any:
    return ray.get_runtime_context().current_actor


def _arrays(learner: WorldFluxLearner, part: str) -> dict[str, np.ndarray]:
    return learner.learner.agent.part_arrays(part)


def _load(learner: WorldFluxLearner, arrays: dict[str, np.ndarray]) -> None:
    learner.learner.agent.load_arrays(arrays)


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

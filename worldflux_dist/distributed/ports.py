"""The flow's three ports, bound to Ray actors.

References and reports pass through here, never data. Runners, shards and imaginers restart by
themselves; what they were doing when they died is simply asked for again. Learners are restarted
here, from the newest checkpoint, and take again the steps that were lost with them.
"""

from __future__ import annotations

import bisect
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import RayActorError

from worldflux_dist import checkpoint
from worldflux_dist.config import Config
from worldflux_dist.distributed.actors import ImaginedReport, RunnerReport
from worldflux_dist.distributed.ending import background
from worldflux_dist.distributed.feeding import ImaginedSource, ReplaySource, Stepper
from worldflux_dist.distributed.flow import UPDATES_PER_ROUND
from worldflux_dist.distributed.group import GroupLostError, LearnerGroup
from worldflux_dist.distributed.shard import ShardReport
from worldflux_dist.distributed.supervision import RETURN_S, Budget, raise_if_gone
from worldflux_dist.distributed.weights import publish_every

WAIT_S = 0.5  # the longest that one look at everything under way may block
POLICY_EVERY = 4  # steps of a policy that learns apart after which imaginers get it
LONGEST_PATIENCE_S = 600.0  # to which patience grows, unless scale.patience is more


@dataclass
class Roles:
    """Handles of a run's processes. `policy` and `imaginers` exist where the policy learns apart;
    `root` is where checkpoints are."""

    model: LearnerGroup
    policy: LearnerGroup | None
    imaginers: Sequence[Any]
    shards: Sequence[Any]
    runners: Sequence[Any]
    root: Any
    named: Sequence[Any]  # found by their names, kept alive by these handles

    @property
    def groups(self) -> list[LearnerGroup]:
        return [self.model] if self.policy is None else [self.model, self.policy]


@dataclass
class RayPorts:
    """The calls under way. Owns what is known of the processes, and their restarts."""

    config: Config
    roles: Roles
    stopping: Callable[[], bool]
    say: Callable[[str], None] = print
    settle: Callable[[], None] = lambda: None  # ends the checkpoint that is being written
    check_stop: Callable[[], None] = lambda: None  # raises where a stop has waited for too long
    sizes: dict[int, ShardReport] = field(default_factory=dict)
    shard_losses: int = 0
    acting_losses: int = 0

    def __post_init__(self) -> None:
        roles, config = self.roles, self.config
        rng = np.random.default_rng([config.seed, roles.model.gradient_steps])
        self.budgets = {"runner": Budget("runner", roles.runners), "learner": Budget("learner")}
        self._owners: dict[int, list[str]] = {}
        self._moved = time.monotonic()
        self._grown: defaultdict[str, float] = defaultdict(lambda: 1.0)
        self._collects: dict[ObjectRef, tuple[int, float]] = {}
        self._lags: list[int] = []
        self._history: deque[tuple[float, int]] = deque(maxlen=10_000)  # when, gradient steps
        self._redo = 0

        def replay(num: int, online: bool) -> ReplaySource:
            size = config.replay.batch_size // num
            return ReplaySource(roles.shards, self.sizes, size, rng, online)

        self.replay = replay(config.scale.num_learners, online=True)
        self.steppers = [Stepper(roles.model, self.replay)]
        self.imagined: ImaginedSource | None = None
        if roles.policy is not None:
            policy, imagination = roles.policy, config.imagination
            self.imagined = ImaginedSource(
                roles.imaginers,
                replay(imagination.num_policy_learners, online=False),
                imagination.queue_size,
                imagination.max_staleness,
                lambda: (roles.model.gradient_steps, policy.gradient_steps),
            )
            self.steppers.append(Stepper(policy, self.imagined))
        for group in roles.groups:
            group.say = self.say
            group.publish_every = publish_every(config.scale.max_staleness)
            if group is roles.policy:
                group.publish_every = min(POLICY_EVERY, group.publish_every)
        self.publish()
        self.ask_sizes()

    @property
    def version(self) -> int:
        """Gradient steps behind the newest published weights that act."""
        return max(0, min(group.publications.steps for group in self.roles.groups))

    @property
    def failed_publications(self) -> int:
        """Publications of weights that the store did not get."""
        return sum(group.publications.failures for group in self.roles.groups)

    def take_lags(self) -> list[int]:
        """For every action that has been reported since the last call, by how many gradient steps
        learners were ahead of the weights that chose it, when they did."""
        taken, self._lags = self._lags, []
        return taken

    def patience(self, role: str) -> float:
        """Seconds that a role may be silent by now."""
        asked = self.config.scale.patience
        return min(asked * self._grown[role], max(asked, LONGEST_PATIENCE_S))

    def _lose_patience(self, role: str, who: str) -> None:
        """Say that somebody was silent for too long, and be more patient from now on: on a busy
        machine it may only have been slow, and would never get further."""
        silent = self.patience(role)
        self._grown[role] *= 2
        longer = self.patience(role)
        more = f"; from now on it may take {longer:g} s" if longer > silent else ""
        self.say(f"{who} gave no answer for {silent:g} s, see scale.patience{more}")

    @property
    def restarts(self) -> dict[str, int]:
        """Processes that died, by role."""
        found = {role: budget.losses for role, budget in self.budgets.items()}
        found |= {"shard": self.shard_losses, "acting": self.acting_losses}
        return found | ({} if self.imagined is None else {"imaginer": self.imagined.budget.losses})

    def ask_sizes(self) -> None:
        """What every shard holds now; in between, runners' reports keep it roughly up to date."""
        refs = [shard.report.remote() for shard in self.roles.shards]
        for index, ref in enumerate(refs):
            try:
                report: ShardReport = ray.get(ref)
                self._know({index: report})
            except RayActorError as error:
                raise_if_gone(error)
                self.sizes.pop(index, None)

    @property
    def num_collects(self) -> int:
        """Collect calls under way."""
        return len(self._collects)

    def start_collect(self) -> None:
        busy = {index for index, _ in self._collects.values()}
        for index, runner in enumerate(self.roles.runners):
            if index not in busy and not self.budgets["runner"].away(index):
                ref = runner.collect.remote(self.config.scale.chunk_length)
                self._collects[ref] = index, time.monotonic()

    def finished_collects(self, wait: bool) -> list[RunnerReport]:
        """Reports that have come in. A runner that is silent for too long is restarted."""
        reports: list[RunnerReport] = []
        if wait and not self._collects:
            time.sleep(0.1)  # all runners are on their way back
        while self._collects:
            refs = list(self._collects)
            timeout = 1.0 if wait and not reports else 0.0
            done, silent = ray.wait(
                refs, num_returns=len(refs) if timeout == 0 else 1, timeout=timeout
            )
            for ref in done:
                index, _ = self._collects.pop(ref)
                try:
                    report: RunnerReport = ray.get(ref)
                except RayActorError as error:
                    raise_if_gone(error)
                    self.budgets["runner"].lost(index)
                    continue
                self.budgets["runner"].brought(index)
                reports.append(report)
                self._know(report.shards)
                self._note_lags(report)
                self.acting_losses += report.acting_losses > 0
            for ref in silent:
                index, since = self._collects[ref]
                if time.monotonic() - since > self.patience("runner"):
                    self._lose_patience("runner", f"runner {index}")
                    ray.kill(self.roles.runners[index], no_restart=False)
                    # Ray fails no call to a process that dies before it has ever started.
                    del self._collects[ref]
                    self.budgets["runner"].lost(index)
            self._keep_published()
            if timeout == 0 or self.stopping():
                break
        return reports

    def drain(self, seconds: float) -> list[RunnerReport]:
        """Wait for the collect calls under way, at most so long: afterwards nothing moves."""
        reports, deadline = [], time.monotonic() + seconds
        while self._collects and time.monotonic() < deadline:
            reports += self.finished_collects(wait=True)
        return reports

    def find_replay(self) -> bool:
        """Whether any shard has something to sample; one that died is waited for."""
        deadline = time.monotonic() + RETURN_S
        while not self.replay.ready and time.monotonic() < deadline and not self.stopping():
            self.ask_sizes()
            time.sleep(0.5)
        return self.replay.ready or self.stopping()

    @property
    def policy_behind(self) -> bool:
        """Whether a policy that learns apart has steps to catch up with."""
        apart = self.roles.policy
        return apart is not None and apart.effective_steps < self.roles.model.effective_steps

    def update(self, num: int) -> list[dict[str, float]]:
        """Up to `num` gradient steps of the model and, where it learns apart, as many of the policy
        as it is behind. A step's metrics of both come together."""
        if num and not self.replay.ready:
            self.ask_sizes()  # a shard may have come back
        self._moved = time.monotonic()
        self.steppers[0].begin(num)
        for stepper in self.steppers[1:]:
            behind = self.roles.model.effective_steps + num - stepper.group.effective_steps
            stepper.begin(max(0, min(behind, 2 * UPDATES_PER_ROUND)))
        while True:
            for stepper in self.steppers:
                try:
                    stepper.pump(self.stopping())
                except GroupLostError as error:
                    self._restart(stepper, error)
            self._history.append((time.time(), self._gradient_steps()))
            if all(stepper.done for stepper in self.steppers):
                break
            waiting = [ref for stepper in self.steppers for ref in stepper.waiting()]
            if self.stopping() and not any(stepper.stepping for stepper in self.steppers):
                break
            if not waiting and self._starved():
                break
            if waiting:
                done, _ = ray.wait(waiting, num_returns=1, timeout=WAIT_S, fetch_local=False)
                self.check_stop()  # steps may wait for learners that wait for a storage
                self._restart_stuck(bool(done))
        if any(stepper.taken for stepper in self.steppers):
            self.budgets["learner"].brought(0)
        return self._join([stepper.taken for stepper in self.steppers])

    def publish(self) -> None:
        for group in self.roles.groups:
            if group.gradient_steps > group.publications.steps:
                group.publish()

    def _keep_published(self) -> None:
        for group in self.roles.groups:
            group.keep_published()

    def _gradient_steps(self) -> int:
        """Of the group that has taken fewest, as `version` counts."""
        return min(group.gradient_steps for group in self.roles.groups)

    def _note_lags(self, report: RunnerReport) -> None:
        """Compare the versions that acted with the gradient steps that were taken by then."""
        for when, version in report.acted:
            if version:  # else actions were random
                index = bisect.bisect_right(self._history, (when, math.inf))
                steps = self._history[index - 1][1] if index else version
                self._lags.append(max(0, steps - version))

    def take_redo(self) -> int:
        """Gradient steps that were lost with learners since the last call."""
        taken, self._redo = self._redo, 0
        return taken

    def take_imagined(self) -> list[ImaginedReport]:
        """What imaginers have brought since the last call."""
        if self.imagined is None:
            return []
        taken, self.imagined.reports = self.imagined.reports, []
        return taken

    def _starved(self) -> bool:
        """Whether nothing can come, since no shard has anything; imaginers at rest do come back."""
        if not self.replay.ready:
            return True
        time.sleep(0.05)
        return False

    def _join(self, taken: list[list[dict[str, float]]]) -> list[dict[str, float]]:
        """The policy's metrics beside the model's of the same round."""
        model, *apart = taken
        for metrics in apart:
            for number, values in enumerate(metrics[: len(model)]):
                own = {f"policy/{n}" if n in model[number] else n: v for n, v in values.items()}
                model[number] |= own
        return model

    def _restart_stuck(self, moved: bool) -> None:
        """Start again whoever has brought nothing for too long, unless it compiles."""
        if moved:
            self._moved = time.monotonic()
        if time.monotonic() - self._moved < self.patience("learner"):
            return
        self._moved = time.monotonic()
        if any(stepper.stepping and stepper.group.compiling() for stepper in self.steppers):
            return
        self._lose_patience("learner", "learners, or what feeds them,")
        for stepper in self.steppers:
            try:
                stepper.restart_stuck()
            except GroupLostError as error:
                self._restart(stepper, error)

    def _restart(self, stepper: Stepper, error: GroupLostError) -> None:
        """Start a group anew from the newest checkpoint. Raises GroupLostError when stopping."""
        group = stepper.group
        why = next((line for line in str(error).splitlines() if line.strip()), "it died")
        self.say(f"the learners of {group.part} start again, since one was lost: {why.strip()}")
        group.kill()  # whoever is left may wait for the dead one, and a checkpoint for them
        self.settle()  # or it would be newer than the weights that go on
        while True:
            time.sleep(self.budgets["learner"].lost(0))
            if self.stopping():
                raise error
            reading = background(checkpoint.newest, self.roles.root)
            while not futures.wait([reading], WAIT_S).done:
                self.check_stop()
            found = reading.result()
            saved = found[1]["counters"]["effective_steps"][group.part] if found else 0
            lost = group.effective_steps - saved
            group.patience = self.patience("learner")
            try:
                group.start(found[0] if found else None, group.gradient_steps)
                group.meet(self.stopping)
            except GroupLostError:
                continue
            group.lost_steps += lost
            if group is self.roles.model:
                self._redo += lost
            group.publish()
            return

    def _know(self, reports: dict[int, ShardReport]) -> None:
        """Take in what shards say; another owner is another process, hence a death."""
        for index, report in reports.items():
            owners = self._owners.setdefault(index, [report.owner])
            if report.owner not in owners:
                owners.append(report.owner)
                self.shard_losses += 1
            if report.owner == owners[-1]:  # not what the one before said late
                self.sizes[index] = report

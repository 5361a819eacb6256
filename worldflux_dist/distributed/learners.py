"""All learners of a run as the flow sees them: gradient steps in rounds, publications, restarts.

A group that was lost goes on from the newest checkpoint. Gradient steps go on counting upwards;
those that were lost with the ranks are taken again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from worldflux_dist import checkpoint
from worldflux_dist.config import Config
from worldflux_dist.distributed.ending import background
from worldflux_dist.distributed.feed import ImaginedSource, ReplaySource, Shards
from worldflux_dist.distributed.group import ActorGroup, GroupLostError, LearnerGroup
from worldflux_dist.distributed.model_actor import ImaginedReport
from worldflux_dist.distributed.supervision import Budget, Driver, Patience
from worldflux_dist.distributed.weights import Staleness, publish_every

if TYPE_CHECKING:
    from upath import UPath

UPDATES_PER_ROUND = 16  # more are worked off in rounds of their own, so that a round stays short
WAIT_S = 0.5  # the longest that one look at everything under way may block
POLICY_EVERY = 4  # steps of a policy that learns apart after which imaginers get it


class Learners:
    """All groups of a run: the model's, `groups[0]`, and the policy's where it learns apart, fed by
    `imaginers`.

    A group that is lost goes on from the newest checkpoint in `root`; where there is no `root`, as
    under RLlib, which starts the ranks, GroupLostError is raised.
    """

    def __init__(
        self,
        config: Config,
        groups: Sequence[LearnerGroup],
        shards: Shards,
        imaginers: Sequence[Any],
        root: UPath | None,
        driver: Driver,
    ) -> None:
        self.groups, self.shards, self.root, self.driver = groups, shards, root, driver
        self.budget, self.staleness = Budget("learner"), Staleness()
        self.patience = Patience(config.scale.patience, driver.say)
        self.imagined: ImaginedSource | None = None
        self._moved = time.monotonic()
        self._redo = 0
        rng = np.random.default_rng([config.seed, self.model.gradient_steps])

        def replay(num: int, online: bool) -> ReplaySource:
            return ReplaySource(shards, config.replay.batch_size // num, rng, online)

        self.model.source = replay(config.scale.num_learners, online=True)
        for group in groups:
            group.driver = driver
            group.publish_every = publish_every(config.scale.max_staleness)
        if (policy := self.policy) is not None:
            self.imagined = policy.source = ImaginedSource(
                imaginers,
                replay(config.imagination.num_policy_learners, online=False),
                config.imagination.queue_size,
                config.imagination.max_staleness,
                lambda: (self.model.gradient_steps, policy.gradient_steps),
            )
            policy.publish_every = min(POLICY_EVERY, policy.publish_every)
        self.publish()
        shards.ask()

    @property
    def model(self) -> LearnerGroup:
        return self.groups[0]

    @property
    def policy(self) -> LearnerGroup | None:
        """The group of a policy that learns apart, else None."""
        return self.groups[1] if len(self.groups) > 1 else None

    @property
    def policy_behind(self) -> bool:
        """Whether a policy that learns apart has steps to catch up with."""
        policy = self.policy
        return policy is not None and policy.effective_steps < self.model.effective_steps

    @property
    def version(self) -> int:
        """Gradient steps behind the newest published weights that act."""
        return max(0, min(group.publications.steps for group in self.groups))

    @property
    def failed_publications(self) -> int:
        """Publications of weights that the store did not get."""
        return sum(group.publications.failures for group in self.groups)

    @property
    def restarts(self) -> dict[str, int]:
        """Processes that died, by role: of learners, and of what feeds them."""
        known = {"learner": self.budget.losses, "shard": self.shards.restarts}
        return known | ({} if self.imagined is None else {"imaginer": self.imagined.budget.losses})

    def update(self, num: int) -> list[dict[str, float]]:
        """Up to `num` gradient steps of the model and, where it learns apart, as many of the policy
        as it is behind, done when this returns. A step's metrics of both come together."""
        if num and not self.shards.ready:
            self.shards.ask()  # a shard may have come back
        self._moved = time.monotonic()
        self.model.begin(num)
        if self.policy is not None:
            behind = self.model.effective_steps + num - self.policy.effective_steps
            self.policy.begin(max(0, min(behind, 2 * UPDATES_PER_ROUND)))
        while True:
            for group in self.groups:
                try:
                    group.pump()
                except GroupLostError as error:
                    self._restart(group, error)
            self.staleness.learned(min(group.gradient_steps for group in self.groups))
            if all(group.done for group in self.groups):
                break
            if self.driver.stopping() and not any(group.stepping for group in self.groups):
                break
            waiting = [ref for group in self.groups for ref in group.waiting()]
            if not waiting and not self.shards.ready:
                break  # nothing can come
            if not waiting:
                time.sleep(0.05)  # for imaginers that are being restarted
                continue
            done, _ = ray.wait(waiting, num_returns=1, timeout=WAIT_S, fetch_local=False)
            self.driver.check_stop()  # steps may wait for learners that wait for a storage
            self._restart_stuck(bool(done))
        if any(group.taken for group in self.groups):
            self.budget.finished(0)
        return _joined([group.taken for group in self.groups])

    def publish(self) -> None:
        """Make the newest weights available to runners; does not wait."""
        for group in self.groups:
            if group.gradient_steps > group.publications.steps:
                group.publish()

    def keep_published(self) -> None:
        """Publish what is due, and again what has failed; does not wait."""
        for group in self.groups:
            group.keep_published()

    def take_redo(self) -> int:
        """Gradient steps that were lost with learners since the last call."""
        taken, self._redo = self._redo, 0
        return taken

    def take_imagined(self) -> list[ImaginedReport]:
        """Reports of imaginers since the last call."""
        if self.imagined is None:
            return []
        taken, self.imagined.reports = self.imagined.reports, []
        return taken

    def _restart_stuck(self, moved: bool) -> None:
        """Restart what has been silent for too long, unless it compiles."""
        if moved:
            self._moved = time.monotonic()
        if time.monotonic() - self._moved < self.patience.seconds:
            return
        self._moved = time.monotonic()
        if any(group.stepping and group.compiling() for group in self.groups):
            return
        self.patience.lose("learners, or what feeds them,")
        for group in self.groups:
            try:
                group.restart_stuck()
            except GroupLostError as error:
                self._restart(group, error)

    def _restart(self, group: LearnerGroup, error: GroupLostError) -> None:
        """Restart a group from the newest checkpoint. Raises GroupLostError when stopping."""
        if self.root is None:
            raise GroupLostError(f"a learner of {group.part}, or its batch, was lost ({error})")
        assert isinstance(group, ActorGroup)
        why = next((line for line in str(error).splitlines() if line.strip()), "it died")
        self.driver.say(
            f"the learners of {group.part} start again, since one was lost: {why.strip()}"
        )
        group.kill()  # the others may wait for the dead one, and a checkpoint for them
        self.driver.settle()  # or it would be newer than the weights that go on
        while True:
            time.sleep(self.budget.lost(0))
            if self.driver.stopping():
                raise error
            reading = background(checkpoint.newest, self.root)
            while not futures.wait([reading], WAIT_S).done:
                self.driver.check_stop()
            newest = reading.result()
            saved = newest[1]["counters"]["effective_steps"][group.part] if newest else 0
            lost = group.effective_steps - saved
            try:
                group.start(newest[0] if newest else None, group.gradient_steps)
                group.meet(self.driver.stopping, self.patience.seconds)
            except GroupLostError:
                continue
            group.lost_steps += lost
            if group is self.model:
                self._redo += lost
            group.publish()
            return


def _joined(taken: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The policy's metrics beside the model's of the same round."""
    model, *apart = taken
    for metrics in apart:
        for own, values in zip(model, metrics, strict=False):
            own |= {f"policy/{n}" if n in own else n: v for n, v in values.items()}
    return model

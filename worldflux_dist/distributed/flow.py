"""The flow of a run in rounds: collect, update, publish, at an exact train_ratio.

Trainer and RLlib algorithm run the same rounds, with the same learners and each with a collector of
its own. References, reports and numbers pass through here, never data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from worldflux_dist.distributed.collect import Collector
from worldflux_dist.distributed.env_runner import RunnerReport
from worldflux_dist.distributed.learners import UPDATES_PER_ROUND, Learners
from worldflux_dist.replay.limiter import Limiter


@dataclass
class Round:
    """The results of one round: what runners reported, and the metrics of each gradient step."""

    reports: Sequence[RunnerReport] = ()
    updates: list[dict[str, float]] = field(default_factory=list)


class Flow:
    """Runs rounds. Runners collect while the learners work off what is owed; then, if a round had
    nothing to learn, it waits for data. Whoever is ahead waits: a runner gets one chunk of work a
    round, and no gradient step is taken before it is owed."""

    def __init__(
        self, limiter: Limiter, collector: Collector, learners: Learners, collect_steps: int
    ) -> None:
        self.limiter, self.collector, self.learners = limiter, collector, learners
        self.collect_steps = collect_steps

    def round(self, collect: bool = True) -> Round:
        """One round; without `collect` no new work is given to runners."""
        if collect and self.limiter.may_collect(self.collect_steps):
            self.collector.start()
        updates = self.learners.update(min(self.limiter.owed, UPDATES_PER_ROUND))
        if collect and not updates:
            self.collector.start()  # replay has no window yet, whatever is owed
        self.limiter.sampled(len(updates))
        if updates:
            self.learners.publish()
        reports = self.collector.finished(wait=not updates)
        self.limiter.inserted(sum(report.env_steps for report in reports))
        return Round(reports, updates)

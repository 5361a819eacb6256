"""The flow of a run in rounds: collect, update, publish, at an exact train_ratio.

The flow knows three ports and a limiter, nothing of Ray or of tensors; the standalone trainer and
other training systems bind the ports to their own processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from worldflux_dist.replay.limiter import Limiter

UPDATES_PER_ROUND = 16  # more are worked off in rounds of their own, so that a round stays short


class Report(Protocol):
    """What a collect call must tell."""

    @property
    def env_steps(self) -> int: ...


R = TypeVar("R", bound=Report)
R_co = TypeVar("R_co", bound=Report, covariant=True)


class Ports(Protocol[R_co]):
    """What a training system offers the flow."""

    def start_collect(self) -> None:
        """Give every idle runner work; does not wait."""

    def finished_collects(self, wait: bool) -> Sequence[R_co]:
        """Reports that have come in; with `wait`, at least one."""

    def update(self, num: int) -> list[dict[str, float]]:
        """Up to `num` gradient steps, done when this returns; metrics of each one taken."""

    def publish(self) -> None:
        """Make the newest weights available to runners; does not wait."""


@dataclass
class Round(Generic[R]):
    """What one round brought."""

    reports: Sequence[R] = ()
    updates: list[dict[str, float]] = field(default_factory=list)


class Flow(Generic[R]):
    """Runs rounds. Runners collect while the learner works off what is owed; then, if a round had
    nothing to learn, it waits for data. Whoever is ahead waits: a runner gets one chunk of work a
    round, and no gradient step is taken before it is owed."""

    def __init__(self, limiter: Limiter, ports: Ports[R], collect_steps: int) -> None:
        self.limiter, self.ports, self.collect_steps = limiter, ports, collect_steps

    def round(self, collect: bool = True) -> Round[R]:
        """One round; without `collect` no new work is given to runners."""
        if collect and self.limiter.may_collect(self.collect_steps):
            self.ports.start_collect()
        updates = self.ports.update(min(self.limiter.owed, UPDATES_PER_ROUND))
        if collect and not updates:
            self.ports.start_collect()  # replay has no window yet, whatever is owed
        self.limiter.sampled(len(updates))
        if updates:
            self.ports.publish()
        reports = self.ports.finished_collects(wait=not updates)
        self.limiter.inserted(sum(report.env_steps for report in reports))
        return Round(reports, updates)

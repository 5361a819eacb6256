"""Rounds: the exact ratio, and that nobody waits for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.learners import UPDATES_PER_ROUND
from worldflux_dist.replay.limiter import Limiter


@dataclass(frozen=True)
class Collected:
    env_steps: int


class OneRunner:
    """Collector and learners with one runner; replay can be sampled after `ready_at` steps."""

    def __init__(self, chunk: int, ready_at: int = 0) -> None:
        self.chunk, self.ready_at = chunk, ready_at
        self.stored = self.published = self.most = 0
        self.under_way = False

    def start(self) -> None:
        self.under_way = True

    def finished(self, wait: bool) -> Sequence[Collected]:
        if not self.under_way:
            return []
        self.under_way = False
        self.stored += self.chunk
        return [Collected(self.chunk)]

    def update(self, num: int) -> list[dict[str, float]]:
        self.most = max(self.most, num)
        return [{}] * num if self.stored >= self.ready_at else []

    def publish(self) -> None:
        self.published += 1


def test_rounds_keep_the_ratio_exact_and_short() -> None:
    system = OneRunner(chunk=100)
    limiter = Limiter(train_ratio=7, batch_steps=32, prefill=250)
    flow = Flow(limiter, system, system, collect_steps=100)
    while limiter.env_steps < 2000:
        flow.round()
    while limiter.owed:
        flow.round(collect=False)
    assert limiter.gradient_steps == limiter.env_steps * 7 // 32
    assert system.most <= UPDATES_PER_ROUND
    assert system.published > 0


def test_collecting_goes_on_while_replay_has_no_window() -> None:
    """More is owed than a round works off, but no stream is long enough to be sampled yet."""
    system = OneRunner(chunk=100, ready_at=1000)
    limiter = Limiter(train_ratio=100, batch_steps=100, prefill=100)
    flow = Flow(limiter, system, system, collect_steps=100)
    for _ in range(20):
        flow.round()
    assert limiter.env_steps >= 1000
    assert limiter.gradient_steps > 0

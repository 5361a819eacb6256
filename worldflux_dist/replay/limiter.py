"""Keeps the ratio of replayed to collected steps exact, and makes whoever is ahead wait.

The debt is a fraction of gradient steps, never rounded: what one chunk earns beyond whole gradient
steps is carried for ever. At any moment the learner has work or the runners may collect, so the
two can wait for each other but never both at once.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any


class Limiter:
    """Counts collected steps against gradient steps. Owns the debt; the caller does the waiting.

    `train_ratio` is replayed steps per env step (resets included), `batch_steps` the steps one
    gradient step replays (batch_size x batch_length), `prefill` the env steps before the first
    gradient step. With all of them counted from the very first env step,

        debt = env_steps * train_ratio / batch_steps - (gradient_steps - redone)

    and never below zero. Collecting waits while more than `max_owed` gradient steps are owed.
    Raises ValueError for numbers that cannot be kept.
    """

    def __init__(
        self, train_ratio: float, batch_steps: int, prefill: int, max_owed: int = 16
    ) -> None:
        if not (math.isfinite(train_ratio) and train_ratio >= 0):
            raise ValueError(f"train_ratio is {train_ratio}: give a finite number, 0 or more")
        if batch_steps < 1 or prefill < 0 or max_owed < 0:
            raise ValueError(
                f"batch_steps {batch_steps} must be at least 1, prefill {prefill} and max_owed "
                f"{max_owed} at least 0"
            )
        # The decimal the user wrote: 0.3 is three tenths, not the nearest binary fraction.
        self._per_step = Fraction(str(train_ratio)) / batch_steps
        self.batch_steps, self.prefill, self.max_owed = batch_steps, prefill, max_owed
        self.env_steps = 0
        self.gradient_steps = 0
        self.forgiven = 0
        self.redone = self._again = 0  # steps that were lost, and those of them still owed
        self._debt = Fraction(0)

    def inserted(self, num_steps: int) -> None:
        """`num_steps` env steps went into replay."""
        assert num_steps >= 0, num_steps
        self.env_steps += num_steps
        self._debt += num_steps * self._per_step

    @property
    def owed(self) -> int:
        """Gradient steps the learner may take now; 0 until `prefill` env steps are in."""
        return math.floor(self._debt) if self.env_steps >= self.prefill else 0

    def sampled(self, num: int = 1) -> None:
        """`num` gradient steps were taken. Raises RuntimeError where fewer were owed."""
        if not 0 <= num <= self.owed:
            raise RuntimeError(
                f"{num} gradient steps taken but {self.owed} owed: ask `owed` before sampling"
            )
        self.gradient_steps += num
        self._again = max(0, self._again - num)
        self._debt -= num

    def redo(self, num: int) -> None:
        """`num` gradient steps were lost with the learners that took them, and are owed again."""
        assert num >= 0, num
        self.redone += num
        self._again += num
        self._debt += num

    def may_collect(self, num_steps: int) -> bool:
        """Whether `num_steps` more env steps may be collected now.

        While the learner works off what such a request earns, the next one may already be under
        way; hence a request never waits for less than its own earnings, nor when nothing is owed.
        """
        return self.owed <= max(self.max_owed, math.floor(num_steps * self._per_step))

    @property
    def achieved(self) -> float:
        """Replayed steps per env step so far, without those that were lost; 0 before the first."""
        return (self.gradient_steps - self.redone) * self.batch_steps / max(1, self.env_steps)

    def state_dict(self) -> dict[str, Any]:
        """The counters as JSON; the debt exactly, as the text of a fraction."""
        names = ("env_steps", "gradient_steps", "forgiven", "redone")
        counters = {name: getattr(self, name) for name in names}
        return counters | {"again": self._again, "debt": str(self._debt)}

    def load_state_dict(self, state: dict[str, Any], num_steps: int = 0) -> None:
        """Continue from saved counters; the ratio may have changed since.

        Steps from before are owed at the ratio they were collected with. Debt beyond what the
        prefill, requests of `num_steps` under way and `max_owed` explain is forgiven and counted,
        so that a resume does not begin with a storm of catching up; the fraction of a gradient
        step is kept, and so are steps that were lost with learners.
        """
        debt, self._again = Fraction(state["debt"]), state["again"]
        allowed = self.max_owed + math.ceil((self.prefill + num_steps) * self._per_step)
        excess = max(0, math.floor(debt) - allowed - self._again)
        self._debt = debt - excess
        self.env_steps, self.gradient_steps = state["env_steps"], state["gradient_steps"]
        self.forgiven, self.redone = state["forgiven"] + excess, state["redone"]

"""How often processes may die before a run gives up, and how long each of them rests in between.

Ray restarts runners, shards, imaginers and the weight store by itself, and the driver restarts
learners; this counts, so that a process which dies at once each time ends the run with a sentence
instead of keeping it busy for ever.
"""

from __future__ import annotations

import time
from collections import Counter

MAX_LOSSES = 20
LONGEST_REST_S = 30.0
CAUSES = {
    "runner": "an environment that crashes its process",
    "learner": "a learner that runs out of memory",
    "imaginer": "an imaginer that runs out of memory",
}


class BudgetError(RuntimeError):
    """A role died too often without bringing anything."""


class Budget:
    """Counts, for each process of one role, what it owed in vain since it last brought something.

    A process that is asked before it has started again counts as one more.
    """

    def __init__(self, role: str) -> None:
        self.role, self.losses = role, 0
        self._in_a_row: Counter[int] = Counter()
        self._resting: dict[int, float] = {}

    def lost(self, index: int) -> float:
        """Process `index` died; gives the seconds it should rest, twice as many each time.

        Raises BudgetError where it died MAX_LOSSES times without bringing anything.
        """
        self._in_a_row[index] += 1
        self.losses += 1
        if self._in_a_row[index] > MAX_LOSSES:
            raise BudgetError(
                f"{self.role} processes died {MAX_LOSSES} times without bringing anything: look "
                f"for {CAUSES[self.role]} or for want of memory"
            )
        rest = min(LONGEST_REST_S, 0.25 * 2.0 ** (self._in_a_row[index] - 1))
        self._resting[index] = time.monotonic() + rest
        return rest

    def brought(self, index: int) -> None:
        """Process `index` has done something."""
        self._in_a_row.pop(index, None)
        self._resting.pop(index, None)

    def resting(self, index: int) -> bool:
        return time.monotonic() < self._resting.get(index, 0.0)

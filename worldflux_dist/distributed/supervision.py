"""How often processes may die before a run gives up, how long each of them rests in between, and
how long they may be silent.

Ray restarts runners, shards, imaginers and the weight store by itself, and the driver restarts
learners; this counts, so that a process which dies at once each time ends the run with a sentence
instead of keeping it busy for ever.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ActorDiedError, RayError

from worldflux_dist.distributed.roles import ROLES

LONGEST_REST_S = 30.0
LONGEST_PATIENCE_S = 600.0  # to which patience grows, unless scale.patience is more
RETURN_S = 60.0  # a process that is not back by then is taken to have died again


@dataclass
class Driver:
    """What the parts of a run ask of the process that drives them: `stopping` is whether the run is
    to end, `since_stop` for how many seconds it has been; `settle` ends the checkpoint that is
    being written, and `check_stop` raises where a stop has waited for too long."""

    say: Callable[[str], None] = print
    stopping: Callable[[], bool] = lambda: False
    since_stop: Callable[[], float] = lambda: 0.0
    settle: Callable[[], None] = lambda: None
    check_stop: Callable[[], None] = lambda: None


class Patience:
    """How long processes of one role may be silent: `seconds`, scale.patience at first, and twice
    as long after each time. On a busy machine they may only be slow, and would never get further.
    """

    def __init__(self, asked: float, say: Callable[[str], None] = print) -> None:
        self.seconds, self._most, self._say = asked, max(asked, LONGEST_PATIENCE_S), say

    def lose(self, who: str) -> None:
        """Say that `who` was silent for too long, and be more patient from now on."""
        silent, self.seconds = self.seconds, min(2 * self.seconds, self._most)
        more = f"; from now on it may take {self.seconds:g} s" if self.seconds > silent else ""
        self._say(f"{who} gave no answer for {silent:g} s, see scale.patience{more}")


def life_seed(*parts: int) -> int:
    """A seed below 2**32 from `parts`, in a process that was started again another one each time:
    it must not draw what its former life drew."""
    here = ray.get_runtime_context()
    again = here.get_actor_id() is not None and here.was_current_actor_reconstructed
    life = again * time.time_ns()
    return int(np.random.SeedSequence([*parts, life]).generate_state(1)[0])


def is_gone(error: Exception) -> bool:
    """Whether `error` says that a process is gone for good.

    Ray says so, too, of one whose node was taken back with notice, and yet starts it again.
    """
    return isinstance(error, ActorDiedError) and not error.preempted


def raise_if_gone(error: RayError) -> None:
    """Raise `error` again where it says that a process is gone for good."""
    if is_gone(error):
        raise error


class BudgetError(RuntimeError):
    """A process died too often without finishing anything."""


class Budget:
    """Counts the deaths of each process of one role since it last finished something.

    `actors` restart by themselves; each has a method `ready` that Ray calls again until they have.
    """

    def __init__(self, role: str, actors: Sequence[Any] = ()) -> None:
        self.role, self.actors, self.losses = role, actors, 0
        self._returning: dict[int, tuple[ObjectRef, float]] = {}
        self._in_a_row: Counter[int] = Counter()
        self._resting: dict[int, float] = {}

    def lost(self, index: int) -> float:
        """Process `index` died; gives the seconds it should rest, twice as many each time.

        Raises BudgetError where it died more often than its role may.
        """
        self._in_a_row[index] += 1
        self.losses += 1
        role = ROLES[self.role]
        if self._in_a_row[index] > role.deaths:
            raise BudgetError(
                f"{self.role} {index} died {role.deaths} times without finishing anything: look "
                f"for {role.cause}, or for processes that ran out of memory"
            )
        rest = min(LONGEST_REST_S, 0.25 * 2.0 ** (self._in_a_row[index] - 1))
        self._resting[index] = time.monotonic() + rest
        if self.actors:
            self._returning[index] = self.actors[index].ready.remote(), time.monotonic()
        return rest

    def finished(self, index: int) -> None:
        """Process `index` has finished something."""
        self._in_a_row.pop(index, None)
        self._resting.pop(index, None)

    def away(self, index: int) -> bool:
        """Whether process `index` rests, or is not back yet: calls until then would only fail."""
        if index in self._returning:
            ref, since = self._returning[index]
            if not ray.wait([ref], timeout=0)[0]:
                # With others at work, one that finds no room in the cluster may wait for it.
                if time.monotonic() - since > RETURN_S and len(self._returning) == len(self.actors):
                    self.lost(index)
                return True
            del self._returning[index]
            ray.get(ref)
        return time.monotonic() < self._resting.get(index, 0.0)

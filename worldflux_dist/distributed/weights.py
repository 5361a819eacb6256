"""The newest weights, published by learners and pulled by everyone who acts or imagines.

Weights come in parts: `agent` where one group of learners trains all of it, else `world_model` and
`behavior`. A version is (generation of the learners, gradient steps) and only grows. A publication
is one object in Ray's store, written once, by the learner, and read by all without a copy on the
same node. The driver owns it, who called for it, so that weights outlive the learner that made
them. Through here go references only. Pulling means that a late or restarted reader needs
no membership, and that readers go on with what they have while the store itself is restarted. The
store's process does not load torch.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError, RayError

from worldflux_dist.distributed.ending import sentence
from worldflux_dist.distributed.supervision import raise_if_gone

if TYPE_CHECKING:
    from worldflux_dist.agent import Agent

RETRY_S = 1.0  # after a publication that failed
COMPILE_S = 3600.0  # compiling for longer is taken for a process that hangs
WEIGHTS = "weights"  # the store's name in the namespace of its run
Version = tuple[int, int]
# A version and, in a list so that Ray passes it on unread, the reference of its weights.
Publication = tuple[Version, list[ObjectRef]]


def publish_every(max_staleness: int) -> int:
    """Gradient steps after which learners publish: with one more that is under way by then, and
    `poll_by` of the readers, nobody acts on weights further behind than `max_staleness`."""
    return max(1, max_staleness // 2 - 1)


def poll_by(max_staleness: int) -> int:
    """Gradient steps by which weights must be newer for those who act to take them over."""
    return max(1, max_staleness // 2)


class StaleGenerationError(RuntimeError):
    """Learners that have been replaced tried to publish."""


class WeightStore:
    """Holds the newest version of each part; an older one is refused."""

    def __init__(self) -> None:
        self._held: dict[str, Publication] = {}
        self._fences: dict[str, int] = {}
        self._news = asyncio.Event()
        self._compiling: dict[tuple[str, int], dict[int, float]] = {}

    def fence(self, part: str, generation: int) -> None:
        """From now on, refuse what learners of an earlier generation publish."""
        self._fences[part] = max(generation, self._fences.get(part, 0))

    def publish(self, part: str, version: Version, weights: list[ObjectRef]) -> None:
        """Take in a publication; a version that is not newer than the one held changes nothing.

        Raises StaleGenerationError for learners that have been replaced.
        """
        if version[0] < self._fences.get(part, 0):
            raise StaleGenerationError(
                f"learners of generation {version[0]} published {part} after generation "
                f"{self._fences[part]} had replaced them"
            )
        if part not in self._held or self._held[part][0] < version:
            self._held[part] = version, weights
            self._news.set()
            self._news = asyncio.Event()

    def newer_than(self, versions: dict[str, Version]) -> dict[str, Publication]:
        """The parts that are newer than, or not among, `versions`."""
        return {
            part: held
            for part, held in self._held.items()
            if part not in versions or versions[part] < held[0]
        }

    async def news(self, versions: dict[str, Version], by: int) -> None:
        """Answers once a part is `by` gradient steps newer than in `versions`, of later learners
        or not in there."""
        while not any(_ahead(held[0], versions.get(p)) >= by for p, held in self._held.items()):
            await self._news.wait()

    def note_compiling(self, part: str, generation: int, rank: int, begins: bool) -> None:
        """A rank begins to compile, or has done so."""
        ranks = self._compiling.setdefault((part, generation), {})
        if begins:
            ranks[rank] = time.monotonic()
        else:
            ranks.pop(rank, None)

    def compiling(self, part: str, generation: int) -> bool:
        """Whether a rank of a group compiles, and has not done so for longer than COMPILE_S."""
        since = self._compiling.get((part, generation), {}).values()
        return any(time.monotonic() - each < COMPILE_S for each in since)


def _ahead(held: Version, had: Version | None) -> float:
    """Gradient steps by which a version is newer than the one a reader has."""
    if had is None or held[0] > had[0]:
        return math.inf
    return held[1] - had[1]


class WeightReader:
    """A reader's side: what it has of each part. `missed` counts pulls without an answer.

    Without `store`, the one of this run's name.
    """

    def __init__(self, store: Any = None) -> None:
        self.store, self.missed = store or ray.get_actor(WEIGHTS), 0
        self.versions: dict[str, Version] = {}
        self._bell: ObjectRef | None = None

    def steps(self, part: str) -> int:
        """Gradient steps behind the weights of `part`; those of the whole agent count for it."""
        return self.versions.get(part, self.versions.get("agent", (0, 0)))[1]

    @property
    def oldest(self) -> int:
        """Gradient steps behind the part that has the fewest."""
        return min((steps for _, steps in self.versions.values()), default=0)

    @property
    def learned(self) -> bool:
        """Whether a gradient step is behind all that was pulled."""
        return self.oldest > 0

    def poll(self, agent: Agent | None, by: int) -> bool:
        """As `pull`, but only where there are weights `by` gradient steps newer; until then it
        neither waits nor asks: the store rings. Takes 27 us of CPU (measured)."""
        if self._bell is None:
            self._bell = self.store.news.remote(self.versions, by)
        if not ray.wait([self._bell], timeout=0)[0]:
            return False
        self._bell = None  # it has rung, or the store died: what is newest now is pulled
        return self.pull(agent)

    def pull(self, agent: Agent | None) -> bool:
        """Take over newer weights; without an agent only their versions. True if there were any.

        Without the store, or where a publication was lost with it, the reader goes on with what it
        has: the next publication brings everyone up to date.
        """
        try:
            newer: Any = ray.get(self.store.newer_than.remote(self.versions))
        except RayActorError as error:
            raise_if_gone(error)
            self.missed += 1
            return False
        for part, (version, (ref,)) in newer.items():
            try:
                if agent is not None:
                    agent.load_arrays(ray.get(ref))
            except ObjectLostError:
                self.missed += 1
                continue
            self.versions[part] = version
        return bool(newer)


class Publications:
    """What became of a group's publications. `steps` are the gradient steps behind the one that was
    last asked for, `failures` counts those that the store did not get."""

    def __init__(self) -> None:
        self.failures = 0
        self.forget()

    def forget(self) -> None:
        """Those who were asked are gone."""
        self.steps, self._retry_at, self._failing = -1, math.inf, False
        self._under_way: list[tuple[ObjectRef, ObjectRef]] = []

    def begun(self, made: ObjectRef, published: ObjectRef, steps: int) -> None:
        """One was asked for: it is `made` by a learner, and then `published`."""
        self.steps, self._retry_at = steps, math.inf
        self._under_way.append((made, published))

    def look(self) -> str:
        """Take in those that have ended; why one failed, where those before it had not."""
        why = ""
        while self._under_way and ray.wait([self._under_way[0][1]], timeout=0)[0]:
            made, published = self._under_way.pop(0)
            error = error_of(published)
            if error is None:
                self._failing, self._retry_at = False, math.inf
            elif error_of(made) is None:  # else the rank is dead, as its steps will show
                why = self._failed(error) or why
        return why

    def _failed(self, error: Exception) -> str:
        """One failed; why, where the one before it had not."""
        known, self._failing = self._failing, True
        self.failures += 1
        self._retry_at = time.monotonic() + RETRY_S
        return "" if known else sentence(error)

    def due(self, gradient_steps: int, every: int) -> bool:
        """Whether the next one is due after so many gradient steps."""
        if time.monotonic() > self._retry_at:
            return True
        return self.steps >= 0 and gradient_steps - self.steps >= every


class Staleness:
    """By how many gradient steps learners were ahead of the weights that chose each action."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, int]] = deque(maxlen=10_000)  # when, gradient steps
        self._lags: list[int] = []

    def learned(self, gradient_steps: int) -> None:
        """So many gradient steps have been taken by now."""
        self._history.append((time.time(), gradient_steps))

    def note(self, acted: Sequence[tuple[float, int]]) -> None:
        """Take in when actions were chosen (seconds since the epoch), with which versions."""
        for when, version in acted:
            if version:  # else actions were random
                index = bisect.bisect_right(self._history, (when, math.inf))
                steps = self._history[index - 1][1] if index else version
                self._lags.append(max(0, steps - version))

    def take(self) -> list[int]:
        """The lags, in gradient steps, of the actions noted since the last call."""
        taken, self._lags = self._lags, []
        return taken


def error_of(ref: ObjectRef) -> Exception | None:
    """What a call ended with, where that was an error."""
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None

"""The newest weights, published by learners and pulled by everyone who acts or imagines.

Weights come in parts: `agent` where one group of learners trains all of it, else `world_model` and
`behavior`. A version is (generation of the learners, gradient steps) and only grows. A publication
is one object in Ray's store, read by all without a copy on the same node; this store owns it, so
that weights outlive the learner that made them. Pulling means that a late or restarted reader needs
no membership, and that readers go on with what they have while the store itself is restarted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ObjectLostError, RayActorError

from worldflux_dist.agent import Agent
from worldflux_dist.distributed.supervision import raise_if_gone

WEIGHTS = "weights"  # the store's name in the namespace of its run
Version = tuple[int, int]
# A version and, in a list so that Ray passes it on unread, the reference of its weights.
Publication = tuple[Version, list[ObjectRef]]


class StaleGenerationError(RuntimeError):
    """Learners that have been replaced tried to publish."""


class WeightStore:
    """Holds the newest version of each part; an older one is refused."""

    def __init__(self) -> None:
        self._held: dict[str, Publication] = {}
        self._fences: dict[str, int] = {}

    def fence(self, part: str, generation: int) -> None:
        """From now on, refuse what learners of an earlier generation publish."""
        self._fences[part] = max(generation, self._fences.get(part, 0))

    def publish(self, part: str, version: Version, weights: dict[str, np.ndarray]) -> None:
        """Take in weights; a version that is not newer than the one held changes nothing.

        Raises StaleGenerationError for learners that have been replaced.
        """
        if version[0] < self._fences.get(part, 0):
            raise StaleGenerationError(
                f"learners of generation {version[0]} published {part} after generation "
                f"{self._fences[part]} had replaced them"
            )
        if part not in self._held or self._held[part][0] < version:
            # Put again, although it came through the object store: the learner owns that one.
            self._held[part] = version, [ray.put(weights)]

    def newer_than(self, versions: dict[str, Version]) -> dict[str, Publication]:
        """The parts that are newer than, or not among, `versions`."""
        return {
            part: held
            for part, held in self._held.items()
            if part not in versions or versions[part] < held[0]
        }


class WeightReader:
    """A reader's side: what it has of each part. `missed` counts pulls that found no store.

    Without `store`, the one of this run's name.
    """

    def __init__(self, store: Any = None) -> None:
        self.store, self.missed = store or ray.get_actor(WEIGHTS), 0
        self.versions: dict[str, Version] = {}

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

    def pull(self, agent: Agent | None) -> bool:
        """Take over newer weights; without an agent only their versions. True if there were any.

        Without the store, or where a publication was lost with it, the reader goes on with what it
        has: the next publication brings everyone up to date.
        """
        try:
            found: Any = ray.get(self.store.newer_than.remote(self.versions))
        except RayActorError as error:
            raise_if_gone(error)
            self.missed += 1
            return False
        for part, (version, (ref,)) in found.items():
            try:
                if agent is not None:
                    agent.load_arrays(ray.get(ref))
            except ObjectLostError:
                self.missed += 1
                continue
            self.versions[part] = version
        return bool(found)

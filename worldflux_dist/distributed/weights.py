"""The newest weights, published by learners and pulled by everyone who acts. Their version is the
number of gradient steps behind them.

A publication is one object in Ray's store, read by all without a copy on the same node. The store
owns it, so weights outlive the learner that made them; pulling means that a late or restarted
reader needs no membership.
"""

from __future__ import annotations

import numpy as np
import ray
from ray import ObjectRef

WEIGHTS = "weights"  # the store's name in the namespace of its run


# A version and, in a list so that Ray passes it on unread, the reference of its weights.
Publication = tuple[int, list[ObjectRef]]


class WeightStore:
    """Holds the newest version. Versions only grow: an older publication is refused."""

    def __init__(self) -> None:
        self._version = -1
        self._weights: ObjectRef | None = None

    def publish(self, version: int, weights: dict[str, np.ndarray]) -> bool:
        """Take in weights; False where the version is not newer than the one held."""
        if version <= self._version:
            return False
        # Put again, although the argument came through the object store: the learner owns that one.
        self._version, self._weights = version, ray.put(weights)
        return True

    def newer_than(self, version: int) -> Publication | None:
        """The newest version; None where it is not newer than `version`."""
        if self._weights is None or self._version <= version:
            return None
        return self._version, [self._weights]

"""Which windows a batch is made of: uniform, recent or prioritized ones, or a mixture.

A *place* is block number x batch_length + offset: where a window begins. Every way of drawing costs
the same however much is stored: uniform and recent places are drawn from the whole ring and kept
where a window begins there; prioritized blocks come from a sum tree, in log2(blocks) steps.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from worldflux_dist.replay.ring import Places

RECENT_AGE = 0.1  # mean age of recent windows, as a share of the ring
PRIORITY_EXPONENT = 0.6  # p = (|priority| + EPSILON) ** PRIORITY_EXPONENT, Schaul et al. 2016
EPSILON = 1e-6


class SumTree:
    """Sums of non-negative weights, to draw an index in proportion to its weight."""

    def __init__(self, num: int) -> None:
        self.num, self._leaves = num, 1 << max(num - 1, 1).bit_length()
        self._sums = np.zeros(2 * self._leaves)  # node i is the sum of nodes 2 i and 2 i + 1

    @property
    def weights(self) -> np.ndarray:
        """The weights (num,), a view."""
        return self._sums[self._leaves : self._leaves + self.num]

    def set(self, indices: np.ndarray, weights: np.ndarray | float) -> None:
        """Give `indices` (K,) new weights (K,); sums are formed anew, so no error builds up."""
        nodes = np.asarray(indices) + self._leaves
        self._sums[nodes] = weights
        while nodes[0] > 1:
            nodes = np.unique(nodes // 2)
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def draw(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Indices (num,), in proportion to the weights, at least one of which is positive."""
        nodes = np.ones(num, np.int64)
        target = rng.random(num) * self._sums[1]
        while nodes[0] < self._leaves:
            left, right = self._sums[2 * nodes], self._sums[2 * nodes + 1]
            # The second condition: rounding must not lead into an empty subtree.
            go_right = (target >= left) & (right > 0)
            target -= np.where(go_right, left, 0)
            nodes = 2 * nodes + go_right
        return nodes - self._leaves


class Sampler:
    """Draws the places where windows begin. Owns the priorities; reads the ring's `starts`.

    `starts` (num_blocks,) is how many windows begin in each block, at offsets 0 and up. `shares`
    are the parts of uniform, recent and prioritized windows in a batch, in any unit.
    """

    def __init__(
        self, starts: np.ndarray, length: int, shares: tuple[float, ...], rng: np.random.Generator
    ) -> None:
        self._starts, self._length, self._rng = starts, length, rng
        self._shares = np.array(shares) / sum(shares)
        self._tree = SumTree(len(starts)) if self._shares[2] else None
        self._largest = 1.0

    def draw(self, num: int, first: int, end: int, num_windows: int) -> np.ndarray:
        """Places (num,) among the blocks `first` .. `end`, which hold `num_windows` windows."""
        tries = (end - first) * self._length / num_windows
        uniform, recent, prioritized = self._split(num)
        return np.concatenate(
            [
                self._scattered(uniform, first, end, tries, recent=False),
                self._scattered(recent, first, end, tries, recent=True),
                self._prioritized(prioritized, first),
            ]
        )

    def _split(self, num: int) -> tuple[int, int, int]:
        """How many windows of each sort: the shares to the whole number, the rest by lot."""
        exact = self._shares * num
        counts = np.floor(exact).astype(np.int64)
        rest = num - int(counts.sum())
        if rest:
            counts += self._rng.multinomial(rest, (exact - counts) / (exact - counts).sum())
        return int(counts[0]), int(counts[1]), int(counts[2])

    def _scattered(self, num: int, first: int, end: int, tries: float, recent: bool) -> np.ndarray:
        # Rejection keeps it exact at a cost that depends on how full blocks are, not how many.
        low, high = first * self._length, end * self._length
        places = [np.empty(0, np.int64)]
        while num > 0:
            size = min(int(1.2 * num * tries) + 4, 1 << 20)
            if recent:
                age = self._rng.exponential(RECENT_AGE * (high - low), size)
                drawn = high - 1 - age.astype(np.int64)
                drawn = drawn[drawn >= low]
                tries *= 2  # the newest blocks may be the emptiest
            else:
                drawn = self._rng.integers(low, high, size=size)
            slot, offset = drawn // self._length % len(self._starts), drawn % self._length
            places.append(drawn[offset < self._starts[slot]][:num])
            num -= len(places[-1])
        return np.concatenate(places)

    def _prioritized(self, num: int, first: int) -> np.ndarray:
        if not num:
            return np.empty(0, np.int64)
        assert self._tree is not None
        slots = self._tree.draw(self._rng, num)
        offsets = (self._rng.random(num) * self._starts[slots]).astype(np.int64)
        return (first + (slots - first) % len(self._starts)) * self._length + offsets

    # ------------------------------------------------------------------------------- priorities

    def filled(self, places: Places) -> None:
        """Blocks have their first window: they get the largest priority so far, to be seen soon."""
        self._weigh(places, self._largest)

    def evicted(self, places: Places) -> None:
        self._weigh(places, 0.0)

    def _weigh(self, places: Places, weight: float) -> None:
        if self._tree is not None:
            for slots, _ in places:
                self._tree.set(np.arange(slots.start, slots.stop), weight)

    def prioritize(self, slots: np.ndarray, values: np.ndarray) -> None:
        """New priorities (K,) for blocks that have windows."""
        if self._tree is None or not len(slots):
            return
        weights = (np.abs(values) + EPSILON) ** PRIORITY_EXPONENT
        self._largest = max(self._largest, float(weights.max()))
        self._tree.set(slots, weights)

    def state(self) -> dict[str, Any]:
        """The priorities as JSON."""
        if self._tree is None:
            return {}
        text = base64.b64encode(self._tree.weights.astype("<f8").tobytes()).decode()
        return {"largest": self._largest, "weights": text}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take saved priorities, unless there are none or the ring has another size."""
        if self._tree is None or not state:
            return
        weights = np.frombuffer(base64.b64decode(state["weights"]), "<f8")
        if len(weights) == self._tree.num:
            self._largest = float(state["largest"])
            alive = (self._starts > 0) & np.isfinite(weights) & (weights > 0)
            slots = np.flatnonzero(alive)
            if len(slots):
                self._tree.set(slots, weights[slots])

"""The ring of blocks: which there are, how far they are filled, and where windows begin in them.

Blocks are numbered in the order they are opened, and block b lies in slot b modulo the size of the
ring. Streams that come in one chunk are mostly *in step*: filled equally far, in blocks that were
opened one after the other. So what happens to them happens to a slice of slots, however many they
are, or to two slices where the ring begins anew among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worldflux_dist.replay.marks import Key

Stream = int | str
Places = list[tuple[slice, slice]]  # slices of slots, and which of some blocks lie in them


@dataclass(eq=False)
class Tail:
    """Where streams that are in step go on: the i-th in block `block + i`, which holds `fill` steps
    and follows on `previous + i` (-1: on none). `key` is that of their last chunk."""

    streams: list[Stream]
    block: int
    previous: int
    fill: int
    key: Key

    def of(self, stream: Stream) -> Tail:
        """Where one of them goes on by itself."""
        row = self.streams.index(stream)
        previous = -1 if self.previous < 0 else self.previous + row
        return Tail([stream], self.block + row, previous, self.fill, self.key)


def joined(tails: list[Tail]) -> Tail | None:
    """One tail for several of one stream each, if they are in step."""
    first = tails[0]
    for i, tail in enumerate(tails):
        previous = -1 if first.previous < 0 else first.previous + i
        if (tail.block, tail.previous, tail.fill) != (first.block + i, previous, first.fill):
            return None
    streams = [stream for tail in tails for stream in tail.streams]
    return Tail(streams, first.block, first.previous, first.fill, first.key)


class Ring:
    """`num` blocks of `length` steps. Blocks `first` .. `end` exist and are chained by `next`.

    By slot: `fill` is the number of steps, `starts` how many windows begin in the block, at offsets
    0 and up, and `next` the block where those go on that do not end in it.
    """

    def __init__(self, num: int, length: int) -> None:
        self.num, self.length = num, length
        self.first = self.end = 0
        self.num_steps = self.num_windows = 0
        self.fill, self.starts = np.zeros(num, np.int64), np.zeros(num, np.int64)
        self.next = np.zeros(num, np.int64)

    def slots(self, block: int, num: int) -> Places:
        """Where `num` blocks from `block` on lie."""
        start = block % self.num
        fit = self.num - start
        if num <= fit:
            return [(slice(start, start + num), slice(0, num))]
        return [(slice(start, self.num), slice(0, fit)), (slice(0, num - fit), slice(fit, num))]

    def alive(self, block: int, num: int) -> Places:
        """As `slots`, of those of `num` blocks that are not evicted; none for block -1."""
        if block >= self.first:
            return self.slots(block, num)
        gone = self.first - block
        if block < 0 or gone >= num:
            return []
        rest = self.slots(self.first, num - gone)
        return [(slots, slice(part.start + gone, part.stop + gone)) for slots, part in rest]

    def open(self, num: int, previous: int) -> int:
        """Open `num` blocks, the i-th to follow on `previous + i` (-1: all on none); the first's
        number. There must be room: evict first."""
        block, self.end = self.end, self.end + num
        assert self.end - self.first <= self.num, (self.first, self.end)
        for slots, part in self.alive(previous, num):
            self.next[slots] = np.arange(block + part.start, block + part.stop)
        return block

    def keeps(self, tail: Tail, num_steps: int) -> bool:
        """Whether a tail's blocks are there still, and stay while its streams take so many steps,
        for which each may need one more block."""
        if tail.fill + num_steps <= self.length:
            return tail.block >= self.first
        room = self.end + len(tail.streams) - self.num
        return tail.block >= max(self.first, room) and num_steps <= self.length

    def filled(self, tail: Tail, places: Places) -> None:
        """A tail's blocks, at `places`, hold `fill` steps now: count what windows this completes.

        All of them have as many: they are in step.
        """
        full, num = tail.fill == self.length, len(tail.streams)
        for slots, _ in places:
            self.fill[slots] = tail.fill
            if full:
                self.starts[slots] = 1
        self.num_windows += num * full
        starts = min(self.length, tail.fill + 1)
        for slots, part in self.alive(tail.previous, num):
            more = starts - self.starts.item(slots.start)
            self.num_windows += more * (part.stop - part.start)
            self.starts[slots] = starts

    def evict(self, end: int, places: Places) -> None:
        """Forget the blocks before `end`, which lie at `places`."""
        for slots, _ in places:
            self.num_steps -= sum(self.fill[slots].tolist())  # few: numpy's own sum is slower
            self.num_windows -= sum(self.starts[slots].tolist())
            self.fill[slots] = self.starts[slots] = 0
        self.first = end

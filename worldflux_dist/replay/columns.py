"""Where the steps of a column lie: in plain memory, or compressed block by block.

A column is a ring of blocks of `length` steps. Raw ones are one large array. Packed ones keep full
blocks compressed, for images: they take a fraction of the memory and give the same samples, and
the price is paid when a window is read. Memory is taken up only where steps have been written.
"""

from __future__ import annotations

import math

import lz4.block
import numpy as np

from worldflux_dist.replay.memory import zeros

LARGE = 1024  # bytes per step from which copying slices beats np.take, and packing pays

Places = list[tuple[int, int, int]]  # slot, offset and following slot of each window


class RawColumn:
    """Steps (num_blocks, length, *shape) in one array. Raises OSError where they do not fit."""

    def __init__(
        self, num_blocks: int, length: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self.array = zeros((num_blocks, length, *shape), dtype)
        self.dtype, self.shape, self._length = dtype, shape, length
        self._large = dtype.itemsize * math.prod(shape) >= LARGE

    def write(self, slot: int, start: int, rows: np.ndarray) -> None:
        self.array[slot, start : start + len(rows)] = rows

    def gather(self, out: np.ndarray, index: np.ndarray, places: Places) -> None:
        """Fill `out` (B, T, *shape); `index` (B, T) counts all steps of the ring."""
        if not self._large:
            # The mode matters: with the default one numpy takes a detour through a copy.
            steps = self.array.reshape(-1, *self.shape)
            steps.take(index, axis=0, out=out, mode="clip")
            return
        for window, (slot, offset, follower) in zip(out, places, strict=True):
            window[: self._length - offset] = self.array[slot, offset:]
            if offset:
                window[self._length - offset :] = self.array[follower, :offset]


class PackedColumn:
    """Steps in compressed blocks; blocks that are still being filled are plain arrays."""

    def __init__(
        self, num_blocks: int, length: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape, self._length = dtype, shape, length
        self._blocks: list[bytes | np.ndarray | None] = [None] * num_blocks
        self._size = length * dtype.itemsize * math.prod(shape)
        self.nbytes = 0

    def write(self, slot: int, start: int, rows: np.ndarray) -> None:
        block = self._blocks[slot]
        if start == 0 or not isinstance(block, np.ndarray):
            if block is not None:
                self.nbytes -= len(block) if isinstance(block, bytes) else self._size
            # Zeroed: a block whose first steps a journal no longer has is never uninitialised.
            block = self._blocks[slot] = np.zeros((self._length, *self.shape), self.dtype)
            self.nbytes += self._size
        block[start : start + len(rows)] = rows
        if start + len(rows) == self._length:
            packed = lz4.block.compress(block, store_size=False)
            self._blocks[slot] = packed
            self.nbytes += len(packed) - self._size

    def gather(self, out: np.ndarray, index: np.ndarray, places: Places) -> None:
        """Fill `out` (B, T, *shape), unpacking one or two blocks for each window."""
        for window, (slot, offset, follower) in zip(out, places, strict=True):
            window[: self._length - offset] = self._block(slot)[offset:]
            if offset:
                window[self._length - offset :] = self._block(follower)[:offset]

    def _block(self, slot: int) -> np.ndarray:
        block = self._blocks[slot]
        if isinstance(block, bytes):
            raw = lz4.block.decompress(block, uncompressed_size=self._size)
            return np.frombuffer(raw, self.dtype).reshape(self._length, *self.shape)
        assert block is not None, slot
        return block


Column = RawColumn | PackedColumn

"""Where the steps of a column lie: in plain memory, or compressed block by block.

A column is a ring of blocks of `length` steps. Raw ones are one large array. Packed ones keep full
blocks compressed, for images: they take a fraction of the memory and give the same samples, and
the price is paid when a window is read. Memory is taken up only where steps have been written.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence

import lz4.block
import numpy as np

LARGE = 1024  # bytes per step from which copying slices beats np.take, and packing pays

Places = list[tuple[int, int, int]]  # slot, offset and following slot of each window
Spec = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of a step's columns
Rows = dict[str, np.ndarray]  # columns (N, T, *shape)
Layout = tuple[int, dict[str, tuple[np.dtype, tuple[int, ...]]]]  # of N streams' rows, whole shapes


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of zeros that takes no memory where nobody has written, and gives it all back.

    numpy's own come from malloc, which a learner in the same process tells to keep what it frees
    (nn/memory.py): a second buffer would then be cleared by hand, and touched, from end to end.
    Raises OSError where the system has not as much.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


class RawColumn:
    """Steps (num_blocks, length, *shape) in one array. Raises OSError where they do not fit.

    Steps (n, T, *shape) are stored by `store[slots, offsets] = steps`, here and below.
    """

    def __init__(
        self, num_blocks: int, length: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape, self._length = dtype, shape, length
        self.array = self.store = zeros((num_blocks, length, *shape), dtype)

    def gather(self, out: np.ndarray, index: np.ndarray, places: Places) -> None:
        """Fill `out` (B, T, *shape); `index` (B, T) counts all steps of the ring."""
        if step_bytes(self.dtype, self.shape) >= LARGE:
            _copy(self.array.__getitem__, places, out)
        else:
            # The mode matters: with the default one numpy takes a detour through a copy.
            self.array.reshape(-1, *self.shape).take(index, axis=0, out=out, mode="clip")


class PackedColumn:
    """Steps in compressed blocks; blocks that are still being filled are plain arrays."""

    def __init__(
        self, num_blocks: int, length: int, dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape, self._length = dtype, shape, length
        self._blocks: list[bytes | np.ndarray | None] = [None] * num_blocks
        self._size = length * step_bytes(dtype, shape)
        self.nbytes = 0

    @property
    def store(self) -> PackedColumn:
        return self

    def __setitem__(self, at: tuple[slice, slice], rows: np.ndarray) -> None:
        slots, offsets = at
        for slot, steps in zip(range(slots.start, slots.stop), rows, strict=True):
            self._write(slot, offsets.start, steps)

    def _write(self, slot: int, start: int, rows: np.ndarray) -> None:
        block = self._blocks[slot]
        if start == 0 or not isinstance(block, np.ndarray):
            if block is not None:
                self.nbytes -= len(block) if isinstance(block, bytes) else self._size
            # Zeroed: a block whose first steps a journal no longer has is never uninitialised.
            block = self._blocks[slot] = np.zeros((self._length, *self.shape), self.dtype)
            self.nbytes += self._size
        block[start : start + len(rows)] = rows
        if start + len(rows) == self._length:
            packed = self._blocks[slot] = lz4.block.compress(block, store_size=False)
            self.nbytes += len(packed) - self._size

    def gather(self, out: np.ndarray, index: np.ndarray, places: Places) -> None:
        """Fill `out` (B, T, *shape), unpacking one or two blocks for each window."""
        _copy(self._block, places, out)

    def _block(self, slot: int) -> np.ndarray:
        block = self._blocks[slot]
        if isinstance(block, bytes):
            raw = lz4.block.decompress(block, uncompressed_size=self._size)
            return np.frombuffer(raw, self.dtype).reshape(self._length, *self.shape)
        assert block is not None, slot
        return block


def _copy(block: Callable[[int], np.ndarray], places: Places, out: np.ndarray) -> None:
    """Fill `out` (B, T, *shape) from one or two blocks (T, *shape) for each window."""
    for window, (slot, offset, follower) in zip(out, places, strict=True):
        window[: len(window) - offset] = block(slot)[offset:]
        if offset:
            window[len(window) - offset :] = block(follower)[:offset]


def step_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


Column = RawColumn | PackedColumn


def spec_of(columns: Rows, streams: Sequence[object]) -> Spec:
    """What the steps of a chunk are; ValueError unless it is one step of one stream at least."""
    shapes = [value.shape for value in columns.values()]
    lead = shapes[0][:2]
    if 0 in lead or lead[0] != len(set(streams)) or any(shape[:2] != lead for shape in shapes):
        raise ValueError(
            "chunk columns must share one leading shape (N, T) with N different streams and T at "
            f"least 1, not {[shape[:2] for shape in shapes]} with streams {streams}"
        )
    return {name: (value.dtype, value.shape[2:]) for name, value in columns.items()}


def difference(given: Spec, ours: Spec) -> str:
    """In words; empty where there is none."""
    names = sorted(k for k in ours.keys() | given.keys() if ours.get(k) != given.get(k))
    return "; ".join(f"{k} is {given.get(k)}, not {ours.get(k)}" for k in names)


def cut(rows: Rows, size: int) -> tuple[Rows, Rows]:
    """The first `size` steps, and the others."""
    first = {name: value[:, :size] for name, value in rows.items()}
    return first, {name: value[:, size:] for name, value in rows.items()}

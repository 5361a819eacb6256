"""Experience in numpy columns, sampled as windows of consecutive steps.

The buffer is one ring of blocks of `batch_length` steps. A block belongs to one stream, and a
stream's blocks are chained in the order it filled them. Blocks are numbered in the order they were
opened (slot = number modulo the size of the ring), so opening one evicts the oldest of all, and
three things come for free: a window touches at most two blocks, eviction never cuts a window in
two (a chain only leads to younger blocks), and a full block is exactly one fresh segment for the
online queue.

    ring    | a0 a0 a0 a0 | b0 b0 b0 b0 | a1 a1 a1 .. | b1 b1 .. .. |       block_length 4
    window              [a0 a0 ........ a1 a1]                              follows the chain

What must stay true: windows are drawn uniformly from all starts that have batch_length steps
behind them; a window never spans missing steps; a chunk counts once, however often it is sent.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldflux_dist.data import Batch, Chunk
from worldflux_dist.replay.columns import LARGE, Column, PackedColumn, RawColumn, step_bytes
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.replay.marks import Key, Marks
from worldflux_dist.replay.sampling import Sampler
from worldflux_dist.replay.segment import Numbering, pack_numbers, unpack_numbers

Spec = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of a step's columns


@dataclass
class _Tail:
    """Where a stream goes on: its last block, the one before it (-1: none), its last chunk."""

    block: int
    previous: int
    key: Key


class ReplayBuffer:
    """Stores chunks and samples [B, T] batches. Owns the steps, the online queue and its RNG.

    Memory is reserved at the first chunk and taken up only as steps come in. Not thread-safe.
    """

    def __init__(self, config: ReplayConfig, seed: int | Sequence[int] = 0) -> None:
        self.config, self._length = config, config.batch_length
        self.num_steps = 0
        self.total_steps = 0  # ever stored, evicted ones too
        self.bytes_per_step = 0
        self.duplicates = 0
        self.online_dropped = 0
        self.first = self.end = 0  # numbers of the oldest block and of the next to be opened
        self.marks = Marks()
        self._rng = np.random.default_rng(seed)
        self._columns: dict[str, Column] = {}
        self._num_blocks = 0
        self._num_windows = 0
        self._tails: dict[int | str, _Tail] = {}
        self._online: OrderedDict[int, None] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether at least one window can be sampled."""
        return self._num_windows > 0

    @property
    def nbytes(self) -> int:
        """Memory of the stored steps, in bytes; packed columns as they are packed."""
        return sum(
            c.nbytes
            if isinstance(c, PackedColumn)
            else self.num_steps * step_bytes(c.dtype, c.shape)
            for c in self._columns.values()
        )

    # -------------------------------------------------------------------------------- inserting

    def add(self, chunk: Chunk, once: bool = True) -> int:
        """Store a chunk (N, T) of any N and T; returns the number of steps stored.

        A chunk whose key has been seen stores nothing and returns 0, but for one out of a journal
        (not `once`), which holds each one once. A stream goes on where it stopped if the chunk is
        the writer's next one or begins with a reset; a reset after an unfinished episode (a
        restarted runner) truncates that episode. Otherwise steps are missing, and no window will
        span the gap. Raises ValueError where columns, dtypes or shapes differ from the first
        chunk's, or where the capacity cannot serve all streams.
        """
        columns = chunk.columns()
        streams = _streams(chunk, columns)
        self._reserve(columns)
        self._check(columns, streams)
        if not self.marks.add(chunk.key) and once:
            self.duplicates += 1
            return 0
        for row, stream in enumerate(streams):
            self._extend(stream, {name: value[row] for name, value in columns.items()}, chunk.key)
        self.total_steps += chunk.num_steps
        return chunk.num_steps

    def _reserve(self, like: dict[str, np.ndarray]) -> None:
        """Reserve the ring for columns like these, unless it is there."""
        if self._columns:
            return
        spec = _spec(like)
        size = sum(step_bytes(*column) for column in spec.values())
        steps = self.config.capacity
        if self.config.capacity_bytes:
            steps = min(steps, self.config.capacity_bytes // size)
        if steps < 2 * self._length:
            raise ValueError(
                f"replay capacity_bytes {self.config.capacity_bytes} is too small: a step takes "
                f"{size} bytes and at least {2 * self._length} steps are needed"
            )
        num, columns = steps // self._length, {}
        packing = self.config.storage == "lz4"
        try:
            for name, column in spec.items():
                kind = PackedColumn if packing and step_bytes(*column) >= LARGE else RawColumn
                columns[name] = kind(num, self._length, *column)
        except (MemoryError, OSError) as error:
            raise RuntimeError(
                f"{num} x {self._length} steps of {size} bytes do not fit in memory: lower capacity"
            ) from error
        self._columns, self._num_blocks, self.bytes_per_step = columns, num, size
        self._fill = [0] * num  # steps in each block
        self._next = np.full(num, -1)  # the block where the stream goes on, -1: none yet
        self._starts = np.zeros(num, np.int64)  # windows that begin in the block, at offsets 0..
        self._sampler = Sampler(self._starts, self._length, self.config.shares, self._rng)

    def _check(self, columns: dict[str, np.ndarray], streams: list[int | str]) -> None:
        ours = {name: (c.dtype, c.shape) for name, c in self._columns.items()}
        given = _spec(columns)
        if ours != given:
            names = sorted(k for k in ours.keys() | given.keys() if ours.get(k) != given.get(k))
            wrong = "; ".join(f"{k} is {given.get(k)}, not {ours.get(k)}" for k in names)
            raise ValueError(f"chunk columns differ from those in replay, use one env: {wrong}")
        if any(stream not in self._tails for stream in streams):
            self._tails = {s: t for s, t in self._tails.items() if t.block >= self.first}
            num = len(self._tails.keys() | set(streams))
            if 2 * num > self._num_blocks:
                raise ValueError(
                    f"replay holds {self._num_blocks} x {self._length} steps, too few for {num} "
                    f"streams: give it at least {2 * num * self._length} (2 x batch_length each)"
                )

    def _extend(self, stream: int | str, rows: dict[str, np.ndarray], key: Key) -> None:
        """Write consecutive steps (T, *shape) to the end of a stream."""
        tail, reset = self._tails.get(stream), rows["is_first"][0]
        goes_on = reset or (tail is not None and (*key[:2], key[2] - 1) == tail.key)
        if tail is None or tail.block < self.first or not goes_on:
            block, previous = self._open(-1), -1
        else:
            block, previous = tail.block, tail.previous
            slot = block % self._num_blocks
            is_last = self._columns["is_last"]
            assert isinstance(is_last, RawColumn)
            is_last.array[slot, self._fill[slot] - 1] |= reset
        done, num = 0, len(rows["reward"])
        while done < num:
            if self._fill[block % self._num_blocks] == self._length:
                block, previous = self._open(block), block
            slot = block % self._num_blocks
            start = self._fill[slot]
            size = min(num - done, self._length - start)
            for name, column in self._columns.items():
                column.write(slot, start, rows[name][done : done + size])
            self._filled(block, previous, start + size)
            done += size
        self.num_steps += num
        self._tails[stream] = _Tail(block, previous, key)

    def _open(self, previous: int) -> int:
        """Open a block that follows `previous` (-1: none), evicting the oldest if there must be."""
        block, self.end = self.end, self.end + 1
        if self.end - self.first > self._num_blocks:
            self._evict()
        slot = block % self._num_blocks
        self._fill[slot], self._starts[slot], self._next[slot] = 0, 0, -1
        if previous >= self.first:
            self._next[previous % self._num_blocks] = block
        return block

    def _evict(self) -> None:
        """Forget the oldest block."""
        slot = self.first % self._num_blocks
        self.num_steps -= self._fill[slot]
        self._num_windows -= int(self._starts[slot])
        self._fill[slot] = self._starts[slot] = 0
        self._sampler.evicted(slot)
        if self.first in self._online:
            del self._online[self.first]
            self.online_dropped += 1
        self.first += 1

    def _filled(self, block: int, previous: int, fill: int) -> None:
        """`block` holds `fill` steps now: count the windows that this completes."""
        full = fill == self._length
        slot, before = block % self._num_blocks, previous % self._num_blocks
        self._fill[slot] = fill
        self._starts[slot] = int(full)
        self._num_windows += int(full)
        if previous >= self.first:
            starts = min(self._length, fill + 1)
            self._num_windows += starts - int(self._starts[before])
            self._starts[before] = starts
        if full:
            self._sampler.filled(slot)
            if self.config.online:
                self._online[block] = None

    # --------------------------------------------------------------------------------- sampling

    def sample(self, batch_size: int | None = None, out: Batch | None = None) -> Batch:
        """`batch_size` windows (default the config's) as a Batch of columns (B, T, *shape).

        Fresh segments come first, in the order they were completed, each once; the rest is drawn
        from all windows in the config's shares. `out`, an earlier batch of the same size, is
        overwritten and returned: faster for images, since new memory is mapped page by page.
        Raises RuntimeError while there is no window.
        """
        return self.sample_with_ids(batch_size, out)[0]

    def sample_with_ids(
        self, batch_size: int | None = None, out: Batch | None = None, online: bool = True
    ) -> tuple[Batch, np.ndarray]:
        """As `sample`, with the ids (B,) int64 of the windows' blocks, for `prioritize`.

        Without `online`, fresh segments are for those who train on each of them once.
        """
        if not self.ready:
            raise RuntimeError(f"replay has no {self._length} consecutive steps: insert more first")
        size = self.config.batch_size if batch_size is None else batch_size
        chosen = self._choose(size, online)
        ids, offsets = chosen // self._length, chosen % self._length
        slots = ids % self._num_blocks
        after = self._next[slots] % self._num_blocks  # (B,) where windows that cross a block go on
        times = offsets[:, None] + np.arange(self._length)  # (B, T)
        block = np.where(times < self._length, slots[:, None], after[:, None] - 1)
        index = block * self._length + times  # (B, T) among all steps of the ring
        places = list(zip(slots.tolist(), offsets.tolist(), after.tolist(), strict=True))
        lead = (size, self._length)
        if out is None:
            columns = self._columns.items()
            out = Batch.from_columns({k: np.empty(lead + c.shape, c.dtype) for k, c in columns})
        for name, values in out.columns().items():
            column = self._columns[name]
            assert values.shape == lead + column.shape, (name, values.shape)
            column.gather(values, index, places)
        return out, ids

    def _choose(self, size: int, online: bool) -> np.ndarray:
        """Places (B,), block x batch_length + offset: fresh segments, then drawn ones."""
        num = min(size, len(self._online)) if online else 0
        fresh = [self._online.popitem(last=False)[0] for _ in range(num)]
        places = np.array(fresh, np.int64) * self._length
        if num == size:
            return places
        drawn = self._sampler.draw(size - num, self.first, self.end, self._num_windows)
        return np.concatenate([places, drawn])

    def prioritize(self, ids: np.ndarray, values: np.ndarray) -> None:
        """Set the priorities (B,) of blocks that `sample_with_ids` named; evicted ones are ignored.

        A block's share is (|priority| + 1e-6) ** 0.6; a new block has the largest so far. Raises
        ValueError for priorities that are not finite.
        """
        ids, values = np.asarray(ids, np.int64), np.asarray(values, np.float64)
        if ids.shape != values.shape or not np.isfinite(values).all():
            raise ValueError("priorities must be finite numbers, one for each id")
        if self._columns:
            slots = ids % self._num_blocks
            alive = (ids >= self.first) & (ids < self.end) & (self._starts[slots] > 0)
            self._sampler.prioritize(slots[alive], values[alive])

    # ------------------------------------------------------------------------- save and restore

    def numbering(self) -> Numbering:
        """What a journal segment that begins now must know, see `begin`."""
        tails = [
            (stream, t.block, t.previous, t.key, self._fill[t.block % self._num_blocks])
            for stream, t in self._tails.items()
            if t.block >= self.first
        ]
        seen = self.marks.state()
        return Numbering(self._length, self.first, self.end, self.total_steps, tails, seen)

    def cut(self) -> None:
        """Let every stream go on in a new block: what came before may be missing on disk."""
        self._tails.clear()

    def begin(self, start: Numbering, chunk: Chunk) -> None:
        """Take the numbering of the journal segment that begins with `chunk`.

        In a new buffer, blocks from before are empty and must be dropped after the last segment
        (`forget`). Later on the numbering agrees already, unless a full disk made the journal drop
        steps in between: it has cut all streams there, and numbers are skipped. Raises ValueError
        for a numbering that cannot be.
        """
        self._reserve(chunk.columns())
        wrong = [t for t in start.tails if not 0 < t[4] <= self._length or t[1] >= start.end]
        wrong += [t for t in start.tails if not -1 <= t[2] < t[1] or t[1] < start.first]
        if wrong or start.first < 0 or start.end < max(self.end, start.first):
            raise ValueError(f"block numbers are out of order at {start.end}")
        fresh = self.end == 0
        if fresh or start.end - self.end > self._num_blocks:
            self.forget(self.end)
            self.first = self.end = max(start.first, start.end - self._num_blocks)
        while self.end < start.end:
            self._open(-1)
        self._tails = {}
        for stream, block, previous, key, fill in start.tails:
            slot = block % self._num_blocks
            if fresh and block >= self.first:
                self.num_steps += fill - self._fill[slot]
                self._fill[slot] = fill
            if block >= self.first:
                if self._fill[slot] != fill:
                    raise ValueError("the segment before it is missing")
                self._tails[stream] = _Tail(block, previous, key)
        self.total_steps = start.total_steps
        self.marks.merge(start.seen)

    def forget(self, end: int) -> None:
        """Evict the blocks before `end`."""
        while self.first < end:
            self._evict()

    def state(self) -> dict[str, Any]:
        """What the journal does not hold, as JSON: random state, online queue, priorities."""
        return {
            "rng": self._rng.bit_generator.state,
            "online": pack_numbers(list(self._online)),
            "online_dropped": self.online_dropped,
            "duplicates": self.duplicates,
            "priorities": self._sampler.state() if self._columns else {},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, after the journal's chunks; the same samples follow.

        With an empty dict nothing is fresh and nothing has been counted yet. Raises ValueError for
        a queue that cannot be unpacked.
        """
        full = {b for b in range(self.first, self.end) if self._starts[b % self._num_blocks]}
        online = state.get("online", []) if self.config.online else []
        if isinstance(online, str):  # the first writers of format 2 left a list
            online = unpack_numbers(online, self._num_blocks)
        self._online = OrderedDict((block, None) for block in online if block in full)
        self.online_dropped = state.get("online_dropped", 0)
        self.duplicates = state.get("duplicates", 0)
        if self._columns:
            self._sampler.load_state(state.get("priorities", {}))
        if "rng" in state:
            self._rng.bit_generator.state = state["rng"]


def _spec(columns: dict[str, np.ndarray]) -> Spec:
    return {name: (value.dtype, value.shape[2:]) for name, value in columns.items()}


def _streams(chunk: Chunk, columns: dict[str, np.ndarray]) -> list[int | str]:
    """The names of a chunk's rows; ValueError unless it is one step of one stream at least."""
    streams = [] if chunk.streams is None else np.asarray(chunk.streams).tolist()
    shapes = {value.shape[:2] for value in columns.values()}
    if len(shapes) != 1 or 0 in (shape := shapes.pop()) or shape[0] != len(set(streams)):
        raise ValueError(
            "chunk columns must share one leading shape (N, T) with N different streams and T at "
            f"least 1, not {[v.shape[:2] for v in columns.values()]} with streams {streams}"
        )
    return streams

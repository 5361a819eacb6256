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
from typing import Any

import numpy as np

from worldflux_dist.data import Batch, Chunk
from worldflux_dist.replay.columns import (
    LARGE,
    Column,
    Layout,
    PackedColumn,
    RawColumn,
    Rows,
    Spec,
    cut,
    difference,
    spec_of,
    step_bytes,
)
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.replay.marks import Key, Marks
from worldflux_dist.replay.ring import Ring, Stream, Tail, joined
from worldflux_dist.replay.sampling import Sampler
from worldflux_dist.replay.segment import Numbering, pack_numbers, unpack_numbers


class ReplayBuffer:
    """Stores chunks and samples [B, T] batches. Owns the steps, the online queue and its RNG.

    Memory is reserved at the first chunk and taken up only as steps come in. Not thread-safe.
    """

    def __init__(self, config: ReplayConfig, seed: int | Sequence[int] = 0) -> None:
        self.config, self._length = config, config.batch_length
        self.total_steps = 0  # ever stored, evicted ones too
        self.bytes_per_step = 0
        self.duplicates = 0
        self.online_dropped = 0
        self.marks = Marks()
        self._rng = np.random.default_rng(seed)
        self._columns: dict[str, Column] = {}
        self._layout: Layout | None = None  # of the last chunk that was looked at
        self._ring = Ring(0, self._length)
        self._tails: dict[Stream, Tail] = {}  # streams in step share theirs
        self._online: OrderedDict[int, None] = OrderedDict()

    @property
    def first(self) -> int:
        """The number of the oldest block."""
        return self._ring.first

    @property
    def end(self) -> int:
        """The number of the next block to be opened."""
        return self._ring.end

    @property
    def num_steps(self) -> int:
        return self._ring.num_steps

    @property
    def ready(self) -> bool:
        """Whether at least one window can be sampled."""
        return self._ring.num_windows > 0

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
        columns, streams, key = chunk.columns(), _streams(chunk), chunk.key
        layout = (len(streams), {name: (x.dtype, x.shape) for name, x in columns.items()})
        tail = self._in_step(chunk, streams, layout)
        if tail is None:
            self._check(columns, streams)
            self._layout = layout
        if not self.marks.add(key) and once:
            self.duplicates += 1
            return 0
        if tail is not None:
            self._extend(tail, columns, key)
        else:
            self._extend_each(streams, columns, key)
        num = chunk.num_steps
        self.total_steps += num
        return num

    def _in_step(self, chunk: Chunk, streams: list[Stream], layout: Layout) -> Tail | None:
        """The tail that all streams of a chunk share, where it follows on the writer's last one and
        is like it, as most are; None where there is more to look at."""
        tail = self._tails.get(streams[0]) if layout == self._layout else None
        if tail is None or tail.streams != streams or tail.key != _before(chunk.key):
            return None
        return tail if self._ring.keeps(tail, chunk.reward.shape[1]) else None

    def _check(self, columns: Rows, streams: list[Stream]) -> None:
        """Raise ValueError unless these are steps like those in replay, of no more streams than it
        has room for; the first steps are. Forgets streams of which nothing is left."""
        spec = spec_of(columns, streams)
        self._reserve(spec)
        different = difference(spec, self._spec)
        if different:
            raise ValueError(f"chunk columns differ from those in replay, use one env: {different}")
        if all(stream in self._tails for stream in streams):
            return
        self._tails = {s: t for s, t in self._tails.items() if t.of(s).block >= self.first}
        num = len(self._tails.keys() | set(streams))
        if 2 * num > self._ring.num:
            raise ValueError(
                f"replay holds {self._ring.num} x {self._length} steps, too few for {num} "
                f"streams: give it at least {2 * num * self._length} (2 x batch_length each)"
            )

    def _reserve(self, spec: Spec) -> None:
        """Reserve the ring for columns like these, unless it is there."""
        if self._columns:
            return
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
        self._columns, self._spec, self.bytes_per_step = columns, spec, size
        self._ring = Ring(num, self._length)
        self._sampler = Sampler(self._ring.starts, self._length, self.config.shares, self._rng)

    def _extend_each(self, streams: list[Stream], columns: Rows, key: Key) -> None:
        """Write to each stream by itself; if they are in step then, they go on together."""
        tails = []
        for row, stream in enumerate(streams):
            rows = {name: value[row : row + 1] for name, value in columns.items()}
            tail = self._alone(stream)
            goes_on = rows["is_first"][0, 0] or (tail and tail.key == _before(key))
            if tail is None or tail.block < self.first or not goes_on:
                tail = Tail([stream], -1, -1, self._length, key)
            self._extend(tail, rows, key)
            self._tails[stream] = tail
            tails.append(tail)
        together = joined(tails)
        if together is not None:
            self._tails |= dict.fromkeys(streams, together)

    def _alone(self, stream: Stream) -> Tail | None:
        """The tail of a stream, which it shares with none from now on."""
        tail = self._tails.get(stream)
        if tail is not None and len(tail.streams) > 1:
            self._tails |= {s: tail.of(s) for s in tail.streams if s in self._tails}
        return self._tails.get(stream)

    def _extend(self, tail: Tail, rows: Rows, key: Key) -> None:
        """Write consecutive steps (n, T, *shape) to the ends of a tail's n streams."""
        ring, (num, left) = self._ring, rows["reward"].shape
        resets = rows["is_first"][:, 0]
        if True in resets.tolist() and tail.block >= 0:  # few: numpy's own any is slower
            self._truncate(tail, resets)
        ring.num_steps += num * left
        tail.key = key
        while left:
            if tail.fill == self._length:
                tail.block, tail.previous = self._open(num, tail.block), tail.block
                tail.fill = 0
            size = min(left, self._length - tail.fill)
            now, rows = (rows, rows) if size == left else cut(rows, size)
            left -= size
            start, tail.fill = tail.fill, tail.fill + size
            places = ring.slots(tail.block, num)
            for slots, part in places:
                at = (slots, slice(start, tail.fill))
                for name, column in self._columns.items():
                    column.store[at] = now[name] if len(places) == 1 else now[name][part]
            ring.filled(tail, places)
            if tail.fill == self._length:
                self._sampler.filled(places)
                if self.config.online:
                    self._online |= dict.fromkeys(range(tail.block, tail.block + num))

    def _truncate(self, tail: Tail, resets: np.ndarray) -> None:
        """The last steps of those streams that go on with a reset (n,) end their episodes."""
        is_last = self._columns["is_last"]
        assert isinstance(is_last, RawColumn)
        for slots, part in self._ring.slots(tail.block, len(resets)):
            is_last.array[slots, tail.fill - 1] |= resets[part]

    def _open(self, num: int, previous: int) -> int:
        """Open blocks as `Ring.open` does, evicting the oldest if there must be."""
        self.forget(self.end + num - self._ring.num)
        return self._ring.open(num, previous)

    def forget(self, end: int) -> None:
        """Evict the blocks before `end`."""
        if end <= self.first:
            return
        places = self._ring.slots(self.first, end - self.first)
        self._sampler.evicted(places)
        if self._online:
            for block in self._online.keys() & range(self.first, end):
                del self._online[block]
                self.online_dropped += 1
        self._ring.evict(end, places)

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
        slots = ids % self._ring.num
        after = (
            self._ring.next[slots] % self._ring.num
        )  # (B,) where windows that cross a block go on
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
        drawn = self._sampler.draw(size - num, self.first, self.end, self._ring.num_windows)
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
            slots = ids % self._ring.num
            alive = (ids >= self.first) & (ids < self.end) & (self._ring.starts[slots] > 0)
            self._sampler.prioritize(slots[alive], values[alive])

    # ------------------------------------------------------------------------- save and restore

    def numbering(self) -> Numbering:
        """What a journal segment that begins now must know, see `begin`."""
        alone = ((stream, tail.of(stream)) for stream, tail in self._tails.items())
        tails = [(s, t.block, t.previous, t.key, t.fill) for s, t in alone if t.block >= self.first]
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
        self._reserve(spec_of(chunk.columns(), _streams(chunk)))
        wrong = [t for t in start.tails if not 0 < t[4] <= self._length or t[1] >= start.end]
        wrong += [t for t in start.tails if not -1 <= t[2] < t[1] or t[1] < start.first]
        if wrong or start.first < 0 or start.end < max(self.end, start.first):
            raise ValueError(f"block numbers are out of order at {start.end}")
        ring, fresh = self._ring, self.end == 0
        if fresh or start.end - self.end > ring.num:
            self.forget(self.end)
            ring.first = ring.end = max(start.first, start.end - ring.num)
        self._open(start.end - self.end, -1)
        self._tails = {}
        for stream, block, previous, key, fill in start.tails:
            slot = block % ring.num
            if fresh and block >= self.first:
                ring.num_steps += fill - int(ring.fill[slot])
                ring.fill[slot] = fill
            if block >= self.first:
                if ring.fill[slot] != fill:
                    raise ValueError("the segment before it is missing")
                self._tails[stream] = Tail([stream], block, previous, fill, key)
        self.total_steps = start.total_steps
        self.marks.merge(start.seen)

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
        full = {b for b in range(self.first, self.end) if self._ring.starts[b % self._ring.num]}
        online = state.get("online", []) if self.config.online else []
        if isinstance(online, str):  # the first writers of format 2 left a list
            online = unpack_numbers(online, self._ring.num)
        self._online = OrderedDict((block, None) for block in online if block in full)
        self.online_dropped = state.get("online_dropped", 0)
        self.duplicates = state.get("duplicates", 0)
        if self._columns:
            self._sampler.load_state(state.get("priorities", {}))
        if "rng" in state:
            self._rng.bit_generator.state = state["rng"]


def _streams(chunk: Chunk) -> list[Stream]:
    return [] if chunk.streams is None else np.asarray(chunk.streams).tolist()


def _before(key: Key) -> Key:
    """The key of the writer's chunk before."""
    return (*key[:2], key[2] - 1)

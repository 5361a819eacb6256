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

import json
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from worldflux_dist.data import Batch, Chunk
from worldflux_dist.replay.memory import zeros

Key = tuple[str, str, int]  # writer, incarnation, seq
Spec = dict[str, tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of a step's columns

MAX_LATE = 64  # chunks of one writer that may overtake a missing one before it is given up
LARGE = 1024  # bytes per step from which copying slices beats np.take


@dataclass(frozen=True)
class ReplayConfig:
    """How much is kept and what a sample looks like.

    `batch_size` windows of `batch_length` steps; at most `capacity` steps and, unless 0, at most
    `capacity_bytes` bytes of them; `online` trains each fresh segment once before uniform replay.
    """

    batch_size: int = 16
    batch_length: int = 64
    capacity: int = 1_000_000
    capacity_bytes: int = 0
    online: bool = True

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "batch_length": 2, "capacity_bytes": 0}
        for name, limit in (least | {"capacity": 2 * self.batch_length}).items():
            if getattr(self, name) < limit:
                raise ValueError(
                    f"replay {name} {getattr(self, name)} is too small: give it at least {limit} "
                    f"(batch_length is {self.batch_length})"
                )


@dataclass
class _Tail:
    """Where a stream goes on: its last block, the one before it (-1: none), its last chunk."""

    block: int
    previous: int
    key: Key


@dataclass
class _Seen:
    """Chunks that have arrived from one life of a writer: all up to `mark`, and some beyond it."""

    mark: int = -1
    late: set[int] = field(default_factory=set)

    def add(self, seq: int) -> bool:
        """Note a chunk; false where it is known already."""
        if seq <= self.mark or seq in self.late:
            return False
        self.late.add(seq)
        if len(self.late) > MAX_LATE:
            self.mark = min(self.late) - 1
        while self.mark + 1 in self.late:
            self.mark += 1
            self.late.remove(self.mark)
        return True


class ReplayBuffer:
    """Stores chunks and samples [B, T] batches. Owns the steps, the online queue and its RNG.

    Memory is reserved at the first chunk and taken up only as steps come in. Not thread-safe.
    """

    def __init__(self, config: ReplayConfig, seed: int = 0) -> None:
        self.config, self._length = config, config.batch_length
        self.num_steps = 0
        self.bytes_per_step = 0
        self.duplicates = 0
        self.online_dropped = 0
        self._rng = np.random.default_rng(seed)
        self._columns: dict[str, np.ndarray] = {}  # (num_blocks, batch_length, *shape)
        self._num_blocks = 0
        self._first = self._end = 0  # numbers of the oldest block and of the next to be opened
        self._num_windows = 0
        self._tails: dict[int | str, _Tail] = {}
        self._seen: dict[tuple[str, str], _Seen] = {}
        self._online: OrderedDict[int, None] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether at least one window can be sampled."""
        return self._num_windows > 0

    @property
    def nbytes(self) -> int:
        """Memory of the stored steps, in bytes."""
        return self.num_steps * self.bytes_per_step

    def stats(self) -> dict[str, int]:
        """Sizes and counters for the metrics."""
        return {
            "num_steps": self.num_steps,
            "num_windows": self._num_windows,
            "nbytes": self.nbytes,
            "streams": len(self._tails),
            "online": len(self._online),
            "online_dropped": self.online_dropped,
            "duplicates": self.duplicates,
        }

    # -------------------------------------------------------------------------------- inserting

    def add(self, chunk: Chunk) -> int:
        """Store a chunk (N, T) of any N and T; returns the number of steps stored.

        A chunk whose key has been seen stores nothing and returns 0. A stream goes on where it
        stopped if the chunk is the writer's next one or begins with a reset; a reset after an
        unfinished episode (a restarted runner) truncates that episode. Otherwise steps are
        missing, and no window will span the gap. Raises ValueError where columns, dtypes or
        shapes differ from the first chunk's, or where the capacity cannot serve all streams.
        """
        columns = chunk.columns()
        streams = _streams(chunk, columns)
        if not self._columns:
            self._reserve(_spec(columns))
        self._check(columns, streams)
        writer, incarnation, seq = chunk.key
        if not self._seen.setdefault((writer, incarnation), _Seen()).add(seq):
            self.duplicates += 1
            return 0
        for row, stream in enumerate(streams):
            self._extend(stream, {name: value[row] for name, value in columns.items()}, chunk.key)
        return chunk.num_steps

    def _reserve(self, spec: Spec) -> None:
        """Reserve the ring for columns of the given dtypes and shapes per step."""
        size = sum(kind.itemsize * math.prod(shape) for kind, shape in spec.values())
        steps = self.config.capacity
        if self.config.capacity_bytes:
            steps = min(steps, self.config.capacity_bytes // size)
        if steps < 2 * self._length:
            raise ValueError(
                f"replay capacity_bytes {self.config.capacity_bytes} is too small: a step takes "
                f"{size} bytes and at least {2 * self._length} steps are needed"
            )
        num = steps // self._length
        lead = (num, self._length)
        try:
            columns = {name: zeros(lead + shape, kind) for name, (kind, shape) in spec.items()}
        except (MemoryError, OSError) as error:
            raise RuntimeError(
                f"{num} x {self._length} steps of {size} bytes do not fit in memory: lower capacity"
            ) from error
        self._columns, self._num_blocks, self.bytes_per_step = columns, num, size
        self._fill = [0] * num  # steps in each block
        self._next = np.full(num, -1)  # the block where the stream goes on, -1: none yet
        self._starts = np.zeros(num, np.int64)  # windows that begin in the block, at offsets 0..

    def _check(self, columns: dict[str, np.ndarray], streams: list[int | str]) -> None:
        ours, given = _spec(self._columns), _spec(columns)
        if ours != given:
            names = sorted(k for k in ours.keys() | given.keys() if ours.get(k) != given.get(k))
            wrong = "; ".join(f"{k} is {given.get(k)}, not {ours.get(k)}" for k in names)
            raise ValueError(f"chunk columns differ from those in replay, use one env: {wrong}")
        if any(stream not in self._tails for stream in streams):
            self._tails = {s: t for s, t in self._tails.items() if t.block >= self._first}
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
        if tail is None or tail.block < self._first or not goes_on:
            block, previous = self._open(-1), -1
        else:
            block, previous = tail.block, tail.previous
            slot = block % self._num_blocks
            self._columns["is_last"][slot, self._fill[slot] - 1] |= reset
        done, num = 0, len(rows["reward"])
        while done < num:
            if self._fill[block % self._num_blocks] == self._length:
                block, previous = self._open(block), block
            slot = block % self._num_blocks
            start = self._fill[slot]
            size = min(num - done, self._length - start)
            for name, pool in self._columns.items():
                pool[slot, start : start + size] = rows[name][done : done + size]
            self._filled(block, previous, start + size)
            done += size
        self.num_steps += num
        self._tails[stream] = _Tail(block, previous, key)

    def _open(self, previous: int) -> int:
        """Open a block that follows `previous` (-1: none), evicting the oldest if there must be."""
        block, self._end = self._end, self._end + 1
        slot = block % self._num_blocks
        if self._end - self._first > self._num_blocks:
            self.num_steps -= self._fill[slot]
            self._num_windows -= int(self._starts[slot])
            if self._first in self._online:
                del self._online[self._first]
                self.online_dropped += 1
            self._first += 1
        self._fill[slot], self._starts[slot], self._next[slot] = 0, 0, -1
        if previous >= self._first:
            self._next[previous % self._num_blocks] = block
        return block

    def _filled(self, block: int, previous: int, fill: int) -> None:
        """`block` holds `fill` steps now: count the windows that this completes."""
        full = fill == self._length
        slot, before = block % self._num_blocks, previous % self._num_blocks
        self._fill[slot] = fill
        self._starts[slot] = int(full)
        self._num_windows += int(full)
        if previous >= self._first:
            starts = min(self._length, fill + 1)
            self._num_windows += starts - int(self._starts[before])
            self._starts[before] = starts
        if full and self.config.online:
            self._online[block] = None

    # --------------------------------------------------------------------------------- sampling

    def sample(self, batch_size: int | None = None, out: Batch | None = None) -> Batch:
        """`batch_size` windows (default the config's) as a Batch of columns (B, T, *shape).

        Fresh segments come first, in the order they were completed, each once; the rest is drawn
        uniformly from all windows. `out`, an earlier batch of the same size, is overwritten and
        returned: faster for images, since new memory is mapped page by page. Raises RuntimeError
        while there is no window.
        """
        if not self.ready:
            raise RuntimeError(f"replay has no {self._length} consecutive steps: insert more first")
        size = self.config.batch_size if batch_size is None else batch_size
        slots, offsets = self._choose(size)
        after = self._next[slots] % self._num_blocks  # (B,) where windows that cross a block go on
        times = offsets[:, None] + np.arange(self._length)  # (B, T)
        block = np.where(times < self._length, slots[:, None], after[:, None] - 1)
        index = block * self._length + times  # (B, T) among all steps of the ring
        places = list(zip(slots.tolist(), offsets.tolist(), after.tolist(), strict=True))
        if out is None:
            shape = (size, self._length)
            pools = self._columns.items()
            out = Batch.from_columns({k: np.empty(shape + v.shape[2:], v.dtype) for k, v in pools})
        for name, column in out.columns().items():
            pool = self._columns[name]
            assert column.shape == (size, self._length, *pool.shape[2:]), (name, column.shape)
            if column[0, 0].nbytes < LARGE:
                # The mode matters: with the default one numpy takes a detour through a copy.
                steps = pool.reshape(-1, *pool.shape[2:])
                steps.take(index, axis=0, out=column, mode="clip")
                continue
            for window, (slot, offset, follower) in zip(column, places, strict=True):
                window[: self._length - offset] = pool[slot, offset:]
                if offset:
                    window[self._length - offset :] = pool[follower, :offset]
        return out

    def _choose(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and offsets (B,) where windows begin: fresh segments, then uniform ones."""
        fresh = [self._online.popitem(last=False)[0] for _ in range(min(size, len(self._online)))]
        found = [np.array(fresh, np.int64) * self._length]
        missing = size - len(fresh)
        # Rejection keeps it uniform at a cost that depends on how full blocks are, not how many.
        places = (self._first * self._length, self._end * self._length)
        tries = (places[1] - places[0]) / self._num_windows
        while missing > 0:
            drawn = self._rng.integers(*places, size=min(int(1.2 * missing * tries) + 4, 1 << 20))
            slot, offset = drawn // self._length % self._num_blocks, drawn % self._length
            found.append(drawn[offset < self._starts[slot]][:missing])
            missing -= len(found[-1])
        starts = np.concatenate(found)
        return starts // self._length % self._num_blocks, starts % self._length

    # ---------------------------------------------------------------------------- save and load

    def save(self, directory: Path) -> None:
        """Write everything to `directory`, replacing an earlier save: .npy columns and a JSON.

        The JSON is written last: without it `restore` refuses the save. Takes no extra memory.
        Raises OSError where the disk is full.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "replay.json").unlink(missing_ok=True)
        slots = [block % self._num_blocks for block in range(self._first, self._end)]
        wrap = self._num_blocks - slots[0] if slots else 0
        for number, pool in enumerate(self._columns.values()):
            header = np.lib.format.header_data_from_array_1_0(pool)
            header["shape"] = (len(slots), *pool.shape[1:])
            with open(directory / f"column{number}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in filter(None, (slots[:wrap], slots[wrap:])):
                    pool[part[0] : part[-1] + 1].tofile(file)
        state = {
            "batch_length": self._length,
            "columns": list(self._columns),
            "first": self._first,
            "fill": [self._fill[slot] for slot in slots],
            "next": [int(self._next[slot]) for slot in slots],
            "tails": [[s, t.block, t.previous, t.key] for s, t in self._tails.items()],
            "seen": [[*life, seen.mark, sorted(seen.late)] for life, seen in self._seen.items()],
            "online": list(self._online),
            "counters": [self.online_dropped, self.duplicates],
            "rng": self._rng.bit_generator.state,
        }
        (directory / "replay.json").write_text(json.dumps(state))

    def restore(self, directory: Path) -> None:
        """Continue from a save: steps, known chunks, online queue and random state.

        The same samples follow as from the buffer that was saved. The capacity may differ; the
        newest blocks that fit are kept. Raises RuntimeError unless this buffer is new, ValueError
        where the save is damaged or was made with another batch_length.
        """
        if self._columns:
            raise RuntimeError("this replay buffer has steps: restore into a new one")
        try:
            state = json.loads((directory / "replay.json").read_text())
            saved = {
                name: np.load(directory / f"column{number}.npy", mmap_mode="r", allow_pickle=False)
                for number, name in enumerate(state["columns"])
            }
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the replay saved in {directory} is incomplete or damaged ({error}): restore an "
                "older one, or delete it to begin with an empty replay"
            ) from error
        if state["batch_length"] != self._length:
            raise ValueError(
                f"the replay saved in {directory} has batch_length {state['batch_length']}, the "
                f"config {self._length}: keep the saved value, or delete the save"
            )
        if saved:
            self._reserve(_spec(saved))
        self._restore_blocks(saved, state)
        self._tails = {s: _Tail(b, before, tuple(key)) for s, b, before, key in state["tails"]}
        self._seen = {(w, life): _Seen(mark, set(late)) for w, life, mark, late in state["seen"]}
        if self.config.online:
            self._online.update((block, None) for block in state["online"] if block >= self._first)
        self.online_dropped, self.duplicates = state["counters"]
        self._rng.bit_generator.state = state["rng"]

    def _restore_blocks(self, saved: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        oldest, fill, chain = state["first"], state["fill"], state["next"]
        self._end = oldest + len(fill)
        self._first = max(oldest, self._end - self._num_blocks)
        for at in range(self._first - oldest, len(fill)):
            slot = (oldest + at) % self._num_blocks
            for name, pool in self._columns.items():
                pool[slot] = saved[name][at]
            self._fill[slot], self._next[slot] = fill[at], chain[at]
            more = fill[chain[at] - oldest] if chain[at] >= 0 else 0
            self._starts[slot] = min(self._length, more + 1) if fill[at] == self._length else 0
            self._num_windows += int(self._starts[slot])
        self.num_steps = sum(fill[self._first - oldest :])


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

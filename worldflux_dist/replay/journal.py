"""The journal of a replay shard: every chunk it stored, on disk within seconds, for its restart.

A journal is a row of segment files (segment.py). The newest is kept in memory and written whole,
every `flush_every` seconds, in place of its shorter self, so that no file ever ends torn; once it
is large enough it is closed and never changes again. One thread packs and writes, task by task, so
the shard never waits for the disk, unless `pending_bytes` are waiting there already.

    append -> raw records -> packed records -> file        one _Segment, oldest first
              (shard)        (thread)          (thread)

When the disk fails the shard goes on, `degraded`: records wait in memory, the oldest are dropped
and counted when there are too many, and writing is tried again at each flush. What must stay true:
a segment on disk can be replayed after those before it. So a dropped record takes with it whatever
builds on it, and segments begun while degraded build on nothing (`cut`: no stream goes on from an
earlier one). The folder belongs to whoever wrote its index last: another writer is fenced off.
"""

from __future__ import annotations

import errno
import hashlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from worldflux_dist.data import Chunk
from worldflux_dist.replay import segment
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.replay.marks import Key, Marks
from worldflux_dist.replay.segment import Numbering, Segment
from worldflux_dist.storage import Disk

if TYPE_CHECKING:
    from upath import UPath

INDEX = "index.json"


class FencedError(RuntimeError):
    """Another process has taken over this shard's folder; this one must stop."""


@dataclass(eq=False)
class _Record:
    """A chunk that was stored, after which the ring held the blocks `first` .. `end`.

    `data` are the bytes of its columns and, once it is packed, all that is appended to the file.
    """

    header: bytes
    data: bytes
    steps: int
    key: Key
    first: int
    end: int


@dataclass(eq=False)
class _Segment:
    """A segment not yet closed on disk. Of its records the first `packed` are packed, of these the
    first `written` are on disk and `attempted` are being written. `doubtful`: a write failed, so
    the file may hold more than is known."""

    name: str
    head: bytes
    cut: bool
    records: list[_Record] = field(default_factory=list)
    packed: int = 0
    written: int = 0
    attempted: int = 0
    size: int = 0  # bytes of the packed records
    closed: bool = False
    dropped: bool = False
    doubtful: bool = False

    @property
    def raw(self) -> int:
        """How many records are not packed yet."""
        return len(self.records) - self.packed

    @property
    def unwritten(self) -> bool:
        return self.written < len(self.records) or (self.doubtful and self.packed > 0)


class Journal:
    """Writes chunks to `root`/`folder`. Owns its thread, the unwritten records and the list of
    closed segments, which begins with `known`. Call it from one thread."""

    def __init__(
        self,
        config: ReplayConfig,
        root: UPath,
        folder: str,
        owner: str,
        start: Numbering,
        known: list[Segment],
        number: int,
        disk: Disk,
    ) -> None:
        self.config, self.segments = config, list(known)
        self.durable, self.durable_steps = Marks(start.seen), start.total_steps
        self.durable_first = start.first
        self.dropped_steps = 0
        self.degraded = ""  # one sentence while the disk fails
        self._root, self._folder, self._owner = root, folder, owner
        self._number, self._disk = number, disk
        self._errno = errno.EIO
        self._fenced = False
        self._open: deque[_Segment] = deque()  # oldest first; the last one takes the records
        self._pending = 0  # bytes that are not on disk
        self._lock = threading.Lock()  # of the open segments and of what is counted
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = False
        self.roll(start, cut=True)
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------ the shard's thread

    def reserve(self, size: int) -> None:
        """Make room for a chunk of `size` bytes: wait for the disk, or drop if it fails.

        Raises FencedError.
        """
        while self._pending and self._pending + size > self.config.pending_bytes:
            self.check()
            if not self.degraded:
                self.flush().exception()  # waits until all is written, or cannot be
            elif not self._drop_oldest():
                break  # all that is left is being written at this moment
        self.check()

    def check(self) -> None:
        """Raise FencedError if another process owns the folder, RuntimeError once closed."""
        if self._ended and not self._fenced:
            raise RuntimeError(f"replay shard {self._folder} is closed: open it again")
        if self._fenced:
            raise FencedError(
                f"replay shard {self._folder} is run by another process: stop this one"
            )

    @property
    def full(self) -> bool:
        """Whether the next record must go to a new segment: `roll` first."""
        last = self._open[-1]
        torn = last.dropped or (bool(self.degraded) and not last.cut)
        return torn or last.size >= self.config.segment_bytes

    @property
    def broken(self) -> bool:
        """Whether a new segment must not build on the last one: its streams are to be cut."""
        return bool(self.degraded) or self._open[-1].dropped

    def roll(self, start: Numbering, cut: bool) -> None:
        """Close the segment, if there is one, and begin one with the numbering `start`."""
        name = f"{self._folder}/{self._number:06}.seg"
        self._number += 1
        with self._lock:
            if self._open:
                self._open[-1].closed = True
            self._open.append(_Segment(name, segment.pack_head(self.config.compress, start), cut))
        if not self.degraded:
            self._tasks.put(self._write_all)

    def append(self, chunk: Chunk, packed: tuple[bytes, bytes], first: int, end: int) -> None:
        """Take a chunk that was stored, after which the ring holds blocks `first` .. `end`."""
        record = _Record(*packed, chunk.num_steps, chunk.key, first, end)
        with self._lock:
            self._open[-1].records.append(record)
            self._pending += len(record.data)
        self._tasks.put(self._pack_one)

    def flush(self, result: Callable[[], Any] = lambda: None) -> Future:
        """Write what has been appended. The future gives `result()`, called when all is on disk.

        It raises OSError where the disk fails, and FencedError.
        """
        future: Future = Future()
        future.set_running_or_notify_cancel()  # it cannot be cancelled any more

        def answer() -> None:
            try:
                self._write_all()
                self.check()
                if self.degraded:
                    raise OSError(self._errno, self.degraded)
                future.set_result(result())
            except (OSError, RuntimeError) as error:
                future.set_exception(error)

        self._tasks.put(answer)
        if self._ended:
            self._answer_rest()
        return future

    @property
    def newest(self) -> str:
        """The name of the segment that takes the next record."""
        return self._open[-1].name

    def listing(self) -> tuple[list[Segment], str]:
        """The closed segments that hold steps which are not evicted, by what is on disk, and the
        name of the first segment that is not closed on disk yet."""
        with self._lock:
            self.segments = [s for s in self.segments if s["end"] > self.durable_first]
            return list(self.segments), self._open[0].name

    def close(self) -> None:
        """Write what is left, if the disk allows, and end the thread."""
        self._tasks.put(self._write_all)
        self._tasks.put(None)
        self._thread.join()

    def _drop_oldest(self) -> bool:
        """Drop the oldest unwritten records and all that build on them; false if there are none."""
        with self._lock:
            lost = False
            for part in self._open:
                if lost and part.cut:
                    break
                keep = max(part.written, part.attempted)
                gone = part.records[keep:]
                if not gone or (part.dropped and not lost):
                    continue
                lost = part.dropped = True
                self.dropped_steps += sum(record.steps for record in gone)
                self._pending -= sum(len(record.data) for record in gone)
                del part.records[keep:]
                part.packed = keep
            return lost

    # ------------------------------------------------------------------------ the journal's thread

    def _run(self) -> None:
        due = time.monotonic() + self.config.flush_every
        try:
            while not self._fenced:
                with suppress(queue.Empty):
                    task = self._tasks.get(timeout=max(0.0, due - time.monotonic()))
                    if task is None:
                        break
                    task()
                if time.monotonic() >= due:
                    self._write_all()
                    due = time.monotonic() + self.config.flush_every
        finally:
            self._ended = True
            self._answer_rest()

    def _answer_rest(self) -> None:
        """Once the thread has ended: the flushes that nothing has answered."""
        with suppress(queue.Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None:
                    task()

    def _pack_one(self) -> None:
        with self._lock:
            part = next((part for part in self._open if part.raw), None)
            if part is None:
                return  # dropped meanwhile
            record = part.records[part.packed]
        packed = segment.pack_record(self.config.compress, record.header, record.data)
        with self._lock:
            if record in part.records:  # not dropped meanwhile
                self._pending += len(packed) - len(record.data)
                record.data = packed
                part.packed += 1
                part.size += len(packed)

    def _write_all(self) -> None:
        """One attempt at everything packed; sets or clears `degraded`."""
        if self._fenced or self._ended:
            return
        try:
            with self._lock:
                parts = list(self._open)
            for part in parts:
                self._write(part)
            self.degraded = ""
        except FencedError:
            self._fenced = True
        except Exception as error:  # an object store has errors of its own
            self._errno = getattr(error, "errno", None) or errno.EIO
            self.degraded = (
                f"replay is not durable: {self._root / self._folder} cannot be written ({error}); "
                f"free space or repair it, writing is tried again every "
                f"{self.config.flush_every:g} s"
            )

    def _write(self, part: _Segment) -> None:
        with self._lock:
            done = part.attempted = part.packed
            records = part.records[:done]
        fresh = records[part.written :]
        try:
            if fresh or (done and part.doubtful):
                data = b"".join([part.head, *(record.data for record in records)])
                self._disk.replace(self._root / part.name, data, self.check_owner)
        except BaseException:
            part.attempted, part.doubtful = 0, True
            raise
        with self._lock:
            for record in fresh:
                self.durable.add(record.key)
                self.durable_steps += record.steps
                self.durable_first = record.first
                self._pending -= len(record.data)
            part.written, part.attempted, part.doubtful = done, 0, False
            if part.closed and not part.unwritten:
                self._open.remove(part)
                if done:
                    self.segments.append(_closed(part))

    def check_owner(self) -> None:
        owner = json.loads((self._root / self._folder / INDEX).read_bytes())["owner"]
        if owner != self._owner:
            raise FencedError(f"{self._folder} belongs to {owner}")


def _closed(part: _Segment) -> Segment:
    data = b"".join([part.head, *(record.data for record in part.records)])
    return {
        "name": part.name,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "steps": sum(record.steps for record in part.records),
        "end": part.records[-1].end,
    }

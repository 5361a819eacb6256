"""A replay shard that survives its process: a ReplayBuffer and the journal it is restored from.

The run's replay folder holds `<life>/shard-<index>/NNNNNN.seg` and an `index.json` in each shard's
folder: who writes there, and which segments of earlier lives it builds on. There are three ways
to begin: anew, from the states of a checkpoint (exactly, or dealt out anew if the number of shards
differs), and, when only the process died, from all that is on disk. What must stay true: a chunk
counts once, whatever dies; nothing is read that does not have the recorded size and hash; and only
what no kept checkpoint and no stored step needs is deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldflux_dist import storage
from worldflux_dist.data import Chunk
from worldflux_dist.replay.buffer import ReplayBuffer
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.replay.journal import INDEX, Journal
from worldflux_dist.replay.segment import (
    FOLDER,
    INDEX_FORM,
    MAX_SEGMENT,
    SEGMENT,
    STATES,
    Numbering,
    Segment,
    pack_chunk,
    read_segment,
)
from worldflux_dist.storage import CheckpointError, Disk

if TYPE_CHECKING:
    from upath import UPath

FORMAT = 1
_FOLDER, _NAME = re.compile(FOLDER), re.compile(SEGMENT)


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds; `total_steps` counts those evicted since, too.

    `degraded` says in one sentence why what comes in is not made durable, where it is not; `owner`
    names the process.
    """

    num_steps: int
    total_steps: int
    durable_steps: int
    dropped_steps: int
    nbytes: int
    duplicates: int
    ready: bool
    degraded: str
    owner: str


class ReplayShard:
    """One shard of the replay. Owns its folder `root`/`life`/shard-`index`; not thread-safe.

    `root` is the run's replay folder, a local path or a UPath; `life` names one life of the driver.
    `saved` are the states of all shards (what `seal` gave) in the checkpoint to resume from; a
    process restarted within its life ignores them. With as many states as shards the same samples
    follow as from the shard that was sealed; otherwise the rows whose stream modulo `num_shards`
    is `index` are kept. Raises CheckpointError where a file is damaged or missing, OSError where
    the folder cannot be written.
    """

    def __init__(
        self,
        config: ReplayConfig,
        seed: int,
        root: UPath,
        life: str,
        index: int,
        num_shards: int,
        saved: Sequence[dict[str, Any]] = (),
        disk: Disk | None = None,
    ) -> None:
        assert 0 <= index < num_shards, (index, num_shards)
        self.config, self._index, self._num_shards = config, index, num_shards
        self._root = storage.as_path(root) if isinstance(root, str) else root
        self._life, self._folder = life, f"{life}/shard-{index}"
        if not _FOLDER.fullmatch(self._folder):
            raise ValueError(f"life {life!r} must be letters, digits, - and _ only")
        self._disk, self._owner = disk or Disk(), uuid.uuid4().hex
        self._sealed: Future | None = None
        self._inherited: list[Any] = []  # marks from before this life
        saved = storage.in_form(list(saved), STATES, self._root)
        self.buffer = ReplayBuffer(config, [seed, index])
        restored = self._take_over()
        if restored is not None:
            self._restart(restored, seed)
        elif len(saved) == num_shards and saved[index]["batch_length"] == config.batch_length:
            self._resume(saved[index])
        else:
            self._deal(saved)
        self._write_index()

    # ------------------------------------------------------------------------------ the replay

    def add(self, chunk: Chunk, once: bool = True) -> int:
        """As ReplayBuffer.add: store a chunk; returns the steps stored, 0 for a known one.

        It is on disk within seconds (`durable`). Raises FencedError where another process has
        taken over the shard.
        """
        self._journal.reserve(chunk.nbytes)
        record = pack_chunk(chunk)  # before the chunk is stored: it may be refused
        if self._journal.full:
            self._roll()
        num = self.buffer.add(chunk, once)
        if num:
            self._journal.append(chunk, record, self.buffer.first, self.buffer.end)
        return num

    def durable(self, key: tuple[str, str, int]) -> bool:
        """Whether a chunk is on disk, so that no crash of the process can lose it."""
        return key in self._journal.durable

    def report(self) -> ShardReport:
        """Sizes, counters and health."""
        return ShardReport(
            num_steps=self.buffer.num_steps,
            total_steps=self.buffer.total_steps,
            durable_steps=self._journal.durable_steps,
            dropped_steps=self._journal.dropped_steps,
            nbytes=self.buffer.nbytes,
            duplicates=self.buffer.duplicates,
            ready=self.buffer.ready,
            degraded=self._journal.degraded,
            owner=self._owner,
        )

    def _roll(self) -> Numbering:
        cut = self._journal.broken
        if cut:
            self.buffer.cut()
        numbering = self.buffer.numbering()
        self._journal.roll(numbering, cut)
        return numbering

    # -------------------------------------------------------------------------------- saving

    def flush(self) -> Future:
        """A future that is done when all that was added is on disk; it raises OSError."""
        return self._journal.flush()

    def seal(self) -> Future:
        """Close the segment; the future gives this moment's state, as JSON for a manifest.

        Takes milliseconds; the thread writes what is missing. The future raises OSError, in one
        sentence, where the disk fails, and FencedError.
        """
        state = asdict(self._roll())
        del state["tails"]
        state |= {"format": FORMAT, "steps": self.buffer.num_steps, **self.buffer.state()}
        newest = self._journal.newest

        def result() -> dict[str, Any]:
            own = f"{self._folder}/"
            segments = [
                {name: value for name, value in segment.items() if name != "end"}
                for segment in self._journal.segments
                if segment["end"] > state["first"]
                # One closed since then is not part of this moment.
                and not (segment["name"].startswith(own) and segment["name"] >= newest)
            ]
            return {"segments": segments, **state}

        self._sealed = self._journal.flush(result)
        return self._sealed

    def retain(self, names: Iterable[str]) -> None:
        """Delete segments that neither a kept checkpoint (`names`) nor a stored step needs.

        This covers the folders of earlier lives that no shard builds on any more. Does nothing
        while a seal is under way. Raises OSError and FencedError.
        """
        self._journal.check()
        if self._sealed is not None and not self._sealed.done():
            return
        keep = set(names)
        if self._sealed is not None and self._sealed.exception() is None:
            keep |= {segment["name"] for segment in self._sealed.result()["segments"]}
        oldest_open = self._write_index()
        keep |= {segment["name"] for segment in self._journal.segments}
        for folder in self._folders():
            for name in self._listing(folder):
                unlisted = folder == self._folder and name >= oldest_open
                if not unlisted and name not in keep:
                    (self._root / name).unlink()

    def close(self) -> None:
        """Write what is left, if the disk allows, and stop. Nothing can be added afterwards."""
        self._journal.close()

    # ------------------------------------------------------------------------------- restoring

    def _restart(self, index: dict[str, Any], seed: int) -> None:
        """Go on within the same life: with all that is on disk, and new random numbers."""
        own = [name for name in self._listing(self._folder) if name >= index["oldest_open"]]
        unlisted: list[Segment] = [
            {"name": name, "size": -1, "sha256": "", "steps": 0} for name in own
        ]
        known = self._replay(index["segments"] + unlisted)
        self.buffer.marks.merge(index["seen"])
        rng = np.random.default_rng([seed, self._index, self.buffer.total_steps])
        self.buffer.load_state({"rng": rng.bit_generator.state})
        self._inherited = index["seen"]
        self._start(known)

    def _resume(self, state: dict[str, Any]) -> None:
        """Go on exactly where a shard was sealed."""
        known = self._replay(state["segments"])
        if state["end"] != self.buffer.end:
            raise CheckpointError(
                f"the segments of replay shard {self._index} end at block {self.buffer.end} and "
                f"not at {state['end']}: resume from an older checkpoint"
            )
        self.buffer.marks.merge(state["seen"])
        try:
            self.buffer.load_state(state)
        except ValueError as error:
            raise CheckpointError(
                f"the state of replay shard {self._index} cannot be used ({error}): resume from an "
                "older checkpoint"
            ) from error
        self._inherited = self.buffer.marks.state()
        self._start(known)

    def _deal(self, states: Sequence[dict[str, Any]]) -> None:
        """Store this shard's rows of all shards' segments anew, in about the order they came."""
        for state in states:
            self.buffer.marks.merge(state["seen"])
        self._inherited = self.buffer.marks.state()
        self._start([])
        parts = [state["segments"] for state in states]
        order = [(at / len(part), segment) for part in parts for at, segment in enumerate(part)]
        for segment, data in self._pages([s for _, s in sorted(order, key=lambda x: x[0])]):
            with self._blame(segment):
                for chunk in read_segment(data)[1]:
                    mine = chunk.streams % self._num_shards == self._index
                    if mine.any():
                        self.add(chunk.rows(mine), once=False)
        self.buffer.load_state({})
        self._journal.flush().result()

    def _replay(self, segments: list[Segment]) -> list[Segment]:
        """Store the chunks of segments as they were stored before; gives what was read."""
        known: list[Segment] = []
        begin = 0
        for segment, data in self._pages(segments):
            with self._blame(segment):
                head, chunks = read_segment(data)
                if head.start.batch_length != self.config.batch_length:
                    raise ValueError(f"it has batch_length {head.start.batch_length}")
                steps = 0
                for number, chunk in enumerate(chunks):
                    if number == 0:
                        begin = begin if known else head.start.end
                        self.buffer.begin(head.start, chunk)
                    steps += self.buffer.add(chunk, once=False)
            known.append({**segment, "steps": steps, "end": self.buffer.end})
        # Blocks that began before the first segment are not whole.
        self.buffer.forget(min(begin, self.buffer.end))
        return known

    def _pages(self, segments: list[Segment]) -> Iterator[tuple[Segment, bytes]]:
        """Segments with their verified bytes; the next one is read meanwhile."""
        with ThreadPoolExecutor(1, "replay-read") as pool:
            ahead: Future | None = None
            for segment in [*segments, None]:
                reading, ahead = ahead, pool.submit(self._read, segment) if segment else None
                if reading is not None:
                    yield reading.result()

    def _read(self, segment: Segment) -> tuple[Segment, bytes]:
        path = self._root / segment["name"]
        with self._blame(segment):
            try:
                size = path.stat().st_size
                if segment["size"] not in (-1, size) or size > MAX_SEGMENT:
                    raise ValueError(f"it has {size} bytes instead of {segment['size']}")
                data: bytes = path.read_bytes()
            except FileNotFoundError:
                raise ValueError("it is missing") from None
            digest = hashlib.sha256(data).hexdigest()
            if segment["sha256"] not in ("", digest):
                raise ValueError("its SHA-256 differs from the recorded one")
        return {**segment, "size": size, "sha256": digest}, data

    @contextmanager
    def _blame(self, segment: Segment) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"the replay segment {self._root / segment['name']} cannot be used ({error}): put "
                "back a good copy of it, or resume from an older checkpoint"
            ) from error

    # ----------------------------------------------------------------------------- the folder

    def _start(self, known: list[Segment]) -> None:
        own = self._listing(self._folder)
        number = int(own[-1][-10:-4]) + 1 if own else 0
        where = (self._root, self._folder, self._owner)
        start = self.buffer.numbering()
        self._journal = Journal(self.config, *where, start, known, number, self._disk)

    def _take_over(self) -> dict[str, Any] | None:
        """Become the folder's owner; what the index said if this life has been here before."""
        folder = self._root / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {}
        if (folder / INDEX).exists():
            try:
                index = storage.read_form(folder / INDEX, INDEX_FORM)
                if len(index) not in (1, 4):
                    raise CheckpointError(f"{folder / INDEX} is malformed: fields are missing")
            except CheckpointError as error:
                remedy = f"move {folder} away to resume from the last checkpoint"
                raise CheckpointError(f"{error}: {remedy}") from None
        # Until a restore is through the index has an owner only: it is begun again after a crash.
        self._put_index(index | {"owner": self._owner})
        if isinstance(folder, Path):
            for path in (self._root / self._life, self._root):
                self._disk.sync_folder(path)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        if "segments" in index:
            return index
        for name in self._listing(self._folder):
            (self._root / name).unlink()
        return None

    def _write_index(self) -> str:
        """Record what the journal builds on; gives the first name that is not on its list yet."""
        segments, oldest_open = self._journal.listing()
        index = {"owner": self._owner, "segments": segments, "oldest_open": oldest_open}
        self._put_index(index | {"seen": self._inherited}, self._journal.check_owner)
        return oldest_open

    def _put_index(self, index: dict[str, Any], check: Callable[[], None] = lambda: None) -> None:
        path = self._root / self._folder / INDEX
        self._disk.replace(path, json.dumps(index).encode(), check)

    def _folders(self) -> list[str]:
        """Folders of this and earlier lives that are this shard's to tidy."""
        lives = [path for path in self._root.iterdir() if path.is_dir() and path.name <= self._life]
        names = [f"{life.name}/{folder.name}" for life in lives for folder in life.iterdir()]
        numbered = [
            (int(name.rpartition("-")[2]), name) for name in names if _FOLDER.fullmatch(name)
        ]
        return [name for number, name in numbered if number % self._num_shards == self._index]

    def _listing(self, folder: str) -> list[str]:
        """Names of the segments in a folder, oldest first."""
        names = (f"{folder}/{path.name}" for path in (self._root / folder).iterdir())
        return sorted(name for name in names if _NAME.fullmatch(name))

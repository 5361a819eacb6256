"""What a shard leaves on disk: the format of journal segments, and the forms of its states.

    MAGIC | frame: Head as JSON | frame: Record as JSON, then its columns, packed | frame ...
    frame = sizes of both parts, CRC-32 of both, the parts

Files may be damaged or hostile: every size is checked against the bytes at hand before anything is
allocated, dtypes are plain numbers, and whatever is wrong ends in one ValueError.
"""

from __future__ import annotations

import base64
import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

import lz4.block
import numpy as np
from annotated_types import Ge, Le, Lt, MaxLen
from pydantic import (
    AfterValidator,
    FailFast,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import to_json
from typing_extensions import TypedDict

from worldflux_dist.data import FLAGS, Chunk
from worldflux_dist.replay.marks import Key
from worldflux_dist.settings import STRICT, Limited, Text, Whole

FORMAT = 1
MAGIC = b"WFD-REPLAY\r\n\x1a\n"
MAX_HEADER = 1 << 24  # bytes of a frame's JSON
MAX_CHUNK = 1 << 30  # bytes of a chunk's columns
_FRAME = struct.Struct("<IQI")  # bytes of the header, bytes of the body, CRC-32 of both
_RATIO = 255  # no lz4 block expands to more than this many times its size
_DTYPE = re.compile(r"[|<](b1|[iu][1248]|f[248])")

Stream = Limited | Text
Mark = Annotated[int, Ge(-1), Le(2**62)]
Seen = Annotated[tuple[Text, Text, Mark, Annotated[list[Whole], FailFast()]], Strict(False)]


@dataclass(frozen=True)
class Numbering:
    """How the ring is numbered where a journal segment begins: all but the steps themselves.

    Blocks `first` .. `end` exist; `tails` holds (stream, block, the block before it, last chunk,
    steps in the block) of every stream, `seen` what `Marks.state` gives.
    """

    batch_length: Whole
    first: Whole
    end: Whole
    total_steps: Whole
    tails: Annotated[list[tuple[Stream, Whole, Mark, Key, Whole]], FailFast()]
    seen: Annotated[list[Seen], FailFast()]


@dataclass(frozen=True)
class Head:
    """Begins every segment: how bodies are packed, and the ring's numbering at its start."""

    format: Literal[1]
    compress: Literal["lz4", "none"]
    start: Numbering


@dataclass(frozen=True)
class Record:
    """A chunk without its bytes; `columns` are (name, dtype, shape) with (N, T) leading."""

    key: Key
    streams: Annotated[list[Stream], FailFast()]
    version: Whole
    columns: Annotated[list[tuple[Text, Text, list[Limited]]], MaxLen(1000)]


def pack_head(compress: str, start: Numbering) -> bytes:
    """The beginning of a segment file."""
    return MAGIC + _frame(to_json({"format": FORMAT, "compress": compress, "start": start}), b"")


def pack_chunk(chunk: Chunk) -> tuple[bytes, bytes]:
    """A chunk's header and the bytes of its columns: a copy, the chunk may change afterwards.

    Raises ValueError where it could not be read back: too large, or no plain numbers.
    """
    columns = {name: np.ascontiguousarray(value) for name, value in chunk.columns().items()}
    if chunk.nbytes > MAX_CHUNK:
        raise ValueError(f"a chunk takes more than {MAX_CHUNK} bytes: collect fewer steps at once")
    for name, value in columns.items():
        if not _DTYPE.fullmatch(value.dtype.str):
            raise ValueError(f"chunk column {name} is {value.dtype}: only plain numbers are stored")
    header = {
        "key": chunk.key,
        "streams": np.asarray(chunk.streams).tolist(),
        "version": int(chunk.version),
        "columns": [(name, v.dtype.str, v.shape) for name, v in columns.items()],
    }
    return to_json(header), b"".join(value.data for value in columns.values())


def pack_record(compress: str, header: bytes, body: bytes) -> bytes:
    """What is appended to a segment file for `pack_chunk`'s bytes."""
    packed = lz4.block.compress(body, store_size=False) if compress == "lz4" else body
    return _frame(header, packed)


def read_segment(data: bytes) -> tuple[Head, Iterator[Chunk]]:
    """A segment file's head and its chunks, which are read-only and unpacked one by one.

    Raises ValueError, at once or while iterating, where a byte is not as it was written.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError("it is no replay segment of this release")
    frames = _frames(memoryview(data)[len(MAGIC) :])
    header, _ = next(frames, (b"", b""))
    head: Head = _parse(Head, header)
    return head, (_chunk(head.compress, header, body) for header, body in frames)


_FORMS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (Head, Record)}


def _parse(kind: type, text: Any) -> Any:
    try:
        return _FORMS[kind].validate_json(bytes(text), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"its {kind.__name__} is wrong at {first['loc']}: {first['msg']}"
        ) from None


def _frame(header: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(body, zlib.crc32(header))
    return b"".join((_FRAME.pack(len(header), len(body), crc), header, body))


def _frames(rest: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    while rest:
        if len(rest) < _FRAME.size:
            raise ValueError("it ends in the middle of a record")
        head, body, crc = _FRAME.unpack(rest[: _FRAME.size])
        rest = rest[_FRAME.size :]
        if head > MAX_HEADER or head + body > len(rest):
            raise ValueError("it ends in the middle of a record, or one is too large")
        parts = rest[:head], rest[head : head + body]
        if zlib.crc32(parts[1], zlib.crc32(parts[0])) != crc:
            raise ValueError("a record's checksum is wrong")
        yield parts
        rest = rest[head + body :]


def _chunk(compress: str, header: memoryview, body: memoryview) -> Chunk:
    record: Record = _parse(Record, header)
    sizes = [_size(dtype, shape) for _, dtype, shape in record.columns]
    total = sum(sizes)
    if not 0 < total <= MAX_CHUNK or total > _RATIO * len(body) + 64:
        raise ValueError(f"a record claims {total} bytes of columns")
    if compress == "lz4":
        try:
            body = memoryview(lz4.block.decompress(body, uncompressed_size=total))
        except lz4.block.LZ4BlockError as error:
            raise ValueError(f"a record cannot be unpacked ({error})") from error
    if len(body) != total:
        raise ValueError(f"a record has {len(body)} bytes of columns instead of {total}")
    columns, at = {}, 0
    for (name, dtype, shape), size in zip(record.columns, sizes, strict=True):
        columns[name] = np.frombuffer(body[at : at + size], np.dtype(dtype)).reshape(shape)
        at += size
    kinds = {"action": ("f", 3), "reward": ("f", 2)} | dict.fromkeys(FLAGS, ("b", 2))
    for name, kind in kinds.items():
        if name in columns and (columns[name].dtype.kind, columns[name].ndim) != kind:
            raise ValueError(f"a record's column {name} is of another kind")
    streams, key = np.array(record.streams), record.key
    try:
        return Chunk.from_columns(columns, streams=streams, version=record.version, key=key)
    except KeyError as error:
        raise ValueError(f"a record lacks the column {error}") from None


def _size(dtype: str, shape: list[int]) -> int:
    if not _DTYPE.fullmatch(dtype) or len(shape) > 16 or min(shape, default=0) < 1:
        raise ValueError(f"a record has a column of {dtype} and shape {shape}")
    return np.dtype(dtype).itemsize * math.prod(shape)


# ------------------------------------------------------------------------------- forms of JSON

FOLDER = r"[A-Za-z0-9_-]{1,64}/shard-[0-9]{1,6}"
SEGMENT = rf"{FOLDER}/[0-9]{{6}}\.seg"
MAX_SEGMENT = 1 << 31  # bytes of a segment file

_Large = Annotated[int, Ge(0), Lt(2**128)]


@with_config(STRICT)
class Segment(TypedDict):
    """A segment of the journal, named below the replay folder."""

    name: Annotated[str, StringConstraints(pattern=f"^{SEGMENT}$")]
    size: Annotated[int, Ge(0), Le(MAX_SEGMENT)]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    steps: Whole
    end: NotRequired[Whole]


class _Numbers(TypedDict):
    state: _Large
    inc: _Large


class _Random(TypedDict):
    bit_generator: Literal["PCG64"]
    state: _Numbers
    has_uint32: Annotated[int, Ge(0), Le(1)]
    uinteger: Annotated[int, Ge(0), Lt(2**32)]


class _Priorities(TypedDict, total=False):
    largest: Annotated[float, Ge(0)]
    weights: Annotated[
        str,
        MaxLen(2**26),
        StringConstraints(
            pattern=r"^([A-Za-z0-9+/]{32})*([A-Za-z0-9+/]{11}=|[A-Za-z0-9+/]{22}==)?$"
        ),
    ]


def _packed(value: Any) -> Any:
    """Text of `pack_numbers`, or the numbers themselves, as they were written at first."""
    numbers = value if isinstance(value, list) else []
    if not (
        isinstance(value, str | list) and all(type(n) is int and n >> 62 == 0 for n in numbers)
    ):
        raise ValueError("numbers are expected")
    return value


def _both(value: Any) -> Any:
    if len(value) == 1:
        raise ValueError("largest and weights belong together")
    return value


@with_config(STRICT)
class ShardState(TypedDict):
    """A shard at the moment of a checkpoint."""

    format: Literal[1]
    steps: Whole
    total_steps: Whole
    batch_length: Annotated[int, Ge(1), Le(2**20)]
    first: Whole
    end: Whole
    segments: Annotated[list[Segment], FailFast()]
    seen: Annotated[list[Seen], FailFast()]
    rng: _Random
    online: Annotated[Any, AfterValidator(_packed)]
    online_dropped: Whole
    duplicates: Whole
    priorities: Annotated[_Priorities, AfterValidator(_both)]


@with_config(STRICT)
class Index(TypedDict):
    """index.json: who writes in a shard's folder and, once it is restored, what it builds on."""

    owner: Text
    segments: NotRequired[Annotated[list[Segment], FailFast()]]
    oldest_open: NotRequired[Annotated[str, StringConstraints(pattern=f"^{SEGMENT}$")]]
    seen: NotRequired[Annotated[list[Seen], FailFast()]]


INDEX_FORM: TypeAdapter[Any] = TypeAdapter(Index)
STATES: TypeAdapter[Any] = TypeAdapter(list[ShardState])


def pack_numbers(numbers: list[int]) -> str:
    """Whole numbers as text: a few bits for each where they follow each other."""
    differences = np.diff(np.array(numbers, "<i8"), prepend=0)
    return base64.b64encode(zlib.compress(differences.tobytes())).decode()


def unpack_numbers(text: str, most: int) -> list[int]:
    """The first `most` numbers of `pack_numbers`. Raises ValueError for any other text."""
    try:
        data = zlib.decompressobj().decompress(
            base64.b64decode(text, validate=True), max(8 * most, 1)
        )
    except zlib.error as error:
        raise ValueError(f"numbers cannot be unpacked: {error}") from error
    numbers: list[int] = np.frombuffer(data, "<i8", len(data) // 8).cumsum().tolist()
    return numbers

"""The forms of what a shard leaves on disk, with limits, and its packed numbers."""

from __future__ import annotations

import base64
import zlib
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
from annotated_types import Ge, Le, Lt, MaxLen
from pydantic import AfterValidator, FailFast, Strict, StringConstraints, TypeAdapter, with_config
from typing_extensions import TypedDict

from worldflux_dist.settings import STRICT, Text, Whole

FOLDER = r"[A-Za-z0-9_-]{1,64}/shard-[0-9]{1,6}"
SEGMENT = rf"{FOLDER}/[0-9]{{6}}\.seg"
MAX_SEGMENT = 1 << 31  # bytes of a segment file

Mark = Annotated[int, Ge(-1), Le(2**62)]
Seen = Annotated[tuple[Text, Text, Mark, Annotated[list[Whole], FailFast()]], Strict(False)]
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
    online: str
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

"""The form of spaces in files, as `space_to_json` writes them, with limits on their sizes."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Le, MaxLen
from pydantic import AfterValidator, Discriminator, FailFast, Strict, Tag
from typing_extensions import TypedDict

from worldflux_dist.settings import STRICT, Text
from worldflux_dist.spaces import Spaces

MAX_SIZE = 2**22  # numbers in one observation, as in a picture of 1024 x 1024 x 4

_Size = Annotated[int, Ge(1), Le(MAX_SIZE)]
_Start = Annotated[int, Ge(-(2**53)), Le(2**53)]
_Whole = Literal["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
_Number = Literal[_Whole, "bool", "float16", "float32", "float64"]


def _small(shape: list[int]) -> list[int]:
    if math.prod(shape) > MAX_SIZE:
        raise ValueError(f"more than {MAX_SIZE} numbers")
    return shape


_Shape = Annotated[list[_Size], MaxLen(16), AfterValidator(_small)]


class _Box(TypedDict):
    box: Annotated[tuple[Any, Any], Strict(False)]
    shape: _Shape
    dtype: _Number


class _Discrete(TypedDict):
    discrete: _Size
    start: _Start


class _MultiDiscrete(TypedDict):
    multi_discrete: list[Any]
    start: list[Any]
    dtype: NotRequired[_Whole]


class _MultiBinary(TypedDict):
    multi_binary: _Size | _Shape


_Key = Text | Annotated[int, Ge(-(2**53)), Le(2**53)]


class _Dict(TypedDict):
    dict: Annotated[list[Annotated[tuple[_Key, Space], Strict(False)]], FailFast()]


class _Tuple(TypedDict):
    tuple: Annotated[list[Space], FailFast()]


def _kind(value: Any) -> str | None:
    kinds = ("dict", "tuple", "discrete", "multi_discrete", "multi_binary", "box")
    return next((k for k in kinds if isinstance(value, dict) and k in value), None)


Space = Annotated[
    Annotated[_Dict, Tag("dict")]
    | Annotated[_Tuple, Tag("tuple")]
    | Annotated[_Discrete, Tag("discrete")]
    | Annotated[_MultiDiscrete, Tag("multi_discrete")]
    | Annotated[_MultiBinary, Tag("multi_binary")]
    | Annotated[_Box, Tag("box")],
    Discriminator(_kind),
]


class SpacesForm(TypedDict):
    """As `Spaces.to_json` writes it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    observation: Space
    action: Space


def make_spaces(saved: Any) -> Spaces:
    """Spaces from their form. Raises ValueError where bounds and numbers do not fit each other."""
    try:
        return Spaces.from_json(saved)
    except (ValueError, TypeError, AssertionError, OverflowError) as error:
        raise ValueError(f"spaces cannot be made: {error!s:.200}") from error

"""What settings are: frozen dataclasses whose annotations are their limits, and one strict parser.

A field says all of itself: its type and range (`Annotated[int, Ge(1), Le(8)]`), its default, and by
`free` whether a run may go on with another value. Nothing is coerced but 1 to 1.0 and, since JSON
has no tuples, a list to a tuple. What is read from files is held to its form by `checked`, in the
same words. Every number has an upper limit, so that a wrong one is said before anything is built.
"""

from __future__ import annotations

import difflib
import functools
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import field, fields, is_dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, MaxLen
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # typing's own has too little of it before Python 3.12

Whole = Annotated[int, Ge(0), Le(2**62)]
Limited = Annotated[int, Ge(-(2**62)), Le(2**62)]
Count = Annotated[int, Ge(1), Le(2**20)]
Units = Annotated[int, Ge(1), Le(2**16)]  # of a layer
Layers = Annotated[int, Ge(1), Le(100)]
Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0), Le(1e9)]
Scale = Annotated[float, Ge(0), Le(1e9)]
Text = Annotated[str, MaxLen(1000)]

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
Any_ = TypeVar("Any_")


def free(default: Any) -> Any:
    """The default of a field that does not change what is learned: a run goes on with another."""
    return field(default=default, metadata={"free": True})


class Settings:
    """Base of frozen dataclasses of settings; invariant: every instance is within its limits.

    `section` is what a user writes before a field's name. Making or replacing one raises
    ValueError naming the field, its value and what is allowed.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        values = {name: getattr(self, name) for name in hints}
        for name, value in values.items():
            if isinstance(value, list) and _is_tuple(hints[name]):
                values[name] = tuple(value)
        for name, value in checked(_form(kind), values, self.section).items():
            object.__setattr__(self, name, value)  # frozen for all others
        self.check()

    def check(self) -> None:
        """Raise ValueError where fields do not fit each other."""


def checked(form: TypeAdapter[Any_], value: Any, where: str = "") -> Any_:
    """`value` in its form. Raises ValueError naming the first field that is not, below `where`."""
    try:
        return form.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    parts = [str(part) for part in first["loc"] if part != "[key]"]
    name = ".".join([where, *parts] if where else parts) or "the whole"
    if first["type"] == "missing":
        raise ValueError(f"{name} is missing")
    if first["type"] == "extra_forbidden":
        raise ValueError(f"{name} is not known")
    said = first["msg"].replace("Input should", "it must").replace("should have", "it must have")
    said = said.replace("greater than or equal to", "at least")
    said = said.replace("less than or equal to", "at most").replace("should match", "must match")
    raise ValueError(f"{name:.200} is {reprlib.repr(first['input'])}: {said:.300}")


def parse(base: Any, values: dict[Any, Any], unknown: str, path: str = "") -> Any:
    """The settings `base` with `values`, nested as they are, in place of its own.

    Raises ValueError for a value that is not allowed and, in the words of `unknown` with the
    nearest name, for a field there is none of.
    """
    known = {f.name: getattr(base, f.name) for f in fields(base)}
    new = {}
    for name, value in values.items():
        if name not in known:
            where = f"{path}{name}"
            raise ValueError(
                f"{unknown.format(repr(where)[:200])}: {nearest(str(name), list(known))}"
            )
        if is_dataclass(known[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{path}{name} is a section: set {path}{name}.<name>")
            value = parse(known[name], value, unknown, f"{path}{name}.")
        new[name] = value
    return replace(base, **new)


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each field that keeps a run with `old` from going on with `new`:
    all that differ and are not `free`."""
    for f in fields(old):
        if not f.metadata.get("free"):
            before, now = getattr(old, f.name), getattr(new, f.name)
            if is_dataclass(before):
                yield from differences(before, now, f"{path}{f.name}.")
            else:
                yield from _differing(before, now, path + f.name)


def _differing(before: Any, now: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _differing(before.get(key), now.get(key), f"{name}.{key}")
    elif before != now:
        yield name, before, now


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence that says what was probably meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of a class's fields, but for nested settings, which have checked theirs."""
    hints = get_type_hints(kind, include_extras=True)
    mine = {f.name: hints[f.name] for f in fields(kind)}
    return {name: hint for name, hint in mine.items() if not is_dataclass(hint)}


@functools.cache
def _form(kind: Any) -> TypeAdapter[Any]:
    make: Any = TypedDict
    columns = make(kind.__name__, _hints(kind))
    columns.__pydantic_config__ = STRICT
    return TypeAdapter(columns)


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple or get_origin(getattr(hint, "__origin__", hint)) is tuple

"""Where a run's replicas serve: files below its storage, which they write and clients read.

Loads neither torch nor Ray, as clients do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.settings import STRICT, Text

if TYPE_CHECKING:
    from upath import UPath

FOLDER = "imagination"


class _Place(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    address: Text


_PLACE = TypeAdapter(_Place)


def place(folder: UPath, index: int) -> UPath:
    """The file of a replica, by its number."""
    return folder / FOLDER / f"replica-{index}.json"


def write(path: UPath, address: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, {"address": address})


def addresses(folder: UPath | str) -> list[str]:
    """Of all replicas of the run in this storage: what a client takes as `addresses`."""
    root = (storage.as_path(folder) if isinstance(folder, str) else folder) / FOLDER
    paths = sorted(root.glob("replica-*.json")) if root.exists() else []
    return [storage.read_form(path, _PLACE)["address"] for path in paths]

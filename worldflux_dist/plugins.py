"""Families and behaviors that other installed packages bring, found by Python's entry points.

A package names them in its pyproject.toml; nothing else is needed to train with them:

    [project.entry-points."worldflux_dist.families"]
    mine = "my_package.mine"           # a module with PRESETS and Model, as those in models/
    [project.entry-points."worldflux_dist.behaviors"]
    mine = "my_package.mine:Mine"      # a Behavior
"""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

FAMILIES, BEHAVIORS = "worldflux_dist.families", "worldflux_dist.behaviors"


@functools.cache
def entries(group: str, own: tuple[str, ...] = ()) -> dict[str, metadata.EntryPoint]:
    """What is brought in a group, by name. Raises ValueError where two packages use one name, or
    one uses a name of our `own`."""
    found: dict[str, metadata.EntryPoint] = {}
    for entry in metadata.entry_points(group=group):
        if entry.name in own:
            raise ValueError(
                f"the package {package(entry)} brings {entry.name!r} in {group}, which is one of "
                "worldflux_dist's own: name it otherwise there, or remove that package"
            )
        other = found.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise ValueError(
                f"the packages {package(other)} and {package(entry)} both bring {entry.name!r} in "
                f"{group}: remove one of them"
            )
    return found


def package(entry: metadata.EntryPoint) -> str:
    """The name of the package that brings it."""
    return entry.dist.name if entry.dist else entry.module


def load(entry: metadata.EntryPoint) -> Any:
    """What an entry names. Raises ValueError naming the package where it cannot be imported."""
    try:
        return entry.load()
    except Exception as error:  # code of another package
        raise ValueError(
            f"{entry.name!r} of the package {package(entry)} cannot be imported from "
            f"{entry.value} ({type(error).__name__}: {error!s:.200}): repair or remove that package"
        ) from error


def missing(packages: list[str]) -> list[str]:
    """Those of the packages that are not installed here."""
    return [name for name in packages if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return False
    return True

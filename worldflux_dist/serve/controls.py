"""How a person steers: the parts of an action space, their names, and keys for them.

What must stay true: whatever a page may choose becomes a flat action of this very space, and what
is none is refused here in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from worldflux_dist.envs import EnvConfig
from worldflux_dist.envs.atari import is_atari
from worldflux_dist.spaces import Spaces

ARROWS = {name: f"Arrow{name.capitalize()}" for name in ("left", "right", "up", "down")}
NUMBERS, LETTERS = "1234567890", "qwertyuiop"  # keys of the first two discrete parts
RESTS = ("noop", "stay", "none")
NAMES = {  # of environments that do not name their actions themselves
    "CartPole": ("left", "right"),
    "MountainCar": ("left", "stay", "right"),
    "Acrobot": ("left", "stay", "right"),
    "LunarLander": ("stay", "left", "up", "right"),
}


def action_names(config: EnvConfig) -> tuple[str, ...]:
    """What the actions of an environment with one discrete part are called; () if unknown."""
    if is_atari(config.id):
        with closing(gymnasium.make(config.id, full_action_space=config.full_action_space)) as game:
            made: Any = game.unwrapped
            return tuple(name.lower() for name in made.get_action_meanings())
    return NAMES.get(config.id.partition("-v")[0], ())


@dataclass(frozen=True)
class Controls:
    """The parts of an action space as a page offers them. A choice has one entry for each part:
    the index of a discrete one, a list of numbers in [-1, 1] of a continuous one."""

    spaces: Spaces
    names: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Parts, the first choice, and what keys set: `{key: {part, index | dim and value}}`."""
        parts: list[dict[str, Any]] = []
        for path, _, leaf_parts in self.spaces.action_leaves:
            title = "/".join(map(str, path)) or "action"
            for i, leaf in enumerate(leaf_parts):
                several = f" {i + 1}" if len(leaf_parts) > 1 else ""
                parts.append({"kind": leaf.kind, "size": leaf.size, "title": title + several})
        for part in parts:
            if part["kind"] == "discrete":
                named = len(parts) == 1 and len(self.names) == part["size"]
                part["names"] = list(self.names) if named else list(map(str, range(part["size"])))
                part["rest"] = next((i for i, n in enumerate(part["names"]) if n in RESTS), None)
        first = [p["rest"] or 0 if p["kind"] == "discrete" else [0.0] * p["size"] for p in parts]
        return {"parts": parts, "first": first, "keys": _keys(parts)}

    def flat(self, choice: Any) -> np.ndarray:
        """The flat action (1, A) of a choice. Raises ValueError for what is none."""
        parts = self.spaces.action_parts
        if not isinstance(choice, list) or len(choice) != len(parts):
            raise ValueError(f"an action has {len(parts)} parts here, not {choice!r:.80}")
        columns = []
        for part, chosen in zip(parts, choice, strict=True):
            if part.kind == "discrete":
                if type(chosen) is not int or not 0 <= chosen < part.size:
                    raise ValueError(f"{chosen!r:.80} is none of {part.size} discrete actions")
                columns.append(np.eye(part.size, dtype=np.float32)[chosen])
            elif not _numbers(chosen, part.size):
                raise ValueError(f"{chosen!r:.80} is no list of {part.size} numbers")
            else:
                columns.append(np.clip(np.asarray(chosen, np.float32), -1, 1))
        return np.concatenate(columns)[None]

    def choice(self, flat: np.ndarray) -> list[Any]:
        """The choice that a flat action (1, A) stands for."""
        edges = np.cumsum([part.size for part in self.spaces.action_parts])[:-1]
        pairs = zip(self.spaces.action_parts, np.split(flat[0], edges), strict=True)
        return [
            int(column.argmax()) if part.kind == "discrete" else column.round(3).tolist()
            for part, column in pairs
        ]


def _numbers(chosen: Any, size: int) -> bool:
    return (
        isinstance(chosen, list)
        and len(chosen) == size
        and all(type(x) in (int, float) and math.isfinite(x) for x in chosen)
    )


def _keys(parts: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Numbers and letters for the first two discrete parts; arrows for the first two numbers of the
    first continuous part, or else for the first discrete one: by name, or its first and last."""
    keys: dict[str, dict[str, Any]] = {}
    discrete = [i for i, part in enumerate(parts) if part["kind"] == "discrete"]
    for row, index in zip((NUMBERS, LETTERS), discrete, strict=False):
        for key, value in zip(row, range(parts[index]["size"]), strict=False):
            keys[key] = {"part": index, "index": value}
    numbers = [i for i, part in enumerate(parts) if part["kind"] == "continuous"]
    if numbers:
        pairs = (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowUp"))
        for dim, (low, high) in enumerate(pairs[: parts[numbers[0]]["size"]]):
            keys[low] = {"part": numbers[0], "dim": dim, "value": -1}
            keys[high] = {"part": numbers[0], "dim": dim, "value": 1}
    elif discrete:
        names = parts[discrete[0]]["names"]
        by_name = {ARROWS[n]: i for i, n in enumerate(names) if n in ARROWS}
        if "fire" in names:
            by_name["f"] = names.index("fire")
        ends = {"ArrowLeft": 0, "ArrowRight": len(names) - 1} if len(names) < 4 else {}
        for key, value in (by_name or ends).items():
            keys[key] = {"part": discrete[0], "index": value}
    return keys

"""Gymnasium's spaces as the system sees them: observations and actions, converted both ways.

What must stay true: whatever is carried comes back as the environment's own, and what cannot be
carried is refused here, with a remedy, before anything is trained.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from gymnasium import spaces as gym_spaces

# How gymnasium, numpy and Python meet what is no space.
_NO_SPACE = (
    *(ValueError, TypeError, LookupError, AssertionError, AttributeError),
    *(ArithmeticError, RecursionError),
)
MAX_SIZE = 2**22  # numbers in one observation from a file, as in a picture of 1024 x 1024 x 4
NO_STACKS = (
    "(leave frame stacking out, world models have memory; flatten what is no image, for example "
    "with gymnasium.wrappers.FlattenObservation)"
)


@dataclass(frozen=True)
class ObsSpec:
    """One observation inside the system: `kind` is image (H, W, C uint8) or vector (n float32).
    `space` is the environment's own, `path` where it is in that of all observations."""

    kind: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray] = field(compare=False)
    path: tuple[Any, ...] = ()
    space: Any = field(default=None, compare=False)

    @property
    def dtype(self) -> Any:
        return np.uint8 if self.kind == "image" else np.float32

    def of(self, raw: Any) -> Any:
        """This one among all observations `raw`, as the environment gives them."""
        return functools.reduce(operator.getitem, self.path, raw)


@dataclass(frozen=True)
class ActionPart:
    """A slice of the flat action vector: one one-hot of `size`, or `size` numbers in [-1, 1]."""

    kind: str
    size: int


class Spaces:
    """An environment's spaces as the system sees them, with the conversions both ways.

    Observations become a dict of arrays (`{"obs": ...}` for a single one): images as uint8
    (H, W, C), all else as flat float32 vectors, discrete ones as one-hots; `vectors` and `images`
    are their sorted names. Actions become one float vector of length `action_dim`: one-hots for
    Discrete, MultiDiscrete and MultiBinary, [-1, 1] for Box, concatenated for Dict and Tuple.
    `action_leaves` holds, in that order, each part's path, space and ActionParts. Raises
    ValueError, with a remedy, for spaces it cannot carry. All conversions take and return batches
    (a leading axis of environments).
    """

    def __init__(self, observation: gym_spaces.Space, action: gym_spaces.Space) -> None:
        self.observation, self.action = observation, action
        self.obs: dict[str, ObsSpec] = {}
        for path, leaf in _leaves(observation):
            name = "/".join(map(str, path)) or "obs"
            if name in self.obs:
                raise ValueError(f"two observations are named {name!r} inside: rename one of them")
            self.obs[name] = replace(_obs_spec(leaf), path=path, space=leaf)
        self.vectors, self.images = (
            [name for name, spec in sorted(self.obs.items()) if spec.kind == kind]
            for kind in ("vector", "image")
        )
        self.action_leaves = [(path, leaf, _action_parts(leaf)) for path, leaf in _leaves(action)]
        self.action_parts = tuple(part for _, _, parts in self.action_leaves for part in parts)
        self.action_dim = sum(part.size for part in self.action_parts)

    def encode_obs(self, raw: Any) -> dict[str, np.ndarray]:
        """A batch of the env's own observations -> dict of (N, *shape) arrays."""
        return {key: spec.convert(np.asarray(spec.of(raw))) for key, spec in self.obs.items()}

    def decode_action(self, flat: np.ndarray) -> Any:
        """Flat actions (N, A) -> a batch of the env's own actions. Box values are clipped."""
        values, start = {}, 0
        for path, leaf, parts in self.action_leaves:
            size = sum(part.size for part in parts)
            values[path] = _decode_leaf(leaf, parts, flat[:, start : start + size])
            start += size
        return _nest(self.action, values)

    def decode_obs(self, named: dict[str, np.ndarray]) -> Any:
        """dict of (N, *shape) arrays -> a batch of the env's own observations: `encode_obs` undone.

        What a model has drawn becomes the nearest observation of the space.
        """
        values = {spec.path: _decode_obs(spec, named[name]) for name, spec in self.obs.items()}
        return _nest(self.observation, values)

    def encode_action(self, raw: Any, normalized: bool = False) -> np.ndarray:
        """A batch of the env's own actions -> flat actions (N, A): `decode_action` undone.

        `normalized` Box actions of floats are in [-1, 1] already. Raises ValueError for others than
        the space has.
        """
        columns: list[np.ndarray] = []
        for path, leaf, parts in self.action_leaves:
            value = np.asarray(functools.reduce(operator.getitem, path, raw))
            rows = value.reshape(len(value), -1)
            if rows.shape[1] != math.prod(leaf.shape or ()):
                raise ValueError(f"the action {value[0]} is not in {leaf}")
            if isinstance(leaf, gym_spaces.Box):
                if not (normalized and np.dtype(leaf.dtype).kind == "f"):
                    rows = _unit(leaf, rows)
                columns.append(np.clip(rows, -1, 1))
                continue
            rows = rows - np.asarray(getattr(leaf, "start", 0)).reshape(-1)
            for column, part in zip(rows.T, parts, strict=True):
                one_hot = column[:, None] == np.arange(part.size)
                if not one_hot.any(-1).all():
                    raise ValueError(f"an action is not in {leaf}")
                columns.append(one_hot)
        return np.concatenate(columns, -1).astype(np.float32)

    def random_action(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Uniformly random flat actions (num, A) float32."""
        parts = [
            _one_hot(rng.integers(part.size, size=num), part.size)
            if part.kind == "discrete"
            else rng.uniform(-1, 1, (num, part.size)).astype(np.float32)
            for part in self.action_parts
        ]
        return np.concatenate(parts, -1)

    def to_json(self) -> dict[str, Any]:
        return {
            "observation": space_to_json(self.observation),
            "action": space_to_json(self.action),
        }

    @classmethod
    def from_json(cls, saved: Any) -> Spaces:
        """From what `to_json` gave. It may come from elsewhere: ValueError for all that is not."""
        made = {}
        for name in ("observation", "action"):
            try:
                made[name] = space_from_json(saved[name])
            except _NO_SPACE as error:
                said = f"{type(error).__name__} {' '.join(str(error).split()):.200}"
                raise ValueError(f"spaces.{name} is malformed: {said}") from error
        return cls(**made)

    def __reduce__(self) -> Any:
        return Spaces, (self.observation, self.action)


def _leaves(space: gym_spaces.Space, path: tuple = ()) -> Iterator[tuple[tuple, gym_spaces.Space]]:
    nested = isinstance(space, gym_spaces.Dict | gym_spaces.Tuple)
    if 0 in (space.shape or ()) or (nested and not space.spaces):  # type: ignore[attr-defined]
        where = f" at {'/'.join(map(str, path))}" if path else ""
        raise ValueError(f"space {space}{where} is empty: leave it out, or give it a part")
    if isinstance(space, gym_spaces.Dict):
        for key in sorted(space.spaces, key=str):
            if not isinstance(key, str | int):
                raise ValueError(f"a Dict space has the key {key!r}: use text or whole numbers")
            yield from _leaves(space.spaces[key], (*path, key))
    elif isinstance(space, gym_spaces.Tuple):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, index))
    else:
        yield path, space


def _nest(space: gym_spaces.Space, values: dict[tuple, Any], path: tuple = ()) -> Any:
    if isinstance(space, gym_spaces.Dict):
        return {key: _nest(part, values, (*path, key)) for key, part in space.spaces.items()}
    if isinstance(space, gym_spaces.Tuple):
        return tuple(_nest(part, values, (*path, i)) for i, part in enumerate(space.spaces))
    return values[path]


def _one_hot(index: np.ndarray, size: int) -> np.ndarray:
    if not ((index >= 0) & (index < size)).all():
        raise ValueError(f"a discrete value outside its space: {index.tolist()} of {size} values")
    return (index[..., None] == np.arange(size)).astype(np.float32)


def _obs_spec(space: gym_spaces.Space) -> ObsSpec:
    if isinstance(space, gym_spaces.Box):
        return _image_spec(space) or _vector_spec(space)
    if isinstance(space, gym_spaces.Discrete):
        n, start = int(space.n), int(space.start)
        return ObsSpec("vector", (n,), lambda x: _one_hot(x - start, n))
    if isinstance(space, gym_spaces.MultiDiscrete):
        nvec, low = space.nvec.reshape(-1), space.start.reshape(-1)

        def one_hots(x: np.ndarray) -> np.ndarray:
            columns = zip(nvec, low, x.reshape(len(x), -1).T, strict=True)
            return np.concatenate([_one_hot(column - first, n) for n, first, column in columns], -1)

        return ObsSpec("vector", (int(nvec.sum()),), one_hots)
    if isinstance(space, gym_spaces.MultiBinary):
        return _vector_spec(space)
    raise ValueError(
        f"observation space {space} is not supported: use Box, Discrete, MultiDiscrete, "
        "MultiBinary, or Dict and Tuple of these (wrap the environment to convert it)"
    )


def _vector_spec(space: Any) -> ObsSpec:
    size = int(np.prod(space.shape))
    return ObsSpec("vector", (size,), lambda x: x.reshape(len(x), size).astype(np.float32))


def _image_spec(space: gym_spaces.Box) -> ObsSpec | None:
    """An image is H x W, H x W x C or C x H x W with values in 0..255 (or floats in 0..1)."""
    shape, low, high = space.shape, float(space.low.min()), float(space.high.max())
    if low != 0 or high not in (1.0, 255.0) or len(shape) < 2:
        return None
    if high == 1.0 and not np.issubdtype(space.dtype, np.floating):
        return None
    if len(shape) > 3:
        if sorted(shape)[-2] < 8:
            return None
        what = f"has {len(shape)} axes; images have 2 or 3"
        raise ValueError(f"image observation of shape {shape} {what} {NO_STACKS}")
    if len(shape) == 2:
        height, width, channels, first = *shape, 1, False
    elif shape[2] <= 4:
        height, width, channels, first = *shape, False
    else:
        channels, height, width, first = *shape, True
    if min(height, width) < 8:
        return None
    if channels not in (1, 3):
        what = f"has {channels} channels; images have 1 or 3"
        raise ValueError(f"image observation of shape {shape} {what} {NO_STACKS}")
    scale = 255.0 if high == 1.0 else 1.0

    def convert(x: np.ndarray) -> np.ndarray:
        x = x if x.dtype == np.uint8 else np.clip(np.rint(x * scale), 0, 255).astype(np.uint8)
        return x.transpose(0, 2, 3, 1) if first else x.reshape(len(x), height, width, channels)

    return ObsSpec("image", (height, width, channels), convert)


def _action_parts(space: gym_spaces.Space) -> tuple[ActionPart, ...]:
    if isinstance(space, gym_spaces.Discrete):
        return (ActionPart("discrete", int(space.n)),)
    if isinstance(space, gym_spaces.MultiDiscrete):
        return tuple(ActionPart("discrete", int(n)) for n in space.nvec.reshape(-1))
    if isinstance(space, gym_spaces.MultiBinary):
        return (ActionPart("discrete", 2),) * int(np.prod(space.shape))
    if isinstance(space, gym_spaces.Box):
        if not space.is_bounded():
            raise ValueError(
                f"action space {space} has no finite bounds: give it some, for example with "
                "gymnasium.wrappers.TransformAction(env, lambda action: action, Box(-1, 1, "
                f"{space.shape})), and leave ClipAction out, actions are clipped already"
            )
        return (ActionPart("continuous", int(np.prod(space.shape))),)
    raise ValueError(
        f"action space {space} is not supported: use Discrete, MultiDiscrete, MultiBinary, a "
        "bounded Box, or Dict and Tuple of these (wrap the environment to convert it)"
    )


def _decode_leaf(space: Any, parts: tuple[ActionPart, ...], flat: np.ndarray) -> np.ndarray:
    if isinstance(space, gym_spaces.Discrete):
        return flat.argmax(-1) + space.start
    if isinstance(space, gym_spaces.MultiDiscrete | gym_spaces.MultiBinary):
        edges = np.cumsum([part.size for part in parts])[:-1]
        columns = [one_hot.argmax(-1) for one_hot in np.split(flat, edges, -1)]
        start = space.start if isinstance(space, gym_spaces.MultiDiscrete) else 0
        return (np.stack(columns, -1).reshape(len(flat), *space.shape) + start).astype(space.dtype)
    # In float64, and without the difference of the bounds, which can overflow.
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    unit = (np.clip(flat, -1, 1).reshape(len(flat), *space.shape).astype(np.float64) + 1) / 2
    value = np.clip(low * (1 - unit) + high * unit, low, high)
    return (value if space.dtype.kind == "f" else np.rint(value)).astype(space.dtype)


def _unit(space: gym_spaces.Box, rows: np.ndarray) -> np.ndarray:
    """Values (N, n) of a Box, of which its bounds become -1 and 1."""
    low, high = (bound.reshape(-1).astype(np.float64) for bound in (space.low, space.high))
    # Half of everything, because the difference of the bounds can overflow.
    half = np.where(high > low, high / 2 - low / 2, 1)
    unit: np.ndarray = (rows / 2 - low / 2) / half * 2 - 1
    return unit


def _decode_obs(spec: ObsSpec, value: np.ndarray) -> np.ndarray:
    space, num = spec.space, len(value)
    if isinstance(space, gym_spaces.Discrete):
        return value.argmax(-1) + space.start
    if isinstance(space, gym_spaces.MultiDiscrete):
        parts = np.split(value, np.cumsum(space.nvec.reshape(-1))[:-1], -1)
        chosen = np.stack([part.argmax(-1) for part in parts], -1).reshape(num, *space.shape)
        return (chosen + space.start).astype(space.dtype)
    if isinstance(space, gym_spaces.MultiBinary):
        return (value > 0.5).reshape(num, *space.shape).astype(space.dtype)
    if spec.kind == "image":
        first = len(space.shape) == 3 and space.shape != spec.shape
        value = (value.transpose(0, 3, 1, 2) if first else value) * (space.high.max() / 255)
    value = value.reshape(num, *space.shape)
    rounded = value if space.dtype.kind == "f" else np.rint(value)
    return np.clip(rounded, space.low, space.high).astype(space.dtype)


def space_to_json(space: gym_spaces.Space) -> dict[str, Any]:
    """A Gymnasium space as plain JSON, so that an agent can be loaded without its environment."""
    if isinstance(space, gym_spaces.Dict):
        # Pairs, because a JSON object would turn whole numbers into text.
        return {"dict": [[key, space_to_json(part)] for key, part in space.spaces.items()]}
    if isinstance(space, gym_spaces.Tuple):
        return {"tuple": [space_to_json(part) for part in space.spaces]}
    if isinstance(space, gym_spaces.Discrete):
        return {"discrete": int(space.n), "start": int(space.start)}
    if isinstance(space, gym_spaces.MultiDiscrete):
        return {
            "multi_discrete": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": np.dtype(space.dtype).name,
        }
    if isinstance(space, gym_spaces.MultiBinary):
        return {"multi_binary": space.n if isinstance(space.n, int) else list(space.n)}
    assert isinstance(space, gym_spaces.Box), space

    def bound(values: np.ndarray) -> Any:
        numbers = np.asarray(values.flat[0]) if (values == values.flat[0]).all() else values
        # JSON has no infinity: bounds that are not finite are written as text.
        return np.where(np.isfinite(numbers), numbers.astype(object), numbers.astype(str)).tolist()

    return {
        "box": [bound(space.low), bound(space.high)],
        "shape": list(space.shape),
        "dtype": np.dtype(space.dtype).name,
    }


def _shape(saved: Any) -> tuple[int, ...]:
    if not (isinstance(saved, list) and len(saved) <= 16 and all(type(n) is int for n in saved)):
        raise ValueError("a shape is a list of whole numbers")
    if not 0 < math.prod(saved) <= MAX_SIZE:
        raise ValueError(f"a part has a size that is not in 1..{MAX_SIZE}")
    return tuple(saved)


def _dtype(name: Any, kinds: str) -> Any:
    if not isinstance(name, str) or np.dtype(name).kind not in kinds:
        raise ValueError("a dtype is of no number")
    return np.dtype(name).type


def space_from_json(saved: dict[str, Any]) -> gym_spaces.Space:
    if "dict" in saved:
        return gym_spaces.Dict(
            {key: space_from_json(part) for key, part in dict(saved["dict"]).items()}
        )
    if "tuple" in saved:
        return gym_spaces.Tuple([space_from_json(part) for part in saved["tuple"]])
    if "discrete" in saved:
        return gym_spaces.Discrete(_shape([saved["discrete"]])[0], start=saved["start"])
    if "multi_discrete" in saved:
        nvec, dtype = saved["multi_discrete"], _dtype(saved.get("dtype", "int64"), "iu")
        _shape([int(np.sum(nvec))])
        return gym_spaces.MultiDiscrete(nvec, dtype=dtype, start=saved["start"])
    if "multi_binary" in saved:
        num = saved["multi_binary"]
        shape = _shape(num if isinstance(num, list) else [num])
        return gym_spaces.MultiBinary(list(shape) if isinstance(num, list) else num)
    shape, dtype = _shape(saved["shape"]), _dtype(saved["dtype"], "biuf")
    low, high = (np.broadcast_to(np.asarray(b, dtype), shape) for b in saved["box"])
    return gym_spaces.Box(low, high, shape, dtype)

"""One tiny environment for each kind of space that users bring: `space_envs:DictObs` and so on.

All play one game, so that only the spaces differ: a bit that flips at every step is shown by the
observation in whatever form its space has, and the reward, 0 to 1, says how well the action named
the bit that was shown. Episodes last 10 to 20 steps; about half of them are truncated.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


def show(space: Any, bit: int) -> Any:
    """The member of `space` that stands for a bit: one half of its numbers high, the rest low."""
    if isinstance(space, spaces.Dict):
        return {key: show(part, bit) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(show(part, bit) for part in space.spaces)
    if isinstance(space, spaces.Discrete):
        return int(space.start) + bit * (int(space.n) - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + bit * (space.nvec - 1)).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return np.full(space.shape, bit, np.int8)
    assert isinstance(space, spaces.Box)
    size = int(np.prod(space.shape))
    high = (np.arange(size) < max(1, size // 2)).reshape(space.shape) == bool(bit)
    return np.where(high, space.high, space.low).astype(space.dtype)


def closeness(space: Any, action: Any, bit: int) -> float:
    """How near an action is to the bit: 1 at the upper end of its space for 1, the lower for 0."""
    if isinstance(space, spaces.Dict):
        return float(np.mean([closeness(p, action[k], bit) for k, p in space.spaces.items()]))
    if isinstance(space, spaces.Tuple):
        parts = zip(space.spaces, action, strict=True)
        return float(np.mean([closeness(part, value, bit) for part, value in parts]))
    if isinstance(space, spaces.Box):
        unit = (action - space.low) / (space.high - space.low)
    elif isinstance(space, spaces.Discrete):
        unit = (action - int(space.start)) / (int(space.n) - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        unit = (action - space.start) / (space.nvec - 1)
    else:
        assert isinstance(space, spaces.MultiBinary)
        unit = action
    return float(1 - abs(np.mean(unit) - bit))


class Small(gymnasium.Env):
    """The game; a subclass chooses the spaces. Raises ValueError for an action not in its space."""

    observation_space: gymnasium.Space = spaces.Box(-1, 1, (2,))
    action_space: gymnasium.Space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._bit = int(self.np_random.integers(2))
        self._left = int(self.np_random.integers(10, 21))
        self._truncates = bool(self.np_random.integers(2))
        return show(self.observation_space, self._bit), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        if not self.action_space.contains(action):
            raise ValueError(f"the action {action!r} is not in {self.action_space}")
        reward = closeness(self.action_space, action, self._bit)
        self._bit, self._left = 1 - self._bit, self._left - 1
        end = self._left == 0
        obs = show(self.observation_space, self._bit)
        return obs, reward, end and not self._truncates, end and self._truncates, {}


class DictObs(Small):
    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (16, 16, 3), np.uint8), joints=spaces.Box(-1, 1, (3,))
    )


class TupleInDictObs(Small):
    observation_space = spaces.Dict(
        flag=spaces.Discrete(2),
        pair=spaces.Tuple((spaces.Box(-2, 2, (2, 2), np.float64), spaces.MultiBinary(3))),
    )


class DictAction(Small):
    action_space = spaces.Dict(gear=spaces.Discrete(3), move=spaces.Box(-1, 1, (2,)))


class MultiDiscreteAction(Small):
    action_space = spaces.MultiDiscrete([2, 3])


class MultiBinaryAction(Small):
    action_space = spaces.MultiBinary(2)


class AsymmetricAction(Small):
    action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32))


class IntegerAction(Small):
    action_space = spaces.Box(-2, 2, (1,), np.int32)


class DiscreteObs(Small):
    observation_space = spaces.Discrete(5, start=2)


class MultiDiscreteObs(Small):
    observation_space = spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]))


class MultiBinaryObs(Small):
    observation_space = spaces.MultiBinary([2, 2])


class Float64Obs(Small):
    observation_space = spaces.Box(-10, 10, (3,), np.float64)


class ScalarObs(Small):
    observation_space = spaces.Box(-1, 1, ())


class GrayImage(Small):
    observation_space = spaces.Box(0, 255, (84, 84, 1), np.uint8)


class TallImage(Small):
    observation_space = spaces.Box(0, 255, (96, 72, 3), np.uint8)


class ChannelsFirstImage(Small):
    observation_space = spaces.Box(0, 1, (3, 16, 12), np.float32)


SPACE_ENVS: dict[str, type[Small]] = {kind.__name__: kind for kind in Small.__subclasses__()}

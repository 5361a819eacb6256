"""Environments with one thing wrong each, for what `worldflux-dist envs check` says of them."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from space_envs import Small


class Odd(Small):
    """An observation and a reward of the subclass's own making."""

    observation_space: gymnasium.Space = spaces.Box(-1, 1, (2,))

    def obs(self) -> Any:
        return np.zeros(2, np.float32)

    def reward(self) -> Any:
        return 1.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.obs(), {}

    def step(self, action: Any) -> Any:
        _, _, terminated, truncated, info = super().step(action)
        return self.obs(), self.reward(), terminated, truncated, info


class Outside(Odd):
    def obs(self) -> Any:
        return np.array([0.5, 7], np.float32)


class OutsideByRounding(Odd):
    def obs(self) -> Any:
        return np.full(2, 1 + 1e-6, np.float32)


class Bright(Odd):
    observation_space = spaces.Box(0, 1, (8, 8), np.float32)

    def obs(self) -> Any:
        return np.full((8, 8), 200, np.float32)


class WiderType(Odd):
    def obs(self) -> Any:
        return np.zeros(2)


class Unholdable(Odd):
    observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)

    def obs(self) -> Any:
        return np.zeros((16, 16, 3))


class NotFinite(Odd):
    def obs(self) -> Any:
        return np.array([0, np.nan], np.float32)


class WrongShape(Odd):
    def obs(self) -> Any:
        return np.zeros(3, np.float32)


class WrongValue(Odd):
    observation_space = spaces.Discrete(3)

    def obs(self) -> Any:
        return 3


class PartMissing(Odd):
    observation_space = spaces.Dict(a=spaces.Discrete(2), b=spaces.Discrete(2))

    def obs(self) -> Any:
        return {"a": 0}


class TextReward(Odd):
    def reward(self) -> Any:
        return "one"


class NoReward(Odd):
    def reward(self) -> Any:
        return None


class ArrayReward(Odd):
    def reward(self) -> Any:
        return np.ones(1)


class Unseeded(Odd):
    def obs(self) -> Any:
        return np.random.default_rng().uniform(-1, 1, 2).astype(np.float32)


class Unbounded(Small):
    action_space = spaces.Box(-np.inf, np.inf, (2,))


class HalfBounded(Small):
    action_space = spaces.Box(np.array([0, -1], np.float32), np.array([np.inf, 1], np.float32))


class Unsupported(Small):
    observation_space = spaces.Dict(name=spaces.Text(4), x=spaces.Discrete(2))


class IntImage(Small):
    observation_space = spaces.Box(0, 7, (16, 12), np.uint8)


class FloatImage(Small):
    observation_space = spaces.Box(-1, 1, (16, 12, 3))


class Large(Small):
    observation_space = spaces.Box(0, 255, (600, 600, 3), np.uint8)


class Raises(Odd):
    def reward(self) -> Any:
        return 1 / 0


class RaisesLate(Odd):
    """In one of its lives; the fourth is the first that is stepped as in a run."""

    lives, broken_life = 0, 4

    def __init__(self) -> None:
        RaisesLate.lives += 1
        self.broken = RaisesLate.lives == RaisesLate.broken_life

    def reward(self) -> Any:
        return 1 / 0 if self.broken else 1.0


class FourThings(Small):
    def step(self, action: Any) -> Any:
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class OnlyObs(Small):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0]


class Endless(Odd):
    def step(self, action: Any) -> Any:
        return self.obs(), 0.0, False, False, {}

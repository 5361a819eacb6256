"""Tiny environments whose answers are known.

Each isolates one thing a world model must get right: EchoEnv the time convention, BanditEnv memory
and delayed, noisy credit, TMaze memory over many steps, Arm what an image shows.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class EchoEnv(gymnasium.Env):
    """The reward that arrives with obs_t is the action that went in at t; obs is pure noise.

    Box actions [-1, 1]^1 give reward a, Discrete(3) actions give reward a - 1. A model that keeps
    `state[t] = update(s, action[t], obs[t])` and `reward[t]` together reaches zero reward error;
    one that is off by a step cannot do better than the rewards' variance. Episodes are truncated
    after 10 to 20 steps, drawn anew each time.
    """

    def __init__(self, discrete: bool = False) -> None:
        self.discrete = discrete
        self.observation_space = spaces.Box(-1, 1, (2,), np.float32)
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1, 1, (1,), np.float32)

    def _noise(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._left = int(self.np_random.integers(10, 21))
        return self._noise(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._left -= 1
        reward = float(action) - 1 if self.discrete else float(action[0])
        return self._noise(), reward, False, self._left == 0, {}


class BanditEnv(gymnasium.Env):
    """Two actions in a row must both be right, and only the first observation says which.

    A context c in 0..n-1 is shown at step 0 and hidden afterwards (observation n). Right is c at
    the first step and (c + 1) mod n at the second, which ends the episode with reward 1 at
    probability 0.9 when both were right and 0.1 otherwise. The best mean return is `optimum`;
    random actions reach 0.1 + 0.8 / n^2.
    """

    optimum = 0.9

    def __init__(self, n: int = 2) -> None:
        self.n = n
        self.observation_space = spaces.Discrete(n + 1)
        self.action_space = spaces.Discrete(n)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self._context = int(self.np_random.integers(self.n))
        self._actions: list[int] = []
        return self._context, {}

    def step(self, action: Any) -> tuple[int, float, bool, bool, dict]:
        self._actions.append(int(action))
        if len(self._actions) < 2:
            return self.n, 0.0, False, False, {}
        right = self._actions == [self._context, (self._context + 1) % self.n]
        reward = float(self.np_random.random() < (self.optimum if right else 1 - self.optimum))
        return self.n, reward, True, False, {}


class TMaze(gymnasium.Env):
    """A corridor of `length` steps, at whose end one turns left or right; which of them pays 1 is
    told in the first observation alone. Without memory of it, half of the episodes pay."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def _look(self) -> np.ndarray:
        """The cue, at the beginning alone; how far it is; whether this is the end."""
        cue = self.cue if self.at == 0 else 0.0
        return np.array([cue, self.at / self.length, self.at == self.length], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.cue, self.at = float(self.np_random.choice((-1.0, 1.0))), 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.at < self.length:
            self.at += 1
            return self._look(), 0.0, False, False, {}
        pays = (action == 1) == (self.cue > 0)
        return self._look(), float(pays), True, False, {}


class Arm(gymnasium.Env):
    """An arm of two joints, seen as a picture of SIZE x SIZE; the actions turn them, with some
    inertia. It is paid for the height of its hand, and each episode takes `length` steps."""

    SIZE = 32
    LINKS = ((0.5, (230, 80, 60)), (0.42, (80, 160, 240)))  # length in half pictures, colour
    observation_space = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, length: int = 32) -> None:
        self.length = length
        at = np.linspace(-1, 1, self.SIZE)
        self._points = np.stack(np.meshgrid(at, at), -1)

    def places(self) -> list[np.ndarray]:
        """Where elbow and hand are, (x, y) in half pictures from the middle, y downwards."""
        angles = np.cumsum(self.joints)
        links = np.stack([np.cos(angles), np.sin(angles)], -1)
        return list(
            np.cumsum([link * x for link, (x, _) in zip(links, self.LINKS, strict=True)], 0)
        )

    def _look(self) -> np.ndarray:
        image, begin = np.full((self.SIZE, self.SIZE, 3), 40.0), np.zeros(2)
        for (_, color), end in zip(self.LINKS, self.places(), strict=True):
            link, rel = end - begin, self._points - begin
            share = (rel @ link / (link @ link)).clip(0, 1)
            away = np.linalg.norm(rel - share[..., None] * link, axis=-1)
            cover = ((0.09 - away) / 0.06).clip(0, 1)[..., None]
            image, begin = image * (1 - cover) + np.array(color) * cover, end
        return image.astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.joints = self.np_random.uniform(-np.pi, np.pi, 2)
        self.speeds, self.at = np.zeros(2), 0
        return self._look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.speeds = 0.9 * self.speeds + 0.15 * np.asarray(action)
        self.joints, self.at = self.joints + self.speeds, self.at + 1
        height = float(-self.places()[1][1])
        return self._look(), height, False, self.at == self.length, {}

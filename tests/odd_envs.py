"""Environments that do odd things at every moment of their lives, and that a run stands."""

from __future__ import annotations

import os
import sys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

LENGTH = 12


class Plain(gymnasium.Env):
    """Episodes of LENGTH steps; the reward is the action."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space: gymnasium.Space = spaces.Box(-1, 1, (2,))
    action_space: gymnasium.Space = spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.t = render_mode, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.obs(), self.info()

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.obs(), float(action), False, self.t >= LENGTH, self.info()

    def obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def info(self) -> Any:
        return {}


class OddInfo(Plain):
    """Infos that no vector environment can merge; `kind` says how."""

    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.kind = kind

    def info(self) -> Any:
        draw = int(self.np_random.integers(1, 6))
        return {
            "shape": {"path": np.zeros((draw, 2))},
            "keys": {f"key{draw}": draw},
            "type": {"x": [1, "one", np.ones(2), None, {"y": 1}][draw - 1]},
            "nested": {"x": {"y": np.zeros(draw)} if draw > 2 else np.zeros(draw)},
            "none": None,
        }[self.kind]


FRAMES: dict[str, Any] = {
    "none": lambda t: None,
    "text": lambda t: "a picture",
    "flat": lambda t: np.zeros(12, np.uint8),
    "empty": lambda t: np.zeros((0, 4, 3), np.uint8),
    "five axes": lambda t: np.zeros((1, 1, 8, 8, 3), np.uint8),
    "objects": lambda t: np.full((8, 8, 3), None),
    "raises": lambda t: 1 / 0,
    "raises at the third": lambda t: np.zeros((8, 9, 3), np.uint8) if t < 2 else 1 / 0,
    "exits": lambda t: sys.exit(0),
    "grows": lambda t: np.zeros((8 + t, 9, 3), np.uint8),
}
GOOD_FRAMES: dict[str, Any] = {  # all show 51 at the first step
    "list": lambda t: [np.zeros((8, 9, 3), np.uint8), np.full((8, 9, 3), 51, np.uint8)],
    "unit floats": lambda t: np.full((8, 9, 3), 0.2),
    "byte floats": lambda t: np.where(np.arange(9)[:, None] < 8, 51.0, 255.0) + np.zeros((8, 9, 3)),
    "whole": lambda t: np.full((8, 9, 3), 51, np.int64),
    "grey": lambda t: np.full((8, 9), 51, np.uint8),
    "one channel": lambda t: np.full((8, 9, 1), 51, np.uint8),
    "alpha": lambda t: np.full((8, 9, 4), 51, np.uint8),
    "channels first": lambda t: np.full((3, 8, 9), 51, np.uint8),
    "not finite": lambda t: np.where(np.arange(9)[:, None] < 8, 0.2, np.nan) + np.zeros((8, 9, 3)),
}


class OddFrames(Plain):
    def __init__(self, kind: str, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.kind = kind

    def render(self) -> Any:
        return (FRAMES | GOOD_FRAMES)[self.kind](self.t)


class DrawKills(Plain):
    """Takes its process along when it draws, and does not close."""

    def render(self) -> Any:
        os._exit(1)

    def close(self) -> None:
        raise RuntimeError("it is gone already")


class Exits(Plain):
    """Calls sys.exit(code) at a moment of its life; `episode` is the first in which it does."""

    def __init__(self, at: str, code: Any = None, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.at, self.code = at, code
        self.leave("construction")

    def leave(self, moment: str) -> None:
        if moment == self.at:
            sys.exit(self.code)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.leave("reset")
        return super().reset(seed=seed)

    def step(self, action: Any) -> Any:
        if self.t == 5:
            self.leave("step")
        return super().step(action)

    def render(self) -> Any:
        self.leave("render")

    def close(self) -> None:
        self.leave("close")


class OddRepeat(Plain):
    """`value` names what its attribute `action_repeat` is."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value

    @property
    def action_repeat(self) -> Any:
        if self.value == "raises":
            raise RuntimeError("not yet")
        if self.value == "exits":
            sys.exit(1)
        return {
            **{"none": None, "method": self.reset, "text": "4", "true": True, "zero": 0},
            **{"negative": -2, "half": 2.5, "array": np.array([2, 3]), "numpy": np.int64(3)},
        }[self.value]


class OddMetadata(Plain):
    metadata: Any = None


class Other(Plain):
    """Every one made has other spaces."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Other.made += 1
        self.action_space = spaces.Discrete(1 + Other.made)


class TakesApart(Plain):
    """Changes what it is given, at every depth."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        assert options.pop("sizes")[1].pop() == 3
        options["array"] += 1
        assert (options["array"] == 2).all()


def no_close() -> gymnasium.Env:
    """It fails at a step in the middle, and then does not close either."""

    class Both(Plain):
        def step(self, action: Any) -> Any:
            if self.t == 8 and self.np_random.uniform() < 0.5:
                raise OSError("simulator gone")
            return super().step(action)

        def close(self) -> None:
            sys.exit("gone")

    return Both()


def deep_limit() -> gymnasium.Env:
    """Two time limits inside other wrappers."""
    env = gymnasium.make("Pendulum-v1")
    env = gymnasium.wrappers.TransformReward(env, lambda reward: reward / 10)
    return gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.TimeLimit(env, 150))


class KwargsRender(Plain):
    """Registered below; its constructor takes no render_mode."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()


gymnasium.register("OddNoRender-v0", entry_point=KwargsRender, max_episode_steps=7)
gymnasium.register("OddDeepLimit-v0", entry_point=deep_limit, max_episode_steps=100)

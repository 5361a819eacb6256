"""Environments to play in: every observation tells what was done, so it is known beforehand."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
from small import ACTIONS

from worldflux_dist.envs import EnvConfig


def config(**kwargs: Any) -> EnvConfig:
    return EnvConfig(id="play_envs:Tally", kwargs=kwargs)


class Tally(gymnasium.Env):
    """Observed are the step, the sum of all actions and a number that the seed gives, or an image
    whose first pixels are these; the reward is the sum. An episode ends after `length` steps.

    `forgetful`: the number is another each time. `draws`: it has a picture of its own, or raises
    where "wrongly". `closed` and `drawings` count those of all.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}
    closed = made = drawings = 0

    def __init__(
        self,
        action: str = "discrete",
        image: bool = False,
        forgetful: bool = False,
        draws: bool | str = False,
        length: int = 100,
        render_mode: str | None = None,
    ) -> None:
        self.action_space = ACTIONS[action]
        self.image, self.forgetful, self.length = image, forgetful, length
        self.draws, self.render_mode = draws, render_mode if draws else None
        self.observation_space = (
            gymnasium.spaces.Box(0, 255, (16, 16, 3), np.uint8)
            if image
            else gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        )

    def _look(self) -> np.ndarray:
        numbers = np.array([self.at, self.total, self.cue], np.float32)
        if not self.image:
            return numbers
        picture = np.zeros((16, 16, 3), np.uint8)
        picture[0, :3, 0] = 10 * numbers
        return picture

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.at, self.total = 0, 0.0
        self.cue = int(self.np_random.integers(20))
        if self.forgetful:
            Tally.made += 1
            self.cue = Tally.made
        return self._look(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        parts = action.values() if isinstance(action, dict) else [action]
        self.total += float(sum(np.sum(part) for part in parts))
        self.at += 1
        return self._look(), self.total, self.at == self.length, False, {}

    def render(self) -> np.ndarray:
        Tally.drawings += 1
        if self.draws == "wrongly":
            raise RuntimeError("no display")
        return np.full((120, 200, 3), 10 * self.at % 250, np.uint8)

    def close(self) -> None:
        Tally.closed += 1

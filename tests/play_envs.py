"""What tests of playing share: an environment that tells what was done in it, and its playbacks."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from small import ACTIONS, make_small, perturbed

from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.models.base import State
from worldflux_dist.serve.play.playback import Playback

LEFT, STAY, RIGHT = [0], [1], [2]


def tally(**kwargs: Any) -> EnvConfig:
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


def start(
    family: str = "dreamerv3",
    seed: int = 5,
    env: EnvConfig | None = None,
    draws: bool = True,
    **options: Any,
) -> Playback:
    """A playback of a small agent in the Tally, of which no output is zero."""
    env = env or tally()
    envs = make_envs(env, 0, 1)
    spaces = envs.spaces
    envs.close()
    torch.manual_seed(0)
    agent = perturbed(make_small(family, spaces.observation, spaces.action, **options))
    return Playback(agent, env, seed, draws)


def go(playback: Playback, *choices: list[Any]) -> None:
    for choice in choices:
        assert playback.do("act", choice) and playback.do("step"), playback.notice


def tensors(state: State) -> dict[str, Any]:
    return {name: value.numpy() for name, value in state.tensors.items()}


def seen(playback: Playback) -> list[list[float]]:
    """The record's observations."""
    return [playback.record.truth(t).tolist() for t in range(playback.record.end + 1)]

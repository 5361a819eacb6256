"""Environments whose dynamics are a world model, for whatever learns in Gymnasium environments.

    gymnasium.make("worldflux_dist.serve:worldflux/Dream-v0", source="runs/demo")
    gymnasium.make_vec("worldflux_dist.serve:worldflux/Dream-v0", num_envs=64, source="runs/demo")

Spaces are those of the environment that the model learned; of a model that draws no observations
they are its features. Episodes begin at states behind replayed steps and end as likely as the model
expects it, or after `horizon` steps, as a truncation. What must stay true: a seed and the same
actions give the same episode, wherever the model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from worldflux_dist.serve.client import Client
from worldflux_dist.serve.results import Trajectories

Source = Any  # an Agent, Dreams, a run directory, a Client, or addresses as Client takes them
PLOTTED = 100  # steps of a plot


class DreamVectorEnv(VectorEnv):
    """`num_envs` dreams, rolled together.

    `source` is an Agent or Dreams of this process, a run directory, a Client or the addresses of
    one; `starts` are Chunks to begin from, for an Agent that has no run. An episode is truncated
    after `horizon` steps. It ends with the probability that the model gives, drawn from the seed,
    or where that of going on is less than `ends_below`. With more `samples` of each step infos have
    `uncertainty` (N,), their spread: the standard deviation of the next features over samples, mean
    of all.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 15,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        source: Source,
        num_envs: int = 1,
        horizon: int = 50,
        samples: int = 1,
        ends_below: float | None = None,
        starts: Sequence[Any] = (),
        render_mode: str | None = None,
    ) -> None:
        self._opened: Any = None
        self.num_envs, self.horizon, self.samples = num_envs, horizon, samples
        self.ends_below, self.render_mode = ends_below, render_mode
        self._client = open_source(source, starts)
        self._opened = None if self._client is source else self._client  # what is not the caller's
        info = self._client.model()
        if "reward" not in info.heads:
            raise ValueError(f"{info.name} predicts no rewards: there is nothing to learn in it")
        if not info.num_starts:
            raise ValueError("dreams begin from replay, of which there is none: give `starts`")
        self.spaces, self._discount = info.spaces, info.discount
        self.draws = "obs" in info.heads
        self._seen = "obs" if self.draws else "features"
        size = (info.feature_dim,)
        self.single_observation_space = (
            self.spaces.observation if self.draws else gym.spaces.Box(-np.inf, np.inf, size)
        )
        self.single_action_space = self.spaces.action
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: dict[str, np.ndarray] | None = None
        self._length = np.zeros(num_envs, int)
        self._done = np.ones(num_envs, bool)
        self._drawn: list[np.ndarray] = []

    # ------------------------------------------------------------------------------ the two calls

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        start = self._start(self.num_envs)
        self._state, seen = start.state, self._observed(start, 0)
        self._length[:], self._done[:] = 0, False
        self._drawn = []
        self._keep(seen)
        return self._own(seen), {}

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert self._state is not None, "call reset first"
        anew, infos = self._done.copy(), {}
        flat = self.spaces.encode_action(actions)
        heads = {self._seen, "reward", "continue", "state"} | (
            {"features"} if self.samples > 1 else set()
        )
        rolled = self._client.rollout(
            self._state, flat[None], samples=self.samples, seed=self._seed(), heads=sorted(heads)
        )
        assert rolled.rewards is not None and rolled.continues is not None and rolled.state
        seen, reward = self._observed(rolled, 1), rolled.rewards[0, :: self.samples].copy()
        going = rolled.continues[0, :: self.samples] / self._discount
        limit = self.np_random.random(self.num_envs) if self.ends_below is None else self.ends_below
        ended = going < limit
        self._state = {name: value[:: self.samples] for name, value in rolled.state.items()}
        self._length += 1
        if self.samples > 1:
            assert rolled.features is not None
            each = rolled.features[1].reshape(self.num_envs, self.samples, -1)
            infos = {"uncertainty": each.std(1).mean(-1)}
        if anew.any():  # whose episode had ended: the next one begins, and the action is ignored
            start = self._start(int(anew.sum()))
            assert start.state is not None
            fresh = self._observed(start, 0)
            for whole, part in ((seen, fresh), (self._state, start.state)):
                for name in whole:
                    whole[name] = whole[name].copy()
                    whole[name][anew] = part[name]
            reward[anew], ended[anew], self._length[anew] = 0, False, 0
        truncated = ~ended & (self._length >= self.horizon)
        self._done = ended | truncated
        if anew[0]:
            self._drawn = []
        self._keep(seen)
        return self._own(seen), reward.astype(np.float64), ended, truncated, infos

    def render(self) -> Any:
        """A picture of each environment: its decoded image, or curves of its numbers."""
        if self.render_mode is None or not self._drawn:
            return None
        newest = self._drawn[-1]
        if newest.ndim == 4:
            return tuple(np.broadcast_to(image, (*image.shape[:2], 3)).copy() for image in newest)
        past = np.stack(self._drawn[-PLOTTED:], 1)  # (N, t, n)
        return tuple(curves(each) for each in past)

    def close_extras(self, **_: Any) -> None:
        if self._opened is not None:
            self._opened.close()

    # -------------------------------------------------------------------------------- their parts

    def _seed(self) -> int:
        return int(self.np_random.integers(2**63))

    def _start(self, num: int) -> Trajectories:
        heads = (self._seen, "state")
        return self._client.rollout(from_replay=num, horizon=0, seed=self._seed(), heads=heads)

    def _observed(self, rolled: Trajectories, step: int) -> dict[str, np.ndarray]:
        """Observations of one step, or features, of the first sample of each row."""
        named = rolled.obs if self.draws else {"": rolled.features}
        every = self.samples if step else 1
        assert named is not None
        return {name: value[step, ::every] for name, value in named.items() if value is not None}

    def _own(self, seen: dict[str, np.ndarray]) -> Any:
        return self.spaces.decode_obs(seen) if self.draws else seen[""]

    def _keep(self, seen: dict[str, np.ndarray]) -> None:
        """For `render`: images, or the numbers of all else."""
        if self.render_mode is None:
            return
        images = [name for name in seen if self.draws and self.spaces.obs[name].kind == "image"]
        drawn = seen[images[0]] if images else np.concatenate(list(seen.values()), -1)
        self._drawn = [*self._drawn[-PLOTTED:], drawn]


class DreamEnv(gym.Env):
    """One dream; settings are those of DreamVectorEnv."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}  # noqa: RUF012

    def __init__(self, source: Source, render_mode: str | None = None, **settings: Any) -> None:
        self.render_mode = render_mode
        self._envs = DreamVectorEnv(source, 1, render_mode=render_mode, **settings)
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        obs, _ = self._envs.reset(seed=seed)
        return _first(self.observation_space, obs), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, ended, truncated, infos = self._envs.step(_batched(action))
        info = {name: float(value[0]) for name, value in infos.items()}
        row = _first(self.observation_space, obs)
        return row, float(reward[0]), bool(ended[0]), bool(truncated[0]), info

    def render(self) -> Any:
        frames = self._envs.render()
        return frames[0] if frames else None

    def close(self) -> None:
        self._envs.close()


def open_source(source: Source, starts: Sequence[Any] = ()) -> Any:
    """What answers as a Client does: the source itself where it is one."""
    if isinstance(source, Client):
        return source
    if isinstance(source, list | tuple) or (
        isinstance(source, str) and ":" in source and not Path(source).exists()
    ):
        return Client(source)
    from worldflux_dist import storage
    from worldflux_dist.agent import Agent
    from worldflux_dist.serve.dreams import Dreams
    from worldflux_dist.serve.here import Here
    from worldflux_dist.serve.run import ServedRun

    if isinstance(source, str | Path):
        return Here(ServedRun(storage.as_path(source)).dreams())
    if isinstance(source, Agent):
        return Here(Dreams(source, starts))
    if isinstance(source, Dreams):
        return Here(source)
    raise ValueError(
        f"a dream's source is no {type(source).__name__}: give an Agent, a run, a Client"
    )


def _first(space: gym.Space, batch: Any) -> Any:
    """The first row of a batch of observations, as the space has them."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _first(part, batch[key]) for key, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_first(part, batch[i]) for i, part in enumerate(space.spaces))
    row = batch[0]
    return row.copy() if isinstance(row, np.ndarray) else row


def _batched(action: Any) -> Any:
    if isinstance(action, dict):
        return {key: _batched(part) for key, part in action.items()}
    if isinstance(action, tuple):
        return tuple(_batched(part) for part in action)
    return np.asarray(action)[None]


def curves(values: np.ndarray, height: int = 200, width: int = 300) -> np.ndarray:
    """Lines of at most 6 numbers over the last steps (t, n), as a picture (h, w, 3)."""
    from PIL import Image, ImageColor, ImageDraw

    from worldflux_dist.figures import DREAM, ERROR, FAINT, INK, OPEN, PAPER, TRUTH

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    shown = values[:, :6]
    low, high = shown.min(), shown.max()
    y = (height - 10) - (shown - low) / max(high - low, 1e-6) * (height - 20)
    x = np.linspace(5, width - 5, max(len(shown), 2))
    for column, color in zip(y.T, (TRUTH, DREAM, OPEN, ERROR, FAINT, INK), strict=False):
        points = [(float(a), float(b)) for a, b in zip(x, column, strict=False)]
        if len(points) > 1:
            draw.line(points, fill=ImageColor.getrgb(color), width=2)
        draw.ellipse(
            [points[-1][0] - 2, points[-1][1] - 2, points[-1][0] + 2, points[-1][1] + 2], fill=color
        )
    return np.asarray(picture)

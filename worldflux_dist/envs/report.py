"""What a run would make of an environment, told before anything is trained: `check(config)`.

All conversions are read from Spaces and the vector environment is that of `make_envs`, so that
the report cannot disagree with a run; and the check does what a run does: it makes one environment
and closes it, steps several, and asks for pictures. What must stay true: the run is the judge. What
ends a run makes an environment not usable, what costs it episodes only is a warning, and what is
usable trains, evaluates and draws to the end.

Gymnasium's checker (`check_env`) cannot say this: it raises at float64 observations, at values
outside their bounds and at factories without a spec, which a run takes, stops at the first, and
looks at a few steps only.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces as gym_spaces
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector.utils import batch_space, iterate

from worldflux_dist.envs import make_envs
from worldflux_dist.envs.atari import is_atari
from worldflux_dist.envs.base import FAILED, FAULTS, EnvConfig, warned, what
from worldflux_dist.envs.single import Guard, builder, check_obs, number, time_limits
from worldflux_dist.spaces import ActionPart, ObsSpec, Spaces

LOOK_STEPS, LOOK_SECONDS = 300, 1.0  # of the bare environment, every value looked at
RUN_STEPS, RUN_SECONDS = 1000, 2.0  # as a run steps it, timed
SETTLE_SECONDS = 30.0  # in which one that failed fails too often or shows that it goes on
DRAW_STEPS = 20  # that are drawn, besides the last one of each episode
LARGE_OBS = 2**20  # bytes


@dataclass
class Report:
    """What `check` found. `problem` says in one sentence why the environment cannot be used."""

    env_id: str
    declared: tuple[gymnasium.Space, gymnasium.Space] | None = None
    spaces: Spaces | None = None
    action_repeat: int = 1
    time_limit: int | None = None  # steps
    steps: int = 0
    steps_per_second: float = 0.0
    episodes: list[int] = field(default_factory=list)  # steps of each one that ended
    rewards: tuple[float, float] | None = None  # least and greatest
    warnings: dict[str, str] = field(default_factory=dict)  # the first of each kind
    problem: str = ""

    @property
    def usable(self) -> bool:
        return not self.problem

    def lines(self) -> list[str]:
        """The report as text; the last line is `usable`, or what to do."""
        rows = [("env", self.env_id), *self._space_rows(), *self._run_rows()]
        rows += [("warning", text) for text in self.warnings.values()]
        width = max(len(name) for name, _ in rows)
        last = "usable" if self.usable else f"not usable: {self.problem}"
        return [f"{name:<{width}}  {text}" for name, text in rows] + [last]

    def _space_rows(self) -> list[tuple[str, str]]:
        if self.declared is None:
            return []
        observation, action = (_one_line(space) for space in self.declared)
        seen, done = [], []
        if self.spaces is not None:
            seen = [(f"  {name}", _obs_text(spec)) for name, spec in self.spaces.obs.items()]
            done = [
                (f"  {'/'.join(map(str, path)) or 'action'}", _action_text(leaf, parts))
                for path, leaf, parts in self.spaces.action_leaves
            ]
        return [("observation space", observation), *seen, ("action space", action), *done]

    def _run_rows(self) -> list[tuple[str, str]]:
        if self.rewards is None:
            return []
        ended = "none ended"
        if self.episodes:
            lengths = " to ".join(
                f"{n:,}" for n in sorted({min(self.episodes), max(self.episodes)})
            )
            ended = f"{len(self.episodes)} ended after {lengths} steps"
        limit = f"{self.time_limit:,} steps" if self.time_limit else "none known"
        return [
            ("random actions", f"{self.steps:,} steps in one environment"),
            ("step rate", f"{self.steps_per_second:,.0f} env steps/s"),
            ("episodes", ended),
            ("reward", f"{self.rewards[0]:.4g} to {self.rewards[1]:.4g} a step"),
            ("time limit", limit),
            ("action repeat", str(self.action_repeat)),
        ]

    def check_spaces(self) -> None:
        """Warn of what is carried, and perhaps not as was meant."""
        size = 0
        assert self.spaces is not None
        for name, spec in self.spaces.obs.items():
            leaf = spec.space
            size += int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
            if spec.kind == "vector" and _like_image(leaf):
                self.warnings[f"image {name}"] = (
                    f"{name} of shape {leaf.shape} looks like an image and is read as a vector: "
                    "images are H x W, H x W x C or C x H x W, with bounds 0 and 255, or 0 and 1 "
                    "for floats; declare it so if it is one"
                )
        if size > LARGE_OBS:
            self.warnings["size"] = (
                f"an observation takes {size / 2**20:.1f} MB in replay: make images smaller "
                "(gymnasium.wrappers.ResizeObservation) or leave parts out (FilterObservation)"
            )

    def check_obs(self, raw: Any) -> None:
        """Warn of oddities in one observation. Raises ValueError where a run would fail."""
        assert self.spaces is not None
        for name, spec in self.spaces.obs.items():
            leaf = spec.space
            try:
                value = spec.of(raw)
            except (KeyError, IndexError, TypeError):
                raise ValueError(f"the observation lacks {name}: return all its parts") from None
            array = np.asarray(value)
            if not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
                raise ValueError(
                    f"{name} is handed out as {array.dtype} and declared as {leaf.dtype}, which "
                    f"cannot hold it: convert it to {leaf.dtype} or declare {array.dtype}"
                )
            try:
                check_obs(leaf, value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}; hand out what its space declares") from error
            if not isinstance(leaf, gym_spaces.Box):
                continue
            if array.dtype != leaf.dtype:
                self.warnings[f"dtype {name}"] = (
                    f"{name} is handed out as {array.dtype} and declared as {leaf.dtype}: it is "
                    "converted, declare what is handed out"
                )
            outside = _outside(array, leaf)
            if outside is not None:
                fate = "clipped" if spec.kind == "image" else "passed on as it is"
                self.warnings.setdefault(
                    f"bounds {name}",
                    f"{name} takes the value {outside:.4g}, outside its declared bounds "
                    f"{_bounds(leaf)}; it is {fate}, widen the Box",
                )


def check(config: EnvConfig, seed: int = 0) -> Report:
    """Look at the environment `config.id` and step it with random actions, for some seconds.

    Never raises for what is wrong with an environment: that is the report's `problem`.
    """
    report = Report(config.id)
    with warned() as texts:
        seen = None if is_atari(config.id) else _fault(lambda: _look(config, seed, report))
        unmade = seen and not report.declared
        ran = seen if unmade else _fault(lambda: _run(config, seed, report))
    # Where the environment failed too often, the look says better why.
    cause = seen if seen and isinstance(ran, RuntimeError) else ran
    report.problem = _sentence(cause, config.id) if cause else ""
    failures = [text for text in texts if FAILED in text]
    if failures and not cause:
        report.warnings["failures"] = (
            f"{failures[0]}; {len(failures)} in {2 * report.steps:,} steps, each costs a run an "
            "episode: repair the environment"
        )
    if seen and not cause:
        report.warnings["seen"] = _sentence(seen, config.id)
    others = [text for text in texts if FAILED not in text and text not in report.problem]
    report.warnings |= {text: text for text in others}
    return report


def _fault(look: Callable[[], None]) -> BaseException | None:
    """Whatever is wrong with the environment is a result."""
    try:
        look()
    except FAULTS as error:
        return error
    return None


def _sentence(error: BaseException, env_id: str) -> str:
    text = _one_line(error) if isinstance(error, ValueError | RuntimeError) else what(error)
    return text.removeprefix(f"env {env_id}: ") or what(error)


def _look(config: EnvConfig, seed: int, report: Report) -> None:
    """Step one environment without a guard, and look at every value that it hands out."""
    make = partial(Guard, builder(config, render=False), config.id, 0, 1)
    with closing(make()) as guard:
        env = guard.env
        report.declared = env.observation_space, env.action_space
        report.spaces = Spaces(*report.declared)
        report.check_spaces()
        limits = [limit._max_episode_steps for limit in time_limits(env)]
        report.time_limit = min(limits, default=None)
        _reset(env, seed, report)
    make().close()  # as a run does that asks for its spaces only
    with closing(make()) as guard:
        env = guard.env
        first, again = (deepcopy(_reset(env, seed, report)) for _ in range(2))
        if not data_equivalence(first, again, exact=True):
            report.warnings["seed"] = (
                f"two resets with the seed {seed} gave different observations, so that no run can "
                "be repeated: call super().reset(seed=seed) and draw from self.np_random only"
            )
        rng = np.random.default_rng(seed)
        batch, ends = batch_space(env.action_space, 1), time.perf_counter() + LOOK_SECONDS
        for _ in range(LOOK_STEPS):
            flat = report.spaces.random_action(rng, 1)
            (action,) = iterate(batch, report.spaces.decode_action(flat))
            if _step(env, action, report):
                _reset(env, None, report)
            if time.perf_counter() > ends:
                break


def _reset(env: gymnasium.Env, seed: int | None, report: Report) -> Any:
    result = _call("reset", lambda: env.reset(seed=seed))
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError("reset must return two things: observation and info")
    report.check_obs(result[0])
    return result[0]


def _step(env: gymnasium.Env, action: Any, report: Report) -> bool:
    """Whether the episode ended."""
    result = _call("step", lambda: env.step(action))
    if not isinstance(result, tuple) or len(result) != 5:
        raise ValueError(
            "step must return five things: observation, reward, terminated, truncated and info"
        )
    obs, reward, terminated, truncated, _ = result
    report.check_obs(obs)
    number(reward)
    return bool(terminated or truncated)


def _call(name: str, method: Callable[[], Any]) -> Any:
    try:
        return method()
    except FAULTS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{name} raised {what(error)} ({frame.filename}:{frame.lineno}); repair the environment"
        ) from error


def _run(config: EnvConfig, seed: int, report: Report) -> None:
    """Step environments as a run does, drawing the first, and take the time.

    Rewards and episodes are those of the first. Raises RuntimeError for those that keep failing.
    """
    with closing(make_envs(config, seed, num_envs=2, render=True)) as envs:
        if report.spaces is None:
            report.spaces = envs.spaces
            report.declared = envs.spaces.observation, envs.spaces.action
            report.check_spaces()
        if is_atari(config.id):
            report.time_limit = config.max_episode_frames // config.frame_skip
            report.time_limit = min(report.time_limit, config.max_episode_steps or 10**9)
        report.action_repeat = envs.action_repeat
        rng = np.random.default_rng(seed)
        envs.step(envs.spaces.random_action(rng, 2))
        rewards, length, seconds, terminal = [0.0], 0, 0.0, False
        while (report.steps < RUN_STEPS and seconds < RUN_SECONDS) or (
            envs.failing and seconds < SETTLE_SECONDS
        ):
            begun = time.perf_counter()
            step = envs.step(envs.spaces.random_action(rng, 2))
            seconds += time.perf_counter() - begun
            report.steps += 1
            if report.steps <= DRAW_STEPS or step.is_last[0]:
                envs.render()
            if step.is_first[0]:
                continue
            rewards.append(float(step.reward[0]))
            length += 1
            if step.is_last[0]:
                report.episodes.append(length)
                length, terminal = 0, terminal or bool(step.is_terminal[0])
        report.steps_per_second = 2 * report.steps / seconds
        report.rewards = min(rewards[1:]), max(rewards[1:])
        if not report.episodes and report.time_limit is None:
            report.warnings["endless"] = (
                f"no episode ended in {report.steps:,} steps and no time limit is known: set "
                "env.max_episode_steps unless episodes end by themselves"
            )
        stays = report.time_limit
        if len(report.episodes) > 1 and len(set(report.episodes)) == 1 and not terminal:
            stays = report.episodes[0]
        if stays and stays < config.max_episode_steps:
            report.warnings["limit"] = (
                f"env.max_episode_steps={config.max_episode_steps} does nothing: a limit of its "
                f"own, {stays} steps, comes first"
            )
        if envs.failing:
            raise RuntimeError("it failed, and did not show that it goes on afterwards: repair it")


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _obs_text(spec: ObsSpec) -> str:
    shape = " x ".join(map(str, spec.shape))
    kind, reader = ("image", "image encoder") if spec.kind == "image" else ("vector of", "MLP")
    inside = f"{kind} {shape} {np.dtype(spec.dtype).name}"
    return f"{inside}; conversion: {_conversion(spec.space, spec)}; read by the {reader}"


def _conversion(leaf: Any, spec: ObsSpec) -> str:
    if isinstance(leaf, gym_spaces.Discrete | gym_spaces.MultiDiscrete):
        return "one-hot"
    done = []
    if spec.kind == "image":
        if leaf.dtype != np.uint8:
            done.append(
                "0..1 floats -> uint8" if leaf.high.max() == 1 else f"{leaf.dtype} -> uint8"
            )
        if leaf.shape != spec.shape:
            done.append(f"{'C x ' if len(leaf.shape) == 3 else ''}H x W -> H x W x C")
    else:
        if len(leaf.shape) != 1:
            done.append("flattened")
        if leaf.dtype != np.float32:
            done.append(f"{leaf.dtype} -> float32")
    return ", ".join(done) or "none"


def _action_text(leaf: Any, parts: tuple[ActionPart, ...]) -> str:
    sizes = ", ".join(str(part.size) for part in parts)
    if parts[0].kind == "discrete":
        return f"categorical of {sizes}" if len(parts) == 1 else f"categoricals of {sizes}"
    rounded = "" if leaf.dtype.kind == "f" else ", rounded"
    return f"Gaussian of {sizes}; scaled {_bounds(leaf)} <- [-1, 1]{rounded}"


def _bounds(leaf: gym_spaces.Box) -> str:
    pairs = sorted(set(zip(leaf.low.flat, leaf.high.flat, strict=True)))
    if len(pairs) > 3:
        return f"{len(pairs)} ranges within [{leaf.low.min():.4g}, {leaf.high.max():.4g}]"
    return ", ".join(f"[{low:.4g}, {high:.4g}]" for low, high in pairs)


def _like_image(leaf: Any) -> bool:
    if not isinstance(leaf, gym_spaces.Box) or len(leaf.shape) < 2:
        return False
    return sorted(leaf.shape)[-2] >= 8 and (len(leaf.shape) > 2 or leaf.dtype == np.uint8)


def _outside(array: np.ndarray, leaf: gym_spaces.Box) -> float | None:
    """A value beyond its bounds by more than a rounding."""
    value, low, high = (np.asarray(part, np.float64) for part in (array, leaf.low, leaf.high))
    rounded = np.isclose(value, low) | np.isclose(value, high)
    beyond = value[((value < low) | (value > high)) & ~rounded]
    return float(beyond[0]) if beyond.size else None

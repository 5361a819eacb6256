"""Any environment of Gymnasium or DeepMind Control, or one's own, stepped in this process.

Each environment is kept by a Guard, so that one that raises or returns nonsense costs an episode
and not the run: it is rebuilt and its episode closed as a truncation. One that keeps failing
stops the run with its name and the error.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import partial
from numbers import Integral
from types import FrameType, ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from worldflux_dist.envs.base import FAILED, FAULTS, EnvConfig, Envs, unknown, what
from worldflux_dist.envs.dmc import dmc_task, is_dmc
from worldflux_dist.spaces import Spaces

logger = logging.getLogger(__name__)

SPACES = ("observation_space", "action_space")
GOOD_RUN = 100  # steps without a failure after which earlier failures are forgotten


class Guard(gymnasium.Wrapper):
    """One environment that survives its own failures. Owns the environment and its builder.

    A failure is an exception, a non-finite reward, an observation that is not finite or not of
    the space's shape, or more than `patience` seconds in Python, in step or in reset. In a step
    the last observation is repeated with zero reward and `truncated`; the next reset builds a new
    environment. `max_failures` in a row, with no run of GOOD_RUN steps between them, raise
    RuntimeError. One that does not close is warned of.

    `failures` are those in a row, `num_failures` all. `info` is the newest; it is not handed to the
    vector environment, which can merge infos of one shape only, and nothing that is trained reads
    them.
    """

    def __init__(
        self,
        build: Callable[[], gymnasium.Env],
        name: str,
        lane: int,
        max_failures: int,
        patience: float = 0.0,
    ) -> None:
        super().__init__(build())
        # A rebuilt environment must have them too. Its own metadata is its class's: it is shared.
        for space in SPACES:
            setattr(self, space, getattr(self.env, space, None))
        own = self.env.metadata
        self.metadata = dict(own) if isinstance(own, dict) else {}
        self.info: dict[str, Any] = {}
        self._build, self._name, self._lane = build, name, lane
        self._max_failures, self._patience = max_failures, 0.0
        if patience and threading.current_thread() is threading.main_thread():
            self._patience = patience
            signal.signal(signal.SIGALRM, _interrupt)
        self.failures = self.num_failures = self._good = 0
        self._broken = False
        self._rng = np.random.default_rng()
        self._last: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            seed = int(seed)
            self._rng = np.random.default_rng(seed)
        while True:
            try:
                if self._broken:
                    self.env = self._build()
                    self._broken = False
                    seed = int(self._rng.integers(2**31))
                self._alarm(self._patience)
                obs, self.info = self.env.reset(seed=seed, options=options)
                self._alarm(0)
                check_obs(self.observation_space, obs)
            except FAULTS as error:
                self._failed(error)
            else:
                self._last = deepcopy(obs)
                return self._last, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            self._alarm(self._patience)
            obs, reward, terminated, truncated, self.info = self.env.step(action)
            self._alarm(0)
            check_obs(self.observation_space, obs)
            reward = number(reward)
            terminated, truncated = bool(terminated), bool(truncated)
        except FAULTS as error:
            self._failed(error)
            return self._last, 0.0, False, True, {}
        self._good += 1
        if self._good >= GOOD_RUN:
            self.failures = 0
        # A copy: an environment may write its next observation into the same array, then raise.
        self._last = deepcopy(obs)
        return self._last, reward, terminated, truncated, {}

    def _alarm(self, seconds: float) -> None:
        """Interrupt this thread then, if it can be; 0 takes it back."""
        if self._patience and threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def render(self) -> Any:
        """The environment's own drawing; None while it is broken."""
        try:
            self._alarm(self._patience)
            return None if self._broken else self.env.render()
        finally:
            self._alarm(0)

    def close(self) -> None:
        """Close the environment; a broken one has been closed."""
        if self._broken:
            return
        self._broken = True
        try:
            self._alarm(self._patience)
            self.env.close()
        except FAULTS as error:
            logger.warning("env %s did not close: %s", self._name, what(error))
        finally:
            self._alarm(0)

    def _failed(self, error: BaseException) -> None:
        self._alarm(0)
        self.failures += 1
        self.num_failures += 1
        self._good, self._broken = 0, True
        logger.warning(
            f"env %s lane %d{FAILED}%d of at most %d in a row): %s",
            *(self._name, self._lane, self.failures, self._max_failures, what(error)),
        )
        with suppress(*FAULTS):  # what is broken may not close either
            self.env.close()
        if self.failures >= self._max_failures:
            raise RuntimeError(
                f"env {self._name} lane {self._lane} failed {self.failures} times in a row, "
                f"last with {what(error)}; repair the environment or raise env.max_failures"
            ) from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("it did not come back in env.patience seconds")


def number(reward: Any) -> Any:
    """A reward as a number; some hand out an array of one. Raises ValueError for all else."""
    try:
        value = np.asarray(reward).item()
        if math.isfinite(np.float32(value)):
            return value
    except (TypeError, ValueError):
        value = reward
    raise ValueError(f"the reward is {value!r}: return one finite number, as float(reward)")


def check_obs(space: gymnasium.Space, obs: Any) -> None:
    """Raise ValueError where an observation has not the space's shape or kind or is not finite.

    Bounds of a Box are not enforced: many an environment oversteps its own by a rounding.
    """
    if isinstance(space, gymnasium.spaces.Dict):
        for key, part in space.spaces.items():
            check_obs(part, obs[key])
    elif isinstance(space, gymnasium.spaces.Tuple):
        for part, value in zip(space.spaces, obs, strict=True):
            check_obs(part, value)
    elif isinstance(space, gymnasium.spaces.Box):
        value = np.asarray(obs)
        if value.shape != space.shape:
            raise ValueError(f"the observation has shape {value.shape}, not {space.shape}")
        if not np.can_cast(value.dtype, np.dtype(space.dtype), "same_kind"):
            raise ValueError(f"the observation is {value.dtype}, not {space.dtype} as declared")
        if value.dtype.kind == "f" and not np.isfinite(value.astype(np.float32)).all():
            raise ValueError("the observation is not finite")
    elif not space.contains(obs):
        raise ValueError(f"the observation {obs!r} is not in {space}")


def single_envs(
    config: EnvConfig,
    seed: int,
    num_envs: int,
    render: bool,
    build: Callable[[], gymnasium.Env] | None = None,
) -> Envs:
    """`num_envs` environments of `config.id`, or those that `build` makes, each behind a Guard."""
    build = build or builder(config, render)
    limits = (config.max_failures, config.patience)
    guards = [Guard(build, config.id, lane, *limits) for lane in range(num_envs)]
    first = guards[0]
    if None in (getattr(first, name, None) for name in SPACES):
        raise ValueError(
            f"env {config.id} has no observation_space or action_space of one agent: set both as "
            "attributes; environments of several agents are not supported"
        )
    try:
        spaces = Spaces(first.observation_space, first.action_space)
    except ValueError as error:
        raise ValueError(f"env {config.id}: {error}") from None
    for other in guards:
        for name in SPACES:
            one, two = getattr(first, name), getattr(other, name)
            if one != two:
                raise ValueError(
                    f"env {config.id}: two environments made alike have the {name} {one} and {two}:"
                    " give all the same"
                )
    vector = SyncVectorEnv(
        [lambda guard=guard: guard for guard in guards],  # type: ignore[misc]
        autoreset_mode=AutoresetMode.NEXT_STEP,
    )
    draw = first.render if first.render_mode == "rgb_array" else None
    return Envs(vector, spaces, seed, action_repeat=_action_repeat(first), draw=draw)


def _action_repeat(env: gymnasium.Env) -> int:
    """The attribute `action_repeat` where it can be meant so: a whole number of at least 1."""
    try:
        value = env.get_wrapper_attr("action_repeat")
    except FAULTS:
        return 1
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if whole and value >= 1 else 1


def builder(config: EnvConfig, render: bool) -> Callable[[], gymnasium.Env]:
    """A function that makes one environment. Raises ValueError when there is none of that id."""
    module_name, _, name = config.id.rpartition(":")
    own: Callable[..., Any] | None = None
    if is_dmc(config.id):
        own = dmc_task(config)
    elif module_name:
        own = getattr(_import(module_name, config.id), name, None)
    if own is None and name not in gymnasium.registry:
        mine = "An environment of your own is named module:factory"
        raise unknown(config.id, name, gymnasium.registry, mine)
    make = partial(_make_registered, name) if own is None else partial(_make_own, own, config.id)
    if render:
        os.environ.setdefault("SDL_AUDIODRIVER", "dummy")  # pygame would open the sound card
    drawing = {}
    if render and "render_mode" not in config.kwargs and (own is None or _can_draw(own)):
        drawing = {"render_mode": "rgb_array"}

    def attempt(more: dict[str, Any]) -> gymnasium.Env:
        # A copy for each, because environments take apart what they are given.
        env, limit = make(**deepcopy(config.kwargs), **more), config.max_episode_steps
        if not limit:
            return env
        for inner in time_limits(env):
            # A shorter one is lifted: inside a wrapper that repeats actions it counts other steps.
            if inner._max_episode_steps < limit:
                inner._max_episode_steps = sys.maxsize
        return gymnasium.wrappers.TimeLimit(env, limit)

    def build() -> gymnasium.Env:
        if drawing:
            try:
                return attempt(drawing)
            except FAULTS as error:
                undrawn = what(error)
        try:
            env = attempt({})
        except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
            raise ValueError(_missing(config.id, error)) from error
        except FAULTS as error:
            raise ValueError(f"env {config.id} could not be made: {what(error)}") from error
        if drawing:
            logger.warning(
                "env %s draws nothing, since it cannot be made with render_mode='rgb_array': %s",
                *(config.id, undrawn),
            )
        return env

    return build


def _can_draw(own: Callable[..., Any]) -> bool:
    try:
        return "render_mode" in inspect.signature(own).parameters
    except (TypeError, ValueError):  # it has no signature that can be read
        return False


def time_limits(env: gymnasium.Env) -> list[gymnasium.wrappers.TimeLimit]:
    """The time limits of an environment, from the outermost to the innermost."""
    inner = time_limits(env.env) if isinstance(env, gymnasium.Wrapper) else []
    return [env, *inner] if isinstance(env, gymnasium.wrappers.TimeLimit) else inner


def _make_registered(name: str, **kwargs: Any) -> gymnasium.Env:
    if "mujoco" in str(gymnasium.registry[name].entry_point):
        import mujoco

        # Left alone, it writes every warning to stderr and to a file in the current directory.
        mujoco.set_mju_user_warning(logger.info)
    return gymnasium.make(name, disable_env_checker=True, **kwargs)


def _make_own(own: Callable[..., Any], env_id: str, **kwargs: Any) -> gymnasium.Env:
    env = own(**kwargs)
    if not isinstance(env, gymnasium.Env):
        raise ValueError(
            f"{env_id} returned a {type(env).__name__}, it must return a gymnasium.Env"
        )
    return env


def _import(module_name: str, env_id: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"env {env_id}: there is no module {error.name}; it is looked for on the Python "
                f"path and in {os.getcwd()}"
            ) from error
        raise ValueError(_missing(env_id, error)) from error
    except SystemExit as error:
        raise ValueError(
            f"env {env_id}: importing {module_name} ended with sys.exit({error.code!r}); what it "
            "does as a program, such as reading the command line, belongs below `if __name__ == "
            '"__main__":`'
        ) from error


def _missing(env_id: str, error: Exception) -> str:
    text = f"env {env_id} needs a package that is not installed: {error}"
    if "dm_control" in str(error):
        text += "; run: pip install 'worldflux_dist[dmc]'"
    return text

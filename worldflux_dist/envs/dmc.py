"""DeepMind Control: the tasks of dm_control's suite as Gymnasium environments.

dm_control is an extra and chooses its OpenGL when first imported, so it is imported only when one
of its tasks is asked for. What must stay true: a step stands for `action_repeat` control steps
and sums their rewards, and a time limit is a truncation.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from worldflux_dist.envs.base import SET_GL, EnvConfig, unknown, what

logger = logging.getLogger(__name__)

VIDEO_SIZE = 256


class DMControl(gymnasium.Env):
    """One task of a suite, for example `load(time_limit=20)`. Owns the dm_control environment.

    Observations are the task's own numbers, flat float32 in the task's order, or with
    `image_size` the view of a camera, (image_size, image_size, 3) uint8. Actions are the task's
    own Box. Raises RuntimeError, with a remedy, where it must draw and cannot.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(
        self,
        load: Callable[..., Any],
        action_repeat: int,
        image_size: int = 0,
        camera: int = 0,
        render_mode: str | None = None,
        **task_kwargs: Any,
    ) -> None:
        self.action_repeat, self.render_mode = action_repeat, render_mode
        self._image_size, self._camera = image_size, camera
        self._env = load(task_kwargs=task_kwargs)
        bounds = self._env.action_spec()
        # An actuator without limits is given as +-1e10, a range nobody can act in.
        low, high = (
            np.where(abs(bound) < 1e10, bound, np.copysign(np.inf, bound)).astype(np.float32)
            for bound in (bounds.minimum, bounds.maximum)
        )
        self.action_space = spaces.Box(low, high)
        if image_size:
            self.observation_space = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        else:
            size = sum(int(np.prod(spec.shape)) for spec in self._env.observation_spec().values())
            self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        try:  # pixels need OpenGL, and so does the terrain of quadruped-escape
            self._obs(self._env.reset())
        except Exception as error:
            raise RuntimeError(f"its first reset failed ({what(error)}); {SET_GL}") from error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self._env.task.random.seed(seed)
        return self._obs(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Up to `action_repeat` control steps, fewer where the episode ends between."""
        reward = 0.0
        for _ in range(self.action_repeat):
            time_step = self._env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        terminated = time_step.last() and time_step.discount == 0
        return self._obs(time_step), reward, terminated, time_step.last() and not terminated, {}

    def render(self) -> Any:
        return self._draw(VIDEO_SIZE) if self.render_mode else None

    def close(self) -> None:
        self._env.physics.free()

    def _obs(self, time_step: Any) -> np.ndarray:
        if self._image_size:
            return self._draw(self._image_size)
        numbers = [np.ravel(value) for value in time_step.observation.values()]
        return np.concatenate(numbers, dtype=np.float32, casting="same_kind")

    def _draw(self, size: int) -> np.ndarray:
        display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        if (os.environ.get("MUJOCO_GL") or "glfw") == "glfw" and not display:
            # dm_control would fail here too, with tracebacks from its destructors around it.
            raise RuntimeError("there is no display")
        return self._env.physics.render(size, size, camera_id=self._camera)


def is_dmc(env_id: str) -> bool:
    """Whether the id names a task of DeepMind Control: `dmc/<domain>-<task>`."""
    return env_id.startswith("dmc/")


def dmc_task(config: EnvConfig) -> Callable[..., DMControl]:
    """What makes the environment `config.id`; it takes `render_mode` and the task's own kwargs.

    Raises ValueError, with a remedy, for an unknown task, a missing dm_control, or an OpenGL that
    MUJOCO_GL asks for and that is not there.
    """
    suite = _suite(config.id)
    ids = {f"dmc/{domain}-{task}": (domain, task) for domain, task in suite.ALL_TASKS}
    if config.id not in ids:
        raise unknown(config.id, config.id, ids, "Tasks are named dmc/<domain>-<task>")
    domain, task = ids[config.id]
    return partial(
        DMControl,
        partial(suite.load, domain, task),
        action_repeat=config.dmc_action_repeat,
        image_size=config.image_size if config.dmc_obs == "pixels" else 0,
        camera=2 if domain == "quadruped" else 0,  # its camera 0 is too far away
    )


def _suite(env_id: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no display, which few tasks need
            import mujoco
            from dm_control import suite
    except ModuleNotFoundError as error:
        raise ValueError(
            f"env {env_id} needs dm_control, which is not installed ({error}); "
            "run, with Python 3.11 or 3.12: pip install 'worldflux_dist[dmc]'"
        ) from error
    except Exception as error:
        raise ValueError(
            f"env {env_id}: MUJOCO_GL={os.environ.get('MUJOCO_GL', '')} cannot be used here "
            f"({what(error)}); {SET_GL}, or unset it where nothing is drawn"
        ) from error
    # Left alone, dm_control writes every warning of the simulator to stderr.
    mujoco.set_mju_user_warning(logger.info)
    return suite

"""What every environment looks like to the rest of the system: its settings and its steps.

`Envs` turns any Gymnasium vector environment with next-step autoreset into rows of Steps. What
must stay true: the row after `is_last` is `is_first`, with a zero action and a zero reward, and
no array handed out is ever written to again.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from gymnasium.vector import VectorEnv

from worldflux_dist.data import Step
from worldflux_dist.settings import Count, Scale, Settings, Share, Text, Whole, free
from worldflux_dist.spaces import Spaces

logger = logging.getLogger(__name__)

# What the code of an environment may raise: a program written to run alone ends with sys.exit.
FAULTS = (Exception, SystemExit)
FAILED = " failed ("  # in the warning of a failure that cost an episode
SET_GL = "without a display set MUJOCO_GL=egl or MUJOCO_GL=osmesa and install that library"
LONGEST_SIDE = 1024  # pixels of a frame; larger ones are thinned out


def what(error: BaseException) -> str:
    """An error of an environment in one line."""
    if isinstance(error, SystemExit):
        return f"SystemExit: sys.exit({error.code!r}) was called"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def unknown(env_id: str, name: str, known: Iterable[str], remedy: str) -> ValueError:
    """The error of an id that there is none of, with the nearest ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(near)}" if near else ""
    return ValueError(f"unknown env {env_id}{hint}? {remedy}")


@contextmanager
def warned() -> Iterator[list[str]]:
    """What this package warns of meanwhile, as text instead of in the log."""
    texts: list[str] = []
    package, listener = logging.getLogger(__package__), logging.Handler(logging.WARNING)
    listener.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    package.addHandler(listener)
    propagated, package.propagate = package.propagate, False
    try:
        yield texts
    finally:
        package.propagate = propagated
        package.removeHandler(listener)


@dataclass(frozen=True)
class EnvConfig(Settings):
    """Which environment, how many of them, and the protocols of Atari and DeepMind Control.

    `id` is a registered Gymnasium id, `dmc/<domain>-<task>` for DeepMind Control, or
    `module:factory`; `kwargs` go to gymnasium.make, to the task or to the factory. With
    `dmc_action_repeat` 2 an episode of DeepMind Control has 500 steps. The Atari defaults are
    those of the Atari 100k benchmark (64x64 RGB, no sticky actions, up to 30 no-ops, whole
    games). The 57-game benchmark of DreamerV3 asks for image_size 96, grayscale,
    repeat_action_probability 0.25 and full_action_space.
    """

    section: ClassVar[str] = "env"

    id: Text = "CartPole-v1"
    num_envs: Count = free(8)  # per runner
    kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: Whole = free(0)  # 0: the environment's own limit
    max_failures: Count = free(5)  # failures in a row of one environment before the run stops
    patience: Scale = free(60.0)  # seconds that one step may take before it counts as a failure

    # Height and width, of Atari and of DeepMind Control's pixels
    image_size: Annotated[int, Ge(8), Le(1024)] = 64

    # DeepMind Control only
    dmc_obs: Literal["proprio", "pixels"] = "proprio"
    dmc_action_repeat: Annotated[int, Ge(1), Le(1000)] = 2  # control steps per step, rewards summed

    # Atari only
    grayscale: bool = False
    frame_skip: Annotated[int, Ge(1), Le(1000)] = 4
    repeat_action_probability: Share = 0.0
    noop_max: Annotated[int, Ge(0), Le(10_000)] = 30
    terminal_on_life_loss: bool = False
    reward_clipping: bool = False
    full_action_space: bool = False
    use_fire_reset: bool = False
    max_episode_frames: Annotated[int, Ge(1), Le(2**31 - 1)] = 108_000


# A policy: (obs, is_first, carry) -> (flat actions (N, A), carry); the carry is its own memory.
Act = Callable[[dict[str, np.ndarray], np.ndarray, Any], tuple[np.ndarray, Any]]


def random_act(spaces: Spaces, seed: int) -> Act:
    """The policy that draws uniformly from the action space: every task's baseline."""
    rng = np.random.default_rng(seed)
    return lambda obs, is_first, carry: (spaces.random_action(rng, len(is_first)), None)


class Envs:
    """N environments of one kind, stepped together. Owns the vector environment.

    `spaces` converts observations and actions, `num_envs` is N, `action_repeat` the frames that
    one step stands for. The first `step` resets every environment and ignores its action.
    `vector` is the Gymnasium vector environment, `last` its newest observations and infos: a list
    of the environments' own where each has its Guard, else as the vector environment merges them.
    """

    def __init__(
        self,
        vector: VectorEnv,
        spaces: Spaces,
        seed: int,
        action_repeat: int = 1,
        draw: Callable[[], Any] | None = None,
    ) -> None:
        self.spaces, self.num_envs, self.action_repeat = spaces, vector.num_envs, action_repeat
        self.vector, self._draw = vector, draw
        self._guards: Any = getattr(vector, "envs", ())  # Atari's has none
        self.last: tuple[Any, Any] = (None, {})
        self._shape: tuple[int, ...] = ()  # of frames
        self._failures = 0
        self._done = np.ones(self.num_envs, bool)
        self._seeds: np.ndarray = np.zeros(0)
        self._seeded = False
        self._obs: dict[str, np.ndarray] | None = None
        self.reset(seed)

    def step(self, action: np.ndarray) -> Step:
        """Flat actions (N, A) in, one Step with leading shape (N,) out.

        Environments whose episode ended in the step before are reset instead: their action is
        ignored and stored as zero. Raises RuntimeError when an environment keeps failing.
        """
        assert action.shape == (self.num_envs, self.spaces.action_dim), action.shape
        assert np.isfinite(action).all(), "actions must be finite"
        is_first = self._done
        action = np.where(is_first[:, None], 0, action).astype(np.float32)
        if self._obs is None:
            seeds: Any = None if self._seeded else self._seeds  # once: later episodes are others
            raw, infos = self.vector.reset(seed=seeds)
            self._seeded = True
            reward = np.zeros(self.num_envs)
            terminated = truncated = np.zeros(self.num_envs, bool)
        else:
            raw, reward, terminated, truncated, infos = self.vector.step(
                self.spaces.decode_action(action)
            )
        self.last = raw, [guard.info for guard in self._guards] or infos
        self._obs = self.spaces.encode_obs(raw)
        self._done = terminated | truncated
        return Step(
            obs=self._obs,
            action=action,
            reward=np.where(is_first, 0, reward).astype(np.float32),
            is_first=is_first,
            is_last=self._done,
            is_terminal=terminated,
        )

    def reset(self, seed: int | None = None) -> None:
        """Begin new episodes everywhere with the next `step`, from `seed` where it is given."""
        self._done = np.ones(self.num_envs, bool)
        self._obs = None
        if seed is not None:
            # Drawn apart, so that runners with neighbouring seeds do not share environments; 31
            # bits because the emulator's seed is a C int.
            self._seeds = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1
            self._seeded = False

    def take_failures(self) -> int:
        """How often an environment raised and was rebuilt since the last call."""
        total = sum(guard.num_failures for guard in self._guards)
        new, self._failures = total - self._failures, total
        return new

    @property
    def failing(self) -> bool:
        """Whether an environment raised and has not shown since that it goes on."""
        return any(guard.failures for guard in self._guards)

    def render(self) -> np.ndarray | None:
        """An RGB frame (H, W, 3) uint8 of environment 0 for a video.

        The environment's own drawing where `make_envs(render=True)` asked for it, else its image
        observation, else None. What goes wrong is warned of once.
        """
        if self._draw is not None:
            try:
                frame = as_frame(self._draw())
                self._shape = self._shape or frame.shape
                if frame.shape != self._shape:
                    raise ValueError(f"frames of the shapes {self._shape} and {frame.shape}")
                return frame
            except FAULTS as error:  # what cannot be drawn must not end a training run
                self._draw = None
                logger.warning(
                    "no video frames, the environment cannot draw: %s (%s)",
                    *(what(error), SET_GL),
                )
        if not self.spaces.images or self._obs is None:
            return None
        image = self._obs[self.spaces.images[0]][0]
        return np.broadcast_to(image, (*image.shape[:2], 3))

    def close(self) -> None:
        self.vector.close()


def as_frame(drawn: Any) -> np.ndarray:
    """What an environment draws, as RGB (H, W, 3) uint8.

    Taken are H x W, H x W x C and C x H x W of 1, 3 or 4 channels (the fourth is left out), floats
    in 0..1 or 0..255, whole numbers, and lists of frames, of which the newest counts. Raises
    ValueError for anything else.
    """
    if isinstance(drawn, list | tuple) and drawn and isinstance(drawn[-1], np.ndarray):
        drawn = drawn[-1]
    frame = np.asarray(drawn)
    if frame.ndim == 3 and frame.shape[2] not in (1, 3, 4) and frame.shape[0] in (1, 3, 4):
        frame = frame.transpose(1, 2, 0)
    frame = frame[..., None] if frame.ndim == 2 else frame
    fits = frame.ndim == 3 and frame.shape[2] in (1, 3, 4) and frame.dtype.kind in "buif"
    if not (fits and frame.size):
        shape = f" of shape {frame.shape} and type {frame.dtype}" if frame.ndim else ""
        raise ValueError(
            f"render returned {type(drawn).__name__}{shape}, not an array of H x W x 3 numbers"
        )
    every = -(-max(frame.shape[:2]) // LONGEST_SIDE)
    frame = frame[::every, ::every, :3]
    if frame.dtype != np.uint8:
        may_be_unit, frame = frame.dtype.kind in "bf", np.nan_to_num(frame.astype(np.float32))
        scale = 255 if may_be_unit and frame.max() <= 1 else 1
        frame = np.clip(np.rint(frame * scale), 0, 255).astype(np.uint8)
    return np.broadcast_to(frame, (*frame.shape[:2], 3)).copy()

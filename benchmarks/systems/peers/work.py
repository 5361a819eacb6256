"""What every side of a comparison does: the same task, widths and batch of noise.

It is read in each side's own process, in virtual environments that have nothing of ours, so it
needs Python and numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """What is observed and done; images (H, W, 3) are uint8, vectors float32."""

    family: str
    obs_shape: tuple[int, ...]
    num_actions: int
    continuous: bool = False
    batch: tuple[int, int] = (16, 64)
    measures: tuple[str, ...] = ("update",)

    @property
    def is_image(self) -> bool:
        return len(self.obs_shape) == 3


@dataclass(frozen=True)
class Widths:
    """A size of DreamerV3. All have 32 categoricals, 8 blocks, 255 bins, channels of 2, 3, 4 and 4
    depths, 3 layers in encoder, decoder, policy and value, 1 in the reward and continue heads."""

    deter: int
    hidden: int
    classes: int
    depth: int
    units: int


TASKS = {
    "vector": Task("dreamerv3", (4,), 2),
    "image": Task("dreamerv3", (64, 64, 3), 6),
    "tdmpc2": Task(
        "tdmpc2", (24,), 6, continuous=True, batch=(256, 4), measures=("update", "plan")
    ),
}
WIDTHS = {
    "size1m": Widths(deter=512, hidden=64, classes=4, depth=4, units=64),
    "size12m": Widths(deter=2048, hidden=256, classes=16, depth=16, units=256),
}
SIZES = {"dreamerv3": tuple(WIDTHS), "tdmpc2": ("1m", "5m")}
CATEGORICALS, BINS = 32, 255
HORIZON = 15


@dataclass(frozen=True)
class Work:
    """A task at a size on so many threads, and perhaps a GPU; travels to the sides as JSON."""

    task: str
    size: str
    threads: int
    device: str = "cpu"

    @property
    def what(self) -> Task:
        return TASKS[self.task]

    @property
    def widths(self) -> Widths:
        return WIDTHS[self.size]


@dataclass
class Made:
    """A side that is ready. Each call does one step of its measure and returns when it is done;
    `parameters` are those that are trained."""

    calls: dict[str, Callable[[], object]]
    parameters: int
    version: str = ""


def noise(task: Task, seed: int = 0) -> Arrays:
    """A (B, T) batch in which every row starts an episode and none ends: obs, action (one-hot or
    in [-1, 1]), reward, is_first, is_last and is_terminal."""
    rng, shape = np.random.default_rng(seed), task.batch
    is_first = np.zeros(shape, bool)
    is_first[:, 0] = True
    if task.is_image:
        obs = rng.integers(256, size=(*shape, *task.obs_shape), dtype=np.uint8)
    else:
        obs = rng.normal(size=(*shape, *task.obs_shape)).astype(np.float32)
    if task.continuous:
        action = rng.uniform(-1, 1, (*shape, task.num_actions)).astype(np.float32)
    else:
        action = np.eye(task.num_actions, dtype=np.float32)[
            rng.integers(task.num_actions, size=shape)
        ]
    return {
        "obs": obs,
        "action": action * ~is_first[..., None],
        "reward": rng.normal(size=shape).astype(np.float32) * ~is_first,
        "is_first": is_first,
        "is_last": np.zeros(shape, bool),
        "is_terminal": np.zeros(shape, bool),
    }

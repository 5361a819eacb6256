"""Stepping environments in tests: random and idle actions, and steps made into a chunk."""

from __future__ import annotations

import numpy as np

from worldflux_dist.data import Chunk, Step
from worldflux_dist.envs import Envs


def zeros(envs: Envs) -> np.ndarray:
    """Actions that do nothing in particular (N, A)."""
    return np.zeros((envs.num_envs, envs.spaces.action_dim), np.float32)


def stack(steps: list[Step]) -> Chunk:
    """Successive steps as one chunk (N, T)."""
    rows = [step.columns() for step in steps]
    return Chunk.from_columns({key: np.stack([row[key] for row in rows], 1) for key in rows[0]})


def collect(envs: Envs, steps: int, seed: int = 0) -> Chunk:
    """Random actions for `steps` steps."""
    rng = np.random.default_rng(seed)
    return stack([envs.step(envs.spaces.random_action(rng, envs.num_envs)) for _ in range(steps)])

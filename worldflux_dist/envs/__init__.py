"""Environments, many at once, behind one small interface: `make_envs(config, seed).step(action)`.

Everything that leaves this package obeys the time convention of data.py: one Step per call, the
last observation of an episode stored, the reset a row of its own. Numpy only, no torch.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium

from worldflux_dist.envs.atari import atari_envs, is_atari
from worldflux_dist.envs.base import Act, EnvConfig, Envs, random_act
from worldflux_dist.envs.single import single_envs

__all__ = ["Act", "EnvConfig", "Envs", "make_envs", "random_act"]


def make_envs(
    config: EnvConfig,
    seed: int,
    num_envs: int | None = None,
    render: bool = False,
    build: Callable[[], gymnasium.Env] | None = None,
) -> Envs:
    """Build `num_envs` (default `config.num_envs`) copies of the environment `config.id`, or of the
    one that `build` makes.

    Everything random follows from `seed`. `render` asks for frames from `Envs.render`; leave it
    off while training. Raises ValueError, with a remedy, for an unknown id, a missing package or
    a space that cannot be carried.
    """
    num = num_envs or config.num_envs
    if build is None and is_atari(config.id):
        return atari_envs(config, seed, num)
    return single_envs(config, seed, num, render, build)

"""Atari through ale-py's native vector environment, 1.5 times Gymnasium's loop per core.

Its defaults clip rewards, press FIRE after a reset and stack four frames, so every option is set
here from EnvConfig and none is left to it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ale_py
import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import TransformObservation

from worldflux_dist.envs.base import EnvConfig, Envs
from worldflux_dist.spaces import Spaces

gymnasium.register_envs(ale_py)


def is_atari(env_id: str) -> bool:
    """Whether the id is a game with images in Gymnasium's ALE namespace."""
    return env_id.startswith("ALE/") and env_id in gymnasium.registry


def atari_envs(config: EnvConfig, seed: int, num_envs: int) -> Envs:
    """`num_envs` games of `config.id`; frames come from the observations, drawing is not needed."""
    if config.kwargs:
        raise ValueError(
            f"env.kwargs {sorted(config.kwargs)} do nothing for {config.id}: Atari games take "
            "the named options of the env section (frame_skip, grayscale, ...)"
        )
    frames = config.max_episode_frames
    if config.max_episode_steps:
        frames = min(frames, config.max_episode_steps * config.frame_skip)
    games: Any = AtariVectorEnv(
        gymnasium.spec(config.id).kwargs["game"],
        num_envs,
        # More threads buy nothing per CPU-second; more runners do.
        num_threads=1,
        max_num_frames_per_episode=frames,
        repeat_action_probability=config.repeat_action_probability,
        full_action_space=config.full_action_space,
        continuous=False,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        img_height=config.image_size,
        img_width=config.image_size,
        grayscale=config.grayscale,
        stack_num=1,
        frameskip=config.frame_skip,
        maxpool=True,
        noop_max=config.noop_max,
        # `episodic_life` would restart the whole game at every lost life. `life_loss_info`
        # ends the episode only; the reset row that follows is one no-op in the same game.
        episodic_life=False,
        life_loss_info=config.terminal_on_life_loss,
        reward_clipping=config.reward_clipping,
        use_fire_reset=config.use_fire_reset,
    )
    shape = games.single_observation_space.shape[1:]  # (1, H, W[, 3]) -> (H, W[, 3])
    frame = gymnasium.spaces.Box(0, 255, shape, np.uint8)
    one_frame = partial(np.squeeze, axis=1)
    vector = TransformObservation(games, one_frame, single_observation_space=frame)
    spaces = Spaces(vector.single_observation_space, vector.single_action_space)
    return Envs(vector, spaces, seed, action_repeat=config.frame_skip)

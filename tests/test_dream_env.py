"""The dream environment: a Gymnasium environment like any other, whose steps are the model's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from serving import address, serving, write_run
from small import FAMILY, SIZES, make_case, make_small, perturbed, random_batch

import worldflux_dist.serve
from worldflux_dist import draws
from worldflux_dist.agent import Agent
from worldflux_dist.data import Chunk
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.models.base import State
from worldflux_dist.runner import EnvRunner
from worldflux_dist.serve.client import Client
from worldflux_dist.serve.dream_env import DreamEnv, DreamVectorEnv
from worldflux_dist.serve.dreams import Dreams
from worldflux_dist.spaces import Spaces

ID = "worldflux_dist.serve:worldflux/Dream-v0"
assert worldflux_dist.serve


def chunk_of(agent: Any) -> Chunk:
    """Steps to begin from, whatever the spaces."""
    batch = random_batch(agent.spaces, length=12)
    return Chunk.from_columns(batch.columns(), streams=np.arange(3))


def dreaming(family: str, obs: str = "vector", action: str = "discrete") -> Dreams:
    agent = make_case((family, obs, action))
    return Dreams(agent, [chunk_of(agent)])


@FAMILY
@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_gymnasiums_checker_is_content(family: str, obs: str) -> None:
    env = gym.make(ID, source=dreaming(family, obs), render_mode="rgb_array").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of bounds that are infinite
        check_env(env, skip_render_check=False)
    env.close()


@pytest.mark.parametrize("action", ["discrete", "continuous", "mixed"])
def test_a_vector_of_dreams(action: str) -> None:
    agent = perturbed(make_small("dreamerv3", "dict", action))
    dreams = Dreams(agent, [chunk_of(agent)])
    envs = gym.make_vec(ID, num_envs=4, source=dreams, horizon=3, samples=5, ends_below=0.0)
    assert isinstance(envs.unwrapped, DreamVectorEnv)
    envs.action_space.seed(0)
    obs, _ = envs.reset(seed=1)
    for t in range(8):
        assert envs.observation_space.contains(obs)
        obs, reward, ended, truncated, infos = envs.step(envs.action_space.sample())
        assert reward.shape == ended.shape == truncated.shape == (4,)
        assert (infos["uncertainty"] > 0).all()
        # Cut after three steps; the one after that is the next start.
        assert not ended.any()
        assert truncated.all() == truncated.any() == (t % 4 == 2)
        assert not reward.any() if t % 4 == 3 else reward.any()


def test_a_step_is_the_models_transition() -> None:
    """By hand: the start, one action, and what the model says of it."""
    dreams = dreaming("dreamerv3", "vector", "continuous")
    agent, model = dreams.agent, dreams.model
    envs = DreamVectorEnv(dreams, 2, ends_below=0.5)
    obs, _ = envs.reset(seed=5)
    numbers = np.random.default_rng()
    numbers.bit_generator.state = envs.np_random.bit_generator.state
    action = np.array([[0.5, -1.0], [0.0, 0.25]], np.float32)
    state = State({name: torch.tensor(value) for name, value in envs._state.items()})
    after, reward, ended, _, _ = envs.step(action)
    seed = int(numbers.integers(2**63))
    noise = torch.tensor(draws.uniform(seed, "transition", 1, 2, *model.noise_shape))[0]
    with torch.no_grad():
        want = model.transition(state, torch.tensor(action), noise)
        preds = model.decode(want).preds
        first = model.decode(state).preds["obs"]
    np.testing.assert_allclose(obs, first, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(after, preds["obs"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reward, preds["reward"], rtol=1e-6)
    going = preds["continue"].numpy() / model.discount
    assert np.array_equal(ended, going < 0.5)
    assert agent.spaces.action.contains(action[0])


def test_an_episode_ends_where_the_model_expects_it() -> None:
    agent = make_small("dreamerv3")
    last = agent.world_model.proceed[-1]
    with torch.no_grad():  # a model that expects an end everywhere
        last.weight.zero_()
        last.bias.fill_(-50.0)
    env = DreamEnv(Dreams(agent, [chunk_of(agent)]))
    env.reset(seed=0)
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    assert terminated and not truncated
    sure = DreamEnv(Dreams(agent, [chunk_of(agent)]), ends_below=0.0)
    sure.reset(seed=0)
    assert not sure.step(sure.action_space.sample())[2]
    with torch.no_grad():  # an even chance: about half of 400 end with the first step
        last.bias.zero_()
    many = DreamVectorEnv(Dreams(agent, [chunk_of(agent)]), 400)
    many.reset(seed=0)
    assert 160 < many.step(many.action_space.sample())[2].sum() < 240


def test_the_same_seed_is_the_same_dream_here_and_over_the_network() -> None:
    dreams = dreaming("dreamerv3", "dict", "discrete")
    seen = []
    with serving(dreams) as server, Client(address(server)) as client:
        for source in (dreams, client, address(server)):
            envs = DreamVectorEnv(source, 3, horizon=4, samples=2)
            obs, _ = envs.reset(seed=3)
            episode = [obs["vector"]]
            for t in range(6):
                obs, reward, *_ = envs.step(np.array([t % 3] * 3))
                episode += [obs["vector"], obs["image"], reward]
            seen.append(episode)
            envs.close()
    for other in seen[1:]:
        for one, two in zip(seen[0], other, strict=True):
            if one.dtype == np.uint8:
                assert np.abs(one.astype(int) - two).max() <= 1
            else:
                np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_pictures_are_images_or_curves() -> None:
    for obs, shape in (("image", (16, 16, 3)), ("vector", (200, 300, 3))):
        env = DreamEnv(dreaming("dreamerv3", obs), render_mode="rgb_array")
        env.reset(seed=0)
        first = env.render()
        for _ in range(5):
            env.step(env.action_space.sample())
        later = env.render()
        assert first.shape == later.shape == shape and first.dtype == np.uint8
        assert (first != later).any()


def test_a_run_directory_is_a_source(tmp_path: Path) -> None:
    cart = gym.make("CartPole-v1")
    spaces = Spaces(cart.observation_space, cart.action_space)
    write_run(tmp_path, perturbed(Agent("dreamerv3:size1m", spaces, SIZES)))
    env = gym.make(ID, source=str(tmp_path))
    assert env.observation_space == cart.observation_space
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)


def test_what_cannot_be_dreamt_is_said() -> None:
    agent = make_small("dreamerv3")
    with pytest.raises(ValueError, match="of which there is none: give `starts`"):
        DreamEnv(agent)
    assert DreamEnv(agent, starts=[chunk_of(agent)])
    with pytest.raises(ValueError, match="a dream's source is no int"):
        DreamEnv(3)
    agent.world_model.decodes_reward = False
    with pytest.raises(ValueError, match="predicts no rewards"):
        DreamEnv(agent, starts=[chunk_of(agent)])


def test_an_agent_of_ours_learns_in_a_dream() -> None:
    """Our runner collects in it as in any other environment."""
    dreams = dreaming("dreamerv3", "vector", "discrete")
    DREAMS.append(dreams)
    config = EnvConfig("test_dream_env:dream_of_a_test", num_envs=2)
    envs = make_envs(config, seed=0)
    chunk = EnvRunner(envs, random_act(envs.spaces, 0)).collect(60)
    chunk.check()
    assert chunk.is_last.any() and chunk.reward.any()
    envs.close()


DREAMS: list[Any] = []


def dream_of_a_test() -> DreamEnv:
    return DreamEnv(DREAMS[0], horizon=10)

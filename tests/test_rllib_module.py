"""The agent as an RLModule: it acts as the agent does, remembers, forgets, is sent and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module import RLModule
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from rllib_runs import check_ratio, small, until
from space_envs import DictAction, DictObs, MultiDiscreteAction, Small

from worldflux_dist.rllib import WorldFluxModule
from worldflux_dist.rllib.module import FRESH

NUM = 3
MODELS: dict[str, dict[str, Any]] = {
    "dreamerv3": {"model": "dreamerv3:tiny"},
    "tdmpc2": {
        "model": "tdmpc2:tiny",
        "model_options": {"plan_samples": 32, "plan_iterations": 2, "plan_proposals": 4},
    },
    "jepa": {"model": "jepa:tiny", "model_options": {"plan_samples": 16, "plan_horizon": 3}},
    "token": {"model": "token:tiny"},
    "diffusion": {"model": "diffusion:tiny", "model_options": {"denoise_steps": 2}},
}
NOT_FOR_ACTING = {
    "dreamerv3": {"world_model": ["decoder", "reward"], "behavior": ["critic", "slow_critic"]},
    "tdmpc2": {"world_model": [], "behavior": ["target_qs"]},
    "jepa": {"world_model": [], "behavior": ["slow_critic"]},
    "token": {"world_model": ["predictor", "heads"], "behavior": ["critic", "slow_critic"]},
    "diffusion": {"world_model": ["denoisers", "heads"], "behavior": ["critic", "slow_critic"]},
}


class Mixed(Small):
    """Many kinds of spaces at once."""

    observation_space = DictObs.observation_space
    action_space = DictAction.action_space


def build(family: str, env: type[Small] = Mixed, inference_only: bool = False) -> Any:
    torch.manual_seed(1 + inference_only)
    config = small(**MODELS[family])
    spec = config.get_rl_module_spec(
        spaces={"default_policy": (env.observation_space, env.action_space)},
        inference_only=inference_only,
    )
    module = spec.build()
    assert type(module) is WorldFluxModule
    with torch.no_grad():  # heads that are zero at first would make all plans and actions equal
        for param in module.parameters():
            param.add_(0.1 * torch.randn_like(param))
    return module


def look(space: gymnasium.Space, seed: int, num: int = NUM) -> Any:
    """A batch (num, ...) of observations."""
    space.seed(seed)
    samples = [space.sample() for _ in range(num)]
    return concatenate(space, samples, create_empty_array(space, num))


def each(function: Any, nested: Any) -> Any:
    if isinstance(nested, dict):
        return {key: each(function, value) for key, value in nested.items()}
    return function(nested)


def leaves(nested: Any) -> list[np.ndarray]:
    if isinstance(nested, dict):
        return [leaf for key in sorted(nested) for leaf in leaves(nested[key])]
    return [np.asarray(nested)]


def same(one: Any, other: Any) -> bool:
    return all(map(np.array_equal, leaves(one), leaves(other)))


def initial(module: Any, num: int = NUM) -> dict[str, torch.Tensor]:
    """The initial state as RLlib batches it."""
    return {n: torch.stack([x] * num) for n, x in module.get_initial_state().items()}


def act(module: Any, obs: Any, state: Any, greedy: bool = True, seed: int = 0) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    forward = module.forward_inference if greedy else module.forward_exploration
    out = forward({Columns.OBS: obs} | ({} if state is None else {Columns.STATE_IN: state}))
    assert out.keys() == {Columns.ACTIONS, Columns.STATE_OUT}
    return out[Columns.ACTIONS], out[Columns.STATE_OUT]


# ------------------------------------------------------------------------------------------ acting


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_it_acts_as_the_agent_does(family: str, greedy: bool) -> None:
    """Over some steps, in which the second of three environments begins a new episode."""
    module = build(family)
    agent, space = module.agent, Mixed.observation_space
    state: Any = None
    carry: Any = None
    for t in range(5):
        obs = look(space, t)
        first = np.array([t == 0, t in (0, 2), t == 0])
        if t == 2:  # as RLlib does: the new episode's row has the initial state
            for name, value in module.get_initial_state().items():
                state[name][1] = value
        actions, state = act(module, obs, state, greedy, seed=t)
        torch.manual_seed(t)
        flat, carry = agent.act_batch(agent.spaces.encode_obs(obs), first, carry, greedy)
        assert same(actions, agent.spaces.decode_action(flat))
        assert state.keys() == carry.keys() | {FRESH}
        assert all(torch.equal(state[name], value) for name, value in carry.items())
        assert not state[FRESH].any()
        numbers = each(lambda x: x.numpy(), actions)
        for action in iterate(batch_space(Mixed.action_space, NUM), numbers):
            assert Mixed.action_space.contains(action)


@pytest.mark.parametrize("family", MODELS)
def test_memory_matters_until_an_episode_begins(family: str) -> None:
    module, space = build(family), Mixed.observation_space
    _, one = act(module, look(space, 0), None)
    _, other = act(module, look(space, 1), None)
    _, after_one = act(module, look(space, 2), one)
    _, after_other = act(module, look(space, 2), other)
    names = [name for name in one if name.startswith("state/")]
    fresh, _ = act(module, look(space, 2), initial(module))
    memories = [torch.cat([s[n].flatten() for n in names]) for s in (after_one, after_other)]
    assert not torch.equal(*memories)
    for state in (one, other):
        forgetful = state | {FRESH: torch.ones(NUM)}
        assert same(act(module, look(space, 2), forgetful)[0], fresh)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("tensors", [True, False])
def test_a_time_axis_changes_nothing_else(family: str, greedy: bool, tensors: bool) -> None:
    """RLlib gives stateful modules (B, T = 1, ...), as tensors; a user's loop often (B, ...)."""
    module = build(family)
    plain_state, timed_state = None, initial(module)
    for t in range(3):
        obs = look(Mixed.observation_space, t)
        timed = each(lambda x: torch.as_tensor(x[:, None]) if tensors else x[:, None], obs)
        plain, plain_state = act(module, obs, plain_state, greedy, seed=t)
        found, timed_state = act(module, timed, timed_state, greedy, seed=t)
        assert same(each(lambda x: x[:, 0], found), plain)
        assert all(value.shape[:2] == (NUM, 1) for value in leaves(found))
        assert all(torch.equal(value, timed_state[name]) for name, value in plain_state.items())


@pytest.mark.parametrize("space", ["scalar", "discrete", "vector", "image"])
def test_every_shape_of_observation_may_have_a_time_axis(space: str) -> None:
    class Env(Small):
        observation_space = {
            "scalar": gymnasium.spaces.Box(-1, 1, ()),
            "discrete": gymnasium.spaces.Discrete(4),
            "vector": gymnasium.spaces.MultiDiscrete([1, 3]),
            "image": gymnasium.spaces.Box(0, 255, (16, 16), np.uint8),
        }[space]

    module = build("dreamerv3", Env)
    obs = look(Env.observation_space, 0)
    plain, _ = act(module, obs, None)
    timed, _ = act(module, obs[:, None], initial(module))
    assert plain.shape == (NUM,) and timed.shape == (NUM, 1)
    assert same(timed[:, 0], plain)


@pytest.mark.parametrize("family", MODELS)
def test_the_initial_state_has_no_batch_axis(family: str) -> None:
    module = build(family)
    assert module.is_stateful()
    state = module.get_initial_state()
    carry = module.agent.initial_carry(NUM)
    assert state.keys() == carry.keys() | {FRESH}
    assert {name: value.shape for name, value in carry.items()} == {
        name: (NUM, *value.shape) for name, value in state.items() if name != FRESH
    }
    obs = look(Mixed.observation_space, 0)
    assert same(act(module, obs, None)[0], act(module, obs, initial(module))[0])


def test_exploring_draws_and_acting_does_not() -> None:
    module = build("dreamerv3", MultiDiscreteAction)
    obs = look(MultiDiscreteAction.observation_space, 0, 32)
    greedy = [act(module, obs, None, greedy=True, seed=seed)[0] for seed in range(2)]
    drawn = [act(module, obs, None, greedy=False, seed=seed)[0] for seed in range(2)]
    assert greedy[0].shape == (32, 2)
    assert not same(*drawn)
    assert not same(greedy[0], drawn[0])


class Shown(gymnasium.Env):
    """Shows the last action."""

    observation_space = gymnasium.spaces.Box(-9, 19, (2,), np.float32)
    action_space = gymnasium.spaces.Box(np.array([-1, 0], "f"), np.array([3, 10], "f"))

    def __init__(self, config: Any) -> None:
        self.left = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.left = 9
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.left -= 1
        return action, 0.0, self.left == 0, False, {}


def test_rllibs_own_runner_acts_with_it() -> None:
    """Its connectors leave our actions as they are: those of the environment already."""
    config = small(**MODELS["dreamerv3"]).environment(Shown)
    runner = SingleAgentEnvRunner(config=config)
    episodes = runner.sample(num_episodes=5)
    assert len(episodes) >= 5
    for episode in episodes:
        assert len(episode) == 9
        np.testing.assert_array_equal(episode.get_observations()[1:], episode.get_actions())
        assert not episode.get_extra_model_outputs(Columns.STATE_OUT)[FRESH].any()
    actions = np.concatenate([episode.get_actions() for episode in episodes])
    assert actions[:, 0].max() > 1.5 and actions[:, 1].max() > 6


def test_training_it_by_hand_is_refused() -> None:
    module = build("dreamerv3")
    with pytest.raises(RuntimeError, match="trained by WorldFluxLearner"):
        module.forward_train({})


# ------------------------------------------------------------------------------ sent and saved


@pytest.mark.parametrize("family", MODELS)
def test_runners_hold_what_acting_needs(family: str) -> None:
    full, acting = build(family), build(family, inference_only=True)
    for part, names in NOT_FOR_ACTING[family].items():
        for name in names:
            assert hasattr(getattr(full.agent, part), name)
            assert not hasattr(getattr(acting.agent, part), name)
    state = full.get_state(inference_only=True)
    assert state.keys() == acting.get_state().keys() < full.get_state().keys()
    assert not any(isinstance(value, torch.Tensor) for value in state.values())
    obs = look(Mixed.observation_space, 0, 16)
    before = act(acting, obs, None)[0]
    wanted = act(full, obs, None)[0]
    assert not same(before, wanted)
    for given in (state, full.get_state()):  # more than is needed does no harm
        acting.set_state(given)
        actions, carry = act(acting, obs, None)
        assert same(actions, wanted)
        assert same(act(acting, obs, carry)[0], act(full, obs, act(full, obs, None)[1])[0])
    with pytest.raises(ValueError, match="missing keys"):
        acting.set_state(dict(list(state.items())[1:]))


@pytest.mark.parametrize("inference_only", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_it_comes_back_from_a_file(family: str, inference_only: bool, tmp_path: Path) -> None:
    module = build(family, inference_only=inference_only)
    path = module.save_to_path(tmp_path / "saved")
    torch.manual_seed(9)
    again = RLModule.from_checkpoint(path)
    assert type(again) is WorldFluxModule and again.inference_only == inference_only
    assert again.agent.recipe == module.agent.recipe
    assert same(again.get_state(), module.get_state())
    state, other = None, None
    for t in range(2):
        obs = look(Mixed.observation_space, t)
        actions, state = act(module, obs, state)
        found, other = act(again, obs, other)
        assert same(actions, found)


@pytest.mark.ray
def test_an_algorithms_checkpoint_holds_it(built: Any, tmp_path: Path) -> None:
    """Without replay the checkpoint is small, and training goes on from it."""
    algo = built(small(checkpoint_replay=False, num_replay_shards=1))
    before = algo.get_module().get_state()
    algo.train()
    path = Path(algo.save_to_path(tmp_path / "saved"))
    module = algo.get_module()
    assert not same(before, module.get_state())
    saved = path / "learner_group" / "learner" / "rl_module" / "default_policy"
    again = RLModule.from_checkpoint(saved)
    obs = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    state, other = None, None
    for _ in range(2):
        actions, state = act(module, obs, state)
        found, other = act(again, obs, other)
        assert same(actions, found)
    assert not (path / "replay").exists()
    steps = algo.limiter.gradient_steps
    restored = Algorithm.from_checkpoint(str(path))
    try:
        check_ratio(until(lambda r: r["gradient_steps"] > steps, restored))
    finally:
        restored.stop()

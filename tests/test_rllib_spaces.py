"""Spaces with which RLlib's own DreamerV3 fails: each trains and acts here as any other."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.utils.test_utils import check_train_results_new_api_stack
from rllib_runs import check_ratio, small
from space_envs import SPACE_ENVS

pytestmark = pytest.mark.ray

NUM_ENVS = 4
TINY = {"deter": 32, "hidden": 16, "groups": 4, "classes": 4, "units": 16, "depth": 2}


def registered(kind: type[gymnasium.Env]) -> str:
    name = f"ours-{kind.__name__}"
    tune.register_env(name, as_class(kind))
    return name


def as_class(kind: type[gymnasium.Env]) -> type[gymnasium.Env]:
    """RLlib hands a class, or what is registered, the env_config."""

    class Configured(kind):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any) -> None:
            assert config == {"level": 3} and config.worker_index == 0

    return Configured


def by_name(kind: type[gymnasium.Env]) -> str:
    return f"{__name__}:{kind.__name__}"


def both(obs: str, action: str) -> type[gymnasium.Env]:
    """An environment with the observations of one and the actions of another."""
    seen, acted = SPACE_ENVS[obs], SPACE_ENVS[action]
    spaces = {"observation_space": seen.observation_space, "action_space": acted.action_space}
    return type(f"{obs}{action}", (seen,), spaces)


Float64ObsDictAction = both("Float64Obs", "DictAction")  # by_name finds it here
CASES = {
    "registered": (both("DictObs", "MultiDiscreteAction"), registered),  # an image and a vector
    "class": (both("DiscreteObs", "DiscreteObs"), as_class),
    "name": (Float64ObsDictAction, by_name),
    "image": (both("GrayImage", "GrayImage"), registered),  # 84 x 84
}


@pytest.mark.parametrize("case", CASES)
def test_spaces_train_and_act(built: Any, case: str) -> None:
    kind, given = CASES[case]
    config = small(
        model_options=TINY | {"warmup": 2}, train_ratio=4, prefill=64, num_replay_shards=1
    )
    config.environment(given(kind), env_config={} if given is by_name else {"level": 3})
    config.min_sample_timesteps_per_iteration = 120
    algo = built(config)
    for _ in range(2):
        result = check_train_results_new_api_stack(algo.train())
        check_ratio(result, ratio=4)
        learned = result["learners"][DEFAULT_MODULE_ID]
        assert np.isfinite([learned["loss"], learned["loss/policy"]]).all()
        assert 0 <= result["env_runners"]["episode_return_mean"] <= 20
        assert 10 <= result["env_runners"]["episode_len_mean"] <= 20
    module = algo.get_module()
    obs_space, action_space = kind.observation_space, kind.action_space
    assert module.observation_space == obs_space and module.action_space == action_space
    obs, state = batch(obs_space), None
    for _ in range(2):
        out = module.forward_inference(
            {Columns.OBS: obs} | ({} if state is None else {Columns.STATE_IN: state})
        )
        state = out[Columns.STATE_OUT]
        actions = list(iterate(batch_space(action_space, NUM_ENVS), numpy(out["actions"])))
        assert len(actions) == NUM_ENVS
        assert all(action_space.contains(action) for action in actions), actions


def batch(space: gymnasium.Space) -> Any:
    """Observations of `NUM_ENVS` environments, stacked as a vector environment does."""
    space.seed(0)
    samples = [space.sample() for _ in range(NUM_ENVS)]
    return concatenate(space, samples, create_empty_array(space, NUM_ENVS))


def numpy(nested: Any) -> Any:
    if isinstance(nested, dict):
        return {key: numpy(value) for key, value in nested.items()}
    assert isinstance(nested, torch.Tensor)
    return nested.numpy()

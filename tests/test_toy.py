"""The toy environments are what their docstrings say."""

from __future__ import annotations

import numpy as np
import pytest
from env_steps import collect, zeros

from worldflux_dist.envs import EnvConfig, make_envs

TOY = "toy_envs"


@pytest.mark.parametrize("discrete", [False, True])
def test_echo_env_answers_the_action_that_went_in(discrete: bool) -> None:
    config = EnvConfig(f"{TOY}:EchoEnv", 4, {"discrete": discrete})
    chunk = collect(make_envs(config, seed=0), 300)
    chunk.check()
    echo = chunk.action.argmax(-1) - 1 if discrete else chunk.action[..., 0]
    echo = np.where(chunk.is_first, 0, echo)
    np.testing.assert_allclose(chunk.reward, echo, atol=1e-6)
    assert np.abs(chunk.reward[:, 1:] - echo[:, :-1]).mean() > 0.3  # one step off is far off
    lengths = np.diff(np.flatnonzero(chunk.is_first[0]))
    assert 11 <= lengths.min() < lengths.max() <= 21
    assert not chunk.is_terminal.any()
    assert chunk.is_last.any()


@pytest.mark.parametrize("n", [2, 3])
def test_bandit_env_optimum_and_chance(n: int) -> None:
    envs = make_envs(EnvConfig(f"{TOY}:BanditEnv", 64, {"n": n}), seed=0)
    rng = np.random.default_rng(0)

    def mean_return(policy: str) -> float:
        total, episodes, context = 0.0, 0, np.zeros(64, int)
        step = envs.step(zeros(envs))
        for _ in range(60):
            seen = step.obs["obs"].argmax(-1)
            context = np.where(step.is_first, seen, context)
            assert (seen[~step.is_first] == n).all()
            right = (context + ~step.is_first) % n
            action = np.eye(n, dtype=np.float32)[right]
            step = envs.step(envs.spaces.random_action(rng, 64) if policy == "random" else action)
            total, episodes = total + step.reward.sum(), episodes + step.is_terminal.sum()
        while not step.is_last.all():
            step = envs.step(zeros(envs))
        return total / episodes

    assert mean_return("best") == pytest.approx(0.9, abs=0.04)
    assert mean_return("random") == pytest.approx(0.1 + 0.8 / n**2, abs=0.05)

"""The whole system in one process: it learns, repeats itself exactly and keeps time aligned."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_task
from small import (
    ARCHITECTURE,
    FAMILY,
    VARIANTS,
    family_batch,
    make_agent,
    make_small,
    perturbed,
    random_batch,
)

from worldflux_dist import local
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import WorldModel, create_from_spaces
from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig
from worldflux_dist.runner import EnvRunner
from worldflux_dist.spaces import Spaces

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.nightly  # by day it is solved through Ray alone, in test_distributed.py
@pytest.mark.learning
def test_the_toy_task_is_solved_in_one_process(tmp_path: Path) -> None:
    settings = toy_task.make_config(tmp_path)
    result = local.train(settings)
    toy_task.check_solved(result.evaluation, result.random)
    toy_task.check_ratio(settings, result.limiter.env_steps, result.limiter.gradient_steps)


def losses_of(settings: local.Config) -> list[tuple[int, float]]:
    seen: list[tuple[int, float]] = []
    local.train(settings, lambda env_steps, metrics: seen.append((env_steps, metrics["loss"])))
    return seen


@pytest.mark.learning
def test_one_seed_gives_one_run_and_another_seed_another(tmp_path: Path) -> None:
    short = ("train.env_steps=384", "train.prefill=256", "train.train_ratio=7.5")
    settings = toy_task.make_config(tmp_path, *short, "train.eval_episodes=2")
    first = losses_of(settings)
    assert len(first) == 384 * 7.5 // 192
    assert first[0][0] >= 256
    assert losses_of(settings) == first
    other = losses_of(toy_task.make_config(tmp_path, *short, "train.eval_episodes=2", "seed=1"))
    assert [loss for _, loss in other] != [loss for _, loss in first]


# ------------------------------------------------------------------------------- alignment


ECHO: dict[str, dict[str, Any]] = {
    "dreamerv3": {"deter": 64, "hidden": 32, "groups": 4, "classes": 4, "units": 32, "blocks": 4}
    | {"learning_rate": 4e-3, "warmup": 20},
    "tdmpc2": {},
    "jepa": {"learning_rate": 4e-3, "warmup": 20},
    "token": {"learning_rate": 2e-3, "warmup": 20},
    "diffusion": {"learning_rate": 4e-3, "warmup": 20},
}
ECHO |= {name: more | ECHO[family] for name, (family, more) in VARIANTS.items()}


def trained_on_echo(family: str, runner: EnvRunner, spaces: Spaces, steps: int) -> WorldModel:
    """A small world model fitted to random play, through the runner and replay."""
    torch.manual_seed(0)
    name, _ = VARIANTS.get(family, (family, {}))
    model = create_from_spaces(f"{name}:tiny", spaces, **ECHO[family])
    optimizer = model.optimizer(list(model.parameters()))
    replay = ReplayBuffer(ReplayConfig(batch_size=64, batch_length=4, capacity=8192))
    for _ in range(16):
        replay.add(runner.collect(64))
    for _ in range(steps):
        losses = model.loss(replay.sample().map(torch.from_numpy)).losses
        loss = sum(model.loss_scales.get(name, 1.0) * part.mean() for name, part in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.learning
@pytest.mark.parametrize("discrete", [False, True])
@ARCHITECTURE
def test_state_and_reward_of_one_index_belong_together(family: str, discrete: bool) -> None:
    """EchoEnv's reward is the action that went in: one step off, it cannot be predicted."""
    config = EnvConfig("toy_envs:EchoEnv", 8, {"discrete": discrete})
    envs = make_envs(config, seed=0)
    runner = EnvRunner(envs, random_act(envs.spaces, 0))
    model = trained_on_echo(family, runner, envs.spaces, 300)
    fresh = runner.collect(100)
    predicted = np.zeros_like(fresh.reward)
    state = model.initial(envs.num_envs)
    with torch.no_grad():
        for t in range(100):
            first = torch.from_numpy(fresh.is_first[:, t])
            obs = {key: value[:, t] for key, value in fresh.obs.items()}
            state = model.update(state, torch.from_numpy(fresh.action[:, t]), obs, first)
            predicted[:, t] = model.decode(state, ("reward",)).preds["reward"].numpy()
    acted = ~fresh.is_first
    error = np.abs(predicted - fresh.reward)[acted].mean()
    both = acted[:, 1:] & acted[:, :-1]
    late = np.abs(predicted[:, :-1] - fresh.reward[:, 1:])[both].mean()
    early = np.abs(predicted[:, 1:] - fresh.reward[:, :-1])[both].mean()
    assert error < 0.05
    assert min(late, early) > 0.5


# ---------------------------------------------------------------------------------- golden


def golden_run(family: str) -> dict[str, list[float]]:
    """Every loss of 20 learner steps on one made-up batch, in float32 on one thread."""
    torch.manual_seed(0)
    if family == "dreamerv3":
        agent = perturbed(make_agent("disc", learning_rate=1e-3, warmup=5), seed=0)
        batch = random_batch(agent.spaces, seed=0)
    else:
        agent = perturbed(make_small(family, "dict", "mixed", learning_rate=1e-3), seed=0)
        batch = family_batch(agent)
    learner = Learner(agent, LearnerConfig(device="cpu"))
    torch.manual_seed(1)
    history = [learner.step(batch) for _ in range(20)]
    names = [name for name in history[0] if name.startswith("loss")]
    return {name: [float(f"{step[name]:.7g}") for step in history] for name in names}


@FAMILY
def test_learning_has_not_changed(family: str) -> None:
    """A change that means to alter learning writes the values anew:
    python tests/test_local.py FAMILY"""
    want, got = json.loads((GOLDEN / f"{family}.json").read_text()), golden_run(family)
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:]:
        rows = ",\n".join(f'"{name}": {values}' for name, values in golden_run(chosen).items())
        (GOLDEN / f"{chosen}.json").write_text(f"{{\n{rows}\n}}\n")

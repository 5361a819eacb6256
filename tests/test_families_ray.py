"""JEPA, Token and Diffusion models through Ray, in both modes of imagination: some gradient steps,
a checkpoint, and the agent in it. The other families have the longer runs of test_distributed.py
and test_one_machine.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import a_ray
from test_spaces_train import FAMILIES
from toy_run import read_metrics

from worldflux_dist import config
from worldflux_dist.agent import Agent
from worldflux_dist.distributed import trainer

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with a_ray(4, 200):
        yield


@pytest.mark.parametrize("mode", ["fused", "actors"])
@pytest.mark.parametrize("family", ["jepa", "token", "diffusion"])
def test_a_family_trains_in_both_modes(family: str, mode: str, tmp_path: Path) -> None:
    given: dict[str, Any] = FAMILIES[family] | {
        "env": {"id": "CartPole-v1", "num_envs": 2},
        "train": {
            **{"env_steps": 256, "prefill": 96, "train_ratio": 1, "eval_every": 0},
            **{"eval_episodes": 2, "checkpoint_every": 0},
        },
        "scale": {"chunk_length": 8, "num_runners": 1, "num_shards": 1},
        "imagination": {"mode": mode},
    }
    settings = config.from_dict(given)
    trainer.train(settings, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["gradient_steps"] >= 10
    assert last["train_ratio/achieved"] == pytest.approx(1, rel=0.2)
    names = {name for line in read_metrics(tmp_path / "run") for name in line}
    assert {"loss/reward", "loss/policy", "return_imagined"} <= names
    apart = list((tmp_path / "run" / "checkpoints").glob("*/learner-behavior.json"))
    assert bool(apart) == (mode == "actors")
    agent = Agent.load(str(tmp_path / "run"))
    assert agent.act(np.zeros(4, np.float32)) in (0, 1)

"""A cluster of three nodes trains the toy task with two processes of every role."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import toy_task
from ray_cluster import nodes
from toy_run import read_metrics

from worldflux_dist.agent import Agent
from worldflux_dist.distributed import trainer

pytestmark = pytest.mark.ray

TWO_OF_EACH = ("scale.num_learners=2", "learner.device=cpu")
ACTORS = (
    "imagination.mode=actors",
    "imagination.num_imaginers=2",
    "imagination.num_policy_learners=2",
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with nodes([4, 4, 4], quick=False):
        yield


SHORT = (
    "train.env_steps=640",
    "train.prefill=384",
    "train.eval_every=0",
    "train.train_ratio=8",
    "train.eval_episodes=4",
    "train.threshold=null",
)


@pytest.mark.parametrize(
    ("mode", "solved"),
    [
        ("actors", False),  # with the same learners of the model, and more
        pytest.param("fused", True, marks=pytest.mark.nightly),
        pytest.param("actors", True, marks=pytest.mark.nightly),
    ],
)
def test_three_nodes_train(cluster: None, tmp_path: Path, mode: str, solved: bool) -> None:
    """With two processes of every role; at night until the task is solved."""
    overrides = (*TWO_OF_EACH, *(ACTORS if mode == "actors" else ()), *(() if solved else SHORT))
    settings = toy_task.make_config(tmp_path, *overrides)
    outcome = trainer.train(settings, tmp_path / "run", plain=True)
    assert outcome is not None
    if solved:
        toy_task.check_run_solved(tmp_path / "run", outcome)
    lines = read_metrics(tmp_path / "run")
    last = lines[-1]
    toy_task.check_ratio(settings, int(last["env_steps"]), int(last["gradient_steps"]))
    assert {name: last[f"restarts/{name}"] for name in ("runner", "shard", "learner")} == {
        "runner": 0,
        "shard": 0,
        "learner": 0,
    }
    if mode == "actors":
        assert last["restarts/imaginer"] == 0
        for role in ("imaginer", "policy"):  # the last line may cover an instant with nothing to do
            assert max(line[f"busy/{role}"] for line in lines) > 0
    assert not ray.is_initialized()
    agent = Agent.load(tmp_path / "run")
    assert agent.behavior is not None

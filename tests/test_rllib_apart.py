"""An RLlib algorithm whose policy learns apart, with processes of every role, which are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from rllib_runs import check_ratio, same, small, until, weights

pytestmark = pytest.mark.ray


RATIO = 2  # the learners' processes leave something to those that start again


@pytest.fixture(scope="module")
def algo(ray_local: None) -> Iterator[Any]:
    config = small(1, 1, num_imagination_actors=1, num_policy_learners=2, train_ratio=RATIO)
    found = config.learners(num_cpus_per_learner=0.5).build_algo()
    yield found
    found.stop()


def test_the_policy_learns_apart(algo: Any, tmp_path: Path) -> None:
    result = until(lambda r: r["gradient_steps"] >= 32, algo)
    check_ratio(result, RATIO)
    assert result["num_imagined_steps_lifetime"] > 0
    (model,), policy = weights(algo), weights(algo, algo.policy.group)
    assert len(policy) == 2 and same(*policy)
    assert not same(model, policy[0], "behavior") and not same(model, policy[0], "world_model")
    algo.evaluate()  # what is evaluated and saved is both
    merged = weights(algo)[0]
    assert same(merged, policy[0], "behavior") and same(merged, model, "world_model")
    acting = algo.get_module().agent.state_dict()
    assert all(np.array_equal(x.numpy(), merged[name]) for name, x in acting.items())
    # Weights that are loaded into the module reach whoever trains them.
    path = algo.learner_group.save_to_path(tmp_path / "learners")
    steps = algo.limiter.gradient_steps
    until(lambda r: r["gradient_steps"] > steps, algo)
    algo.collector.start()
    algo.restore_from_path(path, component="learner_group")
    assert all(same(merged, each, "behavior") for each in weights(algo, algo.policy.group))
    algo.save_to_path(tmp_path / "all")
    assert algo.replay.total_steps() == algo.limiter.env_steps  # and no steps were forgotten


def test_killed_processes_come_back(algo: Any) -> None:
    result = algo.train()

    def pid_of(actor: Any) -> int:
        pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
        return pid

    for role, actors in (("shard", algo.replay.shards), ("imaginer", algo.imaginers)):
        os.kill(pid_of(actors[0]), signal.SIGKILL)
        result = until(lambda r, role=role: r["restarts"][role] >= 1, algo)
    algo.env_runner_group.foreach_env_runner_async(
        lambda _: os.kill(os.getpid(), signal.SIGKILL), remote_worker_ids=[1], tag="kill"
    )
    until(lambda _: algo._counters["total_num_restored_workers"] >= 1, algo)
    assert algo.env_runner_group.num_healthy_remote_workers() == 1
    later = until(lambda r: r["gradient_steps"] > result["gradient_steps"] + 8, algo)
    check_ratio(later, RATIO)
    assert later["replay"]["duplicates"] == 0

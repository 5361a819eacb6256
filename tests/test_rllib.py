"""The RLlib algorithm with processes of every role: it trains, keeps its ratio, and comes back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from gymnasium.envs.classic_control import CartPoleEnv
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from rllib_runs import (
    BATCH,
    BATCH_STEPS,
    PATIENCE_S,
    Closing,
    Sticky,
    check_ratio,
    same,
    small,
    until,
    weights,
)

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("num_env_runners", "num_learners"), [(0, 0), (2, 2)])
def test_it_trains(built: Any, num_env_runners: int, num_learners: int) -> None:
    algo = built(small(num_env_runners, num_learners))
    before = weights(algo)[0]
    for _ in range(2):
        result = algo.train()
        check_ratio(result)
        assert result["env_runners"]["episode_return_mean"] >= 8
        assert np.isfinite(result["learners"][DEFAULT_MODULE_ID]["loss"])
    assert result["num_env_steps_sampled_lifetime"] >= 512
    assert result["learners"]["__all_modules__"]["num_env_steps_trained_lifetime"] == (
        result["gradient_steps"] * BATCH_STEPS
    )
    found = weights(algo)
    assert len(found) == max(1, num_learners)
    assert all(same(found[0], other) for other in found)
    assert not same(before, found[0])
    # Runners act with what was learned, and whoever asks for the module gets it.
    acting = algo.get_module().agent.state_dict()
    assert all(np.array_equal(x.numpy(), found[0][name]) for name, x in acting.items())


def test_others_evaluate_while_it_trains(built: Any) -> None:
    config = small(1).evaluation(
        evaluation_interval=1,
        evaluation_num_env_runners=1,
        evaluation_parallel_to_training=True,
        evaluation_duration="auto",
    )
    algo = built(config)
    results = [algo.train() for _ in range(2)]
    for result in results:
        assert result["evaluation"]["env_runners"]["num_env_steps_sampled"] > 0
    check_ratio(results[-1])
    assert algo.eval_env_runner_group.num_healthy_remote_workers() == 1
    returns = [r["evaluation"]["env_runners"]["episode_return_mean"] for r in results]
    assert returns[0] != returns[1]


def test_a_second_family_trains(built: Any) -> None:
    config = small(model="tdmpc2:tiny", model_options={"episode_length": 200}, num_replay_shards=1)
    algo = built(config.environment("Pendulum-v1"))
    result = until(lambda r: r["gradient_steps"] >= 16, algo)
    check_ratio(result)


def test_a_new_process_goes_on(ray_local: None, tmp_path: Path) -> None:
    """Saved, killed, and restored elsewhere: all counters, weights, optimizers, random numbers and
    replay are those of the save."""
    script = (
        "import ray, sys, os, rllib_runs\n"
        "ray.init(address='local', num_cpus=3, include_dashboard=False, log_to_driver=False,\n"
        "         object_store_memory=100_000_000)\n"
        "algo = rllib_runs.small(0, 0, num_imagination_actors=1).build_algo()\n"
        "result = algo.train()\n"
        "algo.save_to_path(sys.argv[1])\n"
        "print('STEPS', result['replay']['env_steps'], algo.limiter.env_steps, flush=True)\n"
        "algo.train()\n"  # whatever comes after the save is lost
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = float(done.stdout.split("STEPS")[1].split()[1])
    algo = Algorithm.from_checkpoint(str(tmp_path / "saved"))
    try:
        assert algo.limiter.env_steps == saved
        sizes = [ray.get(shard.report.remote()) for shard in algo.replay.shards]
        assert sum(size.num_steps for size in sizes) == saved  # the writer's last row is there, too
        assert algo.training_iteration == 1
        steps = algo.limiter.gradient_steps
        assert algo.model.gradient_steps == steps > 0
        result = algo.train()
        check_ratio(result)
        assert result["training_iteration"] == 2
        assert result["gradient_steps"] > steps and result["replay"]["env_steps"] > saved
        assert result["env_runners"]["num_env_steps_sampled_lifetime"] > saved * 0.8
    finally:
        algo.stop()


def _step(algo: Any, given: Any) -> dict[str, Any]:
    learner = algo.learner_group._learner
    assert learner.begin(0, given) is None
    return learner.finish()


def test_a_restored_learner_takes_the_same_step(built: Any, tmp_path: Path) -> None:
    algo = built(small())
    algo.train()
    algo.limiter.inserted(1000)  # what is owed, however much it is, is not forgiven
    path = algo.save_to_path(tmp_path / "saved")
    given = [ray.get(shard.sample.remote(4))[1] for shard in algo.replay.shards[:1]]
    losses = [_step(algo, given[0]) for _ in range(2)]
    again = built(small())
    again.restore_from_path(path)
    found = [_step(again, given[0]) for _ in range(2)]
    # The same weights and random numbers, and then the same moments and step of the warm-up.
    assert [each["loss"] for each in found] == [each["loss"] for each in losses]
    assert again.limiter.state_dict() == algo.limiter.state_dict()
    # Replay draws what it would have drawn.
    drawn = [ray.get(a.replay.shards[1].sample.remote(4))[1][0].reward for a in (algo, again)]
    assert np.array_equal(*drawn)


def test_a_running_algorithm_goes_back(built: Any, tmp_path: Path) -> None:
    """Runners too act with the older weights again, which a mere version number would prevent."""
    mark = tmp_path / "closed"
    algo = built(small(1).environment(Closing, env_config={"mark": str(mark)}))
    algo.train()
    path = algo.save_to_path(tmp_path / "saved")
    then, steps = weights(algo)[0], algo.limiter.gradient_steps
    algo.train()
    algo.restore_from_path(path)
    assert same(then, weights(algo)[0]) and algo.limiter.gradient_steps == steps

    def acting(runner: Any, store: Any) -> dict[str, np.ndarray]:
        runner.pull(store)
        return {name: x.numpy().copy() for name, x in runner.module.agent.state_dict().items()}

    (found,) = algo.env_runner_group.foreach_env_runner(
        lambda runner, store=algo.store: acting(runner, store), local_env_runner=False
    )
    assert all(np.array_equal(value, then[name]) for name, value in found.items())
    check_ratio(algo.train())
    assert not mark.exists()
    algo.collector.start()
    algo.stop()  # in the middle of the runner's chunk
    deadline = time.monotonic() + PATIENCE_S
    while not mark.exists():
        assert time.monotonic() < deadline, "the environment was not closed"
        time.sleep(0.1)


@pytest.mark.chaos
def test_a_silent_runner_is_started_again(built: Any, tmp_path: Path) -> None:
    mark = tmp_path / "hung"
    config = small(1, 0, patience=5).environment(Sticky, env_config={"mark": str(mark)})
    algo = built(config)
    until(lambda _: algo._counters["total_num_restored_workers"] >= 1, algo)
    assert mark.exists()
    check_ratio(until(lambda result: result["gradient_steps"] > 32, algo))


class Unlicensed(CartPoleEnv):
    def __init__(self, config: Any) -> None:
        super().__init__()

    def step(self, action: Any) -> Any:
        raise OSError("the simulator has no license")


def misses(**given: Any) -> None:
    raise KeyError("my_metric")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            lambda: small(1, num_replay_shards=1, replay=BATCH | {"capacity": 100}),
            "replay holds 6 x 16 steps, too few for 4 streams",
        ),
        (lambda: small(1).environment(Unlicensed), "the simulator has no license"),
        (lambda: small(1).callbacks(on_episode_end=misses), "runner failed: KeyError: 'my_metric'"),
    ],
)
def test_what_goes_wrong_in_a_runner_is_raised(built: Any, config: Any, words: str) -> None:
    """Started again, it would only go wrong again."""
    # Iterations end without steps, too: else one would go on for ever instead of failing this.
    algo = built(config().reporting(min_sample_timesteps_per_iteration=0))
    with pytest.raises((ValueError, RuntimeError), match=words):
        until(lambda _: False, algo)

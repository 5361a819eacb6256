"""The RLlib algorithm with processes of every role: it trains, keeps its ratio, and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from gymnasium.envs.classic_control import CartPoleEnv
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from rllib_runs import (
    BATCH,
    BATCH_STEPS,
    PATIENCE_S,
    Closing,
    Sticky,
    agent_of,
    check_ratio,
    small,
    until,
)

pytestmark = pytest.mark.ray


def weights(algo: Any, group: Any = None) -> list[dict[str, np.ndarray]]:
    """The weights of every learner's agent."""
    found = (group or algo.learner_group).foreach_learner(_weights)
    return [each.get() for each in found]


def _weights(learner: Any) -> dict[str, np.ndarray]:
    return {name: x.cpu().numpy().copy() for name, x in agent_of(learner).state_dict().items()}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], part: str = "") -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(value, other[name]) for name, value in one.items() if name.startswith(part)
    )


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


def test_the_policy_learns_apart(built: Any, tmp_path: Path) -> None:
    config = small(1, 1, num_imagination_actors=1, num_policy_learners=2)
    algo = built(config.learners(num_cpus_per_learner=0.5))
    result = until(lambda r: r["gradient_steps"] >= 64, algo)
    check_ratio(result)
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
        "algo = rllib_runs.small(1, 0, num_imagination_actors=1).build_algo()\n"
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


def test_a_restored_learner_takes_the_same_step(built: Any, tmp_path: Path) -> None:
    algo = built(small())
    algo.train()
    algo.limiter.inserted(1000)  # what is owed, however much it is, is not forgiven
    path = algo.save_to_path(tmp_path / "saved")
    given = [ray.get(shard.sample.remote(4))[1] for shard in algo.replay.shards[:1]]
    losses = [algo.learner_group._learner.step(0, given[0]) for _ in range(2)]
    again = built(small())
    again.restore_from_path(path)
    found = [again.learner_group._learner.step(0, given[0]) for _ in range(2)]
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


def test_killed_processes_come_back(built: Any) -> None:
    algo = built(small(2, 0, num_imagination_actors=1))
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
    assert algo.env_runner_group.num_healthy_remote_workers() == 2
    later = until(lambda r: r["gradient_steps"] > result["gradient_steps"] + 32, algo)
    check_ratio(later)
    assert later["replay"]["duplicates"] == 0


@pytest.mark.chaos
def test_a_silent_runner_is_started_again(built: Any, tmp_path: Path) -> None:
    mark = tmp_path / "hung"
    config = small(1, 0, patience=5).environment(Sticky, env_config={"mark": str(mark)})
    algo = built(config)
    until(lambda _: algo._counters["total_num_restored_workers"] >= 1, algo)
    assert mark.exists()
    check_ratio(until(lambda result: result["gradient_steps"] > 32, algo))


def test_tune_restores_what_was_interrupted(ray_local: None, tmp_path: Path) -> None:
    """A trial that fails goes on from its last checkpoint, with all its counters."""
    config = small(model_options=tune.grid_search([{"units": 32}, {"units": 48}]))

    def tuner_config() -> dict[str, Any]:
        return dict(
            name="interrupted",
            storage_path=str(tmp_path),
            stop={"training_iteration": 3},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            failure_config=tune.FailureConfig(max_failures=0),
        )

    config.callbacks(callbacks_class=None, on_train_result=_fail_once(tmp_path))
    first = tune.Tuner(
        "WorldFlux", param_space=config, run_config=tune.RunConfig(**tuner_config())
    ).fit()
    assert first.num_errors == 1
    tuner = tune.Tuner.restore(
        str(tmp_path / "interrupted"), "WorldFlux", resume_errored=True, param_space=config
    )
    results = tuner.fit()
    assert results.num_errors == 0
    steps = [r.metrics["gradient_steps"] for r in results]
    assert len(steps) == 2
    for result in results:
        assert result.metrics["training_iteration"] == 3
        check_ratio(result.metrics)
    ran = Counter((tmp_path / "iterations").read_text().splitlines())
    assert ran == {"1": 2, "2": 3, "3": 2}  # of two trials: the failed iteration alone was lost


def test_each_process_of_a_trial_finds_its_bundle(ray_local: None, tmp_path: Path) -> None:
    """Three sizes: taken apart by a smaller process, a bundle would leave its owner waiting."""
    config = small(
        num_imagination_actors=2,
        num_cpus_per_imagination_actor=0.25,
        num_cpus_per_replay_shard=0.5,
    )
    stop = {"training_iteration": 1}
    run = tune.RunConfig(name="sizes", storage_path=str(tmp_path), stop=stop)
    [result] = tune.Tuner("WorldFlux", param_space=config, run_config=run).fit()
    assert result.error is None
    check_ratio(result.metrics)


def test_a_failed_trial_takes_nothing_along(
    built: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune starts it again in the same folder, perhaps before the old process has ended."""

    def at_home(algo: Any) -> None:
        algo._logdir = str(tmp_path / "trial")

    monkeypatch.setattr(Algorithm, "_setup_logdir", at_home)
    old = built(small())
    old.train()
    new = built(small())
    assert [path.name for path in (tmp_path / "trial/replay").iterdir()] == [new.replay.root.name]
    new.train()
    new.save_to_path(tmp_path / "first")
    old.stop()
    later = new.train()
    new.save_to_path(tmp_path / "second")
    assert later["replay"]["env_steps"] == new.replay.total_steps()


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


def _fail_once(folder: Path) -> Any:
    def fail(*, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        with (folder / "iterations").open("a") as file:
            file.write(f"{result['training_iteration']}\n")
        if result["training_iteration"] != 2:
            return
        with suppress(FileExistsError):  # another trial was first
            (folder / "failed").touch(exist_ok=False)
            raise RuntimeError("interrupted")

    return fail

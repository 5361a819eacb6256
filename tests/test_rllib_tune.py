"""The RLlib algorithm as a trial of Tune: restored, placed, and started again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.rllib.algorithms.algorithm import Algorithm
from rllib_runs import check_ratio, small

pytestmark = pytest.mark.ray


def test_tune_restores_what_was_interrupted(ray_local: None, tmp_path: Path) -> None:
    """A trial that fails goes on from its last checkpoint, with all its counters."""
    config = small()

    def tuner_config() -> dict[str, Any]:
        return dict(
            name="interrupted",
            storage_path=str(tmp_path),
            stop={"training_iteration": 2},
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
    [result] = results
    assert result.metrics["training_iteration"] == 2
    check_ratio(result.metrics)
    # The failed iteration alone was lost.
    assert (tmp_path / "iterations").read_text().splitlines() == ["1", "2", "2"]


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


def _fail_once(folder: Path) -> Any:
    def fail(*, algorithm: Any, result: dict[str, Any], **kwargs: Any) -> None:
        with (folder / "iterations").open("a") as file:
            file.write(f"{result['training_iteration']}\n")
        if result["training_iteration"] != 2:
            return
        with suppress(FileExistsError):  # it has failed before
            (folder / "failed").touch(exist_ok=False)
            raise RuntimeError("interrupted")

    return fail

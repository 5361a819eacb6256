"""Whose a run directory and its storage are: the same run goes on, another one is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from worldflux_dist import checkpoint
from worldflux_dist.config import Config, ConfigError, from_dict, load
from worldflux_dist.distributed.evaluator import Evaluator
from worldflux_dist.distributed.run import IDENTITY, RunDirectory, storage_of
from worldflux_dist.distributed.session import Session
from worldflux_dist.progress import Progress
from worldflux_dist.replay import Limiter


def settings(storage: Path | str = "", **more: Any) -> Config:
    return from_dict({"model": "dreamerv3:tiny", "scale": {"storage": str(storage)}} | more)


def train(path: Path, config: Config) -> int:
    """One life of a run: the step it resumes from, or -1; it leaves a checkpoint one step later."""
    with RunDirectory(path, config) as run:
        limiter = Limiter(1, 1, 0)
        resumed = run.resume(limiter, 1)
        step = int(resumed[0].name) if resumed else -1
        folder = checkpoint.begin(run.checkpoints, step + 1)
        (folder / "x").write_text("x")
        steps = {"agent": step + 1}
        counters = {"limiter": limiter.state_dict(), "episodes": 0, "shards": []}
        counters |= dict.fromkeys(("gradient_steps", "effective_steps", "lost_steps"), steps)
        checkpoint.commit(run.checkpoints, folder, step + 1, counters=counters)
    return step


def forget(path: Path, storage: Path) -> None:
    """As a release left it that kept no identity."""
    (path / "manifest.json").write_text('{"started": "2026", "versions": {}}')
    (storage / IDENTITY).unlink()


@pytest.mark.parametrize("seed", [0, 1])
def test_another_run_of_the_same_name_is_refused_by_name(seed: int, tmp_path: Path) -> None:
    first, second, store = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "store"
    train(first, settings(store))
    with pytest.raises(ConfigError, match=f"{store}/run belongs to another run, that of {first} "):
        train(second, settings(store, seed=seed))
    with pytest.raises(ConfigError, match="belongs to another run"):
        storage_of(settings(store), copied(first, second, run="0" * 32))
    assert train(first, settings(store)) == 0


def copied(old: Path, new: Path, **own: Any) -> Path:
    """A copy of a run directory, with changes of what it says of itself."""
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(old, new)
    manifest = json.loads((new / "manifest.json").read_text())
    (new / "manifest.json").write_text(json.dumps(manifest | own))
    return new


def test_a_moved_or_copied_run_goes_on_with_its_storage(tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, settings(store))
    moved = run.rename(tmp_path / "moved")
    assert train(moved, settings(store)) == 0
    assert train(copied(moved, tmp_path / "copy"), settings(store)) == 1
    assert [path.name for path in store.iterdir()] == ["run"]


def test_a_lost_run_directory_is_made_anew_with_the_same_settings(tmp_path: Path) -> None:
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, settings(store))
    shutil.rmtree(run)
    with pytest.raises(ConfigError, match="belongs to another run"):
        train(run, settings(store, seed=1))
    assert train(run, settings(store)) == 0


def test_a_storage_may_move_with_what_it_holds(tmp_path: Path) -> None:
    run, store, new = tmp_path / "run", tmp_path / "store", tmp_path / "new"
    train(run, settings(store))
    with pytest.raises(ConfigError, match=r"scale.storage \('.*store' before, '.*new' now\)"):
        train(run, settings(new))
    store.rename(new)
    assert train(run, settings(new)) == 0


def test_a_run_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    """It left no identity; its settings say whether it is the same run."""
    run, store = tmp_path / "run", tmp_path / "store"
    train(run, settings(store))
    forget(run, store / "run")
    with pytest.raises(ConfigError, match=r"seed \(0 before, 1 now\)"):
        train(run, settings(store, seed=1))
    with pytest.raises(ConfigError, match="has checkpoints of a run that is not in"):
        train(tmp_path / "other" / "run", settings(store))
    assert train(run, settings(store)) == 0
    forget(run, store / "run")
    store.rename(tmp_path / "new")
    assert train(run, settings(tmp_path / "new")) == 1
    local = tmp_path / "local"
    train(local, settings())
    forget(local, local)
    assert train(local, settings()) == 0


def test_only_what_changes_learning_refuses_a_resume(tmp_path: Path) -> None:
    run, config = tmp_path / "run", settings()
    train(run, config)
    learner = replace(config.learner, compile=True, pin_memory=True, threads=3)
    env = replace(config.env, max_episode_steps=50)
    other = replace(config, learner=learner, env=env, train=replace(config.train, eval_every=0))
    assert train(run, other) == 0
    assert load([run / "config.yaml"]) == other
    with pytest.raises(ConfigError, match=r"learner.precision \('float32' before, 'bfloat16' now"):
        train(run, replace(other, learner=replace(learner, precision="bfloat16")))


def test_without_evaluations_on_the_way_none_comes_due(tmp_path: Path) -> None:
    """At first, and when a run that has been scored goes on."""
    config = settings(train={"eval_every": 0})
    with RunDirectory(tmp_path / "run", config) as run, Progress(100, plain=True) as progress:
        for env_steps in (0, 100):
            session = Session(config, run, progress, None, None, {})
            evaluator = Evaluator(session, [])  # starting one would fail
            for step in range(env_steps, env_steps + 100, 10):
                evaluator.maybe_evaluate(step)
            run.score(100, 1, [1.0], "random")
            run.score(100, 1, [1.0], config.model)
        assert run.last_score() == 100

"""The toy task through Ray: the same assertions as in one process, and what a run survives."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import fault_runs
import imageio.v3 as imageio
import pytest
import toy_task
from toy_run import ToyRun, read_metrics, replay_in

from worldflux_dist import checkpoint, cli, config, storage
from worldflux_dist.distributed import ending, trainer
from worldflux_dist.distributed.learners import UPDATES_PER_ROUND
from worldflux_dist.distributed.run import RunDirectory
from worldflux_dist.learner import NonFiniteLossError

pytestmark = pytest.mark.ray

EVERY_STREAM_IN_ONE_SHARD = [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.fixture(scope="module")
def solved(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, config.Config, trainer.Outcome | None]:
    """A whole run in this process: its directory, config and outcome."""
    folder = tmp_path_factory.mktemp("solved")
    settings = toy_task.make_config(folder)
    return folder / "run", settings, trainer.train(settings, folder / "run")


Solved = tuple[Path, config.Config, trainer.Outcome]


def test_the_toy_task_is_solved_through_ray(solved: Solved) -> None:
    run_dir, settings, outcome = solved
    toy_task.check_run_solved(run_dir, outcome)
    last = read_metrics(run_dir)[-1]
    toy_task.check_ratio(settings, int(last["env_steps"]), int(last["gradient_steps"]))
    assert last["train_ratio/achieved"] == pytest.approx(40, rel=0.01)
    assert last["restarts/runner"] == last["restarts/shard"] == 0


def test_a_run_directory_is_complete(solved: Solved) -> None:
    run_dir, settings, outcome = solved
    assert config.load([run_dir / "config.yaml"]) == settings
    assert storage.read_json(run_dir / "manifest.json")["versions"]["ray"]
    lines = read_metrics(run_dir)
    for name in ("loss/reward", "loss/policy", "staleness", "busy/learner", "episode/return"):
        assert any(name in line for line in lines), name  # the last one may cover an instant
    # Runners act with weights of the round before, or of the one before that.
    found = [line["staleness"] for line in lines if "staleness" in line]
    assert all(0 <= staleness <= 3 * UPDATES_PER_ROUND for staleness in found)
    scores = list(map(dict, RunDirectory(run_dir, settings).scores()))
    assert {score["method"] for score in scores} == {"random", "dreamerv3:tiny"}
    assert {score["episodes"] for score in scores} == {300}
    assert scores[-1]["return_mean"] == pytest.approx(outcome.evaluation.mean)
    assert list((run_dir / "tb").glob("events*"))
    height, width, _ = imageio.imread(run_dir / "curve.png").shape
    assert min(height, width) > 200
    assert len(imageio.imread(run_dir / "video" / "open_loop.gif")) == 3  # an episode's steps


def test_replay_holds_every_step_and_a_stream_stays_in_its_shard(solved: Solved) -> None:
    run_dir = solved[0]
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    replay = replay_in(found[0])
    assert replay.steps == found[1]["counters"]["limiter"]["env_steps"]
    assert replay.streams == EVERY_STREAM_IN_ONE_SHARD
    assert sorted(writer for writer, _ in replay.lives) == ["runner-0", "runner-1"]


def test_eval_plays_the_saved_agent(
    solved: Solved, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "eval", str(solved[0]), "--episodes", "200"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    agent, random = capfd.readouterr().out.splitlines()
    played = float(agent.split()[1])
    assert played == pytest.approx(solved[2].evaluation.mean, abs=0.15)  # five deviations
    assert played > 0.45 > 0.4 > float(random.split()[1])


def test_inspect_gives_the_report_card_of_the_saved_agent(
    solved: Solved, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["", "inspect", str(solved[0]), "--episodes", "40", "--horizon", "2"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("dreamerv3:tiny on held-out episodes")
    numbers = {words[0]: float(words[1]) for words in map(str.split, lines) if "@" in words[0]}
    assert numbers["reward@1"] < 0.5  # the task is solved, so its rewards are known
    assert lines[-1].endswith("report_card.png")
    picture = imageio.imread(solved[0] / "report_card.png")
    assert picture.shape[2] >= 3 and picture.std() > 10


@pytest.mark.nightly  # test_faults.py kills each alone and looks closer; here the task is solved
def test_killed_runners_and_shards_come_back(tmp_path: Path) -> None:
    with ToyRun(tmp_path, "train.threshold=null") as run:
        run.wait_for("train ")
        prefill = toy_task.make_config(tmp_path).train.prefill
        while on_disk(run.run_dir) < prefill:  # it comes in a burst, and is written a while later
            assert run.running, run.output
            time.sleep(0.1)
        victims = [run.processes(f"ray::{role}")[0] for role in ("EnvRunnerActor", "ReplayShard")]
        for victim in victims:
            victim.kill()
        assert run.wait() == 0, run.output
    settings = config.load([run.run_dir / "config.yaml"])
    assert toy_task.best_score(run.run_dir) >= toy_task.THRESHOLD, run.output
    last = read_metrics(run.run_dir)[-1]
    toy_task.check_ratio(settings, int(last["env_steps"]), int(last["gradient_steps"]))
    replay = replay_in(run.checkpoint_path(run.checkpoint_steps()[-1]))
    assert len(replay.lives) == 3  # the killed runner's second one
    assert last["env_steps"] - 400 < replay.steps  # the killed shard had written most of its steps
    assert replay.streams == EVERY_STREAM_IN_ONE_SHARD


def on_disk(run_dir: Path) -> int:
    """Env steps that its shards would come back with; those of both runners among them, or 0."""
    shards = fault_runs.live_shards(run_dir)
    both = {name for name, _ in fault_runs.lives(shards)} == {"runner-0", "runner-1"}
    return sum(chunk.num_steps for shard in shards for chunk in shard) if both else 0


# ---------------------------------------------------------------------------- what ends a run


def ended_with(folder: Path, *overrides: str, error: type[Exception] = RuntimeError) -> str:
    """The one sentence with which training ends."""
    one = ("scale.num_runners=1", "scale.num_shards=1")
    settings = toy_task.make_config(folder, *one, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with pytest.raises(error) as ended:
            trainer.train(settings, folder / "run")
    sentence = str(getattr(ended.value, "cause", ended.value))
    assert "\n" not in sentence
    return sentence


def test_an_environment_that_always_raises_is_named(tmp_path: Path) -> None:
    sentence = ended_with(tmp_path, "env.id=toy_task:RaisingEnv")
    assert sentence.startswith("env toy_task:RaisingEnv lane ")
    assert "failed 5 times in a row" in sentence
    assert "OSError: the simulator has lost its licence" in sentence


def test_a_runner_that_cannot_start_ends_the_run(tmp_path: Path) -> None:
    """It would be asked for steps for ever otherwise."""
    env = ("env.id=toy_task:DriverOnlyEnv", f"env.kwargs.pid={os.getpid()}")
    sentence = ended_with(tmp_path, *env, error=ending.RoleLostError)
    assert "EnvRunnerActor is lost, it could not start: " in sentence
    assert "could not be made: OSError: no licence" in sentence


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    sentence = ended_with(
        tmp_path,
        "model_options.learning_rate=1e9",
        "train.prefill=64",
        "train.train_ratio=0.6",  # a gradient step every ten rounds, and checkpoints in between
        "train.checkpoint_every=0",
        error=NonFiniteLossError,
    )
    assert sentence.startswith(("loss/", "grad_norm/"))
    assert "the last checkpoint is kept" in sentence
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found[1]["step"] > 0
    assert read_metrics(tmp_path / "run")

"""Stopping and going on: Ctrl-C, a driver killed outright, and a checkpoint cut short."""

from __future__ import annotations

import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import stuck_storage
from toy_run import PATIENCE_S, ToyRun, read_metrics, replay_in

from worldflux_dist import checkpoint
from worldflux_dist.distributed.ending import StopSignals

pytestmark = pytest.mark.ray

OFTEN = "train.checkpoint_every=1"
ENDLESS = ("train.env_steps=1_000_000", "train.eval_every=0", "train.threshold=null")
ENDLESS += ("train.eval_episodes=4",)
# One process of each role, with little to do between what these tests wait for.
SMALL = ("scale.num_runners=1", "scale.num_shards=1", "train.prefill=128", "train.train_ratio=8")


def check_complete(folder: Path) -> int:
    """The env steps of a checkpoint whose replay holds exactly those."""
    steps = replay_in(folder).steps
    assert steps == checkpoint.verify(folder)["counters"]["limiter"]["env_steps"]
    return steps


def stop_by_ctrl_c(folder: Path, *settings: str) -> ToyRun:
    """A life of a run, stopped after its second checkpoint; all that it has done is saved."""
    with ToyRun(folder, *settings) as run:
        run.wait_for_checkpoint(run.wait_for_checkpoint(0))
        run.interrupt()
        assert run.wait() == 130, run.output
    assert "stopping: saving a checkpoint first" in run.output
    assert f"stopped; everything is saved in {run.run_dir}" in run.output
    stopped_at = run.checkpoint_steps()[-1]
    env_steps = check_complete(run.checkpoint_path(stopped_at))
    last = read_metrics(run.run_dir)[-1]
    assert (last["env_steps"], last["gradient_steps"]) == (env_steps, stopped_at)
    return run


def end_by_itself(folder: Path, run: ToyRun, *settings: str) -> ToyRun:
    """The last life: finds the newest checkpoint cut short and goes on from the one before."""
    before, newest = run.checkpoint_steps()[-2:]
    weights = run.checkpoint_path(newest) / "behavior.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with ToyRun(folder, *settings) as run:
        assert run.wait() == 0, run.output
    assert f"{weights} has 1000 bytes instead of" in run.output
    assert f"resumed from {run.checkpoint_path(before)}" in run.output
    # Had replay not been restored, it would hold fewer steps than were counted.
    check_complete(run.checkpoint_path(run.checkpoint_steps()[-1]))
    lines = read_metrics(run.run_dir)
    for name in ("env_steps", "gradient_steps", "episodes"):
        values = [line[name] for line in lines]
        assert values == sorted(values), name
    return run


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    run = stop_by_ctrl_c(tmp_path, OFTEN, *SMALL, *ENDLESS)
    before = run.checkpoint_path(run.checkpoint_steps()[-2])
    more = f"train.env_steps={check_complete(before) + 64}"
    end_by_itself(tmp_path, run, OFTEN, *SMALL, *ENDLESS, more)


@pytest.mark.nightly  # by day test_faults.py kills a driver, and the test above has the other lives
def test_a_run_of_three_lives_solves_its_task(tmp_path: Path) -> None:
    """Stopped by Ctrl-C, killed outright, and ended by itself."""
    settings = (OFTEN, "train.eval_episodes=300")
    run = stop_by_ctrl_c(tmp_path, *settings)
    stopped_at = run.checkpoint_steps()[-1]
    env_steps = check_complete(run.checkpoint_path(stopped_at))
    with ToyRun(tmp_path, *settings) as run:
        run.wait_for(f"{env_steps:,} env steps, {stopped_at:,} gradient steps")
        killed_after = run.wait_for_checkpoint(stopped_at)
        roles = ("EnvRunnerActor", "ReplayShardActor", "LearnerActor", "WeightStore")
        actors = [process for role in roles for process in run.processes(f"ray::{role}")]
        assert len(actors) == 6
        run.kill()
        _, alive = psutil.wait_procs(actors, timeout=PATIENCE_S)
        assert not alive
    assert run.checkpoint_steps()[-1] >= killed_after
    for step in run.checkpoint_steps()[-2:]:
        assert check_complete(run.checkpoint_path(step)) >= env_steps
    assert "PASSED" in end_by_itself(tmp_path, run, *settings).output


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    with ToyRun(tmp_path, *SMALL, *ENDLESS) as run:
        run.wait_for("train ")
        run.processes("ray::ReplayShardActor")[0].suspend()  # so that saving takes for ever
        run.interrupt()
        run.wait_for("once more to stop at once")
        run.interrupt()
        assert run.wait() == 130, run.output
    assert "Traceback" not in run.output
    assert "everything is saved" not in run.output
    assert not run.checkpoint_steps()


@pytest.mark.parametrize("trouble", ["hang", "full"])
def test_sigterm_does_not_wait_for_a_storage(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, met = tmp_path / "trouble", tmp_path / "met"
    monkeypatch.setenv(stuck_storage.TROUBLE, str(told))
    stuck_storage.install(tmp_path)
    storage = f"scale.storage=stuck://{tmp_path}/bucket"
    with ToyRun(tmp_path, OFTEN, storage, *SMALL, *ENDLESS) as run:
        checkpoints = tmp_path / "bucket" / "run" / "checkpoints"
        run.wait_until(lambda: any(checkpoints.glob("*/manifest.json")))
        told.write_text(trouble)
        run.wait_until(met.exists)
        run.terminate()
        began = time.monotonic()
        assert run.wait() == 2, run.output
        took = time.monotonic() - began
        told.unlink()
    assert took < 30, run.output  # ten on an idle machine; it was for ever, or a minute
    (last,) = re.findall(r"the last good one is (?:stuck://)?(\S+):", run.output)
    assert checkpoint.verify(Path(last))["step"] == int(Path(last).name)
    assert "stopped without a last checkpoint, since" in run.output
    assert ("no space left in the bucket" in run.output) == (trouble == "full")
    assert "Traceback" not in run.output


def test_a_second_ctrl_c_is_no_error_wherever_it_comes() -> None:
    class Imported:
        def __set_name__(self, owner: type, name: str) -> None:
            signal.raise_signal(signal.SIGINT)  # Python 3.11 makes a RuntimeError of this one

    def interrupted_twice() -> None:
        with StopSignals(said.append) as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.stopping
            assert len(said) == 1
            type("Class", (), {"attribute": Imported()})

    def interrupted_where_it_is_swallowed() -> None:
        with StopSignals(said.append) as stop:
            signal.raise_signal(signal.SIGINT)
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert stop.stopping

    def interrupted_once() -> None:
        with StopSignals(said.append):
            signal.raise_signal(signal.SIGINT)
            raise RuntimeError("an error of its own")

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    with pytest.raises(KeyboardInterrupt):
        interrupted_where_it_is_swallowed()
    with pytest.raises(RuntimeError, match="of its own"):
        interrupted_once()

"""The command line: mistakes end in exit code 2 and one sentence, and nothing loads too early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import toy_task
from conftest import REPOSITORY

from worldflux_dist import cli, config

OTHER = (
    "holds a run with other settings: seed (0 before, 1 now); choose another run directory or "
    "remove this one"
)


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """The exit code of `worldflux-dist *args`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["worldflux-dist", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return 0 if ended.value.code is None else int(ended.value.code)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["env.idd=CartPole-v1"], "unknown config key 'env.idd': did you mean 'id'?"),
        (["seed=one"], "seed is 'one': it must be a valid integer"),
        (["nowhere.yaml"], "no config file nowhere.yaml: "),
        (["model=dreamerv3:size13m"], "no preset 'dreamerv3:size13m': did you mean 'dreamerv3:si"),
        (["model=dreamer"], "no world-model family 'dreamer': did you mean 'dreamerv3'?"),
        (["model_options.depht=2"], "dreamerv3:size12m has no option 'depht': did you mean 'dept"),
        (["env.id=CartPool-v1"], "unknown env CartPool-v1, did you mean CartPole-v"),
        (["env.id=toy_task:NoEnv"], "unknown env toy_task:NoEnv"),
        (["env.id=toy_task:TextEnv"], "env toy_task:TextEnv: observation space Text("),
        (["env.id=ALE/Pong-v5", "replay.capacity=1e12"], "this run needs 11,"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    settings: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    assert call(monkeypatch, "train", "--run-dir", run_dir, *settings) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: {said}")
    assert err.count("\n") == 1
    assert not run_dir.exists()


def test_a_plan_that_cannot_fit_names_its_numbers_and_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = ["env.id=ALE/Pong-v5", "replay.capacity=1e8"]
    assert call(monkeypatch, "train", "--run-dir", tmp_path / "run", *settings) == 2
    out, err = capfd.readouterr()
    step = 64 * 64 * 3 + 4 * 6 + 4 + 3  # image, six actions, reward, flags
    assert f"100,000,000 steps x {step:,} bytes" in out
    replay = (2 * 400 * 2**20 + 10**8 * step) / 2**20
    assert f"replay alone {replay:,.0f} MB" in err
    assert "lower replay.capacity" in err
    assert "runner               2            1" in out  # two processes of one thread


def test_a_run_directory_of_other_settings_is_refused_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = config.to_yaml(config.Config())
    (tmp_path / "config.yaml").write_text(before)
    # How long a run goes on is free to change, what it learns is not.
    settings = ["seed=1", "train.env_steps=5000"]
    assert call(monkeypatch, "train", "--run-dir", tmp_path, *settings) == 2
    assert capfd.readouterr().err == f"error: {tmp_path} {OTHER}\n"
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == before


def test_eval_wants_a_run_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "eval", tmp_path) == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path} is no run directory: it has no config.yaml\n"
    )
    (tmp_path / "config.yaml").write_text("")
    assert call(monkeypatch, "eval", tmp_path) == 2
    assert f"error: no agent in {tmp_path}" in capfd.readouterr().err


def test_config_prints_yaml_that_loads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = toy_task.write(tmp_path)
    assert call(monkeypatch, "config", path, "seed=3") == 0
    (tmp_path / "printed.yaml").write_text(capfd.readouterr().out)
    assert config.load([tmp_path / "printed.yaml"]) == config.load([path], ["seed=3"])


@pytest.mark.slow
def test_as_a_process_a_mistake_shows_no_stack(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "worldflux_dist.cli", "config", "env.num_envs=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: env.num_envs is 'x': it must be a valid integer\n"
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("worldflux_dist", "torch ray gymnasium"),
        ("worldflux_dist.cli", "torch ray gymnasium"),
        ("worldflux_dist.distributed.shard", "torch"),  # its process holds data only
    ],
)
def test_what_importing_does_not_load(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*(set({absent!r}.split()) & set(sys.modules)))"
    found = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=REPOSITORY)
    assert found == "\n"


def test_doctor_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    checks = {"one": cli._check_torch, "two": cli._check_env("Nowhere-v0")}
    monkeypatch.setattr(cli, "_CHECKS", checks)
    assert call(monkeypatch, "doctor") == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("ok       one")
    assert lines[1].startswith("problem  two            ValueError: unknown env Nowhere-v0")
    assert lines[2] == "1 problem(s)"


@pytest.mark.ray
def test_doctor_finds_this_machine_good(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "doctor") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == ["ok"] * len(cli._CHECKS)
    assert lines[-1] == "all good"

"""The examples for RLlib print what they promise: one runs as a user runs it, in a process and with
a Ray of its own; the others in this process, with the Ray that all tests of RLlib share."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from rllib_runs import PATIENCE_S

from worldflux_dist.spaces import Spaces

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUMBER = r"(-?\d+(?:\.\d+)?)"


@pytest.fixture
def output(
    ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs an example here, in the folder that it leaves results in, and gives what it printed."""

    def run(example: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        path = str(REPOSITORY / "examples" / example)
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capfd.readouterr().out

    return run


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """The numbers in all places where `pattern`, with # for a number, is found."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    return [tuple(map(float, [x] if isinstance(x, str) else x)) for x in found]


def test_pong_trains_and_is_saved(output: Callable[..., str], tmp_path: Path) -> None:
    small = ("--model", "dreamerv3:tiny", "--train-ratio", "2", "--num-replay-shards", "2")
    text = output("rllib_pong.py", *small, "--stop-env-steps", "2000")
    line = r"env_steps #  episode_return_mean nan  train_ratio #  env_steps/s #"
    lines = numbers(line, text)
    assert len(lines) > 1 and lines[-2][0] < 2000 <= lines[-1][0]
    assert all(ratio == 2 and speed > 0 for _, ratio, speed in lines)
    assert (tmp_path / "runs" / "pong" / "rllib_checkpoint.json").exists()


def test_tune_names_the_best_family(output: Callable[..., str]) -> None:
    text = output("rllib_tune.py", "--stop-env-steps", "1000", "--train-ratio", "2")
    returns = {name: float(mean) for name, mean in re.findall(r"^(\w+:tiny) (\S+)$", text, re.M)}
    assert returns.keys() == {"dreamerv3:tiny", "tdmpc2:tiny"}
    assert all(mean >= 8 for mean in returns.values())  # CartPole does not fall any sooner
    ((best, path),) = re.findall(r"^best: (\S+) in (\S+)$", text, re.M)
    assert best == max(returns, key=returns.__getitem__)
    assert (Path(path) / "rllib_checkpoint.json").exists()


def test_a_checkpoint_is_evaluated_and_acts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/rllib_evaluate.py", "--stop-iters", "1", "--train-ratio", "2"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout
    ((mean, episodes),) = numbers(r"evaluated: # in # episodes", text)
    assert mean >= 8 and episodes >= 10
    ((total, steps),) = numbers(r"by hand: # in # steps", text)
    assert total == steps >= 7  # CartPole gives 1 for each


def test_a_custom_env_trains_with_its_callback(output: Callable[..., str]) -> None:
    text = output("rllib_custom_env.py", "--stop-iters", "1", "--train-ratio", "2")
    line = r"env_steps #  episode_return_mean #  comfortable_hours #"
    ((env_steps, mean, hours),) = numbers(line, text)
    assert env_steps >= 1000 and mean < 0 and 0 < hours <= 23


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        ("rllib_endless.py", "more than 200 steps: give the environment an end"),
        (
            "rllib_nan_episodes.py",
            "episode 0 of nan_episodes.parquet has observations that are not",
        ),
        ("rllib_driver_only.py", "TrialMine-v0 is registered in this process alone"),
    ],
)
def test_a_trial_ends_with_one_sentence(
    ray_local: None, shared: Path, tmp_path: Path, monkeypatch: Any, trial: str, words: str
) -> None:
    monkeypatch.setattr("worldflux_dist.runner.EPISODE_LIMIT", 200)
    # The trials look for it where it was when they were written.
    monkeypatch.setattr("worldflux_dist.data.Spaces", Spaces, raising=False)
    monkeypatch.syspath_prepend(shared / "trials")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=words):
        runpy.run_path(str(shared / "trials" / trial), run_name="__main__")

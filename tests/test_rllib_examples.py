"""The examples for RLlib run as a user runs them, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUMBER = r"(-?\d+(?:\.\d+)?)"


def run(folder: Path, example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example, run in `folder`, which is also the home it leaves results in."""
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / example), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def output(folder: Path, example: str, *arguments: str) -> str:
    done = run(folder, example, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[tuple[float, ...]]:
    """The numbers in all places where `pattern`, with # for a number, is found."""
    found = re.findall(pattern.replace("#", NUMBER), text)
    return [tuple(map(float, [x] if isinstance(x, str) else x)) for x in found]


def test_pong_trains_and_is_saved(tmp_path: Path) -> None:
    small = ("--model", "dreamerv3:tiny", "--train-ratio", "2", "--num-replay-shards", "2")
    text = output(tmp_path, "rllib_pong.py", *small, "--stop-env-steps", "2000")
    line = r"env_steps #  episode_return_mean nan  train_ratio #  env_steps/s #"
    lines = numbers(line, text)
    assert len(lines) > 1 and lines[-2][0] < 2000 <= lines[-1][0]
    assert all(ratio == 2 and speed > 0 for _, ratio, speed in lines)
    assert (tmp_path / "runs" / "pong" / "rllib_checkpoint.json").exists()


def test_tune_names_the_best_family(tmp_path: Path) -> None:
    text = output(tmp_path, "rllib_tune.py", "--stop-env-steps", "1000", "--train-ratio", "2")
    returns = {name: float(mean) for name, mean in re.findall(r"^(\w+:tiny) (\S+)$", text, re.M)}
    assert returns.keys() == {"dreamerv3:tiny", "tdmpc2:tiny"}
    assert all(mean >= 8 for mean in returns.values())  # CartPole does not fall any sooner
    ((best, path),) = re.findall(r"^best: (\S+) in (\S+)$", text, re.M)
    assert best == max(returns, key=returns.__getitem__)
    assert (Path(path) / "rllib_checkpoint.json").exists()


def test_a_checkpoint_is_evaluated_and_acts(tmp_path: Path) -> None:
    text = output(tmp_path, "rllib_evaluate.py", "--stop-iters", "1", "--train-ratio", "2")
    ((mean, episodes),) = numbers(r"evaluated: # in # episodes", text)
    assert mean >= 8 and episodes >= 10
    ((total, steps),) = numbers(r"by hand: # in # steps", text)
    assert total == steps >= 7  # CartPole gives 1 for each


def test_a_custom_env_trains_with_its_callback(tmp_path: Path) -> None:
    text = output(tmp_path, "rllib_custom_env.py", "--stop-iters", "1", "--train-ratio", "2")
    line = r"env_steps #  episode_return_mean #  comfortable_hours #"
    ((env_steps, mean, hours),) = numbers(line, text)
    assert env_steps >= 1000 and mean < 0 and 0 < hours <= 23

"""Environments as users bring them, from the folder `trials` of the shared fixtures: what `envs
check` calls usable trains, is evaluated and drawn; the rest is refused in one sentence by both."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_spaces_train import FAMILIES

from worldflux_dist import config, evaluate, local, runner
from worldflux_dist.distributed.run import Pictures, RunDirectory
from worldflux_dist.envs import EnvConfig, report

pytestmark = pytest.mark.learning

USABLE: dict[str, dict[str, Any]] = {
    **{f"quirks:{name}": {} for name in ("CloseRaises", "RepeatNone", "RepeatMethod", "Float64")},
    **{f"quirks:{name}": {} for name in ("Float64Undeclared", "LengthOne", "StartFive", "Lambda")},
    **{f"quirks:{name}": {} for name in ("MultiBinary", "OddImage", "ChannelFirst", "TupleObs")},
    **{f"quirks:{name}": {} for name in ("RewardArray", "Mutates", "OutOfBounds", "HugeReward")},
    "quirks:SelfTruncating": {},
    "quirks:PopsKwargs": {"kwargs": {"options": {"length": 9}}},
    "more:Ragged": {},
    "more:NoRender": {"max_episode_steps": 20},
    "more:TrialNoRender-v0": {},
    "more:FloatFrames": {},
    "more:CloseBeforeRender": {},
    "more:inner_limit": {"max_episode_steps": 220},
    "more:Endless": {"max_episode_steps": 30},
}
REFUSED: dict[str, str] = {
    "quirks:NanReward": "the reward is nan",
    "quirks:OldApi": "reset must return two things",
    "quirks:WrongShape": "obs: the observation has shape (2,), not (3,)",
    "quirks:TextObs": "observation space Text",
    "quirks:Unbounded": "action space Box(-inf, inf, (2,), float32) has no finite bounds",
    "quirks:ExitsAtStep": "step raised SystemExit: sys.exit(3) was called",
    "more:Quits": "step raised SystemExit: sys.exit(None) was called",
    "more:rgb_stack": "image observation of shape (4, 32, 32, 3) has 4 axes; images have",
    "more:grey_stack": "image observation of shape (4, 32, 32) has 4 channels; images have",
}
# What a run makes anew, as often as it may: told of, and trained all the same.
WARNED = {"quirks:RaisesOnce": {"max_failures": 100}}


@pytest.fixture(autouse=True)
def _trials(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared / "trials").is_dir():
        pytest.skip(f"no trials in {shared}")
    monkeypatch.syspath_prepend(str(shared / "trials"))
    monkeypatch.setattr(report, "LOOK_STEPS", 60)
    monkeypatch.setattr(report, "RUN_STEPS", 60)


def test_no_quirk_is_forgotten() -> None:
    quirks = importlib.import_module("quirks")
    names = {f"quirks:{kind.__name__}" for kind in quirks.Base.__subclasses__()}
    assert names <= USABLE.keys() | REFUSED.keys() | WARNED.keys()


def settings_for(name: str, family: str, **env: Any) -> config.Config:
    return config.from_dict(
        FAMILIES[family]
        | {
            "env": {"id": name, "num_envs": 2} | env,
            "train": {"env_steps": 160, "prefill": 96, "train_ratio": 0.5, "eval_episodes": 2},
            "scale": {"chunk_length": 8},
        }
    )


@pytest.mark.parametrize("name", USABLE | WARNED)
def test_what_is_usable_trains_and_is_evaluated_and_drawn(name: str, tmp_path: Path) -> None:
    """As a run does it: its checks, some gradient steps, an evaluation, pictures."""
    env = (USABLE | WARNED)[name]
    found = report.check(EnvConfig(name, **env))
    assert found.lines()[-1] == "usable"
    assert (name in WARNED) == any("failed (1 of" in said for said in found.warnings.values())
    settings = settings_for(name, "dreamerv3", **env)
    losses: list[float] = []
    result = local.train(settings, lambda env_steps, metrics: losses.append(metrics["loss"]))
    assert len(losses) >= 3 and np.isfinite(losses).all()
    assert len(result.evaluation.returns) == len(result.random.returns) == 2
    dream = evaluate.open_loop(result.agent, settings.env, seed=0)
    pictures = Pictures(dream, dream.frames)
    with RunDirectory(tmp_path / "run", settings) as run:
        run.score(160, 1, result.evaluation.returns, "agent")
        assert run.draw(pictures, threshold=0.0, random=0.0) == []
        assert (run.path / "curve.png").exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_usable_says_why_in_one_sentence(name: str) -> None:
    found = report.check(EnvConfig(name))
    assert not found.usable
    assert found.problem.startswith(REFUSED[name])
    assert "\n" not in found.problem
    if name == "more:Quits":
        return  # it does so late, and a short run stands it
    with pytest.raises((ValueError, RuntimeError)) as raised:
        local.train(settings_for(name, "tdmpc2", max_failures=3))
    assert f"env {name}" in str(raised.value)


def test_episodes_are_as_long_as_asked_for_beyond_a_limit_inside() -> None:
    settings = settings_for("more:inner_limit", "tdmpc2", max_episode_steps=220)
    assert report.check(settings.env).time_limit == 220


def test_an_evaluation_without_an_end_gives_advice_that_a_resume_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "EPISODE_LIMIT", 300)
    endless = settings_for("more:Endless", "dreamerv3")
    with pytest.raises(
        runner.EndlessEpisodeError, match=r"give the environment an end with env\.max"
    ):
        local.train(endless)
    with RunDirectory(tmp_path, endless) as run:
        run.score(1, 1, [0.0], "agent")
    with RunDirectory(tmp_path, settings_for("more:Endless", "dreamerv3", max_episode_steps=30)):
        pass

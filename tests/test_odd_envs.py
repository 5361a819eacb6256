"""What an odd environment does ends no run: it trains, is evaluated and drawn, or is refused in one
sentence by `envs check` and by the run alike."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import odd_envs
import pytest
from env_steps import collect, zeros
from gymnasium import spaces
from odd_envs import FRAMES, GOOD_FRAMES, LENGTH
from test_spaces_train import FAMILIES

from worldflux_dist import cli
from worldflux_dist import config as config_of_run
from worldflux_dist.distributed import trainer
from worldflux_dist.envs import EnvConfig, make_envs, report
from worldflux_dist.spaces import Spaces

ODD = "odd_envs"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LOOK_STEPS", 40)
    monkeypatch.setattr(report, "RUN_STEPS", 80)


def config(name: str, **settings: Any) -> EnvConfig:
    kwargs = {k: settings.pop(k) for k in [*settings] if k not in EnvConfig.__dataclass_fields__}
    return EnvConfig(name if ":" in name else f"{ODD}:{name}", kwargs=kwargs, **settings)


def played(settings: EnvConfig, render: bool = False) -> Any:
    """Two of the environments after some episodes, drawn at every step, and closed."""
    envs = make_envs(settings, 0, num_envs=2, render=render)
    collect(envs, 2 * LENGTH).check()
    frames = []
    for _ in range(LENGTH):
        envs.step(zeros(envs))
        frames.append(envs.render())
    envs.close()
    return frames


@pytest.mark.parametrize("kind", ["shape", "keys", "type", "nested", "none"])
def test_infos_are_not_needed(kind: str) -> None:
    assert report.check(config("OddInfo", kind=kind)).lines()[-1] == "usable"
    played(config("OddInfo", kind=kind))


@pytest.mark.parametrize("kind", FRAMES)
def test_what_cannot_be_drawn_is_a_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    found = report.check(config("OddFrames", kind=kind))
    assert found.usable
    (warning,) = found.warnings.values()
    assert warning.startswith("no video frames, the environment cannot draw: ")
    frames = played(config("OddFrames", kind=kind), render=True)
    assert frames[-1] is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("kind", GOOD_FRAMES)
def test_frames_of_every_kind_are_drawn(kind: str) -> None:
    assert not report.check(config("OddFrames", kind=kind)).warnings
    for frame in played(config("OddFrames", kind=kind), render=True):
        assert frame.shape == (8, 9, 3)
        assert frame.dtype == np.uint8
        assert (frame[:, 0] == 51).all()


def test_large_frames_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GOOD_FRAMES, "large", lambda t: np.zeros((3000, 1500, 3), np.uint8))
    frames = played(config("OddFrames", kind="large"), render=True)
    assert frames[0].shape == (1000, 500, 3)


@pytest.mark.parametrize("code", [None, 0, 3, "text"])
@pytest.mark.parametrize("at", ["step", "reset"])
def test_exit_is_a_failure_as_any(at: str, code: Any, caplog: pytest.LogCaptureFixture) -> None:
    settings = config("Exits", at=at, code=code, max_failures=2)
    said = report.check(settings).problem
    assert said.startswith(
        f"{at} raised SystemExit: sys.exit({code!r}) was called ({odd_envs.__file__}"
    )
    envs = make_envs(settings, 0, num_envs=1)
    with pytest.raises(RuntimeError, match=r"failed 2 times in a row, last with SystemExit: sys"):
        collect(envs, 3 * LENGTH)
    assert envs.take_failures() == 2
    assert "lane 0 failed (1 of at most 2 in a row): SystemExit" in caplog.text


@pytest.mark.parametrize("code", [None, 0, 3, "text"])
def test_exit_at_other_moments(code: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = config("Exits", at="construction", code=code)
    sentence = f"env odd_envs:Exits could not be made: SystemExit: sys.exit({code!r}) was called"
    assert report.check(made).problem == sentence
    with pytest.raises(ValueError, match=r"env odd_envs:Exits could not be made: SystemExit"):
        make_envs(made, 0)
    for at in ("render", "close"):
        found = report.check(config("Exits", at=at, code=code))
        assert found.usable
        assert f"sys.exit({code!r}) was called" in " ".join(found.warnings.values())
        played(config("Exits", at=at, code=code), render=True)


@pytest.mark.parametrize(
    "line", ["import sys; sys.exit(0)", "import argparse; argparse.ArgumentParser().parse_args()"]
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_module_that_is_a_program_is_named(
    line: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "program.py").write_text(line)
    words = (
        ["envs", "check", "program:make"] if command == "check" else ["train", "env.id=program:x"]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["worldflux-dist", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (1 if command == "check" else 2)
    said = capfd.readouterr()
    last = (said.out if command == "check" else said.err).splitlines()[-1]
    assert "importing program ended with sys.exit(" in last
    assert last.endswith('belongs below `if __name__ == "__main__":`')


@pytest.mark.parametrize(
    ("value", "expected"),
    [(v, 1) for v in ("none", "method", "text", "true", "zero", "negative", "half", "array")]
    + [("raises", 1), ("exits", 1), ("numpy", 3)],
)
def test_action_repeat_of_any_kind(value: str, expected: int) -> None:
    repeat = make_envs(config("OddRepeat", value=value), 0, num_envs=1).action_repeat
    assert repeat == expected
    assert type(repeat) is int


def test_kwargs_are_every_environments_own() -> None:
    settings = config("TakesApart", options={"sizes": [1, [2, 3]], "array": np.ones(2)})
    assert report.check(settings).usable
    played(settings)
    assert settings.kwargs["options"]["sizes"] == [1, [2, 3]]
    assert (settings.kwargs["options"]["array"] == 1).all()


def test_failing_in_the_middle_and_not_closing(caplog: pytest.LogCaptureFixture) -> None:
    envs = make_envs(EnvConfig(f"{ODD}:no_close", max_failures=50), 0, num_envs=3)
    chunk = collect(envs, 10 * LENGTH)
    chunk.check()
    assert envs.take_failures() > 3
    envs.close()
    assert "did not close: SystemExit: sys.exit('gone')" in caplog.text


def test_metadata_of_none() -> None:
    assert report.check(config("OddMetadata")).usable
    class_metadata = dict(odd_envs.Plain.metadata)
    played(config("Plain"))
    assert odd_envs.Plain.metadata == class_metadata  # Gymnasium writes into that of a vector env


def test_environments_with_other_spaces_are_refused() -> None:
    words = r"two environments made alike have the action_space Discrete\(\d\) and Discrete\(\d\):"
    with pytest.raises(ValueError, match=words):
        make_envs(config("Other"), 0, num_envs=2)
    assert "two environments made alike" in report.check(config("Other")).problem


@pytest.mark.ray
def test_drawing_that_kills_its_process_costs_no_score(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And an environment that does not close, in a whole run."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    settings = config_of_run.from_dict(
        FAMILIES["tdmpc2"]
        | {
            "env": {"id": f"{ODD}:DrawKills", "num_envs": 2},
            "train": {"env_steps": 160, "prefill": 96, "train_ratio": 0.5, "eval_episodes": 2}
            | {"threshold": -1.0},
            "scale": {"chunk_length": 8, "num_runners": 1, "num_shards": 1},
        }
    )
    outcome = trainer.train(settings, tmp_path / "run", plain=True)
    assert outcome is not None
    assert outcome.passed is not None
    assert (tmp_path / "run" / "curve.png").exists()
    assert "tdmpc2:tiny" in (tmp_path / "run" / "scores.jsonl").read_text()
    said = "".join(capfd.readouterr())
    assert "warning: no video: the process that draws was lost" in said
    assert "did not close: RuntimeError: it is gone already" in caplog.text


# ------------------------------------------------------------------------------------ time limits


@pytest.mark.parametrize(
    ("env_id", "asked", "steps"),
    [
        *(("deep_limit", 0, 150), ("deep_limit", 300, 300), ("deep_limit", 50, 50)),
        *((f"{ODD}:OddDeepLimit-v0", 0, 100), (f"{ODD}:OddDeepLimit-v0", 120, 120)),
        *(("Pendulum-v1", 250, 250), (f"{ODD}:OddNoRender-v0", 9, 9)),
    ],
)
def test_max_episode_steps_holds_over_limits_inside(env_id: str, asked: int, steps: int) -> None:
    name = env_id if env_id == "Pendulum-v1" or ":" in env_id else f"{ODD}:{env_id}"
    settings = EnvConfig(name, max_episode_steps=asked)
    envs = make_envs(settings, 0, num_envs=1)
    chunk = collect(envs, steps + 1)
    assert np.flatnonzero(chunk.is_last[0]).tolist() == [steps]
    assert report.check(settings).time_limit == steps


@pytest.mark.parametrize(
    ("env_id", "asked", "stays"), [("ALE/Pong-v5", 50_000, 27_000), (f"{ODD}:Plain", 40, LENGTH)]
)
def test_a_limit_that_stays_is_told(env_id: str, asked: int, stays: int) -> None:
    warning = report.check(EnvConfig(env_id, max_episode_steps=asked)).warnings["limit"]
    assert warning.startswith(f"env.max_episode_steps={asked} does nothing: ")
    assert f" {stays} steps" in warning


# ------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("shape", "high", "dtype"),
    [
        *(((4, 32, 32, 3), 255, np.uint8), ((32, 32, 3, 4), 255, np.uint8)),
        *(((4, 3, 32, 16), 255, np.uint8), ((2, 2, 16, 16, 1), 1, np.float32)),
    ],
)
def test_stacks_of_images_are_refused(shape: tuple[int, ...], high: int, dtype: Any) -> None:
    words = r"has \d axes; images have 2 or 3 \(leave frame stacking out"
    with pytest.raises(ValueError, match=words):
        Spaces(spaces.Box(0, high, shape, dtype), spaces.Discrete(2))
    small = spaces.Box(0, 255, (2, 3, 4, 5), np.uint8)
    assert Spaces(small, spaces.Discrete(2)).obs["obs"].kind == "vector"


def test_registered_environment_that_takes_no_render_mode(caplog: pytest.LogCaptureFixture) -> None:
    found = report.check(EnvConfig(f"{ODD}:OddNoRender-v0"))
    assert found.usable
    (warning,) = found.warnings.values()
    assert "draws nothing, since it cannot be made with render_mode='rgb_array'" in warning
    assert isinstance(gymnasium.spec("OddNoRender-v0").max_episode_steps, int)

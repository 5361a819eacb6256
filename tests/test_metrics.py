"""Logs stay valid and ordered through kills and resumes, and no phase of a run is silent."""

import io
import json
import math
import re
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console

from worldflux_dist.metrics import Averages, Progress, RunLog, read_lines


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def score(log: RunLog, env_steps: int, returns: list[float]) -> dict:
    return log.score(env_steps, env_steps * 4, returns, task="toy", method="dreamerv3", seed=3)


def test_log_lines_and_scalars(tmp_path: Path) -> None:
    before = time.time()
    with RunLog(tmp_path) as log:
        log.log(10, {"loss/recon": 2.5, "bad": math.nan, "worse": math.inf})
        log.log(20, {"loss/recon": 1.5})
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert set(first) == {"env_steps", "time", "loss/recon"}
    assert before <= first["time"] <= second["time"] <= time.time()
    assert [(x["env_steps"], x["loss/recon"]) for x in (first, second)] == [(10, 2.5), (20, 1.5)]
    assert scalars(tmp_path, "loss/recon") == [(10, 2.5), (20, 1.5)]


def test_score_line(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        returned = score(log, 100, [1.0, 3.0])
        with pytest.raises(ValueError, match="finite episode returns"):
            score(log, 200, [1.0, math.nan])
        with pytest.raises(ValueError, match="finite episode returns"):
            score(log, 200, [])
    [line] = read_lines(tmp_path / "scores.jsonl")
    assert line == returned
    assert line.pop("time") > 0
    assert line == {
        "task": "toy",
        "method": "dreamerv3",
        "seed": 3,
        "env_steps": 100,
        "frames": 400,
        "return_mean": 2.0,
        "return_std": 1.0,
        "episodes": 2,
    }


def test_resume_cuts_the_lost_life(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.log(step, {"x": step})
            score(log, step, [step])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"env_steps": 40, "ti')  # killed here
    with RunLog(tmp_path) as log:
        log.truncate_after(20)
        log.log(25, {"x": 2.5})
        score(log, 25, [2.5])
    for name in ("metrics.jsonl", "scores.jsonl"):
        text = (tmp_path / name).read_text()
        assert [json.loads(line)["env_steps"] for line in text.splitlines()] == [10, 20, 25], name
    assert scalars(tmp_path, "x") == [(10, 10), (20, 20), (25, 2.5)]


def test_torn_line_does_not_swallow_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"env_steps": 1}\n{"env_st')
    assert read_lines(path) == [{"env_steps": 1}]
    assert "line 2" in caplog.text
    with RunLog(tmp_path) as log:
        log.log(2, {})
    assert [line["env_steps"] for line in read_lines(path)] == [1, 2]


def test_averages() -> None:
    averages = Averages()
    for value in (1.0, 2.0, math.nan, 6.0):
        averages.mean("x", value)
    averages.mean("only_nan", math.nan)
    assert averages.pop() == {"x": 3.0}
    assert averages.pop() == {}


@pytest.mark.parametrize("phase", ["prefill", "train", "evaluate", "save"])
def test_a_blocked_phase_is_not_silent(phase: str) -> None:
    began, out = time.monotonic(), io.StringIO()
    with redirect_stdout(out), Progress(1000, plain=True, every=0.1) as progress:
        progress.update(env_steps=250)
        progress.phase(phase)
        while out.getvalue().count("\n") < 4:  # the main thread waits for something else
            assert time.monotonic() - began < 300
            time.sleep(0.01)
        lines = out.getvalue().splitlines()
        elapsed = time.monotonic() - began
    assert len(lines) <= elapsed / 0.1 + 1  # one when the phase changed
    assert all(re.match(rf"0:00:\d\d {phase}", line) for line in lines)
    assert all("env_steps 250/1,000 (25%)" in line for line in lines)


def test_plain_line_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100_000, plain=True) as progress:
        progress.phase("train")
        progress.update(env_steps=1000, gradient_steps=100)
        began = time.monotonic()
        time.sleep(0.1)
        progress.update(
            env_steps=2000,
            frames=8000,
            gradient_steps=300,
            train_ratio=31.5,
            asked_ratio=32,
            staleness=1.5,
            episode_return=-20.25,
            bottleneck="learner",
            loss_recon=0.125,
            loss_total=12.5,
        )
        progress.print("a note")
        line = progress.line()
        elapsed = time.monotonic() - began
    for part in (
        "env_steps 2,000/100,000 (2%)",
        "frames 8,000",
        "gradient_steps 300",
        "train_ratio 31.5/32",
        "staleness 1.5",
        "return -20.25",
        "loss recon 0.125 total 12.5",
        "bottleneck learner",
    ):
        assert part in line
    # A rate begins at the first update: what a resumed run brings along was not done now.
    rates = re.search(r"\| ([\d,.]+) env/s \| ([\d,.]+) grad/s \|", line)
    assert rates is not None
    env_rate, gradient_rate = (float(rate.replace(",", "")) for rate in rates.groups())
    assert 999 / elapsed < env_rate <= 10_000  # 1000 steps in at least 0.1 s
    assert gradient_rate == pytest.approx(env_rate / 5, rel=0.1)
    assert re.search(r"ETA 0:\d\d:\d\d", line)
    out = capsys.readouterr().out
    assert "a note\n" in out
    assert "env_steps 2,000" in out.splitlines()[-1]  # the last state closes the log


def test_unknown_is_a_dash_and_never_nan() -> None:
    progress = Progress(1000, plain=True)
    assert "return - |" in progress.line()
    progress.update(episode_return=math.nan, loss_total=math.inf, train_ratio=None)
    line = progress.line()
    assert "return - |" in line
    assert not re.search(r"\b(nan|inf|None)\b", line)
    with pytest.raises(TypeError, match="retrun"):
        progress.update(retrun=1.0)


def test_not_a_terminal_means_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10) as progress:
        progress.phase("train")
    out = capsys.readouterr().out
    assert "train" in out
    assert "\x1b" not in out


def test_live_display_shows_the_same_fields() -> None:
    with Progress(1000, plain=False) as progress:
        progress.phase("train")
        progress.update(env_steps=500, bottleneck="replay")
        console = Console(file=io.StringIO(), width=120, force_terminal=True)
        console.print(progress._display())
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("train", "env_steps 500/1,000 (50%)", "bottleneck replay", "return -", "ETA"):
        assert part in shown

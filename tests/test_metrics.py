"""Logs stay valid and ordered through kills and resumes, and no phase of a run is silent."""

import io
import json
import math
import re
import time
from contextlib import closing, redirect_stdout
from pathlib import Path

import pytest
from conftest import REPOSITORY
from metrics_page import markdown
from rich.console import Console
from small import FAMILY, family_batch, make_small

from worldflux_dist.imaginer import Imaginer
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.metrics import Recorder, RunLog, find, read_lines
from worldflux_dist.progress import SHOWN, Progress


def scalars(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tb"))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def score(log: RunLog, env_steps: int, returns: list[float]) -> dict:
    return log.score(env_steps, env_steps * 4, returns, task="toy", method="dreamerv3", seed=3)


def test_log_lines_and_scalars(tmp_path: Path) -> None:
    before = time.time()
    with closing(RunLog(tmp_path)) as log:
        log.log(10, {"loss/recon": 2.5, "bad": math.nan, "worse": math.inf})
        log.log(20, {"loss/recon": 1.5})
    first, second = read_lines(tmp_path / "metrics.jsonl")
    assert set(first) == {"env_steps", "time", "loss/recon"}
    assert before <= first["time"] <= second["time"] <= time.time()
    assert [(x["env_steps"], x["loss/recon"]) for x in (first, second)] == [(10, 2.5), (20, 1.5)]
    assert scalars(tmp_path, "loss/recon") == [(10, 2.5), (20, 1.5)]


def test_score_line(tmp_path: Path) -> None:
    with closing(RunLog(tmp_path)) as log:
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
    with closing(RunLog(tmp_path)) as log:
        for step in (10, 20, 30):
            log.log(step, {"x": step, "gradient_steps": step})
            score(log, step, [step])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        # Learners had gone on, though no env step was counted; then it was killed.
        file.write('{"env_steps": 20, "time": 1.0, "gradient_steps": 21}\n{"env_steps": 40, "ti')
    with closing(RunLog(tmp_path)) as log:
        log.truncate_after(20, 20)
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
    path.write_text('{"env_steps": 1, "time": 2.5}\n{"env_st')
    assert list(read_lines(path)) == [{"env_steps": 1, "time": 2.5}]
    assert "line 2" in caplog.text
    with closing(RunLog(tmp_path)) as log:
        log.log(2, {})
    assert [line["env_steps"] for line in read_lines(path)] == [1, 2]


def test_values_are_aggregated_as_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    recorder = Recorder()
    for name in ("loss/value", "gradient_steps", "rate/env_steps", "busy/runner", "staleness"):
        for value in (1.0, 2.0, math.nan, 6.0):
            recorder.add(name, value)
    recorder.add("loss/policy", math.nan)
    assert recorder.recent()["staleness"] == 3.0
    now += 4
    assert recorder.line() == {
        "loss/value": 3.0,
        "gradient_steps": 6.0,
        "rate/env_steps": 2.25,
        "busy/runner": 2.25,
        "staleness": 3.0,
        "staleness/p50": 2.0,
        "staleness/p95": pytest.approx(5.6),
    }
    assert recorder.line() == {}


def test_a_metric_that_the_table_does_not_tell_is_a_mean() -> None:
    recorder = Recorder()
    for value in (1.0, 4.0):
        recorder.add("loss_total", value)
    assert recorder.line() == {"loss_total": 2.5}
    assert [find(name).name for name in ("policy/loss", "loss/rec/a/b", "replay/shard3_bytes")] == [
        "policy/<metric>",
        "loss/rec/<key>",
        "replay/shard<index>_bytes",
    ]
    assert all(find(name).meaning for name in SHOWN - {"bottleneck", "loss/rec"})


@FAMILY
@pytest.mark.parametrize("part", ["agent", "world_model", "behavior"])
def test_every_metric_of_a_gradient_step_is_in_the_table(family: str, part: str) -> None:
    agent = make_small(family, "dict", "mixed")
    if part == "behavior" and family == "tdmpc2":
        with pytest.raises(ValueError, match="does not learn in imagination"):
            Learner(agent, part=part)
        return
    batch = family_batch(agent)
    given = Imaginer(agent).imagine(batch) if part == "behavior" else batch
    learner = Learner(agent, LearnerConfig(device="cpu"), part)
    seen = [learner.step(given) for _ in range(2)]
    assert {find(name).how for name in seen[1]} == {"mean", "last"}
    assert all(find(name).meaning for name in seen[1])
    for name, optimizer in learner.optimizers.items():
        params = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in params if p.grad is not None]
        assert seen[1][f"grad_norm/{name}"] > 0
        assert len(grads) == len(params)
        warmup, rate = optimizer.param_groups[0].get("warmup"), optimizer.param_groups[0]["lr"]
        expected = [0, rate / warmup] if warmup else [rate, rate]
        assert [each[f"learning_rate/{name}"] for each in seen] == pytest.approx(expected)


def test_the_page_of_metrics_is_the_table() -> None:
    """Written anew by: python tests/metrics_page.py > docs/metrics.md"""
    assert (REPOSITORY / "docs" / "metrics.md").read_text() == markdown()


@pytest.mark.parametrize("phase", ["prefill", "train", "evaluate", "save"])
def test_a_blocked_phase_is_not_silent(phase: str) -> None:
    began, out = time.monotonic(), io.StringIO()
    with redirect_stdout(out), Progress(1000, plain=True, every=0.1) as progress:
        progress.update({"env_steps": 250})
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
        progress.update({"env_steps": 1000, "gradient_steps": 100})
        began = time.monotonic()
        time.sleep(0.1)
        progress.update(
            {
                "env_steps": 2000,
                "frames": 8000,
                "gradient_steps": 300,
                "train_ratio/achieved": 31.5,
                "train_ratio/asked": 32,
                "staleness": 1.5,
                "episode/return": -20.25,
                "bottleneck": "learner",
                "loss/rec": 0.125,
                "loss": 12.5,
            }
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
    progress.update({"episode/return": math.nan, "loss": math.inf})
    line = progress.line()
    assert "return - |" in line
    assert not re.search(r"\b(nan|inf|None)\b", line)
    with pytest.raises(AssertionError, match="retrun"):
        progress.update({"retrun": 1.0})


def test_not_a_terminal_means_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10) as progress:
        progress.phase("train")
    out = capsys.readouterr().out
    assert "train" in out
    assert "\x1b" not in out


def test_live_display_shows_the_same_fields() -> None:
    with Progress(1000, plain=False) as progress:
        progress.phase("train")
        progress.update({"env_steps": 500, "bottleneck": "replay"})
        console = Console(file=io.StringIO(), width=120, force_terminal=True)
        console.print(progress._display())
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("train", "env_steps 500/1,000 (50%)", "bottleneck replay", "return -", "ETA"):
        assert part in shown

"""Comparisons with peers: windows alternate, other load is noticed, and who is missing is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from learner_step import compare, verdict
from peers.known import PEERS, NotRunError, Places
from peers.work import TASKS, Work, noise
from setting.windows import Row, Side, Window, alternate

WORK = Work("vector", "size1m", threads=1)
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "systems" / "learner_step.py"


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., Side]:
    """Starts a toy side; all write their names into one log."""

    def started(name: str, **options: Any) -> Side:
        given = {"log": str(tmp_path / "log"), "name": name, **options}
        return Side(name, "toy_sides", WORK, given, Path(sys.executable))

    return started


@pytest.fixture
def log(tmp_path: Path) -> Callable[[], str]:
    return (tmp_path / "log").read_text


GPU = SCRIPT.parents[1] / "gpu.py"


def test_without_a_gpu_it_is_said_what_one_would_show(tmp_path: Path) -> None:
    asked = subprocess.run(
        [sys.executable, GPU, "--dry-run"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for name in ("numbers", "compile", "ranks", "memory", "steps", "pong"):
        assert f"  {name} " in asked.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_device_is_compared_with_the_cpu(tmp_path: Path) -> None:
    """The CPU with itself: in float32 the same, and a table is written."""
    told = subprocess.run(
        [sys.executable, GPU, "--device", "cpu", "--only", "numbers", "--out", "table.md"],
        **{"capture_output": True, "text": True, "cwd": tmp_path},
    )
    assert told.returncode == 0, told.stdout + told.stderr
    lines = (tmp_path / "table.md").read_text().splitlines()
    exact = [line for line in lines if " float32 " in line]
    assert len(exact) >= 5 and all("differ by 0.0e+00" in line for line in exact)
    assert sum(line.endswith(" ok") for line in lines) == 2 * len(exact)


def test_windows_of_two_sides_alternate(begin: Callable[..., Side], log: Callable[[], str]) -> None:
    with ExitStack() as stack:
        sides = [begin(name) for name in "ab"]
        for side in sides:
            stack.callback(side.stop)
        rows = alternate(sides, ["update"], 3, 0.0, pytest.fail)["update"]
        assert log() == "ab" * 5  # two windows to warm up
        window = sides[1].window("update", 4)
        assert log() == "ab" * 5 + "bbbb"
    assert [row.name for row in rows] == ["a 1.2", "b 1.2"]
    assert [row.parameters for row in rows] == [12, 12]
    assert [len(row.windows) for row in rows] == [3, 3]
    assert window.steps == 4
    assert 0 < window.seconds < 120
    assert 0 <= window.own <= window.busy + 0.1  # the machine counts in hundredths of a second


def test_a_window_has_as_many_steps_as_fit(begin: Callable[..., Side]) -> None:
    side = begin("a")
    try:
        (row,) = alternate([side], ["update"], 2, 0.01, pytest.fail)["update"]
    finally:
        side.stop()
    assert all(window.steps > 1 for window in row.windows)


def test_a_side_that_gives_up_is_said_and_the_others_go_on(
    begin: Callable[..., Side], log: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Side:
        raise NotRunError("not installed: add --peers all")

    ours = ("ours float32", partial(begin, "ours float32"))
    given = [
        ours,
        ("fails", partial(begin, "fails", fails=2)),
        ("ends", partial(begin, "ends", ends=4)),
        ("missing", missing),
        ("unknown", partial(begin, "unknown", color="red")),
        ("good", partial(begin, "good")),
    ]
    assert compare(WORK, given, windows=3, seconds=0.0)
    assert log().count("good") == 5
    said = capsys.readouterr().out
    assert "  missing not run: not installed: add --peers all\n" in said
    assert "  fails 1.2 not run: update: RuntimeError: no memory left and more lines\n" in said
    assert "  ends 1.2 not run: update: ended with code 3: killed: last words\n" in said
    assert "  unknown not run: TypeError: make() got an unexpected keyword" in said
    assert "ours float32 1.2: " in said and "times the best peer (good 1.2), goal 2.5" in said
    assert not compare(WORK, [("ours float32", missing)], windows=1, seconds=0.0)
    assert "not run" in capsys.readouterr().out


def row(name: str, *windows: tuple[float, float, float]) -> Row:
    """Windows of 10 steps on 2 cores: seconds, CPU time of the side and of the machine."""
    return Row(name, 1, [Window(10, *window, cores=2) for window in windows])


def test_unclean_is_what_others_took_of_the_cores() -> None:
    assert Window(10, 2.0, 3.0, 3.8, 2).others == pytest.approx(0.2)
    assert Window(10, 2.0, 3.0, 3.8, 16).others == pytest.approx(0.025)
    assert Window(10, 2.0, 3.0, 2.9, 2).others == 0  # counted in hundredths: less than its own
    assert row("a", (2.0, 3.0, 3.1), (2.0, 3.0, 3.0), (1.0, 1.0, 1.05)).unclean == ""
    found = row("a", (2.0, 3.0, 3.1), (2.0, 3.0, 3.8), (1.0, 1.0, 1.8))
    assert found.unclean == "unclean: others used 30% of the cores in 2 of 3 windows"
    assert found.rate == 5
    assert found.cpu == pytest.approx(0.3)


def test_nothing_is_judged_by_an_unclean_window() -> None:
    slow, fast = row("slow", (4.0, 4.0, 4.0)), row("fast", (2.0, 2.0, 2.0))
    loaded = row("loaded", (2.0, 2.0, 3.0))
    ours = row("ours", (1.0, 1.0, 1.0))
    assert verdict(ours, [slow, fast], 2.0) == "2.00 times the best peer (fast), goal 2.0: met"
    assert verdict(ours, [slow, fast], 2.1).endswith("goal 2.1: missed")
    assert verdict(ours, [slow, loaded], 1.5).endswith("not judged, unclean")
    assert verdict(row("ours", (1.0, 1.0, 2.0)), [slow], 2.0).endswith("not judged, unclean")
    assert verdict(ours, [], 2.0) == "no peer ran to compare with, goal 2.0 times"


def test_each_peer_says_what_it_needs(tmp_path: Path) -> None:
    places = Places(tmp_path, frozenset(), {"tdmpc2": tmp_path / "nowhere"})
    for peer in PEERS:
        if peer.packages:
            with pytest.raises(NotRunError, match=f"--peers all, or --peers {peer.key}"):
                places.python(peer)
        else:
            assert places.python(peer) == Path(sys.executable)
        if peer.source:
            with pytest.raises(NotRunError, match=f"--{peer.key} "):
                places.options(peer)
        else:
            assert places.options(peer) == {}


@pytest.mark.parametrize("name", TASKS)
def test_noise_is_the_same_for_all(name: str) -> None:
    task = TASKS[name]
    batch, again = noise(task), noise(task)
    for key, value in batch.items():
        assert value.shape[:2] == task.batch
        assert (value == again[key]).all()
    assert batch["is_first"].sum() == task.batch[0]
    assert not batch["action"][:, 0].any() and batch["action"][:, 1:].any(-1).all()


@pytest.mark.slow
def test_the_script_runs_ours_and_says_who_is_missing(tmp_path: Path) -> None:
    asked = ["--task", "tdmpc2", "--size", "1m", "--windows", "1", "--seconds", "0"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked, "--threads", "1", "--venvs", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "nicklashansen/tdmpc2 not run: give its source: --tdmpc2 DIR" in done.stdout
    for goal in ("2.0", "3.0"):
        assert f"ours float32: no peer ran to compare with, goal {goal} times" in done.stdout

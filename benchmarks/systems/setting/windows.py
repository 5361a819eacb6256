"""Sides measured in turn: windows that alternate, and what else used the cores meanwhile.

A ratio of two rates says something only when both were taken in the same minutes with the cores to
themselves. Every side is a process that waits while another one runs its window, and beside each
window stands how much of all cores' time went to other processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import psutil

from peers.work import Work

ALLOWED = 0.05  # of all cores' time, to others, before a window counts as unclean
PATIENCE_S = 900.0  # for one answer: a side may compile for minutes first
TIDY_S = 5.0
SYSTEMS = Path(__file__).parents[1]


class SideError(Exception):
    """A side could not be made or gave up; the message says why in one line."""


@dataclass(frozen=True)
class Window:
    """What `steps` took: wall-clock, CPU time of the side and of everything on the machine."""

    steps: int
    seconds: float
    own: float
    busy: float
    cores: int

    @property
    def rate(self) -> float:
        return self.steps / self.seconds

    @property
    def others(self) -> float:
        """The share of all cores' time that other processes, or other machines, took."""
        return max(0.0, self.busy - self.own) / (self.seconds * self.cores)


@dataclass
class Row:
    """The windows of one side and one measure."""

    name: str
    parameters: int
    windows: list[Window] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median steps per second."""
        return median(window.rate for window in self.windows)

    @property
    def cpu(self) -> float:
        """Median CPU seconds of a step."""
        return median(window.own / window.steps for window in self.windows)

    @property
    def unclean(self) -> str:
        """Says how much others took of the unclean windows; empty where all were clean."""
        taken = [window.others for window in self.windows if window.others > ALLOWED]
        if not taken:
            return ""
        return (
            f"unclean: others used {median(taken):.0%} of the cores in {len(taken)} of "
            f"{len(self.windows)} windows"
        )


class Side:
    """Owns one side's process. What it prints is shown, or kept to say why it failed."""

    def __init__(
        self,
        name: str,
        module: str,
        work: Work,
        options: Mapping[str, Any],
        python: Path,
        show: bool = False,
    ) -> None:
        self.name, self.parameters, self.version = name, 0, ""
        self._printed: IO[bytes] | None = None
        if not show:
            self._printed = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._process = subprocess.Popen(
            [str(python), "-m", "peers.serve"],
            cwd=SYSTEMS,
            env=os.environ | {"OMP_NUM_THREADS": str(work.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
        )
        try:
            made = self.ask({"module": module, "work": asdict(work), "options": dict(options)})
        except SideError:
            self.stop()
            raise
        self.parameters, self.version = made["parameters"], made["version"]

    @property
    def label(self) -> str:
        """Its name and the version that ran."""
        return f"{self.name} {self.version}".strip()

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Send a line, wait for the answer. Raises SideError for a side that fails or is silent."""
        pipes = self._process
        assert pipes.stdin is not None and pipes.stdout is not None
        try:
            pipes.stdin.write(json.dumps(asked).encode() + b"\n")
            pipes.stdin.flush()
        except OSError:
            raise SideError(self._last_words()) from None
        if not select.select([pipes.stdout], [], [], PATIENCE_S)[0]:
            raise SideError(f"no answer in {PATIENCE_S:.0f} s")
        line = pipes.stdout.readline()
        if not line:
            raise SideError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise SideError(answer["failed"])
        return answer

    def window(self, measure: str, steps: int, again: int = 0) -> Window:
        """`steps` of a measure while nothing else of ours runs; an unclean window is taken up to
        `again` times more. Raises SideError."""
        before = busy_seconds()
        found = self.ask({"measure": measure, "steps": steps})
        busy = busy_seconds() - before
        window = Window(steps, found["seconds"], found["cpu"], busy, psutil.cpu_count() or 1)
        if window.others > ALLOWED and again:
            return self.window(measure, steps, again - 1)
        return window

    def stop(self) -> None:
        """End the process, which does so by itself when nobody can ask any more."""
        pipes = self._process
        assert pipes.stdin is not None and pipes.stdout is not None
        with contextlib.suppress(OSError):
            pipes.stdin.close()
        try:
            pipes.wait(TIDY_S)
        except subprocess.TimeoutExpired:
            pipes.kill()
            pipes.wait()
        pipes.stdout.close()
        if self._printed:
            self._printed.close()

    def _last_words(self) -> str:
        """Why a process is gone: its code and the last line it printed."""
        code = self._process.wait()
        words = b""
        if self._printed:
            self._printed.seek(0)
            words = next((x for x in reversed(self._printed.readlines()) if x.strip()), b"")
        return f"ended with code {code}: {words.decode(errors='replace').strip()}"


def busy_seconds() -> float:
    """CPU time of everything since the machine started, what a hypervisor took away included."""
    times = psutil.cpu_times()._asdict()
    counted_twice = ("guest", "guest_nice")  # within user and nice
    idle = ("idle", "iowait")
    return sum(value for name, value in times.items() if name not in (*idle, *counted_twice))


def alternate(
    sides: Sequence[Side],
    measures: Sequence[str],
    count: int,
    seconds: float,
    failed: Callable[[str, str], None],
    again: int = 0,
) -> dict[str, list[Row]]:
    """`count` windows of about `seconds` of each measure, one side after the other, round by round.

    Unclean windows are taken again, up to so often. A measure that a side fails at is reported to
    `failed` (the side's name, why) and has no row of it; all else goes on.
    """
    turns = [(m, side, Row(side.label, side.parameters)) for m in measures for side in sides]
    steps: dict[tuple[str, str], int] = {}
    gone: set[tuple[str, str]] = set()
    for number in range(-2, count):  # the first to warm up, the second to learn how many steps fit
        for measure, side, row in turns:
            key = (measure, side.label)
            if key in gone:
                continue
            try:
                window = side.window(measure, steps.get(key, 1), again if number >= 0 else 0)
            except SideError as error:
                gone.add(key)
                failed(side.label, f"{measure}: {error}")
                continue
            if number >= 0:
                row.windows.append(window)
            elif number == -1:
                steps[key] = max(1, round(seconds * window.rate))
    left = [(m, row) for m, side, row in turns if (m, side.label) not in gone]
    return {m: [row for measure, row in left if measure == m] for m in measures}


def headline(threads: int) -> str:
    """The machine, its load and the time, for the first line."""
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}, {psutil.cpu_count()} cores ({cpu_name()}), "
        f"load {os.getloadavg()[0]:.1f}, {threads} threads a side"
    )


def cpu_name() -> str:
    """The CPU as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")

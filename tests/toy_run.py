"""The toy task trained by the command line in processes of its own, to be stopped and killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import toy_task

from worldflux_dist import checkpoint
from worldflux_dist.metrics import find
from worldflux_dist.replay.segment import read_segment

TESTS = Path(__file__).parent
PATIENCE_S = 240.0


class ToyRun:
    """One life of a run in `folder`/run. Use as a context manager: no process outlives it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.run_dir, self._log = folder / "run", folder / "log.txt"
        command = [sys.executable, "-m", "worldflux_dist.cli", "train", "--run-dir", self.run_dir]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(folder)])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*map(str, command), str(toy_task.write(folder)), *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,
            )
        self._family: list[psutil.Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.processes()
        for process in [*self._family, self._process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def driver(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Processes below the driver whose title begins with `title`."""
        if psutil.pid_exists(self._process.pid):
            self._family = psutil.Process(self._process.pid).children(recursive=True)
        found = []
        for process in self._family:
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_for(self, text: str) -> None:
        """Wait until `text` has been printed."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.output:
            assert self._process.poll() is None, f"ended before saying {text!r}: {self.output}"
            assert time.monotonic() < deadline, f"did not say {text!r}: {self.output}"
            time.sleep(0.1)

    def wait_until(self, true: Callable[[], bool]) -> None:
        """Wait until `true`."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)

    def wait_for_checkpoint(self, after: int) -> int:
        """Wait until a checkpoint of a step later than `after` is in place; gives its step."""
        deadline = time.monotonic() + PATIENCE_S
        while (newest := max([0, *self.checkpoint_steps()])) <= after:
            assert self._process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        return newest

    def checkpoint_steps(self) -> list[int]:
        """Gradient steps of the checkpoints in place, oldest first."""
        return sorted(int(p.name) for p in (self.run_dir / "checkpoints").glob("[0-9]*[0-9]"))

    def checkpoint_path(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"{step:010d}"

    def interrupt(self) -> None:
        """Ctrl-C: every process of the terminal gets it."""
        os.killpg(self._process.pid, signal.SIGINT)

    def terminate(self) -> None:
        """SIGTERM, which only the driver gets."""
        self._process.terminate()

    def kill(self) -> None:
        """End the driver with no chance to tidy up."""
        self.processes()
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        """The exit code."""
        return self._process.wait(PATIENCE_S)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """All lines of metrics; fails on NaN and infinities, which are no JSON, and on a metric of ours
    that the table does not tell."""

    def refuse(name: str) -> float:
        raise AssertionError(f"metrics hold {name}")

    text = (run_dir / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in text]
    assert [name for name in set().union(*lines) if not find(name).meaning] == []
    return lines


@dataclass(frozen=True)
class Replay:
    """What a checkpoint's shards hold: steps in all, the streams of each, and the lives of writers
    that sent them."""

    steps: int
    streams: list[list[int]]
    lives: set[tuple[str, str]]


def replay_in(folder: Path) -> Replay:
    """What a checkpoint says of replay; the segments it names are all there."""
    saved = checkpoint.verify(folder)["counters"]["shards"]
    root = folder.parent.parent / "replay"
    streams: list[list[int]] = []
    for shard in saved:
        found: set[int] = set()
        for segment in shard["segments"]:
            data = (root / segment["name"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == segment["sha256"]
            for chunk in read_segment(data)[1]:
                found |= set(chunk.streams.tolist())
        streams.append(sorted(found))
    return Replay(
        sum(shard["steps"] for shard in saved),
        streams,
        {(writer.split("/")[0], life) for shard in saved for writer, life, *_ in shard["seen"]},
    )

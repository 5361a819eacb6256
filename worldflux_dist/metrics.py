"""What a run says about itself: JSON lines and TensorBoard on disk, progress on the terminal.

`RunLog` owns metrics.jsonl, scores.jsonl and tb/ of one run directory. What must stay true: every
line is valid JSON (a value that is not finite is left out, never written), and env_steps never go
back within a file, because a resumed run first cuts what its lost life had written. `Progress`
prints from a thread of its own, so that no phase is silent however long the main thread waits.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, TypeAdapter
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from typing_extensions import TypedDict

from worldflux_dist import storage
from worldflux_dist.settings import STRICT, Limited, Text, Whole

RATE_WINDOW = 60.0  # seconds over which speeds are averaged

MAX_LINE = 2**20  # bytes


class _Score(TypedDict):
    __pydantic_config__ = STRICT  # type: ignore[misc]
    task: Text
    method: Text
    seed: Whole
    env_steps: Whole
    frames: Whole
    return_mean: float
    return_std: float
    episodes: Whole
    time: float


def _counted(line: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(line.get("env_steps"), int) or line["env_steps"] < 0 or "time" not in line:
        raise ValueError("env_steps and time are needed")
    return line


_SCORE: TypeAdapter[Any] = TypeAdapter(_Score)
_METRICS: TypeAdapter[Any] = TypeAdapter(
    Annotated[dict[str, Limited | float], AfterValidator(_counted)], config=STRICT
)

logger = logging.getLogger(__name__)


class Averages:
    """Means of what was seen since the last `pop`, for values that come oftener than log lines."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def mean(self, name: str, value: float) -> None:
        """Add one value to a running mean; a value that is not finite is left out."""
        value = float(value)
        if math.isfinite(value):
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def pop(self) -> dict[str, float]:
        """The means by name, and start anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means


class RunLog:
    """Writes the measurements of one run directory; one process at a time.

    Owns metrics.jsonl (lines with env_steps and time), the same as scalars under tb/, and
    scores.jsonl. Times are seconds since the epoch. Raises OSError when the disk refuses.
    """

    def __init__(self, run_dir: Path) -> None:
        self._metrics, self._scores = run_dir / "metrics.jsonl", run_dir / "scores.jsonl"
        self._tb_dir = run_dir / "tb"
        self._tb: EventFileWriter | None = None
        run_dir.mkdir(parents=True, exist_ok=True)
        for path in (self._metrics, self._scores):
            _drop_torn_line(path)

    def log(self, env_steps: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics. Values that are not finite are left out."""
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        _append(self._metrics, {"env_steps": int(env_steps), "time": now, **finite})
        self._scalars(int(env_steps), now, finite)

    def score(
        self,
        env_steps: int,
        frames: int,
        returns: Iterable[float],
        *,
        task: str,
        method: str,
        seed: int,
    ) -> dict[str, Any]:
        """Append one evaluation (episode returns, at least one and all finite); gives its line."""
        values = np.asarray(list(returns), np.float64)
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"a score needs finite episode returns, got {values.tolist()}")
        mean, now = float(values.mean()), time.time()
        line = {
            "task": task,
            "method": method,
            "seed": int(seed),
            "env_steps": int(env_steps),
            "frames": int(frames),
            "return_mean": mean,
            "return_std": float(values.std()),
            "episodes": int(values.size),
            "time": now,
        }
        _append(self._scores, line)
        self._scalars(int(env_steps), now, {"score/return_mean": mean})
        return line

    def truncate_after(self, env_steps: int) -> None:
        """Drop what was logged later than `env_steps`, where a resumed run goes on."""
        for path in (self._metrics, self._scores):
            if path.exists():
                kept = (line for line in read_lines(path) if line["env_steps"] <= env_steps)
                storage.write(path, "".join(json.dumps(x) + "\n" for x in kept).encode())
        if self._tb_dir.exists():
            # TensorBoard forgets the points of an earlier file from this step on.
            start = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=env_steps + 1, wall_time=time.time(), session_log=start))

    def close(self) -> None:
        if self._tb is not None:
            self._tb.close()
            self._tb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scalars(self, env_steps: int, now: float, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write_event(Event(step=env_steps, wall_time=now, summary=Summary(value=scalars)))

    def _write_event(self, event: Any) -> None:
        if self._tb is None:
            self._tb = EventFileWriter(str(self._tb_dir))
        self._tb.add_event(event)
        self._tb.flush()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a .jsonl file; one torn by a killed process is left out, and said.

    Raises CheckpointError naming file, line and field where one says something else.
    """
    form = _SCORE if path.name == "scores.jsonl" else _METRICS
    with path.open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            try:
                line = json.loads(text, parse_constant=_no_number)
            except (ValueError, RecursionError):
                logger.warning("line %d of %s is torn and left out", number, path)
                continue
            yield storage.in_form(line, form, storage.as_path(path), f"line {number}")


def _no_number(name: str) -> None:
    raise ValueError(name)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# ----------------------------------------------------------------------------------- progress


@dataclass(frozen=True)
class Status:
    """The last known state of a run; None is not known yet."""

    env_steps: int = 0
    frames: int = 0
    gradient_steps: int = 0
    train_ratio: float | None = None  # achieved replayed steps per env step
    asked_ratio: float | None = None
    staleness: float | None = None  # weight versions the acting policy is behind
    episode_return: float | None = None  # mean of recent episodes
    bottleneck: str | None = None  # runner, replay or learner
    loss_recon: float | None = None
    loss_total: float | None = None


class Progress:
    """A live display on a terminal, or a plain line at least every `every` seconds in a log.

    Use as a context manager. `update` and `phase` may be called from any thread and are cheap;
    printing happens in a daemon thread that owes nothing to the main one.
    """

    def __init__(
        self, total_env_steps: int, plain: bool | None = None, every: float = 15.0
    ) -> None:
        self._total, self._every = total_env_steps, every
        self._plain = not sys.stdout.isatty() if plain is None else plain
        self._phase, self._status = "start", Status()
        self._began = time.monotonic()
        self._samples: deque[tuple[float, int, int]] = deque()  # (time, env, gradient steps)
        self._training_from: tuple[float, int] | None = None  # (time, env_steps)
        # Re-entrant, because an interrupt's handler may print over the main thread's own print.
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_printing, name="progress", daemon=True)
        self._live: Any = None

    def __enter__(self) -> Self:
        if self._plain:
            self._thread.start()
        else:
            from rich.live import Live

            self._live = Live(get_renderable=self._display, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._live is not None:
            self._live.stop()
        else:
            self._thread.join()
            self.print(self.line())

    def phase(self, name: str) -> None:
        """Say what the run is doing now: prefill, train, evaluate, save, ..."""
        with self._lock:
            changed, self._phase = name != self._phase, name
            if changed:
                self._samples.clear()
        if changed and self._plain:
            self.print(self.line())

    def update(self, **fields: Any) -> None:
        """Set fields of Status by name; the others keep their last value."""
        with self._lock:
            self._status = replace(self._status, **fields)
            if self._phase == "train" and self._training_from is None:
                self._training_from = (time.monotonic(), self._status.env_steps)
            self._sample()

    def print(self, text: str) -> None:
        """Print a line of text above the live display, or into the log."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def line(self) -> str:
        """The state as one plain line."""
        with self._lock:
            elapsed = _clock(time.monotonic() - self._began)
            return " | ".join([f"{elapsed} {self._phase:<8}", self._steps(), *self._fields()])

    def _keep_printing(self) -> None:
        while not self._stop.wait(self._every):
            self.print(self.line())

    def _sample(self) -> None:
        now, status = time.monotonic(), self._status
        self._samples.append((now, status.env_steps, status.gradient_steps))
        while now - self._samples[0][0] > RATE_WINDOW and len(self._samples) > 2:
            self._samples.popleft()

    def _rates(self) -> tuple[float | None, float | None]:
        """Env steps and gradient steps per second, recently and within this phase."""
        if len(self._samples) < 2:
            return None, None
        (start, env, gradient), last = self._samples[0], self._samples[-1]
        seconds = max(time.monotonic() - start, 1e-3)
        return (last[1] - env) / seconds, (last[2] - gradient) / seconds

    def _eta(self) -> str:
        """From the pace since training began, evaluations and saves included."""
        if self._training_from is None:
            return "-"
        start, first = self._training_from
        done, left = self._status.env_steps - first, self._total - self._status.env_steps
        return _clock(max(left, 0) * (time.monotonic() - start) / done) if done > 0 else "-"

    def _steps(self) -> str:
        done = self._status.env_steps
        return f"env_steps {done:,}/{self._total:,} ({done / max(self._total, 1):.0%})"

    def _fields(self) -> list[str]:
        s, (env_rate, gradient_rate) = self._status, self._rates()
        return [
            f"frames {s.frames:,}",
            f"gradient_steps {s.gradient_steps:,}",
            f"train_ratio {_number(s.train_ratio)}/{_number(s.asked_ratio)}",
            f"{_number(env_rate)} env/s",
            f"{_number(gradient_rate)} grad/s",
            f"staleness {_number(s.staleness)}",
            f"return {_number(s.episode_return)}",
            f"loss recon {_number(s.loss_recon)} total {_number(s.loss_total)}",
            f"bottleneck {s.bottleneck or '-'}",
            f"ETA {self._eta()}",
        ]

    def _display(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            head = Table.grid(padding=(0, 2))
            head.add_row(
                Text(f"{self._phase:<8}", style="bold cyan"),
                ProgressBar(max(self._total, 1), self._status.env_steps, width=30),
                Text(self._steps()),
                Text(_clock(time.monotonic() - self._began), style="dim"),
            )
            body = Table.grid(padding=(0, 3))
            fields = [Text(field) for field in self._fields()]
            for start in range(0, len(fields), 4):
                body.add_row(*fields[start : start + 4])
            return Group(head, body)


def _number(value: float | None) -> str:
    """Four significant digits, or a dash for what is unknown or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"

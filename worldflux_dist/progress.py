"""What a run says on the terminal while it goes on.

Printing happens in a thread of its own, so that no phase is silent however long the main thread
waits for something.
"""

from __future__ import annotations

import math
import string
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Self

RATE_WINDOW = 60.0  # seconds over which speeds are averaged
# The fields of a line, by the names in metrics.METRICS; `loss/rec` is the sum of all of its kind.
FIELDS = (
    "frames {frames}",
    "gradient_steps {gradient_steps}",
    "train_ratio {train_ratio/achieved}/{train_ratio/asked}",
    "{rate/env_steps} env/s",
    "{rate/gradient_steps} grad/s",
    "staleness {staleness}",
    "return {episode/return}",
    "loss recon {loss/rec} total {loss}",
    "bottleneck {bottleneck}",
)
SHOWN = {name for text in FIELDS for _, name, *_ in string.Formatter().parse(text) if name}


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
        self._phase = "start"
        self._values: dict[str, float | str] = {"env_steps": 0, "frames": 0, "gradient_steps": 0}
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

    def update(self, values: Mapping[str, float | str]) -> None:
        """Set values by name: those of SHOWN, and env_steps. The others keep their last value."""
        assert values.keys() <= SHOWN | {"env_steps"}, values.keys()
        with self._lock:
            self._values |= values
            now, steps = time.monotonic(), self._count("env_steps")
            if self._phase == "train" and self._training_from is None:
                self._training_from = (now, steps)
            self._samples.append((now, steps, self._count("gradient_steps")))
            while now - self._samples[0][0] > RATE_WINDOW and len(self._samples) > 2:
                self._samples.popleft()

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

    def _count(self, name: str) -> int:
        return int(self._values[name])

    def _rates(self) -> dict[str, float | str]:
        """Env steps and gradient steps per second, recently and within this phase."""
        if len(self._samples) < 2:
            return {}
        (start, env, gradient), last = self._samples[0], self._samples[-1]
        seconds = max(time.monotonic() - start, 1e-3)
        return {
            "rate/env_steps": (last[1] - env) / seconds,
            "rate/gradient_steps": (last[2] - gradient) / seconds,
        }

    def _eta(self) -> str:
        """From the pace since training began, evaluations and saves included."""
        if self._training_from is None:
            return "-"
        start, first = self._training_from
        steps = self._count("env_steps")
        done, left = steps - first, self._total - steps
        return _clock(max(left, 0) * (time.monotonic() - start) / done) if done > 0 else "-"

    def _steps(self) -> str:
        done = self._count("env_steps")
        return f"env_steps {done:,}/{self._total:,} ({done / max(self._total, 1):.0%})"

    def _fields(self) -> list[str]:
        values = dict.fromkeys(SHOWN, "-")
        # Rates are shown over a minute and of this phase alone, unlike those of a line of metrics.
        values |= {name: _number(value) for name, value in (self._values | self._rates()).items()}
        return [text.format_map(values) for text in FIELDS] + [f"ETA {self._eta()}"]

    def _display(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            head = Table.grid(padding=(0, 2))
            head.add_row(
                Text(f"{self._phase:<8}", style="bold cyan"),
                ProgressBar(max(self._total, 1), self._count("env_steps"), width=30),
                Text(self._steps()),
                Text(_clock(time.monotonic() - self._began), style="dim"),
            )
            body = Table.grid(padding=(0, 3))
            fields = [Text(field) for field in self._fields()]
            for start in range(0, len(fields), 4):
                body.add_row(*fields[start : start + 4])
            return Group(head, body)


def _number(value: float | str) -> str:
    """Four significant digits, or a dash for what is not finite; text as it is."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"

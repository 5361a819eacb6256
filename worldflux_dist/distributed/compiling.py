"""Compiling a learner's pieces while it trains: decided, begun and taken up beside its steps.

A process of its own fills torch's cache, so that the learner waits only for what is read from
there. What must stay true: a run whose pieces cannot be compiled goes on as it is, and says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import worldflux_dist
from worldflux_dist.agent import Agent
from worldflux_dist.compiled import Pieces, cache_folder, prepare
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.spaces import Spaces

COLD_S = 100.0  # of steps: compiling their pieces takes about as long, and saves a third of them
WARM_S = 20.0  # of steps: reading the pieces from the cache takes the half of it
Order = tuple[dict[str, Any], dict[str, Any], str, bool, Any]


def order_of(learner: Learner, batch: Any) -> Order:
    """What decides which code is compiled for a learner: how its agent is made, its options, what
    it trains, and the shapes and types of its batches."""
    made = {n: x for n, x in learner.agent.recipe.items() if n != "packages"}
    options = asdict(learner.config) | {"compile": True, "threads": torch.get_num_threads()}
    forms = batch.map(lambda array: (array.shape, array.dtype.str))
    return made, options, learner.part, learner.rows, forms


def mark_of(order: Order) -> Path:
    """The file that says that the cache holds what was ordered, of the code as it is now."""
    said = (order, torch.__version__, torch.backends.cpu.get_cpu_capability())
    digest = hashlib.sha256(repr(said).encode())
    for source in sorted(Path(worldflux_dist.__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return cache_folder() / f"{digest.hexdigest()[:32]}.done"


class Ahead:
    """A process that takes one step of a learner like this one, compiled, and so fills the cache.

    It ends with the process that started it, and leaves the cores to it when they are busy.
    """

    def __init__(self, order: Order) -> None:
        self._began = time.monotonic()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worldflux_dist.distributed.compiling"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache_folder())},
        )
        assert self._process.stdin is not None
        # Pickled by us for us, and small: nobody waits. The pipe is open while this process lives.
        self._process.stdin.write(pickle.dumps(order))
        self._process.stdin.flush()

    def seconds(self) -> float | None:
        """How long it took; None while it runs. Raises RuntimeError, in one sentence, where it has
        failed."""
        code = self._process.poll()
        if code is None:
            return None
        if code:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"its process ended with {code}")
        return time.monotonic() - self._began


class Auto:
    """Gives a learner its pieces where a run is long enough: compiled beside it, then in use.

    Meanwhile the learner leaves one of its threads' cores to the other process: threads that wait
    for one that has no core are slower than fewer.

    `steps` is how many gradient steps the run takes in all, infinite where nobody knows; `before`
    is called before the learner takes its first compiled step.
    """

    def __init__(self, learner: Learner, steps: float, before: Callable[[], None]) -> None:
        self._learner, self._steps, self._before = learner, steps, before
        self._taken, self._spent = -1, 0.0  # the first step is slower than all others
        self._ahead: Ahead | None = None
        self._mark: Path | None = None
        off = os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1"  # torch's own switch
        self._over = off or learner.device.type != "cpu"

    def look(self, batch: Any, seconds: float) -> str:
        """After each step, with its batch of arrays and its time: a sentence where there is news,
        else nothing."""
        if self._over:
            return ""
        if self._ahead is None:
            self._taken += 1
            self._spent += seconds if self._taken else 0.0
            return self._begin(batch) if self._worth(WARM_S) else ""
        try:
            took = self._ahead.seconds()
        except RuntimeError as error:
            self._finish()
            return f"learner.compile auto: nothing is compiled, since that failed ({error})"
        if took is None:
            return ""
        self._finish()
        return self._take_up(f"another process took {took:.0f} s")

    def _begin(self, batch: Any) -> str:
        """Take up what an earlier run has compiled, or have it compiled where there is time."""
        order = order_of(self._learner, batch)
        self._mark = self._mark or mark_of(order)
        if self._mark.exists():
            self._over = True
            return self._take_up("an earlier run has compiled them")
        if self._worth(COLD_S):
            self._ahead, self._threads = Ahead(order), torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads - 1))
        return ""

    def _take_up(self, how: str) -> str:
        self._before()
        self._learner.pieces = Pieces(*self._learner.agents)
        return f"the learner's steps are compiled from here on; {how}"

    def _finish(self) -> None:
        self._over = True
        torch.set_num_threads(self._threads)

    def _worth(self, seconds: float) -> bool:
        """Whether steps as they are take at least so long: those that are left, or, where nobody
        knows how many, those that were."""
        if self._taken < 3:
            return False
        left = self._steps - self._learner.gradient_steps
        known = left * self._spent / self._taken if math.isfinite(left) else self._spent
        return known >= seconds


def _fill() -> None:
    """What the process of `Ahead` does."""
    os.nice(5)
    order = pickle.load(sys.stdin.buffer)
    mark, (made, options, part, rows, forms) = mark_of(order), order
    alone = threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True)
    alone.start()
    prepare()
    rng = np.random.default_rng(0)
    with open(cache_folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks one compiles, the others then read
        agent = Agent(spaces=Spaces.from_json(made.pop("spaces")), **made)
        batch = forms.map(lambda form: rng.random(form[0]).astype(form[1]))
        Learner(agent, LearnerConfig(**options), part, rows).step(batch)
    mark.touch()
    os._exit(0)


if __name__ == "__main__":
    _fill()

"""How a run ends: with an outcome, by a signal, or because a process is lost for good."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from ray.exceptions import RayError, RayTaskError

if TYPE_CHECKING:
    from worldflux_dist.evaluate import Evaluation

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the last evaluation, the random baseline, and the verdict if asked for."""

    evaluation: Evaluation
    random: Evaluation
    passed: bool | None


def is_loss(error: Exception) -> bool:
    """Whether Ray lost a process or an object, and not a process of ours raised."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, RayError)
    return isinstance(error, RayError)


def sentence(error: Exception) -> str:
    """What an error says at last, of another process's error its cause."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[-1]


class StoppedError(RuntimeError):
    """A run that was told to stop could not save everything; the message says what is saved."""


def background(call: Callable[..., T], *given: Any) -> Future[T]:
    """Runs `call` in a thread that may hang: a process that ends does not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*given))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class RoleLostError(RuntimeError):
    """A process died for good; the message says which and why."""

    def __init__(self, error: Exception) -> None:
        text = str(getattr(error, "cause", None) or error).strip()
        named = re.search(r"class_name: (\w+)", text) or re.search(r"ray::(\w+)", text)
        role = named[1] if named else "a process"
        why = f"it was killed, perhaps out of memory, or crashed ({type(error).__name__})"
        if "creation task" in text:
            why = f"it could not start: {text.splitlines()[-1].strip()}"
        super().__init__(f"{role} is lost, {why}; run the same command again to go on")


class StopSignals:
    """Ctrl-C or SIGTERM once: save and stop; a second time: stop at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._stopping, self._at_once, self._say = False, False, say
        self._came = math.inf
        self._previous: dict[int, Any] = {}

    @property
    def stopping(self) -> bool:
        """Raises KeyboardInterrupt after a second signal: the code that it interrupted may
        have swallowed that one (a finalizer does)."""
        if self._at_once:
            raise KeyboardInterrupt
        return self._stopping

    @property
    def seconds(self) -> float:
        """Since the first signal; 0 before it."""
        return max(0.0, time.monotonic() - self._came)

    def all_is_saved(self) -> None:
        """From here on one signal stops at once."""
        self._stopping = True

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        # The interrupt rises wherever the run happens to be, and what is there may turn it into
        # an error of its own (an import does, when it is in the middle of a class).
        if self._at_once and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            self._at_once = True
            raise KeyboardInterrupt
        self._stopping, self._came = True, time.monotonic()
        self._say("stopping: saving a checkpoint first (once more to stop at once)")

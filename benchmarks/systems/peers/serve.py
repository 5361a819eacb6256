"""One side of a comparison as a process: it stays alive and runs a window of steps when told.

Started as `python -m peers.serve` by setting/windows.py, with the Python of the side's own virtual
environment. A line of JSON in, a line out: first what to make, then {"measure", "steps"} for each
window. What the side itself prints goes to stderr, so that answers stay alone on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from peers.work import Made, Work


def window(call: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of wall-clock and of this process's CPU that `steps` calls take."""
    start, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        call()
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def made(job: dict[str, Any]) -> Made:
    """The side that `job` names, on as many cores as it is given threads."""
    work = Work(**job["work"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.threads])
    side: Made = importlib.import_module(job["module"]).make(work, **job["options"])
    return side


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers)

    try:
        side = made(json.loads(sys.stdin.readline()))
        answer({"parameters": side.parameters, "version": side.version})
        for line in sys.stdin:
            asked = json.loads(line)
            answer(window(side.calls[asked["measure"]], asked["steps"]))
    except Exception as error:
        traceback.print_exc()
        what = next(iter(str(error).splitlines()), "")
        answer({"failed": f"{type(error).__name__}: {what}"})
        sys.exit(1)


if __name__ == "__main__":
    main()

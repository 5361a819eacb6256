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

LONGEST = 160  # of what is said of a failure


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


def why(error: Exception) -> dict[str, str]:
    """The answer of what failed; its trace goes to what the side prints."""
    traceback.print_exc()
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        side = made(json.loads(sys.stdin.readline()))
    except Exception as error:
        print(json.dumps(why(error)), file=answers)
        sys.exit(1)
    print(json.dumps({"parameters": side.parameters, "version": side.version}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = window(side.calls[asked["measure"]], asked["steps"])
        except Exception as error:  # another measure may still work
            answer = why(error)
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()

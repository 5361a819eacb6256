"""A side of a comparison that writes down its calls, and may print, fail or end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from peers.work import Made, Work


def make(work: Work, log: str, name: str, fails: int = 0, ends: int = 0) -> Made:
    """Its call number `fails` raises, number `ends` ends the process with code 3."""
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        print("a side may print what it likes")
        with Path(log).open("a") as file:
            file.write(name)
        if calls == fails:
            raise RuntimeError("no memory left\nand more lines")
        if calls == ends:
            print("killed: last words", file=sys.stderr, flush=True)
            os._exit(3)

    return Made({"update": call}, parameters=12, version="1.2")

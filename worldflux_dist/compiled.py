"""torch.compile by pieces: the inner loops of a learner's families, each compiled once.

A `piece` is a method that a family or a behavior names (`pieces`): a step of imagination, a step of
the scan over time, losses of many states at once. The whole forward, as many copies of these as
there are steps, would take longer to compile than most runs take.

Compiling the pieces of a family takes a minute or two, reading them from the cache some seconds: so
in a run, a process beside the learner fills the cache while training goes on
(distributed/compiling.py). Pieces draw the same random numbers as the code that they are made of,
and give the same results but for rounding.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from worldflux_dist.agent import Agent

# Draws are torch's own; a graph's calls are C++, too, which for small sizes counts.
OPTIONS: Any = {"fallback_random": True, "cpp_wrapper": True}


def cache_folder() -> Path:
    """Where compiled code stays between runs: TORCHINDUCTOR_CACHE_DIR, or the user's own cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds

    # Torch itself sets the variable, to a folder that is gone after a restart of the machine.
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if named and named != default_cache_dir():
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "worldflux_dist" / "compiled"


def prepare() -> None:
    """Compile in this process, from now on, with the cache above. Before anything is compiled.

    Raises RuntimeError where there can be no cache.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise RuntimeError(
            f"learner.compile keeps what it compiled in {folder}, which cannot be made ({error}): "
            "name another folder in TORCHINDUCTOR_CACHE_DIR, or set learner.compile=false"
        ) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    import torch._inductor.config as config  # takes seconds

    config.compile_threads = 1  # no processes that outlive this one
    # It lays out in memory what it makes as it likes, and then warns of it.
    warnings.filterwarnings("ignore", "torch.searchsorted.*non-contiguous")


class Pieces:
    """The compiled pieces of agents, in use within `applied` only: acting in the same process,
    with batches of other sizes, would have them compiled again."""

    def __init__(self, *agents: Agent) -> None:
        prepare()
        self._pieces: list[tuple[Any, str, Any]] = []
        for part in (part for agent in agents for part in (agent.world_model, agent.behavior)):
            for path in part.pieces:
                *owners, name = path.split(".")
                owner = reduce(lambda module, each: getattr(module, each), owners, part)
                if owner is None:  # which this size of the family does not have
                    continue
                piece = torch.compile(
                    getattr(owner, name), fullgraph=True, dynamic=False, options=OPTIONS
                )
                self._pieces.append((owner, name, piece))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        for owner, name, piece in self._pieces:
            owner.__dict__[name] = piece
        try:
            yield
        finally:
            for owner, name, _ in self._pieces:
                del owner.__dict__[name]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says in one sentence that something could not be compiled."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            what = next(iter(str(error).splitlines()), type(error).__name__)
            raise RuntimeError(
                f"learner.compile: torch.compile failed ({what}): set learner.compile=false"
            ) from error
        raise

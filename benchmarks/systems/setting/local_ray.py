"""Ray on this machine for a benchmark, and what the machine itself can do at that moment.

Figures through Ray say little without the bare copies of the same minute: the machine is shared.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import ray

from worldflux_dist.distributed.cluster import QUIET

MB = 2**20
ONCE = {"num_cpus": 0, "max_restarts": 0}  # options of an actor that only a benchmark needs


@contextmanager
def local_ray(store_bytes: int) -> Iterator[None]:
    """Ray for this process alone, with room for every actor whatever the cores."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # it listens on loopback only
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=64,
        object_store_memory=store_bytes,
        **QUIET,
    )
    try:
        yield
    finally:
        ray.shutdown()


def machine() -> str:
    """Cores, load and the version of Ray, for a headline."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Ray {ray.__version__}"


def copy_seconds(nbytes: int, runs: int = 9) -> float:
    """Median seconds of a bare copy into memory that is there already."""
    source = np.ones(nbytes, np.uint8)
    target, taken = np.zeros_like(source), []
    for _ in range(runs):
        start = time.perf_counter()
        target[:] = source
        taken.append(time.perf_counter() - start)
    return median(taken)


def put_seconds(nbytes: int, runs: int = 9) -> float:
    """Median seconds of ray.put."""
    source, taken = np.ones(nbytes, np.uint8), []
    for _ in range(runs):
        start = time.perf_counter()
        ref = ray.put(source)
        taken.append(time.perf_counter() - start)
        del ref
    return median(taken)


def percentiles(seconds: list[float]) -> str:
    """p50, p95 and p99 in milliseconds."""
    found = 1e3 * np.percentile(seconds, [50, 95, 99])
    return "p50 {:.1f}, p95 {:.1f}, p99 {:.1f} ms".format(*found)

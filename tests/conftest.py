"""What every test stands on: one thread per process, a small local Ray, and the shared fixtures.

The environment is set before torch and Ray are first imported, because both read it only then.
"""

from __future__ import annotations

import os
import secrets

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_AUTH_MODE"] = "token"  # as on a cluster: clusters without one are refused
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of parity values: $WORLDFLUX_SHARED, or `shared` beside the repository.

    A test that asks for it is skipped where the folder is absent.
    """
    folder = Path(os.environ.get("WORLDFLUX_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared fixtures at {folder}; set WORLDFLUX_SHARED to their folder")
    return folder


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A Ray of its own for the module: 4 logical CPUs, 200 MB of object store, no dashboard."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200_000_000,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def small_ray() -> Iterator[None]:
    """A Ray of its own for the module, with the smallest object store it can have: 80 MB."""
    import ray

    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)  # workers find the tests' modules
        ray.init(
            address="local",
            num_cpus=4,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.fixture
def started(small_ray: None) -> Iterator[list[Any]]:
    """Actors put in here are killed afterwards, and their names free again."""
    import ray

    handles: list[Any] = []
    yield handles
    for handle in handles:
        ray.kill(handle)

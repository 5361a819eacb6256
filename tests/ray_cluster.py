"""Real Ray clusters of several nodes on this machine, for tests and benchmarks.

Unless told otherwise, nodes find lost ones in a second instead of ten. Nothing outlives the block
but what Ray itself leaves to its own clean-up.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

QUICK = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 2,
}
SHIPPED = {  # by deploy/
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
MB = 2**20


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Variables of this process, and of those it starts, for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def nodes(
    cpus: Sequence[float], store_bytes: int = 150 * MB, quick: bool = True
) -> Iterator[Cluster]:
    """A cluster with a node for each of `cpus`, the first one its head; this process is not joined.

    Workers find modules of the tests too. On a busy machine, a node that is to find lost ones
    quickly may take one for lost that is only slow.
    """
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    with environment(PYTHONPATH=path):
        cluster = Cluster()
        try:
            for index, num in enumerate(cpus):
                system = {"_system_config": QUICK} if index == 0 and quick else {}
                cluster.add_node(
                    num_cpus=num,
                    object_store_memory=store_bytes,
                    include_dashboard=False,
                    **system,
                )
            cluster.wait_for_nodes()
            with environment(RAY_ADDRESS=cluster.address):
                yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()

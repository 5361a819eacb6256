"""Placement on a cluster of several nodes: reserved, spread, and found again after a node died."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.util.placement_group import placement_group_table

from worldflux_dist.distributed.cluster import Need, Plan, join_cluster
from worldflux_dist.distributed.placement import Placement, _waiting, place
from worldflux_dist.distributed.roles import MB

NODE: dict[str, Any] = {"num_cpus": 3, "memory": 1000 * MB, "object_store_memory": 80 * MB}
SPARE_S = 240.0  # two to five on an idle machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that holds the driver alone, and three nodes; a dead one is noticed in a second."""
    health = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500}
    health |= {"health_check_timeout_ms": 1000, "health_check_failure_threshold": 2}
    head = {"num_cpus": 0, "object_store_memory": 80 * MB, "_system_config": health}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(3):
        cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def make_plan(runners: int, nodes: tuple[Any, ...]) -> Plan:
    roles = (
        Need("runner", runners, 1, runners * 100 * MB, "", {"CPU": 1, "GPU": 0}),
        Need("shard", 2, 1, 2 * 100 * MB, "", {"CPU": 0.5, "GPU": 0}),
        Need("learner", 2, 1, 2 * 200 * MB, "", {"CPU": 1, "GPU": 0}),
    )
    has = sum(node.get("memory", 0) for node in nodes)
    return Plan(roles, 100 * MB, int(has), sum(node.get("CPU", 0) for node in nodes), 0, nodes)


@ray.remote(max_restarts=-1, max_task_retries=0)
class Somewhere:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def start(placement: Placement) -> dict[str, list[Any]]:
    return {
        role: [Somewhere.options(**options).remote() for options in each]  # type: ignore[attr-defined]
        for role, each in placement.options.items()
    }


def nodes_of(actors: list[Any], timeout_s: float) -> list[str]:
    """The node of each; "" of one that does not answer."""
    refs = [actor.node.remote() for actor in actors]
    done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    nodes = dict.fromkeys(refs, "")
    for ref in done:
        with suppress(RayError):
            nodes[ref] = ray.get(ref)
    return list(nodes.values())


@pytest.mark.ray
@pytest.mark.slow
def test_a_role_finds_its_place_again_after_its_node_died(cluster: Cluster) -> None:
    plan = make_plan(2, join_cluster())
    plan.check()
    with closing(place(plan)) as placement:
        roles = start(placement)
        before = {name: nodes_of(actors, 60) for name, actors in roles.items()}
        assert all(node for nodes in before.values() for node in nodes)
        assert len(set(before["shard"])) == 2  # on separate nodes
        lost = before["shard"][0]
        [dead] = [node for node in cluster.worker_nodes if node.node_id == lost]
        cluster.add_node(**NODE)  # the spare
        began = time.monotonic()
        cluster.remove_node(dead, allow_graceful=False)
        everyone = [actor for actors in roles.values() for actor in actors]
        while "" in (after := nodes_of(everyone, 1)) or lost in after:
            assert time.monotonic() - began < SPARE_S, after
            time.sleep(0.5)


@pytest.mark.ray
@pytest.mark.slow
def test_what_finds_no_room_is_said_and_nothing_is_kept(cluster: Cluster) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"for \d+ x runner \(1 CPU, 100 MB\).* are free"):
        place(make_plan(12, join_cluster()), timeout_s=1)
    assert time.monotonic() - began >= 1
    states = {group["state"] for group in placement_group_table().values()}
    assert states == {"REMOVED"}


@pytest.mark.ray
@pytest.mark.slow
def test_room_is_waited_for(cluster: Cluster) -> None:
    plan = make_plan(5, join_cluster())
    with closing(place(plan)), pytest.raises(RuntimeError, match="no room"):
        place(plan, timeout_s=1)
    with closing(place(plan)) as second:  # what was given back
        assert len(second.options["runner"]) == 5


@pytest.mark.ray
@pytest.mark.slow
def test_room_that_is_there_is_never_missed(cluster: Cluster) -> None:
    plan = make_plan(5, join_cluster())
    with closing(place(plan)) as placement:
        assert len(placement.groups) == 7
        assert not any(_waiting(placement.groups) for _ in range(50))


@pytest.mark.ray
@pytest.mark.slow
def test_small_processes_leave_room_for_large_ones(cluster: Cluster) -> None:
    """A learner as large as a node, beside runners that Ray would spread over all of them."""
    plan = make_plan(3, join_cluster())
    runner, shard, _ = plan.roles
    learner = Need("learner", 1, 3, 200 * MB, "", {"CPU": 3, "GPU": 0})
    with closing(place(replace(plan, roles=(runner, shard, learner)), timeout_s=10)) as placement:
        assert len(placement.groups) == 5


def test_on_one_machine_nothing_is_reserved() -> None:
    placement = place(make_plan(2, ()))
    assert placement.options["shard"] == [{"num_cpus": 0.5, "num_gpus": 0}] * 2
    assert placement.groups == []

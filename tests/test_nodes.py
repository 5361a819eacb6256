"""Nodes of a real cluster that die under a run: it goes on, and no step on disk is lost or doubled.

Nodes are raylets on this machine with their workers; the driver is on the head. Recovery times are
printed, and written where WORLDFLUX_RECOVERY_LOG says; nothing is asserted about them. The goal is
30 seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_runs as f
import psutil
import pytest
import ray
import ray_cluster
from fault_runs import FaultRun
from ray._private.state import actors as actor_table  # the public one asks a dashboard
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

from worldflux_dist import config

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

RUNNER, SHARD, LEARNER = "EnvRunnerActor", "ReplayShardActor", "LearnerActor"
TWO = (0, 3, 3)  # each holds a shard; 4.5 CPUs are asked for


@dataclass
class Site:
    """A run on a cluster, and what was on disk when its node was struck."""

    cluster: Cluster
    run: FaultRun

    def node_with(self, *classes: str) -> Any:
        """The worker node that holds a process of each class, and little else."""
        living = self.living()
        nodes = [
            node
            for node in self.cluster.worker_nodes
            if set(classes) <= set(living.get(node.node_id, ()))
        ]
        assert nodes, f"no worker node holds {classes}: {living}"
        return min(nodes, key=lambda node: len(living[node.node_id]))

    def living(self) -> dict[str, list[str]]:
        """Classes of the actors on each node."""
        found: dict[str, list[str]] = {}
        for each in actor_table().values():
            if each["State"] == "ALIVE":
                found.setdefault(each["Address"]["NodeID"], []).append(each["ActorClassName"])
        return found

    def strike(self, node: Any) -> None:
        """SIGKILL everything on a node, now that there is a spare one."""
        self.note()
        self.cluster.remove_node(node, allow_graceful=False)

    def note(self) -> None:
        self.before, self.owners = f.live_shards(self.run.run_dir), f.shard_owners(self.run.run_dir)
        self.was, self.since = self.run.last(), time.time()

    def check_recovery(self, what: str, *classes: str) -> None:
        """Every class that was struck works again, and all that was on disk is there once."""
        run, seconds = self.run, {}
        if SHARD in classes:
            seconds["shard"] = f.shard_back(run, self.since, self.owners)
        if RUNNER in classes:
            seconds["runner"] = f.runner_back(run, self.since, self.before)
        if LEARNER in classes:
            seconds["learner"] = f.learner_back(run, self.since, self.was["restarts/learner"])
        line = run.wait_for_line(
            "progress of all",
            lambda x: (
                x["env_steps"] > self.was["env_steps"]
                and x["gradient_steps"] > self.was["gradient_steps"]
            ),
            self.since + max(seconds.values()),
        )
        f.note_recovery(what, max(seconds.values()), goal=30, parts=seconds)
        after = f.live_shards(run.run_dir)
        assert f.keys(self.before) <= f.keys(after)
        f.check_shards(after)
        f.check_counters(run.lines())
        f.check_ratio(line, runners=2)
        print(f"{what}: {len(f.missing(after))} chunks had been acknowledged and not written")

    def check_end(self, root: Path) -> None:
        """A last checkpoint is taken, from which shards come back without a gap in any window."""
        self.run.interrupt()
        assert self.run.wait() == 130, self.run.output
        _, manifest = f.newest(self.run.run_dir)
        assert f.keys(self.before) <= f.keys(f.saved_shards(self.run.run_dir, manifest))
        replay = config.load([self.run.run_dir / "config.yaml"]).replay
        for shard in f.restored(self.run.run_dir, manifest, root, "9999", replay):
            f.check_windows(shard)


@contextmanager
def run_on(cpus: Sequence[float], folder: Path, *overrides: str) -> Iterator[Site]:
    """A run that trains on a cluster with a node for each of `cpus`, the first one its head."""
    with ray_cluster.nodes(cpus) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        with FaultRun(folder, *overrides) as run:
            run.wait_for_training()
            yield Site(cluster, run)


def add_spare(site: Site, cpus: float) -> None:
    site.cluster.add_node(num_cpus=cpus, object_store_memory=150 * ray_cluster.MB)


@pytest.mark.parametrize("checks", ["quick", "shipped"])
def test_a_node_with_a_runner_and_a_shard_dies(
    tmp_path: Path, checks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checks == "shipped":
        monkeypatch.setattr(ray_cluster, "QUICK", ray_cluster.SHIPPED)
    with run_on(TWO, tmp_path) as site:
        victim = site.node_with(RUNNER, SHARD)
        add_spare(site, TWO[-1])
        site.strike(victim)
        site.check_recovery(f"node with runner and shard, {checks} health checks", RUNNER, SHARD)
        site.check_end(tmp_path / "restored")


def test_a_node_with_one_rank_of_two_dies(tmp_path: Path) -> None:
    """No node has room for both ranks."""
    with run_on([3] * 4, tmp_path, "scale.num_learners=2", "learner.threads=2") as site:
        victim = site.node_with(LEARNER)
        add_spare(site, 3)
        site.strike(victim)
        site.check_recovery("node with a rank of two", LEARNER)
        site.check_end(tmp_path / "restored")


def test_the_node_with_everything_but_the_driver_dies(tmp_path: Path) -> None:
    with run_on([0, 6], tmp_path) as site:
        victim = site.node_with(RUNNER, SHARD, LEARNER, "WeightStore")
        add_spare(site, 6)
        site.strike(victim)
        site.check_recovery("node with everything but the driver", RUNNER, SHARD, LEARNER)
        site.check_end(tmp_path / "restored")


def test_a_node_that_freezes_is_replaced_and_does_no_harm_when_it_wakes(tmp_path: Path) -> None:
    """Its processes go on where they stopped, until they find out that they are of the past."""
    with run_on(TWO, tmp_path) as site:
        victim = site.node_with(RUNNER, SHARD)
        add_spare(site, TWO[-1])
        [raylet] = victim.all_processes["raylet"]
        frozen = psutil.Process(raylet.process.pid)
        frozen_all = [*frozen.children(recursive=True), frozen]
        site.note()
        for process in frozen_all:
            process.suspend()
        try:
            site.check_recovery("frozen node with runner and shard", RUNNER, SHARD)
        finally:
            for process in frozen_all:
                process.resume()
        psutil.wait_procs(frozen_all, timeout=f.PATIENCE_S)
        site.note()
        site.run.wait_for_training(site.since)
        after = f.live_shards(site.run.run_dir)
        assert f.keys(site.before) <= f.keys(after)
        f.check_shards(after)
        site.check_end(tmp_path / "restored")


def test_a_node_that_is_taken_back_with_notice_does_not_end_the_run(tmp_path: Path) -> None:
    """As spot machines are. Ray then raises another error than where a node just dies."""
    with run_on(TWO, tmp_path) as site:
        victim = site.node_with(RUNNER, SHARD)
        add_spare(site, TWO[-1])
        accepted, why = GcsClient(address=site.cluster.address).drain_node(
            victim.node_id,
            DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "the machine is needed elsewhere",
            int(1000 * (time.time() + 5)),
        )
        assert accepted, why
        time.sleep(3)
        site.strike(victim)
        site.check_recovery("node taken back with notice", RUNNER, SHARD)
        site.check_end(tmp_path / "restored")

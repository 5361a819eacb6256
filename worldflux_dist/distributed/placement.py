"""Where the processes of a run live in a cluster: reserved before the first one starts.

What must stay true: a process that is started again finds its reservation, on another node if its
own has died. Ray brings the lost part of a placement group back all together or not at all
(measured), so a role that can do with fewer processes has a group for each of them; the ranks of
learners, which cannot, have one for all, and so have the shards, spread over the nodes. A shard
that comes back may share a node with another: better there than nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import PlacementGroupID
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from worldflux_dist.distributed.cluster import Need, Plan, spell
from worldflux_dist.distributed.roles import ROLES

WAIT_S = 60.0


@dataclass
class Placement:
    """Options of every process to start, by role, in order of their index.

    `options["runner"][3]` goes to `.options(**...)` of the fourth runner, each time it is started.
    Owns the reservations behind them.
    """

    options: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    groups: list[PlacementGroup] = field(default_factory=list)

    def close(self) -> None:
        """Give the reservations back; Ray ends the processes in them."""
        for group in self.groups:
            remove_placement_group(group)
        self.groups = []


def place(
    plan: Plan, timeout_s: float = WAIT_S, stopping: Callable[[], bool] = lambda: False
) -> Placement:
    """Reserve room for every process of the plan in the cluster that was joined.

    On this machine (a plan without nodes) nothing is reserved, since it belongs to the run alone.
    Waits up to `timeout_s` for nodes that another run leaves. Raises
    RuntimeError, with nothing kept, where there is still no room, or when told to stop.
    """
    placement = Placement()
    for role in sorted(plan.roles, key=lambda role: -role.share["CPU"]):
        # The largest first: Ray spreads small ones over nodes that a large one would have fitted.
        groups = _groups(role) if plan.nodes else []
        placement.groups += groups
        options = {"num_cpus": role.share["CPU"], "num_gpus": role.share["GPU"]}
        placement.options[role.name] = [
            options | _in_group(role, groups, index) for index in range(role.processes)
        ]
    deadline = time.monotonic() + timeout_s
    while (waiting := _waiting(placement.groups)) and not stopping():
        if time.monotonic() > deadline:
            missing = _missing(plan, placement, waiting)
            placement.close()
            raise RuntimeError(missing)
        time.sleep(0.1)
    return placement


def _groups(role: Need) -> list[PlacementGroup]:
    if together := ROLES[role.name].together:
        return [placement_group([role.bundle] * role.processes, together)]
    return [placement_group([role.bundle]) for _ in range(role.processes)]


def _in_group(role: Need, groups: list[PlacementGroup], index: int) -> dict[str, Any]:
    """Where process `index` goes; every bundle has a group of its own or one for its role."""
    if not groups:
        return {}
    group, bundle = (groups[0], index) if ROLES[role.name].together else (groups[index], 0)
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle)}


def _waiting(groups: list[PlacementGroup]) -> set[PlacementGroupID]:
    """Those without their room, by the cluster's table. Not by `group.wait(0)`, which also says no
    when the answer takes a moment: a quarter of all times (measured), so often one of many."""
    return {group.id for group in groups if placement_group_table(group)["state"] != "CREATED"}


def _missing(plan: Plan, placement: Placement, waiting: set[PlacementGroupID]) -> str:
    """Which roles found no room, what they ask for, and what is free."""
    asked = []
    for role in plan.roles:
        strategies = [options["scheduling_strategy"] for options in placement.options[role.name]]
        num = sum(strategy.placement_group.id in waiting for strategy in strategies)
        asked += [f"{num} x {role.name} ({spell(role.bundle)})"] if num else []
    available = ray.available_resources()
    free = {kind: available.get(kind, 0) for kind in ("CPU", "GPU", "memory")}
    return (
        f"the cluster has no room for {'; '.join(asked)}: {spell(free)} are free; wait for other "
        "runs to end, add nodes or ask for less"
    )

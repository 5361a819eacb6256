"""Where our processes live under RLlib: within Tune, each in its own bundle of the trial's group.

RLlib's processes take any bundle with room, and Ray the first one it finds: one that asks for half
of a bundle would take it apart, and its owner would wait forever. So idle actors hold our bundles
until RLlib's processes have theirs.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from worldflux_dist.rllib.config import WorldFluxConfig


def bundles(config: WorldFluxConfig) -> dict[str, list[dict[str, float]]]:
    """What each of our processes asks for, by role; in this order their bundles follow RLlib's."""
    shard = {"CPU": config.num_cpus_per_replay_shard}
    asked = {"shard": [shard] * config.num_replay_shards}
    if config.num_imagination_actors:
        imaginer = {
            "CPU": config.num_cpus_per_imagination_actor,
            "GPU": config.num_gpus_per_imagination_actor,
        }
        cpus, gpus = config.num_cpus_per_learner, config.num_gpus_per_learner
        cpus = (0 if gpus else 1) if cpus == "auto" else cpus
        more = config.custom_resources_per_learner or {}
        learner = {"CPU": cpus, "GPU": gpus} | more
        asked["imaginer"] = [imaginer] * config.num_imagination_actors
        asked["policy"] = [learner] * config.num_policy_learners
    return {
        role: [{kind: num for kind, num in bundle.items() if num} for bundle in each]
        for role, each in asked.items()
    }


class Places:
    """Ray's options for each of our processes. Owns the idle actors that hold their bundles."""

    def __init__(self, config: WorldFluxConfig) -> None:
        asked = bundles(config)
        ours = [bundle for each in asked.values() for bundle in each if bundle]
        group = get_current_placement_group()
        there = group.bundle_specs if group is not None else []
        index = len(there) - len(ours)
        inside = there[index:] == ours  # else the group was made for something else
        self._options: dict[str, list[dict[str, Any]]] = {}
        for role, each in asked.items():
            self._options[role] = []
            for bundle in each:
                custom = {k: v for k, v in bundle.items() if k not in ("CPU", "GPU")}
                options: dict[str, Any] = {
                    "num_cpus": bundle.get("CPU", 0),
                    "num_gpus": bundle.get("GPU", 0),
                    "resources": custom,
                }
                if group is not None and inside and bundle:
                    strategy = PlacementGroupSchedulingStrategy(group, index)
                    options["scheduling_strategy"] = strategy
                    index += 1
                self._options[role].append(options)
        holder: Any = ray.remote(Idle)
        self._holders = {
            role: [holder.options(**o).remote() for o in each if "scheduling_strategy" in o]
            for role, each in self._options.items()
        }
        ray.get([idle.__ray_ready__.remote() for each in self._holders.values() for idle in each])

    def take(self, role: str) -> list[dict[str, Any]]:
        """Options of the role's processes, which are to be started now."""
        for idle in self._holders.pop(role, []):
            ray.kill(idle)
        return self._options[role]


class Idle:
    """Does nothing, where it is."""

"""How many torch threads a learner gets where nobody says it: what others leave of the cores."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from worldflux_dist.config import Config
from worldflux_dist.distributed.roles import ROLES, Node

LEARNER_THREADS = 8  # more gain nothing: the steps of a scan are small


def settled(config: Config, nodes: tuple[Node, ...] = ()) -> Config:
    """`config` with learner.threads as a number: what the other processes leave of the cores.

    Processes of this machine share its cores, and runners work only as far as the learner lets
    them: an environment step costs about as much as two replayed ones (benchmarks/LOG.md). A core
    is left to them in any case: threads that wait for one that has no core are slower than fewer.
    On a cluster CPUs are reserved, and the number is the largest with which all processes fit.
    """
    if config.learner.threads != "auto":
        return config
    gpus, device = sum(node.get("GPU", 0) for node in nodes), config.learner.device
    gpus = gpus if nodes else torch.cuda.device_count()
    most = LEARNER_THREADS if device == "cpu" or (device == "auto" and not gpus) else 1
    if not nodes:
        threads = min(most, _left_here(config))
    else:
        fits = (n for n in range(most, 1, -1) if _fits(_with_threads(config, n), nodes))
        threads = next(fits, 1)
    return _with_threads(config, threads)


def _with_threads(config: Config, threads: int) -> Config:
    return replace(config, learner=replace(config.learner, threads=threads))


def _left_here(config: Config) -> int:
    """Of this machine's cores, or of as many as OMP_NUM_THREADS allows, to each learner."""
    cores = os.cpu_count() or 1
    count = {name: role.count(config) for name, role in ROLES.items()}
    collecting = cores / (1 + config.train.train_ratio / 2)
    others = min(collecting, count["runner"] + count["shard"] / 2) + count["imaginer"]
    left = int((cores - max(1, others)) / (count["learner"] + count["policy"]))
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(left, int(allowed) if allowed.isdigit() else left))


def _fits(config: Config, nodes: tuple[Node, ...]) -> bool:
    """Whether the CPUs that all processes ask for can be found on the nodes, the largest first."""
    asked = [role.share(config) for role in ROLES.values() for _ in range(role.count(config))]
    left = [node.get("CPU", 0.0) for node in nodes]
    for cpus in sorted(asked, reverse=True):
        place = max(range(len(left)), key=left.__getitem__)
        left[place] -= cpus
    return min(left) >= 0

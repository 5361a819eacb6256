"""GPUs of a run: which part of one each process gets, and what is free on those that are here."""

from __future__ import annotations

import math
import os
import subprocess

from worldflux_dist.config import Config, ConfigError
from worldflux_dist.distributed.roles import MB, ROLES, Node

SPARE = 0.1  # of each GPU, so that evaluation finds room on any


def shares(config: Config, resources: Node) -> dict[str, dict[str, float]]:
    """CPUs and GPUs that one process of each role gets, of all that `resources` holds.

    A CPU for each torch thread; roles that mostly wait get a part of one. Raises ConfigError where
    the ranks of a group could not have a GPU each.
    """
    there = {name: role for name, role in ROLES.items() if role.count(config)}
    rank, model = _gpu_shares(config, int(resources.get("GPU", 0)))
    most = {"rank": _but_spare(rank), "model": _but_spare(model)}
    gpu = most | {"spare": SPARE * (rank > 0), "": 0}
    return {n: {"CPU": role.share(config), "GPU": gpu[role.gpu]} for n, role in there.items()}


def _gpu_shares(config: Config, gpus: int) -> tuple[float, float]:
    """What a rank of a learner group, and what any other process with a model, gets of a GPU."""
    groups = [role.count(config) for role in ROLES.values() if role.gpu == "rank"]
    others = sum(role.count(config) for role in ROLES.values() if role.gpu == "model")
    ranks, device = sum(groups), config.learner.device
    if device == "cpu" or (gpus == 0 and device == "auto"):
        return 0, 0
    if gpus == 0 or gpus >= ranks + others:  # asked for where there is none: refused by the check
        return 1, 1
    if gpus > ranks:
        return 1, _part(1, others, gpus - ranks)
    if max(groups) == 1:
        share = _part(1, ranks + others, gpus)
        return share, share
    if gpus == ranks:  # more than half: two ranks never meet on one GPU, which NCCL refuses
        return (0.6, _part(0.4, others, gpus)) if others else (1, 1)
    raise ConfigError(
        f"{ranks} ranks of learners need a GPU each and there are {gpus}: lower "
        "scale.num_learners or imagination.num_policy_learners, or set learner.device=cpu"
    )


def _but_spare(share: float) -> float:
    return math.floor(1e4 * share * (1 - SPARE) + 1e-6) / 1e4


def _part(whole: float, processes: int, gpus: int) -> float:
    """An equal part of `whole` GPUs such that all processes fit, in Ray's steps of 0.0001."""
    return math.floor(1e4 * whole / math.ceil(processes / gpus)) / 1e4


def gpu_memory() -> tuple[int, ...]:
    """Bytes that are free on each GPU of this machine that this process may use, by nvidia-smi:
    asking CUDA would take some of them. Nothing where it does not tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    command += ["-i", visible] if visible else []
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return tuple(MB * int(line) for line in told.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()

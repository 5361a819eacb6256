"""What a run asks of the machine, said before it starts, and the local Ray it runs on.

A plan that cannot fit is refused with its numbers: a run that dies of memory after a day has cost
a day.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import ray
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.config import Config, ConfigError
from worldflux_dist.data import Batch, Spaces
from worldflux_dist.replay.buffer import ReplayConfig

MB = 1024**2
PROCESS_BYTES = 400 * MB  # a Python process with torch and Ray loaded, measured
BATCHES_IN_FLIGHT = 4


@dataclass(frozen=True)
class Role:
    """One line of the plan: how many processes of what, with how many torch threads each."""

    name: str
    processes: int
    threads: int
    nbytes: int
    note: str


@dataclass(frozen=True)
class Plan:
    """Roles and memory of a run on this machine."""

    roles: tuple[Role, ...]
    object_store: int
    available: int
    cores: int

    @property
    def nbytes(self) -> int:
        return sum(role.nbytes for role in self.roles) + self.object_store

    @property
    def processes(self) -> int:
        return sum(role.processes for role in self.roles)

    def lines(self) -> list[str]:
        """The plan as a table of plain lines."""
        table = [f"{'role':<14}{'processes':>10}{'threads':>9}{'memory':>12}   what"]
        for role in self.roles:
            table.append(
                f"{role.name:<14}{role.processes:>10}{role.threads:>9}"
                f"{role.nbytes / MB:>9,.0f} MB   {role.note}"
            )
        table.append(
            f"{'object store':<14}{'':>10}{'':>9}{self.object_store / MB:>9,.0f} MB   "
            "batches and weights in flight"
        )
        table.append(
            f"{'in all':<14}{self.processes:>10}{'':>9}{self.nbytes / MB:>9,.0f} MB   "
            f"of {self.available / MB:,.0f} MB available, {self.cores} cores"
        )
        return table

    def check(self) -> None:
        """Raise ConfigError where the plan needs more memory than there is."""
        if self.nbytes > self.available:
            replay = next(role for role in self.roles if role.name == "replay shard")
            raise ConfigError(
                f"this run needs {self.nbytes / MB:,.0f} MB and {self.available / MB:,.0f} MB are "
                f"available (replay alone {replay.nbytes / MB:,.0f} MB): lower replay.capacity or "
                "set replay.capacity_bytes, or take a smaller model"
            )


def make_plan(config: Config, spaces: Spaces) -> Plan:
    """Count what the roles of `config` need; nothing is allocated."""
    shard_config(config)  # refuses a share that is too small
    with torch.device("meta"):
        agent = config.make_agent(spaces)
    if agent.needs_goal:
        raise ConfigError("planner.objective is goal: set planner.goal to one flat observation")
    weights = 4 * sum(p.numel() for p in agent.parameters())
    on_gpu = config.learner.device != "cpu" and torch.cuda.is_available()
    activations = activation_bytes(agent, config.replay)  # refuses batches that do not fit, too
    activations *= not on_gpu
    per_step = step_bytes(spaces)
    steps = config.replay.capacity
    if config.replay.capacity_bytes:
        steps = min(steps, config.replay.capacity_bytes // per_step)
    batch = config.replay.batch_size * config.replay.batch_length * per_step
    scale, size = config.scale, f"{weights / 4e6:.2f} M parameters"
    acting = []
    if scale.acting == "actor":
        nbytes = PROCESS_BYTES + weights
        acting.append(Role("acting", 1, scale.runner_threads, nbytes, "acts for all runners"))
    return Plan(
        roles=(
            Role(
                "env runner",
                scale.num_runners,
                scale.runner_threads,
                scale.num_runners * (PROCESS_BYTES + weights),
                f"{config.env.num_envs} envs of {config.env.id} each",
            ),
            Role(
                "replay shard",
                scale.num_shards,
                1,
                scale.num_shards * PROCESS_BYTES + steps * per_step,
                f"{steps:,} steps x {per_step:,} bytes",
            ),
            Role(
                "learner",
                1,
                config.learner.threads or torch.get_num_threads(),
                PROCESS_BYTES + 4 * weights + activations,
                f"{config.model}, {size}",
            ),
            Role("weight store", 1, 1, PROCESS_BYTES // 4, "the newest weights"),
            *acting,
            Role(
                "evaluator", 1, scale.runner_threads, PROCESS_BYTES + weights, "only now and then"
            ),
        ),
        object_store=max(128 * MB, BATCHES_IN_FLIGHT * (batch + weights)),
        available=psutil.virtual_memory().available,
        cores=os.cpu_count() or 1,
    )


def activation_bytes(agent: Agent, replay: ReplayConfig) -> int:
    """What the world model's loss keeps for its backward pass, counted on the meta device."""
    lead, total = (replay.batch_size, replay.batch_length), 0

    def count(value: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += value.nbytes
        return value

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        kinds = {"image": torch.uint8, "vector": torch.float32}
        flag = torch.zeros(lead, dtype=torch.bool)
        batch = Batch(
            {
                k: torch.zeros(*lead, *s.shape, dtype=kinds[s.kind])
                for k, s in agent.spaces.obs.items()
            },
            torch.zeros(*lead, agent.spaces.action_dim),
            torch.zeros(lead),
            flag,
            flag,
            flag,
        )
        agent.world_model.loss(batch)
    return total


def step_bytes(spaces: Spaces) -> int:
    """Bytes of one step in replay."""
    obs = sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in spaces.obs.values())
    return obs + 4 * spaces.action_dim + 4 + 3


def shard_config(config: Config) -> ReplayConfig:
    """The config of one shard: its share of the capacity, which is meant for all together."""
    num, r = config.scale.num_shards, config.replay
    return replace(r, capacity=r.capacity // num, capacity_bytes=-(-r.capacity_bytes // num))


def start_ray(plan: Plan) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names.

    A local one listens on loopback for this process only, hence runs without a token unless
    RAY_AUTH_MODE says otherwise.
    """
    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(plan.cores, plan.processes),
            "object_store_memory": plan.object_store,
        }
    ray.init(**options)

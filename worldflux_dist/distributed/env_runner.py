"""The env runner as a Ray actor: a thin shell around the plain role.

Steps go from here to the shards as object references; the driver sees reports only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import RayActorError

from worldflux_dist.config import Config
from worldflux_dist.data import Chunk
from worldflux_dist.distributed.model_actor import RemoteAct
from worldflux_dist.distributed.shard import ShardReport, shard_name
from worldflux_dist.distributed.supervision import life_seed, raise_if_gone
from worldflux_dist.distributed.weights import WeightReader, poll_by
from worldflux_dist.envs import make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.runner import EnvRunner, Episode


@dataclass(frozen=True)
class RunnerReport:
    """The result of a collect call: counts and times, no data."""

    env_steps: int
    episodes: list[Episode]
    version: int
    shards: dict[int, ShardReport]
    env_failures: int
    acting_losses: int
    collect_seconds: float
    send_seconds: float
    acted: Sequence[tuple[float, int]]  # as EnvRunner's


class EnvRunnerActor:
    """Collects with the newest weights and sends every environment's steps to its shard."""

    def __init__(self, config: Config, index: int, env_steps: int) -> None:
        torch.set_num_threads(config.scale.runner_threads)
        keep_freed_memory()
        # Neither a resumed run nor a restarted runner plays the episodes of its former life again.
        seed = life_seed(config.seed, index, env_steps)
        torch.manual_seed(seed)
        envs = make_envs(config.env, seed % 2**31)
        self.agent, self.remote = None, None
        if config.scale.acting == "actor":
            self.remote = RemoteAct()
        else:
            self.agent = config.make_agent(envs.spaces)
        first = index * envs.num_envs
        act = random_act(envs.spaces, seed)  # until weights come that have learned something
        self.runner = EnvRunner(envs, act, f"runner-{index}", first)
        self.poll_by = poll_by(config.scale.max_staleness)
        self.runner.version, self.weights = 0, WeightReader()
        # A shard's process is back after seconds, one with a large replay after minutes.
        self.shard_wait_s = 0.9 * config.scale.patience
        self.shards = [ray.get_actor(shard_name(i)) for i in range(config.scale.num_shards)]

    @ray.method(max_task_retries=-1)
    def ready(self) -> None:
        """Answers once a process that died is back."""

    def collect(self, length: int) -> RunnerReport:
        """`length` steps of every environment, stored in replay when this returns."""
        start = time.monotonic()
        self._pull()
        chunk = self.runner.collect(length)
        collected = time.monotonic()
        reports = send(chunk, self.shards, self.shard_wait_s)
        return RunnerReport(
            chunk.num_steps,
            self.runner.take_episodes(),
            chunk.version,
            reports,
            self.runner.envs.take_failures(),
            0 if self.remote is None else self.remote.take_losses(),
            collected - start,
            time.monotonic() - collected,
            self.runner.acted,
        )

    def _pull(self) -> None:
        """Take the newest weights, if there are newer ones."""
        if not (self.weights.pull(self.agent) and self.weights.learned):
            return  # until something has been learned, random actions explore better
        if self.remote is not None:
            self.runner.act = self._act_remotely
        else:
            assert self.agent is not None
            self.runner.act = torch.inference_mode()(self.agent.act_batch)  # a tenth less CPU
            self.runner.refresh = self._poll
            self.runner.version = self.weights.oldest

    def _poll(self) -> None:
        """Within a chunk: take newer weights over before those here are too old."""
        self.weights.poll(self.agent, self.poll_by)
        self.runner.version = self.weights.oldest

    def _act_remotely(self, obs: Any, is_first: np.ndarray, carry: Any) -> tuple[np.ndarray, Any]:
        assert self.remote is not None
        answer = self.remote(obs, is_first, carry)
        self.runner.version = self.remote.version
        return answer


def send(chunk: Chunk, shards: Sequence[Any], patience: float) -> dict[int, ShardReport]:
    """Store a chunk: one part to each shard. A part that may be lost is sent again with the same
    key, for `patience` seconds; then RayActorError is raised."""
    owners, (writer, incarnation, seq) = chunk.streams % len(shards), chunk.key
    parts = {}
    for index in np.unique(owners).tolist():
        part = chunk if (owners == index).all() else chunk.rows(owners == index)  # rows are copied
        parts[index] = replace(part, key=(f"{writer}/{index}", incarnation, seq))
    reports: dict[int, ShardReport] = {}
    deadline = time.monotonic() + patience
    while True:
        missing = parts.keys() - reports.keys()
        refs: dict[int, ObjectRef] = {i: shards[i].add.remote(parts[i]) for i in missing}
        for index, ref in refs.items():
            try:
                report: ShardReport = ray.get(ref)
                reports[index] = report
            except RayActorError as error:
                raise_if_gone(error)
                if time.monotonic() > deadline:
                    raise
        if len(reports) == len(parts):
            return reports
        time.sleep(0.2)

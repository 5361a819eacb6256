"""Runner, learner and evaluation as Ray actors: thin shells around the plain roles.

Data goes from runner to shard and from shard to learner as object references; the driver sees
reports and references only. The trainer makes actors of them.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError

from worldflux_dist import evaluate
from worldflux_dist.config import Config
from worldflux_dist.data import Batch, Chunk, Spaces
from worldflux_dist.distributed.acting import RemoteAct
from worldflux_dist.distributed.shard import ShardReport, shard_name
from worldflux_dist.distributed.weights import WEIGHTS
from worldflux_dist.envs import make_envs
from worldflux_dist.envs.acting import random_act
from worldflux_dist.learner import Learner, keep_freed_memory
from worldflux_dist.runner import EnvRunner, Episode

SHARD_WAIT_S = 60.0  # a shard's process is back after two to ten seconds


@dataclass(frozen=True)
class RunnerReport:
    """What one collect call brought: counts and times, no data."""

    env_steps: int
    episodes: list[Episode]
    version: int
    shards: dict[int, ShardReport]
    env_failures: int
    acting_losses: int
    collect_seconds: float
    send_seconds: float


class EnvRunnerActor:
    """Collects with the newest weights and sends every environment's steps to its shard."""

    def __init__(self, config: Config, index: int, env_steps: int) -> None:
        torch.set_num_threads(config.scale.runner_threads)
        keep_freed_memory()
        # Neither a resumed run nor a restarted runner plays the episodes of its former life again.
        life = ray.get_runtime_context().was_current_actor_reconstructed * time.time_ns()
        seed = np.random.SeedSequence([config.seed, index, env_steps, life]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        envs = make_envs(config.env, int(seed) % 2**31)
        self.agent, self.remote = None, None
        if config.scale.acting == "actor":
            self.remote = RemoteAct()
        else:
            self.agent = config.make_agent(envs.spaces)
        first = index * envs.num_envs
        act = random_act(envs.spaces, int(seed))  # until weights come that have learned something
        self.runner = EnvRunner(envs, act, f"runner-{index}", first)
        self.runner.version, self.published = 0, -1
        self.store = ray.get_actor(WEIGHTS)
        self.shards = [ray.get_actor(shard_name(i)) for i in range(config.scale.num_shards)]

    def collect(self, length: int) -> RunnerReport:
        """`length` steps of every environment, stored in replay when this returns."""
        start = time.monotonic()
        self._pull()
        chunk = self.runner.collect(length)
        if self.remote is not None:
            chunk.version = self.remote.version
        collected = time.monotonic()
        reports = self._send(chunk)
        return RunnerReport(
            chunk.num_steps,
            self.runner.take_episodes(),
            chunk.version,
            reports,
            self.runner.envs.take_failures(),
            0 if self.remote is None else self.remote.take_losses(),
            collected - start,
            time.monotonic() - collected,
        )

    def _pull(self) -> None:
        """Take the newest weights, if there are newer ones."""
        found: Any = ray.get(self.store.newer_than.remote(self.published))
        if found is None:
            return
        self.published, (weights,) = found
        if self.published == 0:
            return  # nothing has been learned: random actions explore better
        if self.remote is not None:
            self.runner.act = self.remote
        else:
            assert self.agent is not None
            self.agent.load_arrays(ray.get(weights))
            self.runner.act, self.runner.version = self.agent.act_batch, self.published

    def _send(self, chunk: Chunk) -> dict[int, ShardReport]:
        """One part to each shard. A part that may be lost is sent again with the same key."""
        parts = {}
        for index in np.unique(chunk.streams % len(self.shards)):
            part = chunk.rows(chunk.streams % len(self.shards) == index)
            writer, incarnation, seq = chunk.key
            part.key = (f"{writer}/{index}", incarnation, seq)
            parts[int(index)] = part
        reports: dict[int, ShardReport] = {}
        deadline = time.monotonic() + SHARD_WAIT_S
        while True:
            missing = parts.keys() - reports.keys()
            refs: dict[int, ObjectRef] = {i: self.shards[i].add.remote(parts[i]) for i in missing}
            for index, ref in refs.items():
                try:
                    report: ShardReport = ray.get(ref)
                    reports[index] = report
                except ActorUnavailableError:
                    if time.monotonic() > deadline:
                        raise
            if len(reports) == len(parts):
                return reports
            time.sleep(0.2)


class LearnerActor:
    """The learner's shell: batches come as references and are fetched before a step begins."""

    def __init__(self, config: Config, spaces: Spaces, folder: Path | None) -> None:
        torch.manual_seed(config.seed)
        self.learner = Learner(config.make_agent(spaces), config.learner)
        self.store = ray.get_actor(WEIGHTS)
        if folder is not None:
            self.learner.load(folder)
        self._idle_since = time.monotonic()

    def step(self, batch: Batch | None) -> dict[str, float] | None:
        """One gradient step; metrics, with seconds spent stepping and waiting for work.

        None without a batch: its shard had nothing to give.
        """
        if batch is None:
            return None
        start = time.monotonic()
        metrics = self.learner.step(batch)
        end = time.monotonic()
        metrics["time/learner_step"] = end - start
        metrics["time/learner_wait"] = start - self._idle_since
        self._idle_since = end
        return metrics

    def publish(self) -> int:
        """Send the inference weights to the store; gives their version, the gradient steps."""
        version = self.learner.gradient_steps
        ray.get(self.store.publish.remote(version, self.learner.agent.inference_state()))
        return version

    def agent_arrays(self) -> dict[str, np.ndarray]:
        """All weights, for evaluation elsewhere."""
        state = self.learner.agent.state_dict()
        return {name: value.cpu().numpy().copy() for name, value in state.items()}

    def save(self, folder: Path) -> None:
        self.learner.save(folder)


@dataclass(frozen=True)
class EvaluationRequest:
    """What to look at, and with which seed. `pictures` are a dream, where the family can show what
    it imagines, or else an episode, where the environment can draw itself."""

    episodes: int
    seed: int
    random: bool = False
    pictures: bool = False


@ray.remote(num_cpus=0, max_retries=2)
def evaluate_remotely(
    config: Config, spaces: Spaces, arrays: dict[str, np.ndarray], request: EvaluationRequest
) -> dict[str, Any]:
    """Evaluate weights in a process of its own: returns, and pictures where asked."""
    keep_freed_memory()
    torch.set_num_threads(config.scale.runner_threads)
    torch.manual_seed(request.seed)
    agent = config.make_agent(spaces)
    agent.load_arrays(arrays)
    found: dict[str, Any] = {
        "agent": evaluate.evaluate(agent, config.env, request.episodes, request.seed)
    }
    if request.random:
        found["random"] = evaluate.evaluate_random(config.env, request.episodes, request.seed)
    if request.pictures and agent.world_model.decodes_obs:
        found["dream"] = evaluate.open_loop(agent, config.env, request.seed)
    elif request.pictures:
        with suppress(evaluate.NoPicturesError):
            found["frames"] = evaluate.episode_frames(agent, config.env, request.seed, limit=200)
    return found

"""The roles of a run, told once: what plan, placement, start, supervision, messages and status say
of a kind of process, they read in ROLES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import ray

from worldflux_dist.data import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from worldflux_dist.agent import Agent
    from worldflux_dist.config import Config
    from worldflux_dist.replay import ReplayConfig
    from worldflux_dist.spaces import Spaces

Node = Mapping[str, float]  # its resources as Ray names them: CPU, GPU, memory in bytes
MB = 1024**2
PROCESS_BYTES = 400 * MB  # a Python process with torch and Ray loaded, measured
CUDA_BYTES = 600 * MB  # CUDA's context and libraries in a process: assumed, not measured yet
FOREVER = {"max_restarts": -1, "max_task_retries": 0}  # a call that failed is made again, elsewhere


def actor(kind: type, **options: Any) -> Any:
    """`kind` as a Ray actor that restarts for ever, unless `options` say otherwise."""
    remote: Any = ray.remote
    return remote(**FOREVER | options)(kind)


@dataclass(frozen=True)
class Sizes:
    """What the memory of a run is counted from. `agent` is on the meta device. Activations count
    where they are `here`: with a GPU they are not in main memory."""

    config: Config
    agent: Agent
    here: bool

    @cached_property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return 4 * sum(p.numel() for p in self.agent.parameters())

    @cached_property
    def step(self) -> int:
        return step_bytes(self.agent.spaces)

    @cached_property
    def steps(self) -> int:
        """Steps that replay holds at most."""
        replay = self.config.replay
        limit = replay.capacity_bytes // self.step if replay.capacity_bytes else replay.capacity
        return min(replay.capacity, limit)

    @cached_property
    def loss(self) -> LossSizes:
        """Of one learner's batch."""
        num, replay = self.config.scale.num_learners, self.config.replay
        return loss_sizes(self.agent, replace(replay, batch_size=replay.batch_size // num))

    @cached_property
    def imagined(self) -> int:
        """Bytes of the features (H + 1, N, F) that a whole batch's N start states are rolled
        into."""
        horizon = self.agent.imagining().config.horizon
        starts = self.loss.starts * self.config.scale.num_learners
        return 4 * (horizon + 1) * starts * self.agent.world_model.feature_dim

    @cached_property
    def sent(self) -> int:
        """Bytes of these features on their way to policy learners, packed."""
        model = self.agent.world_model
        packed = sum(part.nbytes for part in model.feature_parts)
        return self.imagined // (4 * model.feature_dim) * packed

    @cached_property
    def dreaming(self) -> int:
        """Bytes of a learner that imagines itself: states on their way, what is kept of each step,
        and what the behavior's three networks of features keep."""
        from worldflux_dist.behaviors.actor_critic import ActorCritic

        if _apart(self.config) or not isinstance(self.agent.behavior, ActorCritic):
            return 0
        horizon, num = self.agent.behavior.config.horizon, self.config.scale.num_learners
        return 3 * self.loss.state + (horizon + 1) * self.loss.visible + 4 * self.imagined // num

    def learner(self, activations: int) -> int:
        """Bytes of a rank that keeps so many of its activations, with its weights, gradients and
        moments and with copies to save; twice where another process takes a step of its own to
        compile it (compiling.py)."""
        own = PROCESS_BYTES + 7 * self.weights + activations * self.here
        return own * (1 + (self.here and self.config.learner.compile == "auto"))

    def learner_on_gpu(self, activations: int) -> int:
        """What of it is on its GPU, if it has one."""
        return 7 * self.weights + activations

    @cached_property
    def loss_and_dreams(self) -> int:
        """Bytes of activations that a learner of the world model keeps."""
        return self.loss.kept + self.dreaming

    @property
    def acting(self) -> int:
        return PROCESS_BYTES + self.weights


Count = Callable[["Config"], int]


def _of_runner(config: Config) -> int:
    return config.scale.runner_threads


def _of_learner(config: Config) -> int:
    import torch  # not by every process that counts deaths

    threads = config.learner.threads
    assert threads != "auto", "settled by the plan"
    return threads or torch.get_num_threads()


def _apart(config: Config) -> bool:
    return config.imagination.mode == "actors"


@dataclass(frozen=True)
class Role:
    """One kind of process.

    `count` is 0 where a run has none; `cpus` None is one for each torch thread. A "rank" of
    learners may need a whole GPU, other processes with a "model" share one, and "spare" ones get a
    tenth. `nbytes` is the memory of each, `on_gpu` that on its GPU, `shared` what all hold
    together. Those placed `together` come back together when a node
    dies. `death` and `cause` are for messages; more than `deaths` in a row end the run. `busy` is
    its name among the metrics of busy roles, and `more` what to raise when it is the busiest.
    """

    words: str
    count: Count
    threads: Count
    nbytes: Callable[[Sizes], int]
    note: Callable[[Sizes], str]
    cpus: float | None = None
    gpu: Literal["", "rank", "model", "spare"] = ""
    on_gpu: Callable[[Sizes], int] = lambda sizes: sizes.weights
    shared: Callable[[Sizes], int] = lambda sizes: 0
    together: str = ""
    death: str = ""
    cause: str = "a node that fails"
    deaths: int = 20
    busy: str = ""
    more: str = ""

    def share(self, config: Config) -> float:
        """CPUs of each."""
        return self.threads(config) if self.cpus is None else self.cpus


ROLES = {
    "runner": Role(
        "env runners",
        count=lambda c: c.scale.num_runners,
        threads=_of_runner,
        nbytes=lambda s: s.acting,
        note=lambda s: f"{s.config.env.num_envs} envs of {s.config.env.id}",
        death="a runner's process",
        cause="an environment that crashes its process",
        busy="runner",
        more="scale.num_runners",
    ),
    "shard": Role(
        "replay",
        count=lambda c: c.scale.num_shards,
        threads=lambda c: 1,
        cpus=0.5,
        nbytes=lambda s: PROCESS_BYTES,
        shared=lambda s: s.steps * s.step,
        note=lambda s: f"{s.steps:,} steps x {s.step:,} bytes of replay",
        together="SPREAD",
        death="a shard's process",
        busy="replay",
        more="scale.num_shards",
    ),
    "learner": Role(
        "learners",
        count=lambda c: c.scale.num_learners,
        threads=_of_learner,
        gpu="rank",
        nbytes=lambda s: s.learner(s.loss_and_dreams),
        on_gpu=lambda s: s.learner_on_gpu(s.loss_and_dreams),
        note=lambda s: f"{s.config.model}, {s.weights / 4e6:.2f} M parameters",
        together="PACK",
        cause="a learner that crashes",
        busy="learner",
        more="scale.num_learners, or take a faster GPU",
    ),
    "imaginer": Role(
        "imaginers",
        count=lambda c: c.imagination.num_imaginers * _apart(c),
        threads=_of_runner,
        gpu="model",
        nbytes=lambda s: s.acting + 2 * s.imagined * s.here,
        on_gpu=lambda s: s.weights + 2 * s.imagined,
        note=lambda s: f"imagined batches of {s.sent / MB:,.1f} MB",
        death="an imaginer's process",
        cause="an imaginer that crashes",
        busy="imaginer",
        more="imagination.num_imaginers",
    ),
    "policy": Role(
        "policy learners",
        count=lambda c: c.imagination.num_policy_learners * _apart(c),
        threads=_of_learner,
        gpu="rank",
        # Three networks of three layers each keep about what a batch of features holds.
        nbytes=lambda s: s.learner(4 * s.imagined),
        on_gpu=lambda s: s.learner_on_gpu(4 * s.imagined),
        note=lambda s: "learners of what is imagined",
        together="PACK",
        busy="policy",
        more="imagination.num_policy_learners",
    ),
    "acting": Role(
        "acting process",
        count=lambda c: int(c.scale.acting == "actor"),
        threads=_of_runner,
        gpu="model",
        nbytes=lambda s: s.acting,
        note=lambda s: "acts for all runners",
        death="the process that acts",
    ),
    "store": Role(
        "weight store",
        count=lambda c: 1,
        threads=lambda c: 1,
        cpus=0.1,
        nbytes=lambda s: PROCESS_BYTES // 4,
        note=lambda s: "the newest weights",
    ),
    "evaluator": Role(
        "evaluator",
        count=lambda c: 1,
        threads=_of_runner,
        cpus=0.4,
        gpu="spare",
        nbytes=lambda s: s.acting,
        note=lambda s: "only now and then",
    ),
}
BUSY = {role.busy: role for role in ROLES.values() if role.busy}  # in the metrics' words


def step_bytes(spaces: Spaces) -> int:
    """Bytes of one step in replay."""
    obs = sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in spaces.obs.values())
    return obs + 4 * spaces.action_dim + 4 + 3


class LossSizes(NamedTuple):
    """Of the world model's loss on one batch: bytes that are kept for the backward pass, how many
    states imagination starts from, bytes of those, and of what a rollout keeps of them."""

    kept: int
    starts: int
    state: int
    visible: int


def loss_sizes(agent: Agent, replay: ReplayConfig) -> LossSizes:
    """Counted on the meta device. Raises ValueError where the batches do not fit the model."""
    import torch

    model = agent.world_model
    lead, total = (replay.batch_size, replay.batch_length), 0

    def count(value: Tensor) -> Tensor:
        nonlocal total
        total += value.nbytes
        return value

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        kinds = {"image": torch.uint8, "vector": torch.float32}
        obs = {
            name: torch.zeros(*lead, *space.shape, dtype=kinds[space.kind])
            for name, space in agent.spaces.obs.items()
        }
        action = torch.zeros(*lead, agent.spaces.action_dim)
        flag = torch.zeros(lead, dtype=torch.bool)
        output = model.loss(Batch(obs, action, torch.zeros(lead), flag, flag, flag))
    states = output.states
    sizes = (
        sum(value.nbytes for value in state.tensors.values())
        for state in (states, model.visible(states))
    )
    return LossSizes(total, output.batch.reward.numel(), *sizes)

"""An agent in a process of its own that acts and imagines for others: for all runners where
planning is expensive or one GPU is to do it, and for policies that learn apart.

What must stay true: nothing of a caller is kept between calls (its memory travels with every call),
so a call that was lost with the process is simply made again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.config import Config
from worldflux_dist.data import Batch
from worldflux_dist.distributed.supervision import life_seed, raise_if_gone
from worldflux_dist.distributed.weights import WeightReader, poll_by
from worldflux_dist.imaginer import Imaginer
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.spaces import Spaces

ACTING = "acting"  # the name, in the namespace of its run, of the actor that acts for runners
FIRST_SEED = 1_000_003  # apart from those of runners, which are numbered from 0
WAIT_S = 60.0  # a process that died is back after two to ten seconds
T = TypeVar("T")
Answer = tuple[np.ndarray, dict[str, np.ndarray], int]


@dataclass(frozen=True)
class ImaginedReport:
    """The result of an imagine call: counts and times, and the weights it was imagined with."""

    model_version: int
    policy_version: int
    num_steps: int
    seconds: float


class ModelActor:
    """Owns a copy of the agent with the newest weights, which one thread uses.

    `number` tells those of a run apart, `env_steps` are those at its start; without `store`, the
    one of this run's name. Calls to `act` that wait are answered in one batch. Before it answers it
    waits for a fifth of the time that the last answer took: the callers that got it have called
    again by then, and those that came out of step fall into step again.
    """

    def __init__(
        self, config: Config, spaces: Spaces, number: int, env_steps: int = 0, store: Any = None
    ) -> None:
        torch.set_num_threads(config.scale.runner_threads)
        torch.manual_seed(life_seed(config.seed, FIRST_SEED + number, env_steps))
        keep_freed_memory()
        self.agent = config.make_agent(spaces).to(config.learner.beside)
        self.weights, self._poll_by = WeightReader(store), poll_by(config.scale.max_staleness)
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[Any, np.ndarray, Any, asyncio.Future[Answer]]] = []
        self._work: asyncio.Task[None] | None = None
        self._took = 0.0

    @ray.method(max_task_retries=-1)
    async def ready(self) -> None:
        """Answers once a process that died is back."""

    async def act(
        self, obs: dict[str, np.ndarray], is_first: np.ndarray, carry: dict[str, np.ndarray] | None
    ) -> Answer:
        """As Agent.act_batch, with a carry of arrays; also gives the version that acted."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((obs, is_first, carry, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._answer_all())
        return await future

    @ray.method(num_returns=2)
    async def imagine(self, given: tuple[Batch, np.ndarray]) -> tuple[ImaginedReport, Imagined]:
        """Imagine from every step of a batch."""
        return await self._run(self._imagine, given[0])

    async def _run(self, work: Callable[..., T], *given: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)

    async def _answer_all(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._took / 5)
            calls, self._waiting = self._waiting, []
            try:
                answers = await self._run(self._act, calls)
            except Exception as error:
                for *_, future in calls:
                    future.set_exception(error)
            else:
                for (*_, future), answer in zip(calls, answers, strict=True):
                    future.set_result(answer)

    def _act(self, calls: list[Any]) -> list[Answer]:
        """One batched call for all: rows of a call stay together."""
        start = time.monotonic()
        if self.weights.learned:  # newer weights are taken over before those here are too old
            self.weights.poll(self.agent, self._poll_by)
        else:
            self.weights.pull(self.agent)
        sizes = np.cumsum([len(is_first) for _, is_first, _, _ in calls])[:-1]
        carries = [
            self.agent.initial_carry(len(is_first))
            if carry is None
            else {name: torch.as_tensor(value.copy()) for name, value in carry.items()}
            for _, is_first, carry, _ in calls
        ]
        device = self.agent.device
        joined = {n: torch.cat([c[n].to(device) for c in carries]) for n in carries[0]}
        obs = {key: np.concatenate([call[0][key] for call in calls]) for key in calls[0][0]}
        # A call without a carry remembers nothing, as if episodes began there.
        first = np.concatenate([flags | (carry is None) for _, flags, carry, _ in calls])
        action, carry = self.agent.act_batch(obs, first, joined)
        self._took = time.monotonic() - start
        after = {name: np.split(value.cpu().numpy(), sizes) for name, value in carry.items()}
        return [
            (rows, {name: values[i] for name, values in after.items()}, self.weights.oldest)
            for i, rows in enumerate(np.split(action, sizes))
        ]

    def _imagine(self, batch: Batch) -> tuple[ImaginedReport, Imagined]:
        start = time.monotonic()
        self.weights.pull(self.agent)
        imagined = Imaginer(self.agent, packed=True).imagine(batch)
        imagined.model_version = self.weights.steps("world_model")
        imagined.policy_version = self.weights.steps("behavior")
        report = ImaginedReport(
            imagined.model_version,
            imagined.policy_version,
            int(imagined.rewards.size),
            time.monotonic() - start,
        )
        return report, imagined


class ActingActor(ModelActor):
    """Acts for all runners; Ray calls its process by this name, in its lists and its errors."""


class ImaginerActor(ModelActor):
    """Imagines for policy learners."""


class RemoteAct:
    """What a runner acts with instead of its own agent. `version` is that of the last answer,
    `losses` counts calls that were lost with the process that acts."""

    def __init__(self) -> None:
        self.actor, self.version, self.losses = ray.get_actor(ACTING), 0, 0

    def __call__(
        self, obs: dict[str, np.ndarray], is_first: np.ndarray, carry: Any
    ) -> tuple[np.ndarray, Any]:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                answer: Any = ray.get(self.actor.act.remote(obs, is_first, carry))
                self.version = answer[2]
                return answer[:2]
            except RayActorError as error:
                raise_if_gone(error)
                self.losses += 1
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"the process that acts has not come back in {WAIT_S:.0f} s: look for "
                        "processes that ran out of memory, then run the same command again to go on"
                    ) from None
                time.sleep(0.2)

    def take_losses(self) -> int:
        """Lost calls since the last call."""
        taken, self.losses = self.losses, 0
        return taken

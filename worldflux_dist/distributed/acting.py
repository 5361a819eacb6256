"""Acting for all runners in one place: where a plan is dear, or one GPU is to make all of them.

What must stay true: the actor keeps nothing of a runner between calls (its memory travels with
every call), so a call lost with a dead process is simply made again.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from worldflux_dist.config import Config
from worldflux_dist.distributed.supervision import life_seed, raise_if_gone
from worldflux_dist.distributed.weights import WeightReader, poll_by
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.spaces import Spaces

ACTING = "acting"  # the actor's name in the namespace of its run
ACTING_SEED = 1_000_003  # apart from those of runners, which are numbered from 0
WAIT_S = 60.0  # a process that died is back after two to ten seconds
Answer = tuple[np.ndarray, dict[str, np.ndarray], int]


class ActingActor:
    """Owns a copy of the agent with the newest weights; waiting calls are answered in one batch.

    Before it answers it waits for a fifth of the time that the last answer took: whoever got that
    one is back by then, and callers that came out of step fall into step again.
    """

    def __init__(self, config: Config, spaces: Spaces, env_steps: int) -> None:
        torch.set_num_threads(config.scale.runner_threads)
        torch.manual_seed(life_seed(config.seed, ACTING_SEED, env_steps))
        keep_freed_memory()
        self.agent = config.make_agent(spaces)
        if config.learner.device != "cpu" and torch.cuda.is_available():
            self.agent = self.agent.cuda()
        self.weights, self._poll_by = WeightReader(), poll_by(config.scale.max_staleness)
        self._waiting: list[tuple[Any, np.ndarray, Any, asyncio.Future[Answer]]] = []
        self._work: asyncio.Task[None] | None = None
        self._took = 0.0

    async def act(
        self, obs: dict[str, np.ndarray], is_first: np.ndarray, carry: dict[str, np.ndarray] | None
    ) -> Answer:
        """As Agent.act_batch, with a carry of arrays; also gives the version that acted."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((obs, is_first, carry, future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._answer_all())
        return await future

    async def _answer_all(self) -> None:
        while self._waiting:
            await asyncio.sleep(self._took / 5)
            calls, self._waiting = self._waiting, []
            loop = asyncio.get_running_loop()
            try:
                answers = await loop.run_in_executor(None, self._answer, calls)
            except Exception as error:
                for *_, future in calls:
                    future.set_exception(error)
            else:
                for (*_, future), answer in zip(calls, answers, strict=True):
                    future.set_result(answer)

    def _answer(self, calls: list[Any]) -> list[Answer]:
        """One batched call for all: rows of a call stay together."""
        start = time.monotonic()
        self._pull()
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

    def _pull(self) -> None:
        """Take newer weights over before those here are too old."""
        if self.weights.learned:
            self.weights.poll(self.agent, self._poll_by)
        else:
            self.weights.pull(self.agent)


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
                        f"the process that acts has not come back in {WAIT_S:.0f} s: look for want "
                        "of memory, then run the same command again to go on"
                    ) from None
                time.sleep(0.2)

    def take_losses(self) -> int:
        """Lost calls since the last call."""
        taken, self.losses = self.losses, 0
        return taken

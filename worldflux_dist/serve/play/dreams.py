"""Dreams: several rows of one batch that leave the same moment and are given the same actions.

What must stay true: the first step is the agent's posterior, every later one is `transition` of the
one before, and with sampling off all rows are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.models.base import State

MAX_DREAMS = 16
MEMORY = 2**29  # bytes of what one dream may keep


@dataclass
class Reading:
    """What n states say, arrays (n,): reward, going on (a probability) and value, by name, where
    the family gives them; `obs` (n, *shape) is the observation that is shown, or None."""

    curves: dict[str, np.ndarray]
    obs: np.ndarray | None

    @cached_property
    def spread(self) -> float | None:
        """The standard deviation over dreams, averaged over the observation; of images in 0..1."""
        if self.obs is None:
            return None
        scale = 255 if self.obs.dtype == np.uint8 else 1
        return float(self.obs.std(0, dtype=np.float32).mean()) / scale

    def error(self, truth: np.ndarray) -> float | None:
        """The mean absolute error of the dreams, averaged over the observation (*shape)."""
        if self.obs is None:
            return None
        scale = 255 if self.obs.dtype == np.uint8 else 1
        return float(np.abs(self.obs.astype(np.float32) - truth).mean()) / scale


class Reader:
    """Reads states of an agent. `key` names the one observation that is shown."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.key = (agent.spaces.images or agent.spaces.vectors)[0]

    @torch.no_grad()
    def value(self, state: State) -> np.ndarray:
        """(n,) of states (n, ...)."""
        features = self.agent.world_model.features(state)
        return _array(self.agent.behavior.expected_value(features))

    @torch.no_grad()
    def choose(self, state: State) -> np.ndarray:
        """The agent's flat action (1, A) in the first of states (n, ...), seen or dreamt; a plan
        begins afresh. Raises ValueError where a plan lacks its goal."""
        agent, state = self.agent, state[:1]
        if agent.planner is None:
            return _array(agent.behavior.act(agent.world_model.features(state), greedy=True))
        mean, goal = agent.planner.initial(1, agent.device), agent.goal_features()
        plan = agent.planner.plan(agent.world_model, agent.behavior, state, mean, True, goal)
        return _array(plan[0])

    @torch.no_grad()
    def read(self, state: State) -> Reading:
        model = self.agent.world_model
        preds = model.decode(state).preds
        curves = {"value": self.value(state)}
        if "reward" in preds:
            curves["reward"] = _array(preds["reward"])
        if "continue" in preds:
            curves["continue"] = np.clip(_array(preds["continue"]) / model.discount, 0, 1)
        return Reading(curves, self._obs(preds.get("obs")))

    def _obs(self, decoded: Any) -> np.ndarray | None:
        if decoded is None:
            return None
        values = _array(decoded[self.key] if isinstance(decoded, dict) else decoded)
        if self.agent.spaces.obs[self.key].kind == "image":
            return np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return values


@dataclass
class Dreamt:
    """One step of the dreams: the action (1, A) that went in, the states, and what they say."""

    action: np.ndarray
    state: State
    reading: Reading
    error: float | None = None  # to the truth, once it is known


class Dreams:
    """Owns `num` dreams from the posterior of step `start`: `steps[k]` is of step start + k."""

    def __init__(
        self, reader: Reader, posterior: State, start: int, num: int = 1, sampling: bool = True
    ) -> None:
        self.reader, self.start, self.num, self.sampling = reader, start, num, sampling
        self._model = reader.agent.world_model
        rows = self._model.essential(posterior).map(lambda x: x.repeat_interleave(num, 0))
        nothing = np.zeros((1, reader.agent.spaces.action_dim), np.float32)
        self.steps = [Dreamt(nothing, rows, reader.read(rows))]

    @property
    def now(self) -> int:
        return self.start + len(self.steps) - 1

    @property
    def full(self) -> bool:
        """Whether they have used up their memory."""
        newest = self.steps[-1]
        size = sum(x.nbytes for x in newest.state.tensors.values())
        size += 0 if newest.reading.obs is None else newest.reading.obs.nbytes
        return size * len(self.steps) > MEMORY

    @torch.no_grad()
    def step(self, action: np.ndarray) -> None:
        """Go on with one flat action (1, A) for all of them."""
        went_in = torch.as_tensor(action, device=self.reader.agent.device).expand(self.num, -1)
        state = self._model.transition(self.steps[-1].state, went_in, self._noise())
        self.steps.append(Dreamt(action, state, self.reader.read(state)))

    def _noise(self) -> Tensor | None:
        """What takes the place of the family's draws; None for fresh ones."""
        shape = self._model.noise_shape
        if self.sampling or shape is None:
            return None
        return torch.full((self.num, *shape), 0.5, device=self.reader.agent.device)

    def cut(self, now: int) -> None:
        """Forget what comes after step `now`, which is one of these."""
        assert self.start <= now <= self.now, now
        del self.steps[now - self.start + 1 :]

    def again(self, num: int, sampling: bool) -> Dreams:
        """As many dreams of the same actions from the same moment, anew."""
        first = self.steps[0].state[:1]
        dreams = Dreams(self.reader, first, self.start, num, sampling)
        for step in self.steps[1:]:
            dreams.step(step.action)
        return dreams


def _array(value: Tensor) -> np.ndarray:
    return value.float().cpu().numpy()

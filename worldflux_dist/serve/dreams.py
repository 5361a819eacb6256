"""An agent that encodes, imagines and acts for many callers at once, with numpy in and out.

What must stay true: nothing of a caller is kept between calls; every random number of a call comes
from its seed; and rows are independent, so that the answer to a call does not depend on the calls
that it shares a batch with. Plain Python: no network in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldflux_dist import draws
from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch, Chunk
from worldflux_dist.models.base import Policy, State

Arrays = dict[str, np.ndarray]
HEADS = ("reward", "continue", "value", "obs", "features", "action", "state")
DECODED = 4096  # lane-steps that are decoded at once
STARTS = 1024  # states of replay that are kept


@dataclass(frozen=True)
class Encode:
    """Observations (N, T, ...), action (N, T, A), is_first (N, T); `state` came before."""

    obs: Arrays
    action: np.ndarray
    is_first: np.ndarray
    state: Arrays | None = None
    seed: int = 0

    @property
    def rows(self) -> int:
        return len(self.is_first)

    @property
    def key(self) -> tuple[Any, ...]:
        """Calls of one key can share a batch."""
        return "encode", self.is_first.shape[1]


@dataclass(frozen=True)
class Imagine:
    """Trajectories from states, first looks (`obs`) or `from_replay` starts: N of them."""

    horizon: int
    state: Arrays | None = None
    obs: Arrays | None = None
    from_replay: int = 0
    action: np.ndarray | None = None  # (H, N, A)
    greedy: bool = False
    samples: int = 1
    seed: int = 0
    heads: tuple[str, ...] = ("reward", "continue")
    by_step: bool = False

    @property
    def starts(self) -> int:
        given = self.state or self.obs
        return len(next(iter(given.values()))) if given else self.from_replay

    @property
    def rows(self) -> int:
        return self.starts * self.samples

    @property
    def key(self) -> tuple[Any, ...]:
        acting = "given" if self.action is not None else self.greedy
        return "imagine", self.horizon, acting, frozenset(self.heads), self.by_step


@dataclass(frozen=True)
class ActOn:
    """Observations (N, ...) of a real environment, and what was remembered."""

    obs: Arrays
    is_first: np.ndarray
    carry: Arrays | None = None
    greedy: bool = False
    seed: int = 0

    @property
    def rows(self) -> int:
        return len(self.is_first)

    @property
    def key(self) -> tuple[Any, ...]:
        return "act", self.greedy


class Dreams:
    """Owns the agent, its version and starts from replay. One thread at a time.

    `chunks` are steps to start from, of which those with some past are taken, and none that ends an
    episode.
    """

    def __init__(
        self, agent: Agent, chunks: Sequence[Chunk] = (), version: tuple[int, int] = (0, 0)
    ) -> None:
        self.agent, self.version, self.chunks = agent, version, list(chunks)
        self.model, self.behavior = agent.world_model, agent.behavior
        self._starts: State | None = None

    # --------------------------------------------------------------------------- the three calls

    @torch.no_grad()
    def encode(self, calls: Sequence[Encode]) -> list[Arrays]:
        """The states (N, ...) of each call after its last step."""
        state = self._joined([call.state or self._blank(call.rows) for call in calls])
        obs = {name: self._cat([call.obs[name] for call in calls]) for name in calls[0].obs}
        action, first = (self._cat([getattr(c, n) for c in calls]) for n in ("action", "is_first"))
        length = first.shape[1]
        noise = self._noise(calls, "look", self.model.update_noise_shape, length)  # (T, N, ...)
        for t in range(length):
            look = {name: value[:, t] for name, value in obs.items()}
            draw = None if noise is None else noise[t]
            state = self.model.update(state, action[:, t], look, first[:, t], draw)
        return _split(state.tensors, calls)

    @torch.no_grad()
    def imagine(
        self, calls: Sequence[Imagine], going: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[int, list[Arrays]]]:
        """Blocks of steps: the number of the first one and, for each call, the outputs of its heads
        (steps, N * samples, ...); with the last one `state/<name>` (N * samples, ...).

        Asks `going` before each step, and ends where it says no.
        """
        model, horizon, heads = self.model, calls[0].horizon, calls[0].heads
        start = model.essential(self._joined([self._start(call) for call in calls]))
        noise = self._noise(calls, "transition", model.noise_shape, horizon)
        rows = sum(call.rows for call in calls)
        size = 1 if calls[0].by_step else max(1, DECODED // rows)
        zeros = torch.zeros(rows, self.agent.spaces.action_dim, device=self.agent.device)
        walk = model.walk(start, self._actions(calls), horizon, noise)
        first, taken, states = 0, [], []
        for number, (action, state) in enumerate(itertools.chain([(zeros, start)], walk)):
            taken.append(action)
            states.append(model.visible(state))
            if len(states) == size or number == horizon:
                outputs = self._decoded(State.stack(states), torch.stack(taken), heads, first)
                parts = _split(outputs, calls, axis=1)
                if number == horizon and "state" in heads:
                    last = {f"state/{name}": value for name, value in state.tensors.items()}
                    parts = [a | b for a, b in zip(parts, _split(last, calls), strict=True)]
                yield first, parts
                first, taken, states = number + 1, [], []
            if not going():
                return

    @torch.no_grad()
    def act(self, calls: Sequence[ActOn]) -> list[Arrays]:
        """What to remember of each call; its `action` (N, A) is the one to take."""
        if self.agent.planner is not None:
            return [self._plan(call) for call in calls]
        obs = {name: np.concatenate([call.obs[name] for call in calls]) for name in calls[0].obs}
        first = np.concatenate([call.is_first for call in calls])
        carry = self._joined([call.carry or self._blank_carry(call.rows) for call in calls])
        look = self._noise(calls, "look", self.model.update_noise_shape, 1)
        moves = self._cat([draws.action_noise(c.seed, self._parts, c.rows) for c in calls])
        draw = (None if look is None else look[0], moves)
        _, after = self.agent.act_batch(obs, first, carry.tensors, calls[0].greedy, draw)
        return _split(after, calls)

    def _plan(self, call: ActOn) -> Arrays:
        """A plan draws too much, of too many kinds, to be handed in: by torch's own seed."""
        carry = call.carry or self._blank_carry(call.rows)
        devices = [self.agent.device] if self.agent.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(call.seed % 2**63)
            remembered = self._joined([carry]).tensors
            obs = {name: value.copy() for name, value in call.obs.items()}  # not read-only
            _, after = self.agent.act_batch(obs, call.is_first, remembered, call.greedy)
        return _split(after, [call])[0]

    # ------------------------------------------------------------------------------- what is used

    @property
    def _parts(self) -> Any:
        return self.agent.spaces.action_parts

    def _actions(self, calls: Sequence[Imagine]) -> Tensor | Policy:
        """Given ones (H, rows, A), or the policy with the draws of each step."""
        if calls[0].action is not None:
            given = [np.repeat(c.action, c.samples, 1) for c in calls if c.action is not None]
            return self._cat(given, 1)
        greedy, horizon = calls[0].greedy, calls[0].horizon
        drawn = [draws.action_noise(c.seed, self._parts, horizon, c.rows) for c in calls]
        noise = iter(self._cat(drawn, 1))
        return lambda features: self.behavior.act(features, greedy, next(noise))

    def _start(self, call: Imagine) -> Arrays | dict[str, Tensor]:
        if call.state is not None:
            state: Any = call.state
        elif call.obs is not None:
            look = [replace(call, samples=1)]  # whose rows are the starts
            noise = self._noise(look, "look", self.model.update_noise_shape, 1)
            obs = {name: self._tensor(value) for name, value in call.obs.items()}
            state = self.model.encode(obs, None if noise is None else noise[0]).tensors
        else:
            kept = self.starts
            pick = draws.generator(call.seed, "start").integers(self.num_starts, size=call.starts)
            state = kept[torch.as_tensor(pick, device=self.agent.device)].tensors
        return {n: self._tensor(x).repeat_interleave(call.samples, 0) for n, x in state.items()}

    def _decoded(
        self, states: State, actions: Tensor, heads: Sequence[str], first: int
    ) -> dict[str, Tensor]:
        """What heads say of states (steps, rows, ...)."""
        model = self.model
        outputs: dict[str, Tensor] = {}
        wanted = [head for head in ("reward", "continue", "obs") if head in heads]
        if wanted:
            flat = model.decode(states.flatten(), wanted).preds
            lead = actions.shape[:2]
            obs = flat.pop("obs", {})
            named = obs if isinstance(obs, dict) else {"obs": obs}
            outputs |= {name: value.unflatten(0, lead) for name, value in flat.items()}
            for name, value in named.items():
                if self.agent.spaces.obs[name].kind == "image":
                    value = value.float().round().clamp(0, 255).to(torch.uint8)
                outputs[f"obs/{name}"] = value.unflatten(0, lead)
        if "reward" in outputs and first == 0:
            outputs["reward"][0] = 0  # nothing led to the start
        if {"value", "features"} & set(heads):
            features = model.features(states)
            outputs |= {"features": features} if "features" in heads else {}
            if "value" in heads:
                outputs["value"] = self.behavior.expected_value(features)
        return outputs | ({"action": actions} if "action" in heads else {})

    # ------------------------------------------------------------------------- starts from replay

    @property
    def num_starts(self) -> int:
        return len(next(iter(self.starts.tensors.values()))) if self.chunks else 0

    @property
    def starts(self) -> State:
        """States (n, ...) behind replayed steps, with these weights."""
        if self._starts is None:
            found = [self._seen(chunk, number) for number, chunk in enumerate(self.chunks)]
            joined = self._joined([state.tensors for state in found])
            num = len(next(iter(joined.tensors.values())))
            kept = np.linspace(0, num - 1, min(num, STARTS)).round().astype(int)
            self._starts = joined[torch.as_tensor(kept, device=self.agent.device)]
        return self._starts

    @torch.no_grad()
    def _seen(self, chunk: Chunk, number: int) -> State:
        """States (n, ...) behind the later half of a chunk's steps, but for those that end."""
        batch = Batch.from_columns(chunk.columns()).map(
            lambda value: torch.tensor(value, device=self.agent.device)
        )
        shape, noise = self.model.update_noise_shape, None
        if shape is not None:
            drawn = draws.uniform(number, "look", *batch.reward.shape, *shape)
            noise = torch.as_tensor(drawn, device=self.agent.device)
        states, steps = self.model.observe(batch, noise)
        half = steps.reward.shape[1] // 2
        states = states.map(lambda value: value[:, half:])
        return states.flatten()[~steps.is_last[:, half:].flatten()]

    # ---------------------------------------------------------------------------- arrays, tensors

    def _cat(self, values: Sequence[np.ndarray], axis: int = 0) -> Tensor:
        joined = values[0] if len(values) == 1 else np.concatenate(values, axis)
        return torch.tensor(joined, device=self.agent.device)

    def _joined(self, states: Sequence[Any]) -> State:
        """States of arrays or tensors, one under the other."""
        return State({n: torch.cat([self._tensor(s[n]) for s in states]) for n in states[0]})

    def _tensor(self, value: np.ndarray | Tensor) -> Tensor:
        if isinstance(value, np.ndarray):  # a copy: what came over the wire is read-only
            return torch.tensor(value, device=self.agent.device)
        return value.to(self.agent.device)

    def _noise(
        self, calls: Sequence[Any], stream: str, shape: tuple[int, ...] | None, length: int
    ) -> Tensor | None:
        """Uniform draws (length, rows, *shape) of all calls."""
        if shape is None:
            return None
        return self._cat([draws.uniform(c.seed, stream, length, c.rows, *shape) for c in calls], 1)

    def _blank(self, num: int) -> dict[str, Tensor]:
        return self.model.initial(num).tensors

    def _blank_carry(self, num: int) -> dict[str, Tensor]:
        return self.agent.initial_carry(num)


def _split(named: dict[str, Tensor], calls: Sequence[Any], axis: int = 0) -> list[Arrays]:
    """The rows of each call, as arrays."""
    edges = list(itertools.accumulate((call.rows for call in calls), initial=0))
    whole = {name: value.cpu().numpy() for name, value in named.items()}
    return [
        {
            name: value[(slice(None),) * axis + (slice(*edges[i : i + 2]),)]
            for name, value in whole.items()
        }
        for i in range(len(calls))
    ]


def joined(blocks: Sequence[Arrays]) -> Arrays:
    """Blocks of steps as one; of states there is only the last."""
    if len(blocks) == 1:
        return blocks[0]
    outputs = {
        name: np.concatenate([block[name] for block in blocks])
        for name in blocks[0]
        if not name.startswith("state/")
    }
    return outputs | {n: x for n, x in blocks[-1].items() if n.startswith("state/")}

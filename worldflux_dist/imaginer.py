"""The imaginer: turns replayed batches into imagined ones, for policies that learn elsewhere.

Plain Python, no Ray. Arrays come in and go out. What a policy learns from here is what it would
learn from in a learner that trains the whole agent: imagined from the same replayed states.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.data import Batch


class Imaginer:
    """Rolls an agent's policy in its world model from the states of a batch, for `horizon` steps
    (the behavior's own by default), with the weights that the agent then has. What it gives is
    `packed` for other processes where that is asked for.

    Raises ValueError for a behavior that does not learn in imagination.
    """

    def __init__(self, agent: Agent, horizon: int | None = None, packed: bool = False) -> None:
        self.agent, self.behavior = agent, agent.imagining()
        self.horizon, self.packed = horizon, packed

    @torch.no_grad()
    def imagine(self, batch: Batch) -> Imagined:
        """Imagined arrays of a replayed (B, T) batch of arrays; both versions are left at 0."""
        model = self.agent.world_model
        # A copy: batches of another process lie in memory that torch may not write to.
        tensors = batch.map(lambda value: torch.tensor(value, device=self.agent.device))
        states, steps = model.observe(tensors)
        rollout = self.behavior.imagine(model, states.flatten(), self.horizon)
        imagined = Imagined.of(model, rollout, steps)
        del states, rollout  # each about as large as the features
        if self.packed:
            imagined = imagined.packed(model.feature_parts)
        # Of the features that the learner will see: where its policy is the one that acted, both
        # give the same, and rounding is not taken for a policy that has moved.
        seen = imagined.unpacked(model.feature_parts).features
        imagined.log_prob = self.behavior.log_prob(seen[:-1], imagined.actions)
        return imagined.map(_owned)


def _owned(value: Tensor) -> np.ndarray:
    return value.cpu().numpy().copy()

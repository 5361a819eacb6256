"""An agent's twin in bfloat16, which imagines: weights are cast once a step, not at each use.

Imagination has no gradient and takes most of a step's products. What must stay true: the twin has
the weights that the agent had when the step began and its buffers at all times; master weights,
gradients, returns and losses stay float32, and so do parts that a family keeps exact.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from worldflux_dist.agent import Agent


class Coarse:
    """Owns the twin, by which `agent.behavior` imagines from now on. No part of any checkpoint."""

    def __init__(self, agent: Agent) -> None:
        behavior = agent.imagining()
        self.agent = copy.deepcopy(agent).requires_grad_(False)
        exact = tuple(f"world_model.{name}." for name in agent.world_model.exact)
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for (name, own), twin in zip(
            agent.named_parameters(), self.agent.parameters(), strict=True
        ):
            if not name.startswith(exact):
                twin.data = twin.data.bfloat16()
            self._pairs.append((twin, own))
        for module, twin_module in zip(agent.modules(), self.agent.modules(), strict=True):
            twin_module._buffers = module._buffers
        behavior.twin = self.agent.world_model, self.agent.imagining()

    @torch.no_grad()
    def follow(self) -> None:
        """Take over the weights of the agent."""
        twins, own = zip(*self._pairs, strict=True)
        torch._foreach_copy_(list(twins), list(own))

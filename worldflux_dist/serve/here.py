"""An agent of this process that answers as a Client does, without a network."""

from __future__ import annotations

from typing import Any

import numpy as np

from worldflux_dist.serve.dreams import Dreams, Imagine, joined
from worldflux_dist.serve.requests import Limits, Requests, describe
from worldflux_dist.serve.results import Arrays, ModelInfo, Trajectories


class Here:
    """Rolls `dreams` out in the caller's thread."""

    def __init__(self, dreams: Dreams) -> None:
        self.dreams = dreams

    def model(self) -> ModelInfo:
        """As Client.model."""
        return ModelInfo(describe(self.dreams, Requests(self.dreams, Limits())))

    def rollout(
        self,
        state: Arrays | None = None,
        actions: np.ndarray | None = None,
        horizon: int | None = None,
        **how: Any,
    ) -> Trajectories:
        """As Client.rollout."""
        horizon = horizon if actions is None else len(actions)
        call = Imagine(horizon or 0, state=state, action=actions, **how)
        blocks = [parts[0] for _, parts in self.dreams.imagine([call])]
        return Trajectories.of(self.dreams.version, joined(blocks))

    def close(self) -> None:
        """Nothing is held."""

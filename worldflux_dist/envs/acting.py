"""What a policy looks like to whoever steps environments, and the simplest policy there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from worldflux_dist.spaces import Spaces

# (obs, is_first, carry) -> (flat actions (N, A), carry); the carry is the policy's own memory.
Act = Callable[[dict[str, np.ndarray], np.ndarray, Any], tuple[np.ndarray, Any]]


def random_act(spaces: Spaces, seed: int) -> Act:
    """The policy that draws uniformly from the action space: every task's baseline."""
    rng = np.random.default_rng(seed)

    def act(obs: dict[str, np.ndarray], is_first: np.ndarray, carry: Any) -> tuple[np.ndarray, Any]:
        return spaces.random_action(rng, len(is_first)), None

    return act

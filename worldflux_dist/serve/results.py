"""What callers get, over the network or in their own process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from worldflux_dist.spaces import Spaces

Arrays = dict[str, np.ndarray]
Version = tuple[int, int]  # generation of the learners, gradient steps


@dataclass(frozen=True)
class Trajectories:
    """What was imagined, time-major; None for heads that were not asked for.

    As Rollout: rewards, continues (H, N) of states 1..H and start_continue (N,) of state 0. Of the
    others step 0 is the start: values (H + 1, N), obs (H + 1, N, ...) each, features (H + 1, N, F),
    actions (H, N, A). `state` (N, ...) is the last. N are the rows, each `samples` times.
    """

    version: Version
    rewards: np.ndarray | None = None
    continues: np.ndarray | None = None
    start_continue: np.ndarray | None = None
    values: np.ndarray | None = None
    obs: Arrays | None = None
    features: np.ndarray | None = None
    actions: np.ndarray | None = None
    state: Arrays | None = None

    @classmethod
    def of(cls, version: Version, outputs: Arrays) -> Trajectories:
        """From outputs of all steps, as ImagineResponse names them."""
        going, reward = outputs.get("continue"), outputs.get("reward")
        action = outputs.get("action")
        return cls(
            version,
            None if reward is None else reward[1:],
            None if going is None else going[1:],
            None if going is None else going[0],
            outputs.get("value"),
            _below("obs/", outputs) or None,
            outputs.get("features"),
            None if action is None else action[1:],
            _below("state/", outputs) or None,
        )


@dataclass(frozen=True)
class ModelInfo:
    """What is served: `spaces` convert observations and actions, `message` is the whole answer."""

    message: Any

    @property
    def name(self) -> str:
        return f"{self.message.family}:{self.message.preset}"

    @property
    def version(self) -> Version:
        return version_of(self.message)

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(self.message.heads)

    @property
    def discount(self) -> float:
        return float(self.message.discount)

    @property
    def feature_dim(self) -> int:
        return int(self.message.feature_dim)

    @property
    def num_starts(self) -> int:
        return int(self.message.starts)

    @cached_property
    def spaces(self) -> Spaces:
        return Spaces.from_json(json.loads(self.message.spaces_json))


def version_of(message: Any) -> Version:
    """The version in an answer."""
    return message.version.generation, message.version.gradient_steps


def _below(prefix: str, outputs: Arrays) -> Arrays:
    return {n.removeprefix(prefix): x for n, x in outputs.items() if n.startswith(prefix)}

"""worldflux_dist: distributed reinforcement learning with world models, on Ray.

The public names load on first use: importing the package loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldflux_dist.agent import Agent as Agent
    from worldflux_dist.config import Config as Config
    from worldflux_dist.data import Batch as Batch
    from worldflux_dist.data import Chunk as Chunk
    from worldflux_dist.data import Step as Step
    from worldflux_dist.models.base import Rollout as Rollout
    from worldflux_dist.models.base import State as State
    from worldflux_dist.models.base import WorldModel as WorldModel
    from worldflux_dist.models.base import create_world_model as create_world_model
    from worldflux_dist.spaces import Spaces as Spaces

__version__ = "0.1.0"

_HOMES = {
    "Agent": "agent",
    "Batch": "data",
    "Chunk": "data",
    "Config": "config",
    "Rollout": "models.base",
    "Spaces": "spaces",
    "State": "models.base",
    "Step": "data",
    "WorldModel": "models.base",
    "create_world_model": "models.base",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

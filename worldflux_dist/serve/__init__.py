"""Imagination as a service: servers, clients, and environments and pages inside the dream.

The public names load on first use: a client loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldflux_dist.serve.client import AsyncClient as AsyncClient
    from worldflux_dist.serve.client import Client as Client
    from worldflux_dist.serve.dream_env import DreamEnv as DreamEnv
    from worldflux_dist.serve.dream_env import DreamVectorEnv as DreamVectorEnv

_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "DreamEnv": "dream_env",
    "DreamVectorEnv": "dream_env",
}
__all__ = [*_HOMES]


def _register() -> None:
    """The dream environment's ids, made without loading it."""
    import gymnasium

    home = f"{__name__}.dream_env"
    gymnasium.register(
        "worldflux/Dream-v0", f"{home}:DreamEnv", vector_entry_point=f"{home}:DreamVectorEnv"
    )


_register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

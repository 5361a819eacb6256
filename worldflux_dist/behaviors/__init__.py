"""Behaviors: what learns to act on what a world model imagines or predicts, by its kind."""

from __future__ import annotations

from typing import Any

from worldflux_dist.behaviors.actor_critic import ActorCritic, ActorCriticConfig
from worldflux_dist.behaviors.base import Behavior
from worldflux_dist.behaviors.latent_td import LatentTD, LatentTDConfig
from worldflux_dist.settings import nearest, parse

BEHAVIORS: dict[str, tuple[Any, type[Behavior]]] = {
    "actor_critic": (ActorCriticConfig(), ActorCritic),
    "latent_td": (LatentTDConfig(), LatentTD),
}


def behavior_config(native: dict[str, Any], options: dict[str, Any]) -> tuple[str, Any]:
    """The kind and the config of the behavior: the native one's values, or another kind's.

    Raises ValueError for an unknown kind or option, naming the nearest.
    """
    kind = options.get("kind", native["kind"])
    if not isinstance(kind, str) or kind not in BEHAVIORS:
        raise ValueError(f"no behavior.kind {kind!r:.100}: {nearest(str(kind), list(BEHAVIORS))}")
    values = (native if kind == native["kind"] else {}) | options
    values = {name: value for name, value in values.items() if name != "kind"}
    return kind, parse(BEHAVIORS[kind][0], values, "behavior has no option {}")

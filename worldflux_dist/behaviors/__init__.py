"""Behaviors: what learns to act on what a world model imagines or predicts, by its kind."""

from __future__ import annotations

from typing import Any

from worldflux_dist import plugins
from worldflux_dist.behaviors.actor_critic import ActorCritic
from worldflux_dist.behaviors.base import Behavior
from worldflux_dist.behaviors.latent_td import LatentTD
from worldflux_dist.settings import Settings, nearest, parse

BEHAVIORS: dict[str, type[Behavior]] = {"actor_critic": ActorCritic, "latent_td": LatentTD}


def find(kind: Any) -> type[Behavior]:
    """The behavior of a kind, ours or one that another package brings (see plugins.py).

    Raises ValueError for an unknown kind, naming the nearest, and for a broken one.
    """
    brought = plugins.entries(plugins.BEHAVIORS, tuple(BEHAVIORS))
    if isinstance(kind, str) and kind in BEHAVIORS:
        return BEHAVIORS[kind]
    if not isinstance(kind, str) or kind not in brought:
        names = [*BEHAVIORS, *brought]
        raise ValueError(f"no behavior.kind {kind!r:.100}: {nearest(str(kind), names)}")
    behavior, wrong = plugins.load(brought[kind]), ""
    if not isinstance(behavior, type) or not issubclass(behavior, Behavior):
        wrong = "is no Behavior: name a subclass of it"
    elif behavior.__abstractmethods__:
        wrong = f"lacks {', '.join(sorted(behavior.__abstractmethods__))}: define them"
    elif not issubclass(getattr(behavior, "Config", object), Settings):
        wrong = "has no Config: define one, a dataclass of Settings"
    if wrong:
        raise ValueError(
            f"behavior {kind!r} of the package {plugins.package(brought[kind])} {wrong}"
        )
    return behavior


def behavior_config(native: dict[str, Any], options: dict[str, Any]) -> tuple[str, Any]:
    """The kind and the config of the behavior: the native one's values, or another kind's.

    Raises ValueError for an unknown kind or option, naming the nearest.
    """
    kind = options.get("kind", native["kind"])
    values = (native if kind == native["kind"] else {}) | options
    values = {name: value for name, value in values.items() if name != "kind"}
    return kind, parse(find(kind).Config(), values, "behavior has no option {}")

"""What a run says to Prometheus, through Ray's metrics: a gauge for each number worth a picture.

Ray's agent on every node serves them, as ray_<name>, with the tags run, role and shard; it is there
where `ray[default]` is installed, and elsewhere setting a gauge does nothing. The names are used by
the dashboard in deploy/grafana.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

GAUGES = {
    "worldflux_env_steps_per_s": "Environment steps per second, of all runners together.",
    "worldflux_gradient_steps_per_s": "Gradient steps per second.",
    "worldflux_learner_step_ms": "Milliseconds that a gradient step takes.",
    "worldflux_input_stall": "Fraction of the time that learners wait for data.",
    "worldflux_weight_lag": "Gradient steps by which the acting policy is behind.",
    "worldflux_imagined_steps_per_s": "Imagined steps per second, of all imaginers together.",
    "worldflux_replay_steps": "Steps that a replay shard holds.",
    "worldflux_replay_bytes": "Bytes that a replay shard holds.",
    "worldflux_restarts": "Processes of a role that died and were started again.",
    "worldflux_not_durable": "1 where replay cannot be written to disk, else 0.",
}
# A pattern of the names in metrics.jsonl: the gauge, its role, and the factor to its unit.
# A group in the pattern is the shard or, where no role is given, the role.
SOURCES: list[tuple[str, str, str, float]] = [
    ("rate/env_steps", "worldflux_env_steps_per_s", "runner", 1),
    ("rate/gradient_steps", "worldflux_gradient_steps_per_s", "learner", 1),
    ("rate/imagined_steps", "worldflux_imagined_steps_per_s", "imaginer", 1),
    ("time/learner_step", "worldflux_learner_step_ms", "learner", 1000),
    ("stall/learner", "worldflux_input_stall", "learner", 1),
    ("staleness", "worldflux_weight_lag", "runner", 1),
    (r"replay/shard(\d+)_steps", "worldflux_replay_steps", "shard", 1),
    (r"replay/shard(\d+)_bytes", "worldflux_replay_bytes", "shard", 1),
    (r"restarts/(\w+)", "worldflux_restarts", "", 1),
    ("replay/not_durable", "worldflux_not_durable", "shard", 1),
]


class Telemetry:
    """The gauges of one run. Needs a running Ray; a gauge is made when it is first set."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, name: str, value: float, role: str, shard: str = "") -> None:
        """Set one of GAUGES. Raises KeyError for a name that is none."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, GAUGES[name], tag_keys=("run", "role", "shard"))
        self._gauges[name].set(value, {"run": self.run, "role": role, "shard": shard})

    def record(self, counters: Mapping[str, float]) -> None:
        """Set every gauge that a line of metrics has a number for; other names are left out."""
        for source, value in counters.items():
            for pattern, name, role, scale in SOURCES:
                if found := re.fullmatch(pattern, source):
                    group = found.group(1) if found.groups() else ""
                    self.set(name, value * scale, role or group, group if role else "")

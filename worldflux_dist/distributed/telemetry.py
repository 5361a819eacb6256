"""What a run says to Prometheus, through Ray's metrics: a gauge for each metric that names one.

Ray's agent on every node serves them, as ray_<name>, with the tags run, role and shard; it is there
where `ray[default]` is installed, and elsewhere setting a gauge does nothing. The names are used by
the dashboard in deploy/grafana.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from worldflux_dist.metrics import find


class Telemetry:
    """The gauges of one run. Needs a running Ray; a gauge is made when it is first set."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}

    def record(self, line: Mapping[str, float]) -> None:
        """Set the gauge of every metric that has one. What differs in a metric's name is the shard
        or, where its row names no role, the role."""
        for name, value in line.items():
            row = find(name)
            if not row.gauge:
                continue
            if row.gauge not in self._gauges:
                keys = ("run", "role", "shard")
                self._gauges[row.gauge] = Gauge(row.gauge, row.meaning, tag_keys=keys)
            match = row.pattern.fullmatch(name)
            differs = match[1] if match and match.groups() else ""
            tags = {"role": row.role or differs, "shard": differs if row.role else ""}
            self._gauges[row.gauge].set(value * row.scale, {"run": self.run} | tags)

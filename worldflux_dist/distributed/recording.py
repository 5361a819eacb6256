"""What the driver measures: rounds go in, lines of metrics, gauges and the progress line come out.

How each number is aggregated is told in metrics.METRICS.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from worldflux_dist.distributed.collect import RayCollector
from worldflux_dist.distributed.env_runner import RunnerReport
from worldflux_dist.distributed.roles import BUSY, ROLES
from worldflux_dist.distributed.session import Session
from worldflux_dist.distributed.telemetry import Telemetry
from worldflux_dist.metrics import Recorder, family
from worldflux_dist.progress import SHOWN
from worldflux_dist.replay.limiter import Limiter

LOG_EVERY_S = 10.0
# What every line has, also where nothing was done.
ALWAYS = ["rate/env_steps", "rate/gradient_steps", "rate/imagined_steps"]
ALWAYS += [f"busy/{name}" for name in BUSY]


def stall(means: Mapping[str, float]) -> float:
    """The share of the learner's wall-clock in which it had no batch, from the means of its steps'
    metrics; 1 where there was no step."""
    return means.get("time/learner_wait", 1.0) / means.get("time/learner_wall", 1.0)


class Record:
    """Owns the counts of one run that are kept nowhere else, and when it was last logged."""

    def __init__(
        self, session: Session, limiter: Limiter, collector: RayCollector, episodes: int = 0
    ) -> None:
        self.session, self.limiter, self.collector = session, limiter, collector
        self.learners, self.shards = collector.learners, collector.shards
        self.episodes, self.env_failures = episodes, 0
        self.recorder = Recorder()
        self.telemetry = Telemetry(session.run.path.name)
        self._logged = time.monotonic()
        self._said = dict.fromkeys(ROLES, 0)
        self._degraded = ""

    def take_in(self, reports: Sequence[RunnerReport], updates: Sequence[dict[str, float]]) -> None:
        """Record the results of a round, and show them."""
        self._say_deaths()
        self._say_degraded()
        add, config = self.recorder.add, self.session.config
        for report in reports:
            self.env_failures += report.env_failures
            self.episodes += len(report.episodes)
            add("rate/env_steps", report.env_steps)
            add("busy/runner", report.collect_seconds / config.scale.num_runners)
            add("busy/replay", report.send_seconds / config.scale.num_runners)
            for episode in report.episodes:
                add("episode/return", episode.total_reward)
                add("episode/length", episode.length)
        for lag in self.learners.staleness.take():
            add("staleness", lag)
        for imagined in self.learners.take_imagined():
            add("busy/imaginer", imagined.seconds / config.imagination.num_imaginers)
            add("rate/imagined_steps", imagined.num_steps)
        add("rate/gradient_steps", len(updates))
        for number, metrics in enumerate(updates):
            add("busy/learner", metrics["time/learner_step"])
            add("busy/policy", metrics.get("policy/time/learner_step", 0.0))
            if number:  # the first step of a round waits for nobody but its being owed
                add("busy/replay", metrics["time/learner_wait"])
            for name, value in metrics.items():
                add(name, value)
        self._show()

    def log_when_due(self) -> None:
        if time.monotonic() - self._logged > LOG_EVERY_S:
            self.log()

    def log(self) -> None:
        """One line of metrics: what was recorded since the last one, and the counters."""
        for name in ALWAYS:
            self.recorder.add(name, 0.0)
        recorded, self._logged = self.recorder.line(), time.monotonic()
        busy = {name: recorded[f"busy/{name}"] for name in BUSY}
        self.session.progress.update({"bottleneck": max(busy, key=busy.__getitem__)})
        line = self._counters() | {"stall/learner": stall(recorded)} | recorded
        self.session.run.log.log(self.limiter.env_steps, line)
        self.telemetry.record(line)

    def _progressed(self) -> dict[str, float]:
        """The counters that the progress line shows, too."""
        limiter, session = self.limiter, self.session
        return {
            "frames": limiter.env_steps * session.task.action_repeat,
            "gradient_steps": limiter.gradient_steps,
            "train_ratio/achieved": limiter.achieved,
            "train_ratio/asked": session.config.train.train_ratio,
        }

    def _counters(self) -> dict[str, float]:
        counters: dict[str, float] = self._progressed() | {
            "gradient_steps/redone": self.limiter.redone,
            "gradient_steps/forgiven": self.limiter.forgiven,
            "episodes": self.episodes,
            "env_failures": self.env_failures,
            "weights_version": self.learners.version,
            "weights/failed_publications": self.learners.failed_publications,
            "replay/not_durable": float(bool(self._degraded)),
        }
        counters |= {f"restarts/{role}": num for role, num in self._restarts().items()}
        for index, report in self.shards.sizes.items():
            counters[f"replay/shard{index}_steps"] = report.num_steps
            counters[f"replay/shard{index}_bytes"] = report.nbytes
            counters[f"replay/shard{index}_duplicates"] = report.duplicates
            counters[f"replay/shard{index}_dropped_steps"] = report.dropped_steps
        if self.learners.imagined is not None:
            counters["imagination/stale"] = self.learners.imagined.stale
        return counters

    def _restarts(self) -> dict[str, int]:
        """Processes that died, by role."""
        return self.collector.restarts | self.learners.restarts

    def _show(self) -> None:
        recent = self.recorder.recent()
        if recon := family(recent, "loss/rec/"):
            recent["loss/rec"] = sum(recon.values())
        shown = {name: recent[name] for name in SHOWN & recent.keys()}
        steps: dict[str, float | str] = {"env_steps": self.limiter.env_steps}
        self.session.progress.update(steps | shown | self._progressed())

    def _say_deaths(self) -> None:
        for role, num in self._restarts().items():
            if num > self._said[role] and ROLES[role].death:
                self.session.progress.print(f"{ROLES[role].death} died; it is started again")
            self._said[role] = num

    def _say_degraded(self) -> None:
        """Say once when replay is no longer kept on disk, and once when it is again."""
        reports = self.shards.sizes.values()
        why = next((report.degraded for report in reports if report.degraded), "")
        if bool(why) != bool(self._degraded):
            self.session.progress.print(
                f"replay is not being kept on disk: {why}" if why else "replay is on disk again"
            )
        self._degraded = why

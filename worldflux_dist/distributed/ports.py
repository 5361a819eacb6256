"""The flow's three ports, bound to Ray actors.

References and reports pass through here, never data. Runners and shards restart by themselves;
what they were doing when they died is simply asked for again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.exceptions import ActorUnavailableError

from worldflux_dist.config import Config
from worldflux_dist.distributed.actors import RunnerReport
from worldflux_dist.distributed.shard import ShardReport

ROLES = ("runner", "shard", "acting")  # whose processes may die without ending the run
MAX_LOSSES = 20
STEPS_IN_FLIGHT = 3  # batches on their way: one in work, the others being gathered


@dataclass
class RayPorts:
    """The actors of a run and the calls under way. Owns what is known of them; a runner or a shard
    that dies costs its call and nothing else."""

    config: Config
    learner: Any
    shards: list[Any]
    runners: list[Any]
    stopping: Callable[[], bool]
    gradient_steps: int = 0
    restarts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    sizes: dict[int, ShardReport] = field(default_factory=dict)
    version: int = 0
    _collects: dict[ObjectRef, int] = field(default_factory=dict)
    _losses_in_a_row: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng([self.config.seed, self.gradient_steps])
        self.version = ray.get(self.learner.publish.remote())
        self.ask_sizes()

    def ask_sizes(self) -> None:
        """What every shard holds now; in between, runners' reports keep it roughly up to date."""
        refs = [shard.report.remote() for shard in self.shards]
        for index, ref in enumerate(refs):
            try:
                report: ShardReport = ray.get(ref)
                self.sizes[index] = report
            except ActorUnavailableError:
                self.sizes.pop(index, None)

    @property
    def ready(self) -> bool:
        """Whether any shard is known to have something to sample."""
        return any(report.ready for report in self.sizes.values())

    @property
    def num_collects(self) -> int:
        """Collect calls under way."""
        return len(self._collects)

    def start_collect(self) -> None:
        busy = set(self._collects.values())
        for index, runner in enumerate(self.runners):
            if index not in busy:
                ref = runner.collect.remote(self.config.scale.chunk_length)
                self._collects[ref] = index

    def finished_collects(self, wait: bool) -> list[RunnerReport]:
        reports: list[RunnerReport] = []
        while self._collects:
            refs = list(self._collects)
            timeout = 1.0 if wait and not reports else 0.0
            done, _ = ray.wait(refs, num_returns=len(refs) if timeout == 0 else 1, timeout=timeout)
            for ref in done:
                del self._collects[ref]
                try:
                    reports.append(ray.get(ref))
                except ActorUnavailableError as error:
                    self.restarts["runner"] += 1
                    self._losses_in_a_row += 1
                    if self._losses_in_a_row > MAX_LOSSES:
                        raise RuntimeError(
                            f"env runners died {MAX_LOSSES} times without bringing a chunk: look "
                            "for an environment that crashes its process or for want of memory"
                        ) from error
                else:
                    self.sizes |= reports[-1].shards
                    self.restarts["acting"] += reports[-1].acting_losses > 0
                    self._losses_in_a_row = 0
            if timeout == 0 or self.stopping():
                break
        return reports

    def drain(self) -> list[RunnerReport]:
        """Wait for every collect call under way: afterwards nothing moves."""
        reports = []
        while self._collects:
            reports += self.finished_collects(wait=True)
        return reports

    def update(self, num: int) -> list[dict[str, float]]:
        if num and not self.ready:
            self.ask_sizes()  # a shard may have come back
        taken: list[dict[str, float]] = []
        under_way: deque[tuple[int, ObjectRef]] = deque()
        started = 0
        while started < num or under_way:
            if started < num and len(under_way) < STEPS_IN_FLIGHT and not self.stopping():
                shard = self._choose_shard()
                if shard is not None:
                    batch = self.shards[shard].sample.remote()
                    under_way.append((shard, self.learner.step.remote(batch)))
                    started += 1
                    continue
            if not under_way:
                break
            shard, ref = under_way.popleft()
            try:
                metrics: dict[str, float] | None = ray.get(ref)
            except ActorUnavailableError:
                self.restarts["shard"] += 1
                metrics = None
            if metrics is None:
                self.sizes.pop(shard, None)  # until a runner reports it alive and filled
            else:
                taken.append(metrics)
        self.gradient_steps += len(taken)
        return taken

    def publish(self) -> None:
        self.learner.publish.remote()
        self.version = self.gradient_steps

    def _choose_shard(self) -> int | None:
        """A shard with data, in proportion to what it holds: all steps are equally likely."""
        ready = [index for index, report in self.sizes.items() if report.ready]
        if not ready:
            return None
        weights = np.array([self.sizes[index].num_steps for index in ready], float)
        return int(self._rng.choice(ready, p=weights / weights.sum()))

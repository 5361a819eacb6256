"""Whoever is slow, silent or never there: runners, learners, and an object store that is too small.

Recovery times are printed, and added to the file that WORLDFLUX_RECOVERY_LOG names.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
import ray
from fault_runs import note_recovery
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from injected import (
    MB,
    PATIENCE_S,
    pid_of,
    start_shard,
)
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from worldflux_dist import config
from worldflux_dist.data import Batch
from worldflux_dist.distributed import env_runner, supervision
from worldflux_dist.distributed.cluster import shard_config
from worldflux_dist.distributed.collect import RayCollector
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.group import LearnerGroup
from worldflux_dist.distributed.learners import UPDATES_PER_ROUND, Learners
from worldflux_dist.distributed.roles import ROLES, actor
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace, shard_name
from worldflux_dist.distributed.supervision import Driver, Patience
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.replay.limiter import Limiter

# ----------------------------------------------------------------------------- runners that went


class CountEnv(gymnasium.Env):
    """Shows how many observations it has shown; an episode is ten steps long."""

    observation_space: gymnasium.Space = spaces.Box(0, np.inf, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self._shown = -1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self._show(), 0.0, False, self._shown % 11 == 10, {}

    def _show(self) -> np.ndarray:
        self._shown += 1
        return np.array([self._shown], np.float32)


class HangingEnv(CountEnv):
    """Once, hangs for ever in C, where no signal and no other thread of Python gets through."""

    def __init__(self, hung: str) -> None:
        super().__init__()
        self.hung = Path(hung)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._shown == 20 and not self.hung.exists():
            self.hung.write_text(str(os.getpid()))
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            ctypes.PyDLL(None).sleep(3600)
        return super().step(action)


class CrashingEnv(CountEnv):
    """Ends its process, unless that is the driver's."""

    def __init__(self, driver: int) -> None:
        super().__init__()
        if os.getpid() != driver:
            os.kill(os.getpid(), signal.SIGKILL)


class NobodyLearns(LearnerGroup):
    """Collecting alone."""

    def publish(self) -> None:
        pass


def start_collecting(started: list[Any], folder: Path, env: dict[str, Any]) -> RayCollector:
    """The collector of a system with one runner and one shard."""
    settings = config.from_dict(
        {"model": "dreamerv3:tiny", "env": {"num_envs": 2} | env, "replay": {"batch_length": 4}}
        | {"scale": {"num_runners": 1, "num_shards": 1, "chunk_length": 8}}
    )
    store = actor(WeightStore).options(name=WEIGHTS, num_cpus=0).remote()
    shard = start_shard(started, folder, name=shard_name(0))
    runner = actor(env_runner.EnvRunnerActor).options(num_cpus=0).remote(settings, 0, 0)
    started += [store, runner]
    return make_collector(settings, NobodyLearns("agent", store), [shard], [runner])


def make_collector(
    settings: config.Config, group: LearnerGroup, shards: list[Any], runners: list[Any]
) -> RayCollector:
    """A collector, with learners that are never restarted."""
    driver, replay = Driver(), Shards(shards)
    learners = Learners(settings, [group], replay, [], None, driver)
    return RayCollector(settings, runners, replay, learners, driver)


def collected(collector: RayCollector) -> int:
    """Env steps that have come in by now; the runner goes on."""
    collector.start()
    time.sleep(0.05)
    return sum(report.env_steps for report in collector.finished(wait=False))


def set_patience(collector: RayCollector, seconds: float) -> None:
    say = collector.driver.say
    collector.patience = Patience(seconds, say)
    collector.learners.patience = Patience(seconds, say)


@pytest.mark.ray
def test_a_runner_that_hangs_in_c_is_killed_and_comes_back(
    started: list[Any], tmp_path: Path
) -> None:
    hung = tmp_path / "hung"
    env = {"id": "test_waiting:HangingEnv", "kwargs": {"hung": str(hung)}}
    collector = start_collecting(started, tmp_path / "replay", env)
    steps = 0
    while not hung.exists():
        steps += collected(collector)
    began = time.monotonic()
    set_patience(collector, 1)
    while not collector.restarts["runner"]:
        steps += collected(collector)
        assert time.monotonic() - began < PATIENCE_S
    set_patience(collector, PATIENCE_S)  # it must be able to start
    while not (after := collected(collector)):
        assert time.monotonic() - began < PATIENCE_S
    note_recovery("runner that hung in C, since its patience ended", time.monotonic() - began)
    assert not psutil.pid_exists(int(hung.read_text()))
    assert ray.get(collector.shards.handles[0].report.remote()).total_steps >= steps + after


@pytest.mark.ray
def test_a_runner_that_crashes_at_every_start_ends_the_run(
    started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROLES, "runner", replace(ROLES["runner"], deaths=2))
    monkeypatch.setattr(supervision, "RETURN_S", 3)
    env = {"id": "test_waiting:CrashingEnv", "kwargs": {"driver": os.getpid()}}
    collector = start_collecting(started, tmp_path, env)
    set_patience(collector, 3)
    began = time.monotonic()

    def collect_for_ever() -> None:
        while time.monotonic() - began < PATIENCE_S:
            assert collected(collector) == 0

    with pytest.raises(supervision.BudgetError, match="runner 0 died 2 times without"):
        collect_for_ever()
    assert collector.restarts["runner"] == 3


# ------------------------------------------------------------------------------- whoever is slow


class NoiseEnv(CountEnv):
    """Images that cannot be packed."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def _show(self) -> np.ndarray:
        self._shown += 1
        return self.np_random.integers(0, 256, (64, 64, 3), np.uint8)


class Idler:
    """A rank that looks at batches instead of learning from them."""

    def __init__(self) -> None:
        self.looked: dict[str, float] | None = None

    def begin(self, shard: int, given: tuple[Batch, np.ndarray]) -> dict[str, float] | None:
        looked = self.finish()
        time.sleep(0.01)
        self.looked = {"batch_bytes": given[0].nbytes}
        return looked

    def finish(self) -> dict[str, float] | None:
        looked, self.looked = self.looked, None
        return looked

    @ray.method(num_returns=2)
    def weights(self) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
        return (0, 0), {}


IMAGES = {
    "model": "dreamerv3:tiny",
    "env": {"id": "test_waiting:NoiseEnv", "num_envs": 8},
    "replay": {"batch_length": 64, "capacity": 3000, "pending_bytes": 16 * MB},
    "scale": {"num_runners": 2, "num_shards": 2, "chunk_length": 64},
}
STEP_BYTES = 64 * 64 * 3
COLLECT_STEPS = 2 * 8 * 64  # of both runners: 12.6 MB
BATCH_STEPS = 16 * 64  # 12.6 MB, of which four may be under way


@pytest.fixture(scope="module")
def images(small_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCollector]:
    """A system that moves large chunks and batches through an object store of 80 MB."""
    settings = config.from_dict(IMAGES)
    folder = tmp_path_factory.mktemp("images")
    place = [ShardPlace(str(folder), "0001", index, 2) for index in range(2)]
    store = actor(WeightStore).options(name=WEIGHTS, num_cpus=0).remote()
    make = actor(ReplayShardActor, concurrency_groups={"disk": 1}, num_cpus=0)
    shards = [
        make.options(name=shard_name(index)).remote(shard_config(settings), 0, place[index], [])
        for index in range(2)
    ]
    runner = actor(env_runner.EnvRunnerActor, num_cpus=0)
    runners = [runner.remote(settings, index, 0) for index in range(2)]
    group = LearnerGroup("agent", store)
    group.ranks = [actor(Idler, num_cpus=0).remote()]
    yield make_collector(settings, group, shards, runners)
    for handle in [*runners, *shards, store, *group.ranks]:
        ray.kill(handle)


def spilled_bytes() -> int:
    """Bytes that Ray has written to disk, ever, for want of room in its object store."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    stats = get_memory_info_reply(state).store_stats
    return stats.spilled_bytes_total + stats.object_store_bytes_fallback


@pytest.mark.ray
@pytest.mark.parametrize("ratio", [40, 1], ids=["slow learner", "slow runners"])
def test_whoever_is_ahead_waits_and_memory_stays_bounded(
    images: RayCollector, ratio: float
) -> None:
    """As many gradient steps are earned by a chunk of each runner as the ratio."""
    limiter = Limiter(ratio, BATCH_STEPS, prefill=COLLECT_STEPS, max_owed=0)
    flow = Flow(limiter, images, images.learners, COLLECT_STEPS)
    earned = COLLECT_STEPS * ratio / BATCH_STEPS
    shards = images.shards.handles
    before = sum(ray.get(shard.report.remote()).total_steps for shard in shards)
    processes = [*(psutil.Process(pid_of(shard)) for shard in shards), psutil.Process()]
    sizes = [process.memory_full_info().uss for process in processes]
    spilled = spilled_bytes()
    while limiter.env_steps < 5 * COLLECT_STEPS:
        owed = limiter.owed
        found = flow.round()
        assert len(found.updates) == min(owed, UPDATES_PER_ROUND)  # 0 where nothing is owed
        # A runner has one chunk of work, and gets the next one when what it brings can be used.
        assert limiter.owed <= 2 * earned
        assert images.num_under_way <= 2
    limiter.inserted(sum(report.env_steps for report in images.drain(60)))
    while limiter.owed:
        flow.round(collect=False)
    *grown, driver = [p.memory_full_info().uss - s for p, s in zip(processes, sizes, strict=True)]
    replay = images.config.replay
    assert max(grown) < replay.capacity // 2 * STEP_BYTES + replay.pending_bytes + 64 * MB
    assert driver < 32 * MB
    assert spilled_bytes() - spilled <= BATCH_STEPS * STEP_BYTES
    replayed, asked = limiter.gradient_steps * BATCH_STEPS, limiter.env_steps * ratio
    assert asked - BATCH_STEPS < replayed <= asked
    after = sum(ray.get(shard.report.remote()).total_steps for shard in shards)
    assert after - before == limiter.env_steps


@dataclass(frozen=True)
class Collected:
    env_steps: int


@dataclass
class Simulated:
    """Ports of runners that take `durations` for a chunk and a learner that takes `step_s` for a
    step, once `window` steps are stored; only the clock is made up."""

    chunk: int
    durations: Sequence[float]
    step_s: float
    window: int
    now: float = 0.0
    stored: int = 0
    under_way: dict[int, float] = field(default_factory=dict)

    def start(self) -> None:
        for index, seconds in enumerate(self.durations):
            self.under_way.setdefault(index, self.now + seconds)

    def finished(self, wait: bool) -> list[Collected]:
        if wait and self.under_way:
            self.now = max(self.now, min(self.under_way.values()))
        done = [index for index, at in self.under_way.items() if at <= self.now]
        for index in done:
            del self.under_way[index]
        self.stored += len(done) * self.chunk
        return [Collected(self.chunk)] * len(done)

    def update(self, num: int) -> list[dict[str, float]]:
        num = num if self.stored >= self.window else 0
        self.now += num * self.step_s
        return [{}] * num

    def publish(self) -> None:
        pass


@settings(max_examples=500, deadline=None)
@given(
    durations=st.lists(st.sampled_from([0.01, 0.1, 1.0, 30.0]), min_size=1, max_size=5),
    step_s=st.sampled_from([0.001, 0.1, 10.0]),
    chunk=st.integers(1, 200),
    ratio=st.sampled_from([0, 0.001, 0.3, 1, 7, 64]),
    batch_steps=st.integers(16, 2048),
    prefill=st.integers(0, 3000),
    max_owed=st.integers(0, 40),
    window=st.integers(0, 3000),
)
def test_nobody_waits_for_ever_and_debt_is_bounded(
    durations: list[float],
    step_s: float,
    chunk: int,
    ratio: float,
    batch_steps: int,
    prefill: int,
    max_owed: int,
    window: int,
) -> None:
    system = Simulated(chunk, durations, step_s, window)
    collect_steps = chunk * len(durations)
    limiter = Limiter(ratio, batch_steps, prefill, max_owed)
    flow = Flow(limiter, system, system, collect_steps)
    earned = collect_steps * ratio / batch_steps
    allowed = 0.0
    for _ in range(60):
        steps, gradient_steps = limiter.env_steps, limiter.gradient_steps
        flow.round()
        assert limiter.env_steps > steps or limiter.gradient_steps > gradient_steps
        if limiter.gradient_steps == 0:
            allowed = max(limiter.owed, max_owed, earned)  # also before replay can be sampled
        assert limiter.owed <= allowed + earned
    system.under_way.clear()
    while limiter.owed and system.stored >= window:
        flow.round(collect=False)
    if system.stored >= window and limiter.env_steps >= prefill:
        assert limiter.gradient_steps == limiter.env_steps * Fraction(str(ratio)) // batch_steps

"""What the driver's rounds cost: how long a learner waits for its batches, and runners for work.

Stall: the rounds of a training, with runners that wait for a slow environment and
a learner whose step copies its batch of images [16, 64] and then sleeps for what is left of a fixed
time; the ratio is set such that runners bring 1.2 times what the learner can take. Scaling: env
steps/s of 1, 8 and 32 runners, each with environments that sleep, so that cores are not the limit.
The limits are a learner and a runner that never wait; peers have no such rounds.

    python benchmarks/systems/ray_flow.py [--part stall scaling] [--runners 1 8 32] [--quick]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

import gymnasium
import numpy as np
import psutil
import ray
from gymnasium import spaces

from setting.local_ray import MB, ONCE, local_ray, machine
from worldflux_dist.config import Config, ScaleConfig
from worldflux_dist.data import Batch
from worldflux_dist.distributed.collect import RayCollector
from worldflux_dist.distributed.env_runner import EnvRunnerActor, RunnerReport
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.group import LearnerGroup
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.rank import BESIDE, Rank
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace, shard_name
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.envs import EnvConfig
from worldflux_dist.learner import LearnerConfig, Ready
from worldflux_dist.replay import ReplayConfig
from worldflux_dist.replay.limiter import Limiter

OBS = {
    "image": spaces.Box(0, 255, (64, 64, 3), np.uint8),
    "vector": spaces.Box(-np.inf, np.inf, (24,), np.float32),
}
ACTION = spaces.Box(-1, 1, (6,), np.float32)
VECTOR_STEP_S = 0.016  # all of a runner's environments, one after the other
SUPPLY = 1.2
STALL_GOAL, SCALING_GOALS = 0.01, {8: 0.90, 32: 0.80}


class SlowEnv(gymnasium.Env):
    """Sleeps in every step and does nothing else; its episodes have 1,000 steps."""

    def __init__(self, kind: str, seconds: float) -> None:
        self.observation_space, self.action_space = OBS[kind], ACTION
        self.seconds, self.num_steps = seconds, 0
        self._obs = np.full(OBS[kind].shape, 100, OBS[kind].dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        self.num_steps = 0
        return self._obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        time.sleep(self.seconds)
        self.num_steps += 1
        return self._obs, 0.0, False, self.num_steps == 1000, {}


class Sleeping:
    """A learner whose step takes `seconds`, the copy of its batch included."""

    config, rows = LearnerConfig(compile=False), False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def ahead(self, batch: Batch) -> Ready:
        return Ready(batch, batch)

    def step(self, ready: Ready) -> dict[str, float]:
        end = time.monotonic() + self.seconds
        ready.arrays.map(np.copy)
        time.sleep(max(0.0, end - time.monotonic()))
        return {}


class SleepingRank(Rank):
    """A rank without an agent. It publishes nothing; ray_weights.py tells what that takes."""

    def __init__(self, seconds: float) -> None:
        learner: Any = Sleeping(seconds)
        super().__init__(learner, None, [], 0)

    def publish(self) -> None:
        pass


class SleepingGroup(LearnerGroup):
    """Given its ranks instead of starting them; there may be none."""

    def __init__(self, store: Any, ranks: list[Any]) -> None:
        super().__init__("agent", store)
        self.ranks = ranks

    def publish(self) -> None:
        for rank in self.ranks:
            rank.publish.remote()


def slow_config(kind: str, num_runners: int, num_envs: int) -> Config:
    env = {"kind": kind, "seconds": VECTOR_STEP_S / num_envs}
    return Config(
        model="dreamerv3:tiny",
        env=EnvConfig(id="ray_flow:SlowEnv", num_envs=num_envs, kwargs=env),
        replay=ReplayConfig(16, 64, capacity=32_768),
        scale=ScaleConfig(num_runners, num_shards=1),
    )


@contextmanager
def system(config: Config, ranks: list[Any]) -> Iterator[RayCollector]:
    """The processes of a run but for its learners, tied together as in training; ends them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        store = actor(WeightStore, **ONCE).options(name=WEIGHTS).remote()
        make = actor(ReplayShardActor, concurrency_groups={"disk": 1}, **ONCE)
        place = ShardPlace(folder, "0001", 0, 1)
        shard = make.options(name=shard_name(0)).remote(config.replay, 0, place, [])
        make = actor(EnvRunnerActor, **ONCE)
        runners = [make.remote(config, i, 0) for i in range(config.scale.num_runners)]
        group = SleepingGroup(store, ranks)
        try:
            driver, shards = Driver(), Shards([shard])
            learners = Learners(config, [group], shards, [], None, driver)
            yield RayCollector(config, runners, shards, learners, driver)
        finally:
            for handle in (*runners, *ranks, shard, store):
                ray.kill(handle)
            time.sleep(1.0)  # names are free again


def collect(collector: RayCollector, seconds: float) -> list[tuple[float, RunnerReport]]:
    """Reports with the time each came in, all runners being given work again at once."""
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        collector.start()
        reports = collector.finished(wait=True)
        found += [(time.monotonic(), report) for report in reports]
    return found


def rate_of(found: list[tuple[float, RunnerReport]], num_runners: int) -> float:
    """Env steps/s: runners take turns, so every num_runners-th report is the same runner's."""
    times = np.array([time for time, _ in found])
    period = np.mean(times[num_runners:] - times[:-num_runners])
    return float(num_runners * found[0][1].env_steps / period)


def stall(step_seconds: float, seconds: float) -> None:
    """Share of a learner's time that it waits, within the rounds and at their beginnings."""
    config = slow_config("image", num_runners=1, num_envs=8)
    rank = actor(SleepingRank, **ONCE, concurrency_groups=BESIDE).remote(step_seconds)
    with system(config, [rank]) as collector:
        collect(collector, 0.1)  # until the runner has started
        supply = rate_of(collect(collector, 5 * 64 * VECTOR_STEP_S), 1)
        batch_steps = config.replay.batch_size * config.replay.batch_length
        ratio = round(SUPPLY * batch_steps / step_seconds / supply, 3)
        limiter = Limiter(ratio, batch_steps, prefill=0)
        collector.drain(60)
        flow = Flow(limiter, collector, collector.learners, 64 * config.env.num_envs)
        begin: list[float] = []
        within: list[float] = []
        unpaid, short = 0, False  # where nothing is owed, it is runners that the learner waits for
        start, warm = time.monotonic(), 0.25 * seconds
        while (spent := time.monotonic() - start) < warm + seconds or len(begin) < 3:
            if spent > warm + 3 * seconds:
                print(
                    "stall: no figure, the machine is too busy for runners to keep up", flush=True
                )
                return
            counts = spent > warm and limiter.gradient_steps > 0
            waits = [m["time/learner_wait"] for m in flow.round().updates]
            if counts and waits:
                begin += [] if short else waits[:1]
                within += waits[1:]
            short = not waits
            unpaid += counts and short
        collector.drain(60)
    steps = len(within) + len(begin)
    share = sum(within + begin) / (sum(within + begin) + steps * step_seconds)
    verdict = "met" if share <= STALL_GOAL else "MISSED"
    print(
        f"stall, step {1e3 * step_seconds:4.0f} ms, ratio {ratio:6.1f}: {share:6.2%} of "
        f"{steps} steps (goal {STALL_GOAL:.0%}: {verdict}); between steps of a round "
        f"{1e3 * mean(within or [0]):.1f} ms, between rounds of {steps / len(begin):.0f} steps "
        f"{1e3 * mean(begin):.1f} ms (p99 {1e3 * np.percentile(begin, 99):.1f}); left "
        f"out: {unpaid} rounds in which runners had brought too little; {machine()}",
        flush=True,
    )


def scaling(nums: list[int], seconds: float) -> None:
    """Env steps/s by number of runners, and what runners do with their time."""
    base = 0.0
    for num in nums:
        config = slow_config("vector", num, num_envs=2)
        started = time.monotonic()
        with system(config, []) as collector:
            collector.start()
            collector.drain(60)
            started = time.monotonic() - started
            psutil.cpu_percent()
            found = collect(collector, seconds)
            busy, free = psutil.cpu_percent() / 100, psutil.virtual_memory().available
            collector.drain(60)
        rate = rate_of(found, num)
        base = base or rate / num
        efficiency = rate / (num * base)
        goal = SCALING_GOALS.get(num)
        verdict = f" (goal {goal}: {'met' if efficiency >= goal else 'MISSED'})" if goal else ""
        whole = 64 * config.env.num_envs * num / rate  # seconds from chunk to chunk
        collecting = mean(r.collect_seconds for _, r in found)
        sending = mean(r.send_seconds for _, r in found)
        print(
            f"scaling, {num:2d} runners: {rate:8,.0f} env steps/s, efficiency {efficiency:.3f}"
            f"{verdict}; a chunk {whole:.3f} s, of it sleep {64 * VECTOR_STEP_S:.3f}, other "
            f"collecting {collecting - 64 * VECTOR_STEP_S:.3f}, sending {sending:.3f}, waiting "
            f"for work {whole - collecting - sending:.3f}; cores busy {busy:.0%}, started in "
            f"{started:.0f} s, {free / 1e9:.1f} GB of memory free; {machine()}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["stall", "scaling"]
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--runners", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.runners, args.seconds = [1, 2], 4.0
    print(machine())
    with local_ray(1024 * MB):
        if "stall" in args.part:
            for step_seconds in (0.2, 0.1, 0.05):
                stall(step_seconds, args.seconds)
        if "scaling" in args.part:
            scaling(args.runners, args.seconds)


if __name__ == "__main__":
    main()

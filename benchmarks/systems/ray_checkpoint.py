"""What a checkpoint, and size, cost a sample.

A shard that holds a gigabyte of images and goes on storing is asked for batches [16, 64] one after
the other, without and with checkpoints of it being taken all the time (sealed, written, tidied up).
Then, in one process, samples from a buffer and from one of ten times the size.

    python benchmarks/systems/ray_checkpoint.py [--runs 5] [--quick]
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np
import ray

from setting.local_ray import MB, ONCE, local_ray, machine, percentiles
from setting.replay_sides import CHUNKS, LENGTH, ROWS, InProcess, Side, pong_chunk, shard_side
from worldflux_dist.distributed.roles import actor
from worldflux_dist.replay import ReplayConfig

GOAL_MS = 50.0
REST_S = 0.2  # between two checkpoints
CHUNKS_PER_SECOND = 4  # that go on coming in meanwhile: 2,048 steps, an Atari runner or two


class Saving:
    """Takes checkpoints of a shard one after the other, as the driver does."""

    def __init__(self, side: Side) -> None:
        self.side = side

    def save(self, seconds: float) -> list[float]:
        taken = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            self.side.save()
            taken.append(time.perf_counter() - start)
            time.sleep(REST_S)
        return taken


def latencies(replay: Any, seconds: float) -> list[float]:
    """Seconds of each sample, one after the other, until it is there to be fetched."""
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        flag, ref = replay.sample.remote(ROWS)
        ray.get(flag)
        found.append(time.perf_counter() - start)
        del ref
    return found


def pause(steps: int, runs: int, seconds: float) -> None:
    """Sample latency of a full shard that goes on storing, with and without checkpoints."""
    chunk = pong_chunk()
    config = ReplayConfig(ROWS, LENGTH, capacity=steps, online=False)
    with shard_side(config, chunk) as side:
        saving = actor(Saving, **ONCE).remote(side)
        side.insert(steps // chunk.num_steps)
        side.save()
        held = ray.get(side.replay.report.remote()).nbytes
        found: dict[str, list[float]] = {"without": [], "while checkpoints are taken": []}
        saved: list[float] = []
        for _ in range(runs):
            for name in found:
                num = int((seconds + 1) * CHUNKS_PER_SECOND)
                sending = side.writer.send.remote(num, CHUNKS_PER_SECOND)
                ref = saving.save.remote(seconds) if name != "without" else None
                found[name] += latencies(side.replay, seconds)
                saved += ray.get(ref) if ref is not None else []
                ray.get(sending)
    print(f"\nsample latency of a shard with {held / 1e6:,.0f} MB of images; {machine()}")
    for name, values in found.items():
        p99 = 1e3 * float(np.percentile(values, 99))
        verdict = f" (goal p99 {GOAL_MS:.0f} ms: {'met' if p99 <= GOAL_MS else 'MISSED'})"
        print(f"  {name:28}{percentiles(values)}{verdict} of {len(values)}")
    print(f"  {len(saved)} checkpoints, each on disk after {percentiles(saved)}")


def by_size(kind: str, steps: int, runs: int) -> None:
    """In one process: what ten times the steps cost a sample."""
    chunk = CHUNKS[kind]()
    found: dict[int, list[float]] = {steps: [], 10 * steps: []}
    replays = {
        size: InProcess(ReplayConfig(ROWS, LENGTH, capacity=size, online=False), chunk)
        for size in found
    }
    for size, replay in replays.items():
        replay.insert(size // chunk.num_steps)
        replay.sample(20)
    for _ in range(runs):
        for size, replay in replays.items():
            found[size] += [replay.sample(1) for _ in range(100)]
    one, ten = (median(values) for values in found.values())
    for size, values in found.items():
        print(f"  {kind}, {size:10,} steps: {percentiles(values)}")
    print(f"  {kind}: ten times the steps take {ten / one:.2f} times as long (p50)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    runs, small = (1, 16) if args.quick else (args.runs, 1)
    with local_ray(1024 * MB):
        pause(81_920 // small, runs, 6.0 / small)
    print(f"sample latency in one process; {machine()}")
    for kind, steps in {"image 64x64x3": 8_192, "vector 24": 102_400}.items():
        by_size(kind, max(1024, steps // small), runs)


if __name__ == "__main__":
    main()

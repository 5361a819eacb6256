"""Rates of replay through Ray: into a shard's process, and out of it to a learner's.

A writer sends chunks [8, 64] as runners do, two under way; batches [16, 64] go by reference to a
reader, which copies them as learners do. Ours with its journal, the bare ReplayBuffer in an actor
and RLlib's EpisodeReplayBuffer in an actor take turns; "until on disk" waits for a checkpoint's
state of the shard after each turn. The limits are the bare buffer in one process and numpy's copy.
Rates are per second of wall clock, medians over the runs.

    python benchmarks/systems/ray_replay.py [--runs 5] [--quick]
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import ray

from peers.rllib_replay import RllibReplay
from setting.local_ray import MB, copy_seconds, local_ray, machine
from setting.replay_sides import (
    CHUNKS,
    LENGTH,
    ROWS,
    BareReplay,
    InProcess,
    Side,
    make_side,
    shard_side,
)
from worldflux_dist.replay import ReplayConfig


def rates(kind: str, steps: int, runs: int, chunks: int) -> None:
    chunk = CHUNKS[kind]()
    config = ReplayConfig(ROWS, LENGTH, capacity=steps, online=False)
    step_bytes = chunk.nbytes / chunk.num_steps
    copied = copy_seconds(int(ROWS * LENGTH * step_bytes))
    print(
        f"\n{kind}: a chunk {chunk.nbytes / 1e6:.2f} MB, a batch "
        f"{ROWS * LENGTH * step_bytes / 1e6:.2f} MB, which numpy copies in {1e3 * copied:.2f} ms "
        f"({ROWS * LENGTH * step_bytes / copied / 1e9:.1f} GB/s); {machine()}"
    )
    with shard_side(config, chunk) as shard:
        sides: dict[str, Side | InProcess] = {
            "limit: in one process": InProcess(config, chunk),
            "shard with journal": shard,
            "bare buffer in an actor": make_side(BareReplay, (config,), chunk),
            "RLlib's in an actor": make_side(RllibReplay, (steps, LENGTH), chunk),
        }
        for side in sides.values():  # full, and warm
            side.insert(steps // chunk.num_steps)
            side.sample(2)
        inserts: dict[str, list[float]] = {name: [] for name in (*sides, "until on disk")}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(runs):
            for name, side in sides.items():
                seconds = side.insert(chunks)
                inserts[name].append(chunks * chunk.num_steps / seconds)
                if side is shard:
                    start = time.perf_counter()
                    shard.save()
                    seconds += time.perf_counter() - start
                    inserts["until on disk"].append(chunks * chunk.num_steps / seconds)
                samples[name].append(chunks / side.sample(chunks))
    limit = median(inserts["limit: in one process"])
    peer = median(inserts["RLlib's in an actor"])
    for name, found in inserts.items():
        rate = median(found)
        print(
            f"  insert {name:24}{rate:12,.0f} steps/s {rate * step_bytes / 1e6:9,.1f} MB/s"
            f"   {rate / limit:6.3f} of the limit  {rate / peer:6.2f}x RLlib"
        )
    limit, peer = (median(samples[n]) for n in ("limit: in one process", "RLlib's in an actor"))
    for name, found in samples.items():
        rate = median(found)
        print(
            f"  sample {name:24}{rate:12,.1f} batches/s "
            f"{rate * ROWS * LENGTH * step_bytes / 1e6:7,.1f} MB/s"
            f"   {rate / limit:6.3f} of the limit  {rate / peer:6.2f}x RLlib"
        )
    for side in sides.values():
        if isinstance(side, Side):
            for handle in (side.replay, side.writer, side.reader):
                ray.kill(handle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    runs, small = (1, 16) if args.quick else (args.runs, 1)
    print(f"{machine()}, medians of {runs}")
    with local_ray(1024 * MB):
        for kind in CHUNKS:
            rates(kind, 16_384 // small, runs, 64 // small)


if __name__ == "__main__":
    main()

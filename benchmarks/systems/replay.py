"""How near replay comes to the memory bus: sampling and inserting against bare numpy copies.

The limit is measured in the same run, in turn with ours, on the same kind of steps: windows cut as
slices from one contiguous array per column into a reused batch, chunks copied into such an array.
Figures are per CPU-second of this process, medians over the runs; the ratio is the figure that
carries over to another machine. Run: python benchmarks/systems/replay.py [--runs 7] [--steps 24576]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from worldflux_dist.data import Chunk
from worldflux_dist.replay import ReplayBuffer, ReplayConfig, ReplayShard
from worldflux_dist.storage import as_path

NUM_ENVS, BATCH, LENGTH = 8, 16, 64
GOALS = {"sample": 0.8, "insert": 0.5}


class Kind(NamedTuple):
    """What an environment gives: an observation's shape and dtype, numbers of an action, and steps
    of a chunk."""

    shape: tuple[int, ...]
    dtype: type
    actions: int = 6
    steps: int = LENGTH


KINDS = {
    "image 64x64x3": Kind((64, 64, 3), np.uint8),
    "vector 24": Kind((24,), np.float32),
    "vector 4": Kind((4,), np.float32, 2, 16),  # CartPole
}


def random_chunk(rng: np.random.Generator, kind: Kind, seq: int) -> Chunk:
    lead = (NUM_ENVS, kind.steps)
    first = np.zeros(lead, bool)
    first[:, 0] = seq == 0
    return Chunk(
        obs={"obs": rng.integers(0, 255, (*lead, *kind.shape)).astype(kind.dtype)},
        action=rng.standard_normal((*lead, kind.actions), np.float32),
        reward=rng.standard_normal(lead, np.float32),
        is_first=first,
        is_last=np.zeros(lead, bool),
        is_terminal=np.zeros(lead, bool),
        streams=np.arange(NUM_ENVS),
        key=("runner", "life", seq),
    )


def per_cpu_second(function: Callable[[], object], seconds: float) -> float:
    """Calls of `function` per second of CPU time of this process."""
    function()
    calls, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        function()
        calls += 1
    return calls / spent


class BareColumns:
    """The limit: one contiguous array per column, no streams, no eviction, no bookkeeping."""

    def __init__(self, chunk: Chunk, num_steps: int) -> None:
        self.columns = {
            name: np.zeros((num_steps, *value.shape[2:]), value.dtype)
            for name, value in chunk.columns().items()
        }
        self.out = {
            name: np.empty((BATCH, LENGTH, *value.shape[1:]), value.dtype)
            for name, value in self.columns.items()
        }
        self.rng = np.random.default_rng(0)
        self.num_steps, self.at = num_steps, 0

    def add(self, chunk: Chunk) -> None:
        for name, value in chunk.columns().items():
            flat = value.reshape(-1, *value.shape[2:])
            self.columns[name][self.at : self.at + len(flat)] = flat
        self.at = (self.at + chunk.num_steps) % self.num_steps

    def sample(self) -> None:
        starts = self.rng.integers(0, self.num_steps - LENGTH, BATCH).tolist()
        for name, column in self.columns.items():
            for window, start in zip(self.out[name], starts, strict=True):
                window[:] = column[start : start + LENGTH]


def measure(kind: str, num_steps: int, runs: int, seconds: float) -> None:
    chunk = random_chunk(np.random.default_rng(0), KINDS[kind], 0)
    num_steps -= num_steps % chunk.num_steps
    config = ReplayConfig(BATCH, LENGTH, capacity=num_steps, online=False)
    replay, bare = ReplayBuffer(config), BareColumns(chunk, num_steps)

    def inserts(add: Callable[[Chunk], object]) -> Iterator[object]:
        for seq in itertools.count():
            chunk.key = ("runner", "life", seq)
            chunk.is_first[:, 0] = seq == 0
            yield add(chunk)

    insert, copy = (inserts(each.add).__next__ for each in (replay, bare))
    for _ in range(num_steps // chunk.num_steps + 1):
        insert()
        copy()
    out = replay.sample()
    timed: dict[str, Callable[[], object]] = {
        "limit sample": bare.sample,
        "sample": lambda: replay.sample(out=out),
        "sample, fresh memory": replay.sample,
        "limit insert": copy,
        "insert": insert,
    }
    figures: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(runs):
        for name, function in timed.items():
            figures[name].append(per_cpu_second(function, seconds))
    for name in ("sample", "sample, fresh memory", "insert"):
        limit = figures["limit insert" if name == "insert" else "limit sample"]
        scale = chunk.num_steps if name == "insert" else 1
        ratio = median(a / b for a, b in zip(figures[name], limit, strict=True))
        unit = "steps/CPU-s" if name == "insert" else f"batches [{BATCH}, {LENGTH}]/CPU-s"
        verdict = ""
        if name in GOALS:
            verdict = f"  goal {GOALS[name]}: {'met' if ratio >= GOALS[name] else 'MISSED'}"
        print(
            f"{kind:14} {name:21} {median(figures[name]) * scale:14,.0f}  limit "
            f"{median(limit) * scale:14,.0f} {unit:26} ratio {ratio:.2f}{verdict}"
        )


def measure_sizes(sizes: tuple[int, ...] = (1_000_000, 10_000_000), calls: int = 400) -> None:
    """Median time of a sample, by what is stored; steps without observations fit ten millions."""
    for share in ("uniform", "recent", "prioritized"):
        medians = []
        for size in sizes:
            shares: dict[str, Any] = {"uniform": 0.0, share: 1.0}
            buffer = ReplayBuffer(ReplayConfig(capacity=size, online=False, **shares))
            chunk = random_chunk(np.random.default_rng(0), Kind((1,), np.float32), 0)
            chunk = chunk.map(lambda value: np.repeat(value, 128, axis=1))
            chunk.is_first[:, 1:] = False
            for seq in range(size // chunk.num_steps + 1):
                chunk.key = ("runner", "life", seq)
                buffer.add(chunk)
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                buffer.sample()
                times.append(time.perf_counter() - start)
            medians.append(median(times) * 1e6)
        figures = ", ".join(f"{n:,} steps {m:.0f} us" for n, m in zip(sizes, medians, strict=True))
        print(f"{share:14} p50 of a sample: {figures}, ratio {medians[-1] / medians[0]:.2f}")


def screens(num_chunks: int) -> list[Chunk]:
    """Chunks of Pong-like screens: a flat court, two paddles and a ball."""
    rng, found = np.random.default_rng(0), []
    for seq in range(num_chunks):
        chunk = random_chunk(rng, KINDS["image 64x64x3"], seq)
        chunk.obs["obs"][:] = (144, 72, 17)
        for frame in chunk.obs["obs"].reshape(-1, 64, 64, 3):
            left, right, x, y = rng.integers(2, 58, 4)
            frame[left : left + 6, 4:6], frame[right : right + 6, 58:60] = (213, 130, 74), 92
            frame[y, x] = 236
        found.append(chunk)
    return found


def measure_storage(seconds: float, num_chunks: int = 40) -> None:
    """Memory and sampling of packed storage; disk, sealing and restoring of a shard."""
    some = screens(4)

    def insert(add: Callable[[Chunk], int]) -> None:
        for seq in range(num_chunks):
            chunk = some[seq % len(some)]
            chunk.key = ("runner", "life", seq)
            chunk.is_first[:, 0] = seq == 0
            add(chunk)

    num_steps = num_chunks * some[0].num_steps
    for storage in ("raw", "lz4"):
        config = ReplayConfig(BATCH, LENGTH, num_steps, online=False, storage=storage)
        buffer = ReplayBuffer(config)
        insert(buffer.add)
        out = buffer.sample()
        rate = per_cpu_second(functools.partial(buffer.sample, out=out), seconds)
        print(f"storage {storage}: {buffer.nbytes / 2**20:.1f} MB, {rate:,.0f} batches/CPU-s")
    with tempfile.TemporaryDirectory() as folder:
        config = ReplayConfig(BATCH, LENGTH, num_steps)
        root = as_path(folder)
        shard = ReplayShard(config, 0, root, "1", 0, 1)
        start = time.perf_counter()
        insert(shard.add)
        added = time.perf_counter()
        future = shard.seal()
        sealed = time.perf_counter()
        state = future.result()
        written = time.perf_counter()
        shard.close()
        again = time.perf_counter()
        ReplayShard(config, 0, root, "2", 0, 1, [state]).close()
        restore = num_steps / (time.perf_counter() - again)
        size = sum(found["size"] for found in state["segments"]) / 2**20
        print(
            f"shard: add {num_steps / (added - start):,.0f} steps/s, durable "
            f"{num_steps / (written - start):,.0f} steps/s, {size:.1f} MB on disk, seal "
            f"{(sealed - added) * 1e3:.2f} ms, restore {restore:,.0f} steps/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24_576, help="steps held in replay")
    parser.add_argument("--seconds", type=float, default=0.2, help="CPU time of one measurement")
    args = parser.parse_args()
    for kind in KINDS:
        measure(kind, args.steps, args.runs, args.seconds)
    measure_storage(args.seconds)
    measure_sizes()


if __name__ == "__main__":
    main()

"""Gradient steps of one and of two learner processes that share every batch, on one thread each.

A group is stepped as the driver does it, through gloo on this machine; the limit is as many times
one learner as there are ranks. dreamerv3:size1m on 24 numbers, batches [16, 64], medians.

    python benchmarks/systems/ray_ranks.py [--ranks 1 2] [--runs 5] [--quick]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import numpy as np
import ray
from ray import ObjectRef

from peers.ours import as_batch, spaces_of
from peers.work import Task, noise
from setting.local_ray import MB, ONCE, local_ray, machine
from worldflux_dist.config import Config, ScaleConfig
from worldflux_dist.distributed.feed import Fed
from worldflux_dist.distributed.group import ActorGroup
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.replay import ReplayConfig

TASK = Task("dreamerv3", (24,), 6, continuous=True)


class Fixed:
    """A source that always has the same batch for every rank."""

    def __init__(self, ref: ObjectRef) -> None:
        self.ref = ref

    def pump(self, needed: int) -> None:
        pass

    def take(self, num: int) -> list[Fed] | None:
        return [(0, self.ref)] * num

    def waiting(self) -> list[ObjectRef]:
        return []

    def restart_stuck(self) -> None:
        pass


def ranks(nums: list[int], runs: int, steps: int) -> None:
    """Gradient steps/s of groups that share a batch of [16, 64]."""
    base = 0.0
    store = actor(WeightStore, **ONCE).options(name=WEIGHTS).remote()
    for num in nums:
        config = Config(model="dreamerv3:size1m", replay=ReplayConfig(16, 64))
        config = replace(config, scale=ScaleConfig(num_learners=num))
        group = ActorGroup(config, spaces_of(TASK), "agent", [{"num_cpus": 0}] * num)
        group.start(None, 0)
        group.meet()
        batch = as_batch(noise(replace(TASK, batch=(16 // num, 64))))
        group.source = Fixed(ray.put((batch, np.zeros(0, np.int64))))
        rates = []
        for _ in range(1 + runs):  # the first one warms up
            start = time.monotonic()
            group.begin(steps)
            while not group.done:
                group.pump()
                if waiting := group.waiting():
                    ray.wait(waiting, num_returns=1, timeout=1.0)
            rates.append(steps / (time.monotonic() - start))
        group.kill()
        rate = median(rates[1:])
        base = base or rate
        print(
            f"ranks, dreamerv3:size1m vector 24: {num} with {16 // num} rows each: {rate:.3f} "
            f"gradient steps/s, {rate / (num * base):.2f} of {num} times one; {machine()}",
            flush=True,
        )
    ray.kill(store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    args = parser.parse_args()
    with local_ray(512 * MB):
        ranks(args.ranks, *((1, 2) if args.quick else (args.runs, 5)))


if __name__ == "__main__":
    main()

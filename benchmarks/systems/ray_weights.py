"""How long weights take from the learner's publishing to having been applied by every reader.

A real learner (dreamerv3:size12m on 24 numbers, 24 MB of inference weights) publishes through the
WeightStore to 8 readers, each a process with an agent of its own: first they look whether the store
has rung between steps of 20 ms, then ask once a chunk; runners do both. The limit is one ray.put
and one bare copy of as many bytes, taken just before; the peer RLlib's EnvRunnerGroup.sync_weights
to 8 env runners with a module of about as many bytes, in the same run.

    python benchmarks/systems/ray_weights.py [--readers 8] [--publications 40] [--quick]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from statistics import median

import numpy as np
import ray
import torch
from gymnasium import spaces

from peers.rllib_weights import RllibRunners
from setting.local_ray import MB, copy_seconds, local_ray, machine, percentiles, put_seconds
from worldflux_dist.config import Config
from worldflux_dist.distributed.group import LearnerGroup
from worldflux_dist.distributed.rank import BESIDE, LearnerActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.weights import WEIGHTS, WeightReader, WeightStore
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.spaces import Spaces

ONCE = {"num_cpus": 0, "max_restarts": 0}
GOAL_MS = 60.0
OBSERVATION, ACTION = spaces.Box(-np.inf, np.inf, (24,), np.float32), spaces.Box(-1, 1, (6,))
HIDDEN = (2400, 2400)  # of RLlib's module: 24 MB
PAUSES_S = {"between steps of 20 ms": 0.02, "once a chunk of 250 ms": 0.25}


class Reader:
    """An agent that follows the newest weights."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        self.agent = config.make_agent(Spaces(OBSERVATION, ACTION))
        self.weights = WeightReader()

    def follow(self, last: int, pause: float, chunks: bool) -> list[tuple[int, float, float]]:
        """Until version `last`: each version, when it had been applied, and seconds it took."""
        take = self.weights.pull if chunks else partial(self.weights.poll, by=1)
        found = []
        while self.weights.oldest < last:
            start = time.monotonic()
            if take(self.agent):
                end = time.monotonic()
                found.append((self.weights.oldest, end, end - start))
            time.sleep(pause)
        return found


class TimedLearner(LearnerActor):
    """A rank that tells how large its weights are."""

    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.learner.agent.inference_state().values())


def ours(num_readers: int, num: int) -> dict[str, list[list[float]]]:
    """For each kind of reader the delays of every publication."""
    config = Config(model="dreamerv3:size12m")
    store = actor(WeightStore, **ONCE).options(name=WEIGHTS).remote()
    spaces_ = Spaces(OBSERVATION, ACTION)
    learner = actor(TimedLearner, **ONCE, concurrency_groups=BESIDE).remote(
        config, spaces_, "agent", 0, 1
    )
    nbytes: int = ray.get(learner.nbytes.remote())
    limit = put_seconds(nbytes), copy_seconds(nbytes)
    print(
        f"limit: put {1e3 * limit[0]:.1f} ms, copy {1e3 * limit[1]:.1f} ms of {nbytes / 1e6:.1f} "
        f"MB; {machine()}"
    )
    make = actor(Reader, **ONCE)
    readers = [make.remote(config) for _ in range(num_readers)]
    ray.get([reader.follow.remote(0, 0.0, True) for reader in readers])
    group = LearnerGroup("agent", store)
    group.ranks = [learner]
    delays: dict[str, list[list[float]]] = {}
    version = 0
    for name, pause in PAUSES_S.items():
        first, last = version + 1, version + num
        following = [reader.follow.remote(last, pause, pause > 0.1) for reader in readers]
        began: dict[int, float] = {}
        busy = []
        for version in range(first, last + 1):
            time.sleep(0.3 + pause)
            ray.get(learner.count_from.remote(version))
            began[version] = time.monotonic()
            group.publish()
            ray.get(group.published)
            busy.append(time.monotonic() - began[version])
        logs = ray.get(following)
        delays[name] = [[_applied(log, v) - began[v] for log in logs] for v in began]
        pulls = [seconds for log in logs for _, _, seconds in log]
        _say(name, delays[name], sum(limit))
        print(
            f"  a reader's pull {percentiles(pulls)}; publishing {percentiles(busy)}; {machine()}"
        )
    for handle in (*readers, learner, store):
        ray.kill(handle)
    return delays


def _applied(log: list[tuple[int, float, float]], version: int) -> float:
    """When a reader had these weights or newer ones."""
    return min(end for found, end, _ in log if found >= version)


def _say(name: str, delays: list[list[float]], limit: float) -> None:
    every = [delay for each in delays for delay in each]
    p95, by_all = 1e3 * float(np.percentile(every, 95)), 1e3 * median(map(max, delays))
    print(
        f"{name}: {percentiles(every)}, by all {len(delays[0])} {by_all:.1f} ms (p50); "
        f"p95 is {p95 / limit / 1e3:.1f} times put + copy (goal {GOAL_MS:.0f} ms: "
        f"{'met' if p95 <= GOAL_MS else 'MISSED'})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--publications", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="short, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.readers, args.publications = 2, 3
    print(machine())
    with local_ray(1024 * MB):
        delays = ours(args.readers, args.publications)
        runners = RllibRunners(args.readers, HIDDEN)
        found = [runners.push() for _ in range(1 + args.publications)][1:]
        runners.stop()
        limit = put_seconds(runners.nbytes) + copy_seconds(runners.nbytes)
        _say(f"RLlib's sync_weights, {runners.nbytes / 1e6:.1f} MB", found, limit)
        tight = next(iter(delays.values()))
        ratio = median(map(max, found)) / median(map(max, tight))
        print(f"  RLlib takes {ratio:.1f} times as long until all have them; {machine()}")


if __name__ == "__main__":
    main()

"""Imagined lane-steps per second: in one process, through gRPC, through replicas and through the
imagination actors of a run; and the latency that gRPC adds at 70 % load.

    python benchmarks/systems/imagination.py [--model dreamerv3:size1m] [--seconds 5] [--rounds 5]

All roll the same model with its policy, features off, one torch thread each: 256 lanes of 15 steps
in one process, the same lanes in 8 calls at a time from a client in a process of its own. Windows
of the ways alternate; medians, the server's own CPU time beside wall-clock. Latency is that of
calls of one lane that arrive at random, beside one process that rolls them in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # as the server and the client

import gymnasium as gym
import numpy as np
import psutil
import ray
import torch

from setting.local_ray import local_ray, machine
from worldflux_dist import checkpoint, config, storage
from worldflux_dist.agent import Agent
from worldflux_dist.config import Config
from worldflux_dist.data import Batch, Steps
from worldflux_dist.distributed.model_actor import ImaginerActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.nn.memory import arrays
from worldflux_dist.runner import EnvRunner
from worldflux_dist.serve import replicas
from worldflux_dist.serve.client import AsyncClient
from worldflux_dist.serve.dreams import Dreams, Encode, Imagine
from worldflux_dist.spaces import Spaces

HORIZON, LANES, CLIENTS = 15, 256, 8
LOAD = 0.7
GOAL, GOALS_MS = 0.90, (2.0, 8.0)
ENV = "CartPole-v1"
Arrays = dict[str, np.ndarray]


def write_run(folder: Path, model: str) -> tuple[Config, Agent]:
    """A run whose agent has learned nothing, which costs the same to roll."""
    settings = config.from_dict({"model": model, "env": {"id": ENV}})
    env = gym.make(ENV)
    torch.manual_seed(0)
    agent = settings.make_agent(Spaces(env.observation_space, env.action_space))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    root = storage.as_path(folder) / "checkpoints"
    made = checkpoint.begin(root, 1)
    agent.save(made)
    checkpoint.commit(root, made, 1, counters={"gradient_steps": {"agent": 1}})
    return settings, agent


def real_steps() -> Steps:
    """16 x 16 random steps, as an imaginer gets them."""
    envs = make_envs(EnvConfig(ENV, 16), 0)
    chunk = EnvRunner(envs, random_act(envs.spaces, 0)).collect(16)
    envs.close()
    return chunk


def start_states(dreams: Dreams, steps: Steps) -> Arrays:
    """256 states behind real steps."""
    whole = Encode(steps.obs, steps.action, steps.is_first)
    state = dreams.encode([whole])[0]
    return {name: np.repeat(value, LANES // 16, 0) for name, value in state.items()}


@contextmanager
def server(run: Path) -> Iterator[tuple[int, str]]:
    """A server in a process of its own: its pid and address."""
    command = [sys.executable, "-m", "worldflux_dist.cli", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r" at ([^ ,]+:\d+)", process.stdout.readline())
        assert found is not None
        yield process.pid, found[1]
    finally:
        process.terminate()
        process.wait()


# ------------------------------------------------------------------------------------ throughput


async def saturate(addresses: list[str], state: Arrays, seconds: float) -> int:
    """Lane-steps that come back in so many seconds, with CLIENTS calls at a time."""
    rows, done, end = LANES // CLIENTS, 0, time.monotonic() + seconds
    part = {name: value[:rows] for name, value in state.items()}

    async def ask(number: int) -> None:
        nonlocal done
        async with AsyncClient(addresses[number % len(addresses)]) as client:
            seed = number
            while time.monotonic() < end:
                await client.rollout(part, horizon=HORIZON, seed=seed)
                done, seed = done + rows * HORIZON, seed + CLIENTS

    await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    return done


def cpu_of(pids: list[int]) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def window(work: Callable[[float], int], seconds: float, pids: list[int]) -> tuple[float, float]:
    """Lane-steps per second, and per CPU-second of these processes."""
    start, before = time.monotonic(), cpu_of(pids)
    done = work(seconds)
    return done / (time.monotonic() - start), done / (cpu_of(pids) - before)


def in_process(dreams: Dreams, state: Arrays) -> Callable[[float], int]:
    def work(seconds: float) -> int:
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            list(dreams.imagine([Imagine(HORIZON, state=state, seed=done)]))
            done += LANES * HORIZON
        return done

    return work


def through_actors(imaginers: list[Any], batch: Batch) -> Callable[[float], int]:
    """Each has a call waiting while it works on another, as in a run."""

    def work(seconds: float) -> int:
        given, done, end = ray.put((batch, None)), 0, time.monotonic() + seconds
        waiting = [[i.imagine.remote(given)[0] for _ in range(2)] for i in imaginers]
        while time.monotonic() < end:
            for calls, imaginer in zip(waiting, imaginers, strict=True):
                if ray.wait(calls[:1], timeout=0.001)[0]:
                    done += ray.get(calls.pop(0)).num_steps
                    calls.append(imaginer.imagine.remote(given)[0])
        for calls in waiting:
            ray.get(calls)
        return done

    return work


# --------------------------------------------------------------------------------------- latency


async def arrivals(address: str, state: Arrays, rate: float, seconds: float) -> list[float]:
    """Seconds that calls of one lane take which arrive at random, so many a second."""
    one, taken, source = {n: x[:1] for n, x in state.items()}, [], random.Random(0)
    async with AsyncClient(address) as client:

        async def ask(seed: int) -> None:
            start = time.perf_counter()
            await client.rollout(one, horizon=HORIZON, seed=seed)
            taken.append(time.perf_counter() - start)

        tasks, end, seed = [], time.monotonic() + seconds, 0
        while time.monotonic() < end:
            await asyncio.sleep(source.expovariate(rate))
            tasks.append(asyncio.create_task(ask(seed)))
            seed += 1
        await asyncio.gather(*tasks)
    return taken


def one_lane_seconds(dreams: Dreams, state: Arrays, num: int = 200) -> list[float]:
    one, taken = {name: value[:1] for name, value in state.items()}, []
    for seed in range(num):
        start = time.perf_counter()
        list(dreams.imagine([Imagine(HORIZON, state=one, seed=seed)]))
        taken.append(time.perf_counter() - start)
    return taken


def queued(alone: list[float], rate: float, seconds: float) -> list[float]:
    """Seconds that the same arrivals take where one process rolls them one after the other, without
    a network: waiting and rolling."""
    source, now, free = random.Random(0), 0.0, 0.0
    taken: list[float] = []
    while now < seconds:
        now += source.expovariate(rate)
        free = max(free, now) + alone[len(taken) % len(alone)]
        taken.append(free - now)
    return taken


# ------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dreamerv3:size1m")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, local_ray(200 * 2**20):
        run = Path(folder) / "run"
        settings, agent = write_run(run, given.model)
        dreams, steps = Dreams(agent), real_steps()
        state = start_states(dreams, steps)
        print(f"{given.model}, {LANES} lanes x {HORIZON} steps, {machine()}", flush=True)
        with server(run) as (pid, address):
            throughput(given, settings, dreams, steps, state, run, pid, address)
            latency(given, dreams, state, address)


def throughput(
    given: argparse.Namespace,
    settings: Config,
    dreams: Dreams,
    steps: Steps,
    state: Arrays,
    run: Path,
    pid: int,
    address: str,
) -> None:
    where = replicas.start(str(run), replicas.Serving(str(run), host="127.0.0.1", port=0), 2)
    store = actor(WeightStore, num_cpus=0).options(name=WEIGHTS).remote()
    sent = ray.put(arrays(dreams.agent.inference_state("world_model")))
    ray.get(store.publish.remote("agent", (0, 1), [sent]))
    imaginer = actor(ImaginerActor, num_cpus=0).remote(settings, dreams.agent.spaces, 0)
    batch = Batch.from_columns(steps.columns())
    ray.get(imaginer.ready.remote())
    family = psutil.Process().children(recursive=True)
    ports = {int(a.rpartition(":")[2]) for a in where}
    both = [p.pid for p in family if any(c.laddr.port in ports for c in p.net_connections())]
    imagining = [p.pid for p in family if "ImaginerActor" in " ".join(p.cmdline())]

    def asking(addresses: list[str]) -> Callable[[float], int]:
        return lambda seconds: asyncio.run(saturate(addresses, state, seconds))

    ways = {
        "in one process": (in_process(dreams, state), [os.getpid()]),
        "gRPC": (asking([address]), [pid]),
        "2 replicas": (asking(where), both),
        "1 imagination actor": (through_actors([imaginer], batch), imagining),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, (work, pids) in ways.items():
            got = window(work, given.seconds, pids)
            if number:  # the first round warms up
                found[name].append(got)
    replicas.stop(str(run))
    base_wall, base_cpu = (median(x) for x in zip(*found["in one process"], strict=True))
    print(f"{'way':<22}{'lane-steps/s':>14}{'ratio':>8}{'per CPU-s':>14}{'ratio':>8}")
    for name, results in found.items():
        wall, cpu = (median(x) for x in zip(*results, strict=True))
        print(
            f"{name:<22}{wall:>14,.0f}{wall / base_wall:>8.2f}{cpu:>14,.0f}{cpu / base_cpu:>8.2f}"
        )
    print(f"goal: gRPC at least {GOAL} of one process", flush=True)


def latency(given: argparse.Namespace, dreams: Dreams, state: Arrays, address: str) -> None:
    alone = one_lane_seconds(dreams, state)
    rate = LOAD / median(alone)
    taken = asyncio.run(arrivals(address, state, rate, 2 * given.seconds))
    wanted = queued(alone, rate, 2 * given.seconds)
    base = [1e3 * float(np.percentile(wanted, q)) for q in (50, 99)]
    ours = [1e3 * float(np.percentile(taken, q)) for q in (50, 99)]
    print(
        f"one lane at {LOAD:.0%} load ({rate:.0f} calls/s, {1e3 * median(alone):.1f} ms each): in "
        f"one process p50 {base[0]:.2f} ms, p99 {base[1]:.2f}; through gRPC p50 {ours[0]:.2f}, p99 "
        f"{ours[1]:.2f}: added "
        f"{ours[0] - base[0]:.2f} and {ours[1] - base[1]:.2f} (goals {GOALS_MS[0]}, {GOALS_MS[1]})"
    )


if __name__ == "__main__":
    main()

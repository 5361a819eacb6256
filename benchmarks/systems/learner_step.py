"""Gradient steps per second of the learners, and planned actions per second, next to peers.

    python benchmarks/systems/learner_step.py
    python benchmarks/systems/learner_step.py --task image --dtype bfloat16 --profile 20
    python benchmarks/systems/learner_step.py --task tdmpc2

DreamerV3: batches of 16 x 64, horizon 15, next to RLlib's learner at the same widths, which runs
here too. TD-MPC2: 256 windows of 4, 24 observed numbers, 6 actions, plans of 512 samples and 6
iterations, next to figures of the official implementation taken beforehand on two cores. Rates are
medians of 5 windows, one side after the other, each in a process of its own. No peer has reduced
precision: every ratio is against its float32. A profile of our step comes first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch.profiler import ProfilerActivity, profile

from peers.rllib_dreamerv3 import WIDTHS, rllib_step
from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.spaces import Spaces

Precision = Literal["float32", "bfloat16"]
ROWS, LENGTH, HORIZON = 16, 64, 15
STEPS_PER_WINDOW = 2
TASKS: dict[str, tuple[spaces.Box, spaces.Discrete]] = {
    "vector": (spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(2)),
    "image": (spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Discrete(6)),
}
# The official TD-MPC2, float32 on two cores: updates/s, then plans/s for one environment.
OFFICIAL = {"1m": (5.95, 3.90), "5m": (1.84, 1.42)}
PLAN_GOALS = {"float32": 2.0, "bfloat16": 3.0}
UPDATE_GOAL = 1.5
GOALS = {("vector", "float32"): 3.0, ("vector", "bfloat16"): 4.1, ("image", "float32"): 2.0}


def random_batch(
    observation: spaces.Box,
    action: spaces.Space,
    seed: int = 0,
    shape: tuple[int, int] = (ROWS, LENGTH),
) -> Batch:
    """A (B, T) batch of noise in which every row starts an episode."""
    rng = np.random.default_rng(seed)
    if observation.dtype == np.uint8:
        obs = rng.integers(256, size=(*shape, *observation.shape), dtype=np.uint8)
    else:
        obs = rng.normal(size=(*shape, *observation.shape)).astype(np.float32)
    is_first = np.zeros(shape, bool)
    is_first[:, 0] = True
    actions = Spaces(observation, action).random_action(rng, shape[0] * shape[1])
    actions = actions.reshape(*shape, -1)
    return Batch(
        obs={"obs": obs},
        action=actions * ~is_first[..., None],
        reward=rng.normal(size=shape).astype(np.float32) * ~is_first,
        is_first=is_first,
        is_last=np.zeros(shape, bool),
        is_terminal=np.zeros(shape, bool),
    )


def our_step(
    size: str, dtype: Precision, observation: spaces.Box, action: spaces.Discrete, threads: int
) -> tuple[Callable[[], object], int]:
    """One update of our learner as a function, and the number of trained parameters."""
    agent = Agent(f"dreamerv3:{size}", Spaces(observation, action))
    learner = Learner(agent, LearnerConfig(precision=dtype, threads=threads, device="cpu"))
    batch = random_batch(observation, action)
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    return lambda: learner.step(batch), trained


def median_rate(step: Callable[[], object], repeats: int) -> float:
    """Median calls per second of a function over windows, after one to warm up."""
    rates = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        for _ in range(STEPS_PER_WINDOW):
            step()
        rates.append(STEPS_PER_WINDOW / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def print_profile(step: Callable[[], object], rows: int) -> None:
    """Where one step's time goes: by phase, then the `rows` most costly operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        wall = 1e6 * (time.perf_counter() - start)
    events = profiler.key_averages()
    outer = [e for e in profiler.events() if e.cpu_parent is None]
    backward = sum(e.cpu_time_total for e in outer if e.name.startswith("autograd::engine"))
    optimizer = sum(e.cpu_time_total for e in events if e.key.startswith("Optimizer.step"))
    print(
        f"   forward {1 - (backward + optimizer) / wall:.0%}, backward {backward / wall:.0%}, "
        f"optimizer {optimizer / wall:.0%} of {wall / 1e6:.2f} s under the profiler"
    )
    own = sum(e.self_cpu_time_total for e in events)
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:rows]:
        share = event.self_cpu_time_total / own
        print(f"   {share:6.1%}  {event.count:6d} calls  {event.key}")


def measure(side: str, task: str, size: str, args: argparse.Namespace) -> tuple[float, int]:
    """Updates per second and parameters of one learner, in this process; prints its profile."""
    torch.set_num_threads(args.threads)
    observation, action = TASKS[task]
    if side == "RLlib float32":
        step, parameters = rllib_step(
            size, observation, action, random_batch(*TASKS[task]), HORIZON
        )
        return median_rate(step, args.repeats), parameters
    precision: Precision = "bfloat16" if side.endswith("bfloat16") else "float32"
    step, parameters = our_step(size, precision, observation, action, args.threads)
    rate = median_rate(step, args.repeats)
    if args.profile:
        print(f"   -- {task} {side}")
        print_profile(step, args.profile)
    return rate, parameters


def run(task: str, size: str, dtypes: list[Precision], args: argparse.Namespace) -> None:
    found = {}
    for side in ["RLlib float32", *(f"ours {dtype}" for dtype in dtypes)]:
        # A process of its own: each learner with the allocator and threads its users get.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[side] = pool.apply(measure, (side, task, size, args))
    base = found["RLlib float32"][0]
    for side, (rate, parameters) in found.items():
        goal = GOALS.get((task, side.removeprefix("ours "))) if size == "size1m" else None
        goal = None if side.startswith("RLlib") else goal
        verdict = f"  goal {goal}x {'met' if rate >= goal * base else 'missed'}" if goal else ""
        print(
            f"{task:7}{size:8}{side:15}{rate:8.3f} updates/s {parameters:12,d} parameters"
            f"{rate / base:7.2f}x RLlib{verdict}",
            flush=True,
        )


def measure_tdmpc2(size: str, dtype: Precision, args: argparse.Namespace) -> list[float]:
    """Updates/s, and plans/s for 1 and for 8 environments at once, in this process."""
    torch.set_num_threads(args.threads)
    observation = spaces.Box(-np.inf, np.inf, (24,), np.float32)
    action = spaces.Box(-1, 1, (6,), np.float32)
    # Without a termination head, as the official default for tasks that do not end.
    options = {"termination": "none"}
    spaces_ = Spaces(observation, action)
    agent = Agent(f"tdmpc2:{size}", spaces_, options, planner={"precision": dtype})
    learner = Learner(agent, LearnerConfig(precision=dtype, threads=args.threads, device="cpu"))
    batch = random_batch(observation, action, shape=(256, 4))

    def step() -> None:
        learner.step(batch)

    rates = [median_rate(step, args.repeats)]
    if args.profile:
        print(f"   -- tdmpc2:{size} {dtype} update")
        print_profile(step, args.profile)
    for num in (1, 8):
        obs = {"obs": np.random.default_rng(0).normal(size=(num, 24)).astype(np.float32)}
        is_first = np.zeros(num, bool)
        _, carry = agent.act_batch(obs, is_first)

        def act(obs: Any = obs, is_first: Any = is_first, carry: Any = carry) -> None:
            agent.act_batch(obs, is_first, carry)

        rates.append(num * median_rate(act, args.repeats))
        if args.profile and num == 1:
            print(f"   -- tdmpc2:{size} {dtype} plan")
            print_profile(act, args.profile)
    return rates


def run_tdmpc2(dtypes: list[Precision], args: argparse.Namespace) -> None:
    for size, (official_update, official_plan) in OFFICIAL.items():
        print(
            f"tdmpc2:{size}  official float32  {official_update:6.2f} updates/s "
            f"{official_plan:6.2f} plans/s (1 env), taken beforehand"
        )
        for dtype in dtypes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                update, plan, batched = pool.apply(measure_tdmpc2, (size, dtype, args))
            print(
                f"tdmpc2:{size}  ours {dtype:12}{update:7.2f} updates/s {plan:6.2f} plans/s "
                f"(1 env) {batched:6.2f} (8 envs)   update {update / official_update:.2f}x, goal "
                f"{UPDATE_GOAL}x; plan {plan / official_plan:.2f}x, goal {PLAN_GOALS[dtype]}x; "
                f"batched {batched / plan:.2f}x a plan alone",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = [*TASKS, "tdmpc2"]
    parser.add_argument("--task", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--size", choices=list(WIDTHS), default="size1m")
    dtypes = list(get_args(Precision))
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=int, default=8, metavar="ROWS", help="0 for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.threads} torch threads, "
        f"torch {torch.__version__}, medians of {args.repeats}"
    )
    for task in args.task:
        if task == "tdmpc2":
            run_tdmpc2(args.dtype, args)
        else:
            run(task, args.size, args.dtype, args)


if __name__ == "__main__":
    main()

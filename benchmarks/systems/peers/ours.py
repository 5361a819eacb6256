"""Our learners and our planner, with the settings of LearnerConfig that a run would have."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch.profiler import ProfilerActivity, profile

from peers.work import HORIZON, Arrays, Made, Task, Work, noise
from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.spaces import Spaces


def make(work: Work, profile_rows: int = 0, **learner: Any) -> Made:
    """A learner and, for TD-MPC2, a planner of one environment in the same precision.

    `learner` goes into LearnerConfig as it is. With `profile_rows` a profile of each measure is
    printed, so many operators long.
    """
    task = work.what
    config = LearnerConfig(device=work.device, threads=work.threads, **learner)
    torch.set_num_threads(work.threads)
    name, spaces_ = f"{task.family}:{work.size}", spaces_of(task)
    if task.family == "tdmpc2":
        # Without a termination head, as the official default for tasks that do not end.
        planner = {"precision": config.precision}
        agent = Agent(name, spaces_, {"termination": "none"}, planner=planner)
    else:
        agent = Agent(name, spaces_, behavior={"horizon": HORIZON})
    trained = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    step, batch = Learner(agent, config).step, as_batch(noise(task))
    calls: dict[str, Callable[[], object]] = {"update": lambda: step(batch)}
    if "plan" in task.measures:
        calls["plan"] = plan(agent, task)
    if profile_rows:
        for measure, call in calls.items():
            call()
            print(f"profile of {measure}, {work.task} {work.size} {config}", file=sys.stderr)
            print_profile(call, profile_rows)
    return Made(calls, trained)


def plan(agent: Agent, task: Task) -> Callable[[], object]:
    """Plans the next action of one environment, from the plan before."""
    obs = {"obs": np.random.default_rng(0).normal(size=(1, *task.obs_shape)).astype(np.float32)}
    is_first = np.zeros(1, bool)
    _, carry = agent.act_batch(obs, is_first)
    return lambda: agent.act_batch(obs, is_first, carry)


def spaces_of(task: Task) -> Spaces:
    """A task's spaces."""
    observation = (
        spaces.Box(0, 255, task.obs_shape, np.uint8)
        if task.is_image
        else spaces.Box(-np.inf, np.inf, task.obs_shape, np.float32)
    )
    if task.continuous:
        return Spaces(observation, spaces.Box(-1, 1, (task.num_actions,), np.float32))
    return Spaces(observation, spaces.Discrete(task.num_actions))


def as_batch(arrays: Arrays) -> Batch:
    """The noise as replay gives it to learners."""
    return Batch(obs={"obs": arrays["obs"]}, **{k: v for k, v in arrays.items() if k != "obs"})


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
        f"optimizer {optimizer / wall:.0%} of {wall / 1e6:.2f} s under the profiler",
        file=sys.stderr,
    )
    own = sum(e.self_cpu_time_total for e in events)
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:rows]:
        share = event.self_cpu_time_total / own
        print(f"   {share:6.1%}  {event.count:6d} calls  {event.key}", file=sys.stderr)

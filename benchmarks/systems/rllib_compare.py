"""The algorithm under RLlib next to RLlib's own DreamerV3: its runner, its update, its training.

    python benchmarks/systems/rllib_compare.py
    python benchmarks/systems/rllib_compare.py --quick --env CartPole-v1
    python benchmarks/systems/rllib_compare.py --size size12m --repeat 5
    python benchmarks/systems/rllib_compare.py --env CartPole-v1 --compile

Both sides are algorithms as RLlib builds them, with a local env runner and a local learner, each in
a process of its own, at equal widths (peers/rllib_dreamerv3.py), horizon and batches. Figures are
medians over repetitions, taken in turn, one side and then the other. The machine must have nothing
else to do: threads that wait for each other lose more than half of their speed beside other work:

- runner: env steps per CPU-second of the process in `algo.env_runner.sample` with the model acting,
  1 torch thread. Both are asked for 64 steps of every environment at a time, which favours RLlib:
  its algorithm asks for one. RLlib's Pong is wrapped by its own `wrap_atari_for_new_api_stack`,
  which needs OpenCV (pip install opencv-python-headless); without it Pong is left out and said.
- update: updates per second of the learner group, 2 torch threads, on a batch out of the side's own
  replay, sampled beforehand.
- train: wall-clock seconds per 1,000 env steps of `algo.train()`, 2 torch threads, with replay and
  weights, after replay was filled; env steps are rows of replay here, resets included. RLlib takes
  at least one update for each step of all its environments, however low a ratio it is asked for; it
  is asked for just that, and each repetition of ours is given the ratio RLlib's turned out to have.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import ale_py
import gymnasium
import numpy as np
import ray
import torch
from ray import tune

from peers.work import WIDTHS
from setting.local_ray import MB, ONCE, local_ray, machine
from worldflux_dist.distributed.roles import actor
from worldflux_dist.replay.limiter import Limiter
from worldflux_dist.rllib.learner import WorldFluxLearner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # RLlib makes environments while it is imported
    from ray.rllib.algorithms.dreamerv3 import DreamerV3Config
    from ray.rllib.core import DEFAULT_MODULE_ID
    from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack
    from ray.rllib.policy.sample_batch import SampleBatch
    from ray.rllib.utils.numpy import one_hot

    from peers.rllib_dreamerv3 import set_widths
    from worldflux_dist.rllib import WorldFluxConfig

OPENCV = "opencv-python-headless"
ENVS = ("CartPole-v1", "ALE/Pong-v5")
HORIZON = 15
RUNNER_THREADS, LEARNER_THREADS = 1, 2
SAMPLE_STEPS = 64  # of every environment, in one call of a runner
CHUNK_STEPS = 4  # of every environment, in one iteration of ours: RLlib's are as short
GOALS = {"runner": 3.0, "update": 2.5}
UNITS = {"runner": "env steps/CPU-s", "update": "updates/s", "train": "s/1,000 env steps"}


@dataclass(frozen=True)
class Task:
    """What both sides do, and how much of it in one repetition."""

    env: str
    num_envs: int
    size: str
    rows: int
    length: int
    train_steps: int  # env steps
    updates: int
    samples: int  # calls of the runner
    compiled: bool  # our learner, by torch.compile

    @property
    def batch_steps(self) -> int:
        return self.rows * self.length


class Trained(NamedTuple):
    """What one repetition of training was."""

    env_steps: int
    replayed: int
    seconds: float


class Side(ABC):
    """Owns one algorithm, which acts and learns in this process, with replay filled."""

    def __init__(self, task: Task, config: Any) -> None:
        self.task = task
        self.algo = config.learners(num_learners=0).build_algo()
        module: Any = self.algo.learner_group._learner.module[DEFAULT_MODULE_ID]
        self._parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)

    @abstractmethod
    def _counts(self) -> tuple[int, int]:
        """Env steps in replay, resets among them, and steps replayed so far."""

    @abstractmethod
    def _one_update(self) -> Callable[[], object]:
        """An update through the learner group, on one batch of replay, as a function."""

    def parameters(self) -> int:
        """Trained parameters; what follows others slowly is not counted."""
        return self._parameters

    def train(self) -> Trained:
        """Iterations until the env steps of a repetition are taken."""
        torch.set_num_threads(LEARNER_THREADS)
        before, start = np.array(self._counts()), time.perf_counter()
        env_steps = replayed = 0
        while env_steps < self.task.train_steps:
            self.algo.train()
            env_steps, replayed = (np.array(self._counts()) - before).tolist()
        return Trained(env_steps, replayed, time.perf_counter() - start)

    def update(self) -> float:
        """Updates per second."""
        torch.set_num_threads(LEARNER_THREADS)
        update = self._one_update()
        start = time.perf_counter()
        for _ in range(self.task.updates):
            update()
        return self.task.updates / (time.perf_counter() - start)

    def runner(self) -> float:
        """Env steps per CPU-second, resets left out. The steps go nowhere: train no more."""
        torch.set_num_threads(RUNNER_THREADS)
        runner, taken = self.algo.env_runner, 0
        start = time.process_time()
        for _ in range(self.task.samples):
            found = runner.sample(num_timesteps=self.task.num_envs * SAMPLE_STEPS, explore=True)
            taken += sum(part.env_steps() for part in found)
            runner.get_metrics()  # as after every call of an algorithm
        return taken / (time.process_time() - start)

    def stop(self) -> None:
        """End the algorithm and delete its log directory."""
        self.algo.stop()
        shutil.rmtree(self.algo.logdir)


class Ours(Side):
    def __init__(self, task: Task) -> None:
        config = (
            WorldFluxConfig(model=f"dreamerv3:{task.size}")
            .environment(task.env)
            .env_runners(num_envs_per_env_runner=task.num_envs, rollout_fragment_length=CHUNK_STEPS)
            .training(
                behavior={"horizon": HORIZON},
                replay={"batch_size": task.rows, "batch_length": task.length},
                learner={
                    "precision": "float32",
                    "threads": LEARNER_THREADS,
                    "compile": task.compiled,
                },
                train_ratio=task.batch_steps / task.num_envs,
                prefill=0,
            )
            .reporting(min_sample_timesteps_per_iteration=0)
        )
        super().__init__(task, config)
        steps = 0
        # Past the limiter, which would have these steps replayed at once.
        while steps < task.batch_steps:
            report, _ = self.algo.env_runner.collect(self.algo.store, self.algo.replay.shards)
            steps += report.env_steps
        self.algo.learners.shards.ask()

    def set_ratio(self, ratio: float) -> None:
        """Go on at another ratio, as a run does that is resumed with one."""
        limiter = Limiter(ratio, self.task.batch_steps, prefill=0)
        limiter.load_state_dict(self.algo.limiter.state_dict())
        self.algo.limiter = self.algo.flow.limiter = limiter

    def _counts(self) -> tuple[int, int]:
        limiter = self.algo.limiter
        return limiter.env_steps, limiter.gradient_steps * limiter.batch_steps

    def _one_update(self) -> Callable[[], object]:
        _, sampled = self.algo.replay.shards[0].sample.remote(self.task.rows)
        group, batch = self.algo.learner_group, ray.get(sampled)

        def update(learner: WorldFluxLearner) -> None:
            learner.begin(0, batch)
            learner.finish()

        return lambda: group.foreach_learner(update)


class Rllib(Side):
    def __init__(self, task: Task) -> None:
        set_widths(task.size)
        env = task.env
        if env.startswith("ALE/"):  # ours makes 64x64 RGB of it by itself
            env = "atari-64x64"
            tune.register_env(env, lambda _: _rllib_atari(task.env))
        config = (
            DreamerV3Config()
            .environment(env)
            .env_runners(num_env_runners=0, num_envs_per_env_runner=task.num_envs)
            .training(
                batch_size_B=task.rows,
                batch_length_T=task.length,
                horizon_H=HORIZON,
                training_ratio=task.batch_steps / task.num_envs,
            )
        )
        super().__init__(task, config)
        self.algo.train()  # fills replay first

    def _counts(self) -> tuple[int, int]:
        buffer = self.algo.replay_buffer
        env_steps = buffer.get_added_timesteps() + buffer.get_num_episodes()
        return env_steps, buffer.get_sampled_timesteps()

    def _one_update(self) -> Callable[[], object]:
        sample = self.algo.replay_buffer.sample(
            batch_size_B=self.task.rows, batch_length_T=self.task.length
        )
        num_actions = self.algo.env_runner.env.single_action_space.n
        sample["actions"] = one_hot(sample["actions"], depth=num_actions)
        batch = SampleBatch(sample).as_multi_agent()
        return lambda: self.algo.learner_group.update(batch=batch)


def _rllib_atari(env: str) -> gymnasium.Env:
    gymnasium.register_envs(ale_py)
    made = gymnasium.make(env, frameskip=1, repeat_action_probability=0.0)
    return wrap_atari_for_new_api_stack(made, dim=64, frameskip=4, grayscale=False)


def measure(task: Task, repeat: int) -> tuple[dict[str, dict[str, list[Any]]], dict[str, int]]:
    """Both sides' figures by repetition, and their numbers of parameters."""
    sides = {"RLlib": actor(Rllib, **ONCE).remote(task), "ours": actor(Ours, **ONCE).remote(task)}
    counts = {name: ray.get(side.parameters.remote()) for name, side in sides.items()}
    found: dict[str, dict[str, list[Any]]] = {}
    for figure in ("train", "update", "runner"):
        found[figure] = {name: [] for name in sides}
        for run in range(-1, repeat):  # the first one warms up
            for name, side in sides.items():
                value = ray.get(getattr(side, figure).remote())
                if figure == "train" and name == "RLlib":
                    ray.get(sides["ours"].set_ratio.remote(_ratio([value])))
                if run >= 0:
                    found[figure][name].append(value)
    ray.get([side.stop.remote() for side in sides.values()])
    return found, counts


def compare(task: Task, repeat: int) -> None:
    """Measure both sides on one environment and print the table."""
    found, counts = measure(task, repeat)
    ratios = {name: _ratio(parts) for name, parts in found["train"].items()}
    found["train"] = {
        name: [1000 * part.seconds / part.env_steps for part in parts]
        for name, parts in found["train"].items()
    }
    print(
        f"\n{task.env}, {task.num_envs} envs, {task.size}, batches of {task.rows} x {task.length}: "
        f"{counts['ours']:,d} parameters, RLlib {counts['RLlib']:,d}; "
        f"replayed {ratios['ours']:.1f} steps per env step, RLlib {ratios['RLlib']:.1f}"
    )
    print(f"{'':10}{'ours':>10}{'RLlib':>10}  {'':19}{'ratio':>6}{'goal':>6}")
    for figure, unit in UNITS.items():
        ours, rllib = median(found[figure]["ours"]), median(found[figure]["RLlib"])
        times = rllib / ours if figure == "train" else ours / rllib
        goal = GOALS.get(figure)
        verdict = f"{goal:6.1f}  {'met' if times >= goal else 'missed'}" if goal else f"{'-':>6}"
        print(f"{figure:10}{ours:10,.2f}{rllib:10,.2f}  {unit:19}{times:6.2f}{verdict}", flush=True)


def _ratio(parts: list[Trained]) -> float:
    return sum(part.replayed for part in parts) / sum(part.env_steps for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=ENVS, default=ENVS)
    parser.add_argument("--size", choices=list(WIDTHS), default="size1m")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small batches: about a minute")
    parser.add_argument("--compile", action="store_true", help="our learner; takes minutes first")
    args = parser.parse_args()
    amounts = (8, 16, 64, 4, 1) if args.quick else (16, 64, 64, 4, 2)
    with local_ray(256 * MB):
        print(
            f"{machine()}, torch {torch.__version__}, {LEARNER_THREADS} threads in learners and "
            f"{RUNNER_THREADS} in runners, medians of {args.repeat}"
        )
        for env in args.env:
            if env.startswith("ALE/") and not importlib.util.find_spec("cv2"):
                print(f"\n{env} not run: RLlib's wrapper needs OpenCV: pip install {OPENCV}")
                continue
            compare(Task(env, args.num_envs, args.size, *amounts, args.compile), args.repeat)
        print(f"afterwards: {machine()}")


if __name__ == "__main__":
    main()

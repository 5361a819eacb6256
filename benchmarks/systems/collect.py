"""What collecting costs on top of the emulator: Atari steps delivered into replay.

Random actions in both. Ours: EnvRunner, chunks of 64 and ReplayBuffer.add; the limit: the bare
AtariVectorEnv stepped in a loop, measured in turn with ours in the same run. Figures are env steps
per CPU-second of this process, medians over the runs.
Run: python benchmarks/systems/collect.py [--game ALE/Pong-v5] [--runs 7] [--steps 512]
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode

from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.replay import ReplayBuffer, ReplayConfig
from worldflux_dist.runner import EnvRunner

GOAL = 0.85
NUM_ENVS, CHUNK = 8, 64


def bare(config: EnvConfig) -> AtariVectorEnv:
    """The same protocol without anything of ours."""
    return AtariVectorEnv(
        gymnasium.spec(config.id).kwargs["game"],
        NUM_ENVS,
        num_threads=1,
        autoreset_mode=AutoresetMode.NEXT_STEP,
        img_height=config.image_size,
        img_width=config.image_size,
        grayscale=config.grayscale,
        stack_num=1,
        frameskip=config.frame_skip,
        noop_max=config.noop_max,
        repeat_action_probability=config.repeat_action_probability,
        reward_clipping=False,
        use_fire_reset=False,
        maxpool=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--game", default="ALE/Pong-v5")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=512, help="of every environment and run")
    args = parser.parse_args()
    print(f"{args.game}, {NUM_ENVS} envs, load {os.getloadavg()[0]:.1f}, medians of {args.runs}")
    for gray, size in ((False, 64), (True, 84)):
        config = EnvConfig(id=args.game, num_envs=NUM_ENVS, grayscale=gray, image_size=size)
        env = bare(config)
        env.reset(seed=0)
        envs = make_envs(config, 0)
        runner = EnvRunner(envs, random_act(envs.spaces, 0))
        replay = ReplayBuffer(ReplayConfig(capacity=50_000))
        rng = np.random.default_rng(0)
        num_actions = envs.spaces.action_dim
        rates: dict[str, list[float]] = {"bare": [], "ours": []}
        for run in range(-1, args.runs):  # the first one warms up
            start = time.process_time()
            for _ in range(args.steps):
                env.step(rng.integers(num_actions, size=NUM_ENVS))
            middle = time.process_time()
            for _ in range(args.steps // CHUNK):
                replay.add(runner.collect(CHUNK))
            end = time.process_time()
            if run >= 0:
                rates["bare"].append(NUM_ENVS * args.steps / (middle - start))
                rates["ours"].append(NUM_ENVS * args.steps / (end - middle))
        limit, ours = median(rates["bare"]), median(rates["ours"])
        verdict = "met" if ours >= GOAL * limit else "missed"
        print(
            f"{size}x{size} {'gray' if gray else 'RGB '}: {ours:,.0f} env steps/CPU-s into replay, "
            f"bare env {limit:,.0f}, ratio {ours / limit:.2f} (goal {GOAL}: {verdict})"
        )


if __name__ == "__main__":
    main()

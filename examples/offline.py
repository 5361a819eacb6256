"""Learn from a record alone: a world model and a policy in it, from 90 episodes that something else
played. The environment is used to record them and, now and then, to see how the policy does.

python examples/offline.py                              # minutes, on one core
python examples/offline.py --model dreamerv3:tiny
"""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

import numpy as np
import torch

from worldflux_dist.agent import Agent
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.evaluate import evaluate
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig
from worldflux_dist.runner import EnvRunner

ENV, LANES, STEPS = EnvConfig("CartPole-v1"), 16, 400


def player(seed: int) -> Any:
    """Pushes to where the pole falls, but for a share of random pushes, from a fifth to all."""
    rng, share = np.random.default_rng(seed), np.linspace(0.2, 1, LANES)

    def act(obs: dict[str, np.ndarray], is_first: np.ndarray, carry: Any) -> Any:
        falls = obs["obs"][:, 2] + 0.2 * obs["obs"][:, 3] > 0
        right = np.where(rng.random(LANES) < share, rng.random(LANES) < 0.5, falls)
        return np.eye(2, dtype=np.float32)[right.astype(int)], carry

    return act


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn CartPole from a record alone.")
    parser.add_argument("--model", default="diffusion:dreamer4_tiny")
    parser.add_argument("--steps", type=int, default=1500, help="gradient steps")
    parser.add_argument("--every", type=int, default=250, help="gradient steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    replay = ReplayBuffer(ReplayConfig(batch_size=8, batch_length=16, capacity=10_000), args.seed)
    with closing(make_envs(ENV, args.seed, num_envs=LANES)) as envs:
        spaces, runner = envs.spaces, EnvRunner(envs, player(args.seed))
        replay.add(runner.collect(STEPS))
    returns = [episode.total_reward for episode in runner.take_episodes()]
    print(f"record: {np.mean(returns):.0f} in {len(returns)} episodes, at most {max(returns):.0f}")
    print("random:", evaluate(None, ENV, 20, args.seed + 1), flush=True)

    agent = Agent(args.model, spaces, behavior={"horizon": 10})
    learner = Learner(agent, LearnerConfig(device="cpu"))
    for step in range(1, args.steps + 1):
        metrics = learner.step(replay.sample())
        if step % args.every == 0:
            found = evaluate(agent, ENV, 10, args.seed + 1)
            print(f"{step} gradient steps: {found}, loss {metrics['loss']:.3g}", flush=True)


if __name__ == "__main__":
    main()

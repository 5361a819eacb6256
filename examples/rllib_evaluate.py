"""Evaluate a checkpoint, and act with it by hand. Without one, a small one is trained first.

python examples/rllib_evaluate.py
python examples/rllib_evaluate.py --checkpoint runs/pong     # what rllib_pong.py saved
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from worldflux_dist.envs import make_envs
from worldflux_dist.rllib import WorldFluxConfig


def train_small(train_ratio: float, iterations: int) -> str:
    """The path of a checkpoint from `iterations` times 1,000 env steps in CartPole."""
    config = (
        WorldFluxConfig(model="dreamerv3:tiny")
        .environment("CartPole-v1")
        .env_runners(num_env_runners=1, num_envs_per_env_runner=4, rollout_fragment_length=16)
        .training(
            train_ratio=train_ratio, prefill=512, replay={"batch_size": 8, "batch_length": 32}
        )
    )
    algo = config.build_algo()
    for _ in range(iterations):
        result = algo.train()
        print("trained:", result["env_runners"]["episode_return_mean"], flush=True)
    path: str = algo.save_to_path(tempfile.mkdtemp())
    algo.stop()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate a checkpoint and act with it.")
    parser.add_argument("--checkpoint", type=Path, help="default: a small one is trained")
    parser.add_argument("--train-ratio", type=float, default=32, help="of the small one")
    parser.add_argument("--stop-iters", type=int, default=4, help="of the small one")
    args = parser.parse_args()
    checkpoint = Path(args.checkpoint or train_small(args.train_ratio, args.stop_iters)).resolve()

    # The whole algorithm, as it was saved: it can go on training, or be evaluated.
    algo = Algorithm.from_checkpoint(str(checkpoint))
    evaluation = algo.evaluate()["env_runners"]
    mean, num = evaluation["episode_return_mean"], evaluation["num_episodes"]
    print(f"evaluated: {mean} in {num} episodes")
    env_settings = algo.config.settings().env
    algo.stop()

    # The module alone needs no Ray. Acting has a memory: what comes out goes in at the next step.
    module = RLModule.from_checkpoint(
        checkpoint / "learner_group" / "learner" / "rl_module" / "default_policy"
    )
    # One copy of the environment that was trained in, behind Gymnasium's vector interface.
    env = make_envs(env_settings, seed=0, num_envs=1).vector
    state = {name: value[None] for name, value in module.get_initial_state().items()}
    obs, _ = env.reset(seed=0)
    total, steps, done = 0.0, 0, False
    while not done:
        out = module.forward_inference({Columns.OBS: obs, Columns.STATE_IN: state})
        state = out[Columns.STATE_OUT]
        obs, reward, terminated, truncated, _ = env.step(out[Columns.ACTIONS].numpy())
        total, steps, done = total + reward[0], steps + 1, terminated[0] or truncated[0]
    print("by hand:", total, "in", steps, "steps")


if __name__ == "__main__":
    main()

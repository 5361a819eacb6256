"""Train on Atari Pong from pixels, with as many processes of each kind as you ask for.

    python examples/rllib_pong.py                                  # any laptop, for a night
    python examples/rllib_pong.py --model dreamerv3:size12m --num-env-runners 4 --num-learners 2 \
        --num-gpus-per-learner 1 --num-replay-shards 4             # a machine with two GPUs
    python examples/rllib_pong.py --num-learners 1 --num-imagination-actors 2    # five CPUs

With imagination actors, the policy learns in processes of its own, on what they imagine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from worldflux_dist.rllib import WorldFluxConfig


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a world model on ALE/Pong-v5.")
    parser.add_argument("--model", default="dreamerv3:size1m", help="family:preset")
    parser.add_argument("--num-env-runners", type=int, default=1)
    parser.add_argument("--num-learners", type=int, default=0, help="0 learns in this process")
    parser.add_argument("--num-gpus-per-learner", type=float, default=0)
    parser.add_argument("--num-replay-shards", type=int, default=1)
    parser.add_argument("--num-imagination-actors", type=int, default=0)
    parser.add_argument("--train-ratio", type=float, default=32, help="replayed per env step")
    parser.add_argument("--stop-env-steps", type=int, default=400_000)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/pong"))
    args = parser.parse_args()

    config = (
        WorldFluxConfig(model=args.model)
        .environment("ALE/Pong-v5", env_config={"image_size": 64, "frame_skip": 4})
        .env_runners(num_env_runners=args.num_env_runners, num_envs_per_env_runner=8)
        .learners(num_learners=args.num_learners, num_gpus_per_learner=args.num_gpus_per_learner)
        .training(
            train_ratio=args.train_ratio,
            replay={"batch_size": 16, "batch_length": 64, "capacity": 400_000},
            num_replay_shards=args.num_replay_shards,
            num_imagination_actors=args.num_imagination_actors,
        )
    )
    algo = config.build_algo()
    env_steps = 0
    while env_steps < args.stop_env_steps:
        result = algo.train()
        env_steps = result["num_env_steps_sampled_lifetime"]
        runners = result["env_runners"]
        returns = runners["episode_return_mean"]  # nan until a game has ended, in 1,000 steps or so
        speed = runners["num_env_steps_sampled_lifetime_throughput"]["throughput_since_last_reduce"]
        print(
            f"env_steps {env_steps:.0f}  episode_return_mean {returns}  "
            f"train_ratio {result['train_ratio']['achieved']:.2f}  env_steps/s {speed:.0f}",
            flush=True,
        )
    print("checkpoint:", algo.save_to_path(args.checkpoint.resolve()))
    algo.stop()


if __name__ == "__main__":
    main()

"""Compare two families of world model with Tune; ASHA stops early whatever falls behind.

    python examples/rllib_tune.py
    python examples/rllib_tune.py --env Acrobot-v1 --models dreamerv3:tiny dreamerv3:size1m

All that `.training` takes may be searched over. A trial takes one CPU here; Tune runs as many at
once as there is room for.
"""

from __future__ import annotations

import argparse

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from worldflux_dist.rllib import WorldFluxConfig

STEPS, RETURN = "num_env_steps_sampled_lifetime", "env_runners/episode_return_mean"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune over families of world models.")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--models", nargs="+", default=["dreamerv3:tiny", "tdmpc2:tiny"])
    parser.add_argument("--train-ratio", type=float, default=32, help="replayed per env step")
    parser.add_argument("--stop-env-steps", type=int, default=8000)
    args = parser.parse_args()

    config = (
        WorldFluxConfig()
        .environment(args.env)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8, rollout_fragment_length=16)
        .training(
            model=tune.grid_search(args.models),
            train_ratio=args.train_ratio,
            prefill=512,
            replay={"batch_size": 32, "batch_length": 8},
        )
    )
    tuner = tune.Tuner(
        "WorldFlux",  # registered by the import above
        param_space=config,
        tune_config=tune.TuneConfig(
            scheduler=ASHAScheduler(
                time_attr=STEPS,
                metric=RETURN,
                mode="max",
                grace_period=args.stop_env_steps // 4,
                max_t=args.stop_env_steps,
            )
        ),
        run_config=tune.RunConfig(
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True), verbose=1
        ),
    )
    results = tuner.fit()
    for result in results:
        print(result.config["world_model"], result.metrics["env_runners"]["episode_return_mean"])
    best = results.get_best_result(RETURN, mode="max")
    print("best:", best.config["world_model"], "in", best.checkpoint.path)


if __name__ == "__main__":
    main()

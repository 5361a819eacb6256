"""Your own environment, with a Dict observation and a MultiDiscrete action, and a callback.

    python examples/rllib_custom_env.py

Nothing has to be flattened or wrapped: see the README for all spaces. The callback sees every
episode and logs a number of it, which comes out beside RLlib's own.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
from ray import tune
from ray.rllib.callbacks.callbacks import RLlibCallback

from worldflux_dist.rllib import WorldFluxConfig


class Home(gym.Env):
    """Keep two rooms at 21 degrees for a day, at little cost: night is cold and so is `outside`."""

    observation_space = gym.spaces.Dict(
        rooms=gym.spaces.Box(-50.0, 50.0, (2,)), hour=gym.spaces.Discrete(24)
    )
    action_space = gym.spaces.MultiDiscrete([3, 3])  # each room's heating: off, low, high

    def __init__(self, outside: float = 5.0) -> None:
        self.outside = outside

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.rooms, self.hour = self.np_random.uniform(10, 25, 2), 0
        return self.obs(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self.hour += 1
        outside = self.outside + 5 * np.sin(2 * np.pi * (self.hour - 8) / 24)
        self.rooms = self.rooms + 2.5 * action - 0.15 * (self.rooms - outside)
        wrong = np.abs(self.rooms - 21).mean()
        reward = float(-0.1 * wrong - 0.05 * action.sum())
        # A day's end is no reason why nothing should follow: truncated, not terminated.
        return self.obs(), reward, False, self.hour == 23, {"comfortable": bool(wrong < 2)}

    def obs(self) -> dict[str, Any]:
        return {"rooms": self.rooms.astype(np.float32), "hour": self.hour}


class Comfort(RLlibCallback):
    """Logs how many hours of each day were comfortable."""

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **kwargs: Any) -> None:
        hours = sum(info.get("comfortable", False) for info in episode.get_infos())
        metrics_logger.log_value("comfortable_hours", hours, reduce="mean", window=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train in an environment of one's own.")
    parser.add_argument("--model", default="dreamerv3:tiny", help="family:preset")
    parser.add_argument("--train-ratio", type=float, default=32, help="replayed per env step")
    parser.add_argument("--stop-iters", type=int, default=10, help="of 1,000 env steps each")
    args = parser.parse_args()

    tune.register_env("home", lambda env_config: Home(**env_config))
    config = (
        WorldFluxConfig(model=args.model)
        .environment("home", env_config={"outside": 2.0})
        .env_runners(num_env_runners=1, num_envs_per_env_runner=4, rollout_fragment_length=16)
        .training(
            train_ratio=args.train_ratio, prefill=512, replay={"batch_size": 8, "batch_length": 32}
        )
        .callbacks(Comfort)
    )
    algo = config.build_algo()
    for _ in range(args.stop_iters):
        found = algo.train()["env_runners"]
        print(
            f"env_steps {found['num_env_steps_sampled_lifetime']:.0f}  "
            f"episode_return_mean {found['episode_return_mean']:.2f}  "
            f"comfortable_hours {found['comfortable_hours']:.1f}",
            flush=True,
        )
    algo.stop()


if __name__ == "__main__":
    main()

"""RLlib's PPO, learned in a world model and in nothing else: not one real step.

worldflux-dist train configs/diffusion_tiny.yaml train.env_steps=9900 --run-dir runs/cartpole
python examples/dream_rllib.py runs/cartpole CartPole-v1
"""

import os
import sys

os.environ.setdefault("RAY_AUTH_MODE", "token")

import gymnasium as gym
import numpy as np
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune import register_env

from worldflux_dist.serve import DreamEnv

ITERATIONS, EPISODES = 30, 20


def dream(settings):
    torch.set_num_threads(1)
    return DreamEnv(**settings)


ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
register_env("dream", dream)
algo = (
    PPOConfig()
    .environment("dream", env_config={"source": os.path.abspath(sys.argv[1]), "horizon": 50})
    .env_runners(num_env_runners=1, num_envs_per_env_runner=16)
    .training(
        lr=1e-3, gamma=0.99, train_batch_size_per_learner=2048, num_epochs=6, minibatch_size=256
    )
    .debugging(seed=0)
    .build_algo()
)
for iteration in range(ITERATIONS):
    result = algo.train()
    if iteration % 5 == 4:
        dreamt = result["env_runners"]["episode_return_mean"]
        print(f"iteration {iteration + 1}: return {dreamt:.1f} in the dream", flush=True)

module, env, returns = algo.get_module(), gym.make(sys.argv[2]), []
for episode in range(EPISODES):
    (obs, _), total, done = env.reset(seed=1000 + episode), 0.0, False
    while not done:
        with torch.no_grad():
            seen = {"obs": torch.tensor(obs[None])}
            logits = module.forward_inference(seen)["action_dist_inputs"]
        obs, reward, ended, cut, _ = env.step(int(logits.argmax()))
        total, done = total + reward, ended or cut
    returns.append(total)
print(f"real return: {np.mean(returns):.1f} +- {np.std(returns):.1f} over {EPISODES} episodes")
algo.stop()
ray.shutdown()

"""RLlib's PPO, learned in a world model and in nothing else: not one real step.

    worldflux-dist train configs/diffusion_tiny.yaml train.env_steps=9900 train.train_ratio=64 \
        --run-dir runs/cartpole
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
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

ITERATIONS, EPISODES = 60, 20

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
config = (
    PPOConfig()
    .environment(
        "worldflux_dist.serve:worldflux/Dream-v0",
        env_config={"source": os.path.abspath(sys.argv[1]), "horizon": 50},
    )
    # Its 64 dreams are rolled together.
    .env_runners(
        num_env_runners=1,
        num_envs_per_env_runner=64,
        gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
    )
    .training(lr=1e-3, gamma=0.99, lambda_=0.95, train_batch_size_per_learner=4096)
    .training(num_epochs=4, minibatch_size=512, entropy_coeff=0.01)
    .training(vf_clip_param=1e4)  # values are up to 1 / (1 - gamma), and RLlib's 10 would cut them
    .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64], vf_share_layers=False))
    .debugging(seed=0)
)
algo = config.build_algo()
for iteration in range(ITERATIONS):
    result = algo.train()
    if iteration % 10 == 9:
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

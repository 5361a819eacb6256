"""PPO in plain PyTorch, learned in a served world model and in nothing else: not one real step.

    worldflux-dist train configs/diffusion_tiny.yaml train.env_steps=9900 train.train_ratio=64 \
        --run-dir runs/cartpole
    worldflux-dist serve runs/cartpole &
    python examples/dream_ppo.py 127.0.0.1:50051 CartPole-v1

The policy sees what the model draws, so that it acts in the real environment as it is.
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from worldflux_dist.serve import Client

LANES, LENGTH, UPDATES, LIMIT, GAMMA, LAMBDA = 64, 64, 60, 50, 0.99, 0.95
torch.manual_seed(0)
torch.set_num_threads(1)
client = Client(sys.argv[1])
served = client.model()
num_obs, num_actions = served.spaces.obs["obs"].shape[0], served.spaces.action_dim
net = nn.ModuleList(
    nn.Sequential(nn.Linear(num_obs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n))
    for n in (num_actions, 1)
)
optimizer = torch.optim.Adam(net.parameters(), 1e-3)


def starts(num, seed):
    found = client.rollout(from_replay=num, horizon=0, seed=seed, heads=("obs", "state"))
    return found.obs["obs"][0], found.state


obs, state = starts(LANES, 0)
age, numbers = np.zeros(LANES, int), np.random.default_rng(0)
for update in range(UPDATES):
    kept = {name: [] for name in ("obs", "action", "log_prob", "value", "reward", "going", "cut")}
    for t in range(LENGTH):
        seen = torch.tensor(obs)
        with torch.no_grad():
            policy, value = torch.distributions.Categorical(logits=net[0](seen)), net[1](seen)[:, 0]
        action = policy.sample()
        seed = 1 + update * LENGTH + t
        flat = np.eye(num_actions, dtype=np.float32)[action]
        rolled = client.rollout(
            state, flat[None], seed=seed, heads=("obs", "reward", "continue", "state")
        )
        obs, state, age = rolled.obs["obs"][1].copy(), rolled.state, age + 1
        going = numbers.random(LANES) < rolled.continues[0] / served.discount
        cut = ~going | (age >= LIMIT)
        reward = (1 - GAMMA) * rolled.rewards[0]
        values = (seen, action, policy.log_prob(action), value, reward, going, cut)
        for name, each in zip(kept, values, strict=True):
            kept[name].append(torch.tensor(np.asarray(each)))
        if cut.any():
            fresh, anew = starts(int(cut.sum()), seed)
            obs[cut], age[cut] = fresh, 0
            state = {n: x.copy() for n, x in state.items()}
            for name in state:
                state[name][cut] = anew[name]
    batch = {name: torch.stack(each) for name, each in kept.items()}  # (LENGTH, LANES, ...)
    with torch.no_grad():
        after = torch.cat([batch["value"][1:], net[1](torch.tensor(obs))[None, :, 0]])
    advantage, running = torch.zeros_like(after), torch.zeros(LANES)
    for t in reversed(range(LENGTH)):  # where an episode was cut its own value stands for the next
        after[t] = torch.where(batch["cut"][t], batch["value"][t], after[t])
        delta = batch["reward"][t] + GAMMA * batch["going"][t] * after[t] - batch["value"][t]
        running = delta + GAMMA * LAMBDA * ~batch["cut"][t] * running
        advantage[t] = running
    target = (advantage + batch["value"]).flatten()
    flat = {name: value.flatten(0, 1) for name, value in batch.items()}
    gain = ((advantage - advantage.mean()) / advantage.std()).flatten()
    for _ in range(4):
        for rows in torch.randperm(len(gain)).split(512):
            policy = torch.distributions.Categorical(logits=net[0](flat["obs"][rows]))
            ratio = (policy.log_prob(flat["action"][rows]) - flat["log_prob"][rows]).exp()
            lowest = torch.minimum(ratio * gain[rows], ratio.clamp(0.8, 1.2) * gain[rows])
            error = (net[1](flat["obs"][rows])[:, 0] - target[rows]).square()
            loss = -lowest.mean() + 0.5 * error.mean() - 0.01 * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
    if update % 10 == 9:
        print(f"update {update + 1}: {LIMIT} steps at most, mean age {age.mean():.0f}", flush=True)

env, returns = gym.make(sys.argv[2]), []
for episode in range(20):
    (real, _), total, done = env.reset(seed=1000 + episode), 0.0, False
    while not done:
        action = int(net[0](torch.tensor(real)).argmax())
        real, reward, ended, cut, _ = env.step(action)
        total, done = total + reward, ended or cut
    returns.append(total)
print(f"real return: {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
client.close()

"""What each family costs: parameters, time of an imagined step and of a gradient step, peak memory.

    python benchmarks/systems/families.py [--obs vector image] [--presets tiny small]

One process for each row, one thread, CPU time: a transition of 256 states; a gradient step of the
whole agent (with its own behavior) at 16 x 64; the highest resident memory of two such steps less
what was there before, beside what the plan counts for it. The limit of memory is 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np

LIMIT_MB, SHAPE, ROWS = 2000, (16, 64), 256
SMALL = {"dreamerv3": "size12m", "tdmpc2": "5m"}  # their names of a preset that is called small


def measure(model: str, kind: str) -> dict[str, float]:
    """One row, in this process."""
    import torch
    from gymnasium import spaces as gym_spaces

    from worldflux_dist import config
    from worldflux_dist.agent import Agent
    from worldflux_dist.data import Batch
    from worldflux_dist.distributed.roles import MB, Sizes
    from worldflux_dist.learner import Learner, LearnerConfig
    from worldflux_dist.spaces import Spaces

    obs = {
        "vector": gym_spaces.Box(-np.inf, np.inf, (8,)),
        "image": gym_spaces.Box(0, 255, (64, 64, 3), np.uint8),
    }[kind]
    spaces = Spaces(obs, gym_spaces.Discrete(4))
    size, length = SHAPE
    changed = [f"model={model}", f"replay.batch_size={size}", f"replay.batch_length={length}"]
    settings = config.load([], changed)
    with torch.device("meta"):
        sizes = Sizes(settings, settings.make_agent(spaces), here=True)
        counted = 4 * sizes.weights + sizes.loss.kept + sizes.dreaming
    agent = Agent(model, spaces)
    learner = Learner(agent, LearnerConfig(device="cpu"))
    rng, (seen,) = np.random.default_rng(0), spaces.obs.values()

    def batch(*lead: int) -> Batch:
        num = int(np.prod(lead))
        return Batch(
            {"obs": rng.integers(0, 256, (*lead, *seen.shape)).astype(seen.dtype)},
            spaces.random_action(rng, num).reshape(*lead, -1),
            rng.normal(size=lead).astype(np.float32),
            *(np.zeros(lead, bool) for _ in range(3)),
        )

    before, given = _resident(), batch(*SHAPE)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        learner.step(given)
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "parameters": sum(p.numel() for p in agent.world_model.parameters()) / 1e6,
        "imagined": 1e6 / ROWS * _transition(agent, batch(ROWS)),
        "step": seconds[1],
        "peak": peak / MB,
        "counted": counted / MB,
    }


def _transition(agent: Any, batch: Any) -> float:
    """CPU seconds of one transition, the middle of five."""
    import torch

    model, taken = agent.world_model, []
    with torch.no_grad():
        state = model.essential(model.encode(batch.obs))
        action = torch.from_numpy(batch.action)
        for _ in range(5):
            start = time.process_time()
            state = model.transition(state, action)
            taken.append(time.process_time() - start)
    return sorted(taken)[2]


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    from worldflux_dist.models.base import families

    parser = argparse.ArgumentParser()
    parser.add_argument("--obs", nargs="+", default=["vector", "image"])
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"])
    parser.add_argument("--families", nargs="+", default=families())
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(*given.row)))
        return
    print(f"gradient steps at {SHAPE[0]} x {SHAPE[1]}; CPU time on one thread; limit {LIMIT_MB} MB")
    print(
        f"{'model':<20}{'obs':<8}{'M params':>9}{'us / imagined':>15}{'s / step':>10}"
        f"{'peak MB':>9}{'plan MB':>9}{'plan / peak':>13}"
    )
    for family in given.families:
        for preset in given.presets:
            name = SMALL.get(family, preset) if preset == "small" else preset
            for kind in given.obs:
                command = [sys.executable, __file__, "--row", f"{family}:{name}", kind]
                row = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                print(
                    f"{f'{family}:{name}':<20}{kind:<8}{row['parameters']:>9.2f}"
                    f"{row['imagined']:>15.1f}{row['step']:>10.2f}{row['peak']:>9,.0f}"
                    f"{row['counted']:>9,.0f}{row['counted'] / row['peak']:>13.2f}"
                    f"{'  over the limit' if row['peak'] > LIMIT_MB else ''}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

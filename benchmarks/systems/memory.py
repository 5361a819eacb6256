"""Peak memory of gradient steps of every family at 16 x 64, beside what the plan counts for it.

    python benchmarks/systems/memory.py [--obs vector image] [--presets tiny small]

One process for each row: two steps of a learner on made-up batches, the highest resident memory
less what was there before the first step. The limit is 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import numpy as np

LIMIT_MB, SHAPE = 2000, (16, 64)


def measure(model: str, kind: str) -> dict[str, float]:
    """Peak MB of two gradient steps, and the plan's count, in this process."""
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
    changed = [
        f"model={model}",
        *(f"replay.batch_{n}={v}" for n, v in zip(("size", "length"), SHAPE, strict=True)),
    ]
    settings = config.load([], changed)
    with torch.device("meta"):
        sizes = Sizes(settings, settings.make_agent(spaces), here=True)
        counted = 4 * sizes.weights + sizes.loss.kept + sizes.dreaming
    learner = Learner(Agent(model, spaces), LearnerConfig(device="cpu"))
    rng, seen = np.random.default_rng(0), next(iter(spaces.obs.values()))
    shape = (*SHAPE, *seen.shape)
    batch = Batch(
        {"obs": rng.integers(0, 256, shape).astype(seen.dtype)},
        spaces.random_action(rng, SHAPE[0] * SHAPE[1]).reshape(*SHAPE, -1),
        rng.normal(size=SHAPE).astype(np.float32),
        *(np.zeros(SHAPE, bool) for _ in range(3)),
    )
    before = _resident()
    for _ in range(2):
        learner.step(batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": (peak - before) / MB, "counted": counted / MB}


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
    names = {"dreamerv3": {"small": "size12m"}, "tdmpc2": {"small": "5m"}}
    print(f"gradient steps at {SHAPE[0]} x {SHAPE[1]}, MB; limit {LIMIT_MB:,}")
    print(f"{'model':<20}{'obs':<8}{'peak':>8}{'plan':>8}{'plan / peak':>13}")
    for family in given.families:
        for preset in given.presets:
            model = f"{family}:{names.get(family, {}).get(preset, preset)}"
            for kind in given.obs:
                command = [sys.executable, __file__, "--row", model, kind]
                row = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                ratio = row["counted"] / row["peak"]
                over = "  over the limit" if row["peak"] > LIMIT_MB else ""
                print(
                    f"{model:<20}{kind:<8}{row['peak']:>8,.0f}{row['counted']:>8,.0f}"
                    f"{ratio:>13.2f}{over}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

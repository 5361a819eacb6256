"""Every kind of space a user brings trains and acts, in every family, through the whole system."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from space_envs import SPACE_ENVS

from worldflux_dist import config, local
from worldflux_dist.models.base import families

pytestmark = pytest.mark.learning

FAMILIES: dict[str, dict[str, Any]] = {
    "dreamerv3": {
        "model": "dreamerv3:tiny",
        "model_options": {
            **{"deter": 32, "hidden": 16, "groups": 4, "classes": 4, "units": 16, "depth": 2},
            "warmup": 2,
        },
        "behavior": {"horizon": 3},
        "replay": {"batch_size": 2, "batch_length": 6, "capacity": 1000},
    },
    "tdmpc2": {
        "model": "tdmpc2:tiny",
        "model_options": {
            **{"encoder_units": 16, "units": 16, "latent": 16, "channels": 4},
            **{"plan_samples": 32, "plan_iterations": 2, "plan_proposals": 4},
        },
        "replay": {"batch_size": 4, "batch_length": 6, "capacity": 1000},
    },
    "jepa": {
        "model": "jepa:tiny",
        "model_options": {
            **{"emb": 8, "units": 16, "memory_size": 16, "depth": 2, "samples": 8},
            **{"directions": 4, "warmup": 2, "plan_samples": 16, "plan_horizon": 3},
        },
        "behavior": {"horizon": 3},
        "replay": {"batch_size": 2, "batch_length": 6, "capacity": 1000},
    },
    "token": {
        "model": "token:tiny",
        "model_options": {
            **{"width": 16, "heads": 2, "units": 16, "depth": 2, "context": 4},
            **{"warmup": 2, "tokenizer_warmup": 2},
        },
        "behavior": {"horizon": 3},
        "replay": {"batch_size": 2, "batch_length": 6, "capacity": 1000},
    },
    "diffusion": {
        "model": "diffusion:tiny",
        "model_options": {
            **{"units": 16, "memory": 16, "denoiser_units": 16, "denoiser_layers": 1, "depth": 2},
            **{"channels": (4, 8), "steps": 1, "denoise_steps": 2, "starts": 2, "warmup": 2},
        },
        "behavior": {"horizon": 3},
        "replay": {"batch_size": 2, "batch_length": 6, "capacity": 1000},
    },
}


# Other models of a family: with a transformer and, as it draws embeddings of images, those too.
VARIANTS = {
    "dreamer4": FAMILIES["diffusion"]
    | {
        "model_options": FAMILIES["diffusion"]["model_options"]
        | {"backbone": "transformer", "heads": 2, "context": 4, "emb": 16}
    }
}


def test_no_family_is_forgotten() -> None:
    assert sorted(FAMILIES) == families()


@pytest.mark.parametrize("family", sorted(FAMILIES | VARIANTS))
@pytest.mark.parametrize("name", sorted(SPACE_ENVS))
def test_a_space_trains_and_acts(name: str, family: str) -> None:
    """Some gradient steps on the env's own data, then episodes with the greedy policy; an action
    outside its space would raise in the env, and the run would stop."""
    settings = config.from_dict(
        (FAMILIES | VARIANTS)[family]
        | {
            "env": {"id": f"space_envs:{name}", "num_envs": 2, "max_failures": 1},
            "train": {"env_steps": 160, "prefill": 96, "train_ratio": 0.5, "eval_episodes": 2},
            "scale": {"chunk_length": 8},
        }
    )
    losses: list[float] = []
    result = local.train(settings, lambda env_steps, metrics: losses.append(metrics["loss"]))
    assert len(losses) >= 3 and np.isfinite(losses).all()
    assert len(result.evaluation.returns) == 2
    env = SPACE_ENVS[name]()
    obs, _ = env.reset(seed=0)
    torch.manual_seed(0)
    for _ in range(5):
        action = result.agent.act(obs, greedy=False)
        assert env.action_space.contains(action), action
        obs, *_ = env.step(action)

"""Memory: a cue seen at the beginning decides, nine steps later, which turn pays. What does not
remember it is paid in half of all episodes, whatever it does."""

from __future__ import annotations

from typing import Any

import pytest

from worldflux_dist import config, local

pytestmark = [pytest.mark.nightly, pytest.mark.learning]

# Neither the cue nor the turn alone says anything about the reward, only both together: so policies
# are kept undecided until both turns are known, and recurrent models learn at a low rate.
WITH: dict[str, dict[str, Any]] = {
    "dreamerv3": {
        "model": "dreamerv3:tiny",
        "model_options": {
            **{"memory_span": 32, "reward_scale": 10, "groups": 4, "classes": 4},
            "learning_rate": 4e-4,
        },
        "replay": {"batch_size": 32},
        "train": {"env_steps": 14_000, "train_ratio": 160, "prefill": 8192},
    },
    "jepa": {
        "model": "jepa:tiny",
        "model_options": {"memory": "gru", "memory_span": 32, "learning_rate": 8e-4},
        "planner": {"method": "none"},
    },
    "token": {"model": "token:tiny", "model_options": {"context": 12, "starts": 10}},
    "diffusion": {"model": "diffusion:tiny"},
}
WITHOUT: dict[str, dict[str, Any]] = {
    "jepa": {"model": "jepa:tiny", "planner": {"method": "none"}},
    "tdmpc2": {
        **{"model": "tdmpc2:tiny", "behavior": {"kind": "actor_critic"}},
        **{"planner": {"method": "none"}},
    },
}
COMMON: dict[str, dict[str, Any]] = {
    "behavior": {"horizon": 10, "entropy_scale": 0.03, "replay_value_scale": 0.0},
    "env": {"id": "toy_envs:TMaze", "num_envs": 8},
    "replay": {"batch_size": 16, "batch_length": 20, "capacity": 100_000},
    "train": {
        **{"env_steps": 8000, "train_ratio": 80, "prefill": 4096},
        **{"eval_every": 0, "eval_episodes": 300},
    },
    "scale": {"chunk_length": 8},
}


def share_that_pays(given: dict[str, Any]) -> float:
    together = given | {name: part | given.get(name, {}) for name, part in COMMON.items()}
    return local.train(config.from_dict(together)).evaluation.mean


@pytest.mark.parametrize("family", WITH)
def test_what_remembers_turns_where_it_pays(family: str) -> None:
    assert share_that_pays(WITH[family]) >= 0.9


@pytest.mark.parametrize("family", WITHOUT)
def test_what_does_not_remember_cannot(family: str) -> None:
    assert share_that_pays(WITHOUT[family]) <= 0.6

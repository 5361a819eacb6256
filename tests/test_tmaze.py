"""Memory: a cue seen at the beginning decides, nine steps later, which turn pays. What does not
remember it is paid in half of all episodes, whatever it does."""

from __future__ import annotations

from typing import Any

import pytest

from worldflux_dist import config, local

pytestmark = [pytest.mark.nightly, pytest.mark.learning]

# Not DreamerV3 and JEPA with its GRU, which do not learn it in this time (benchmarks/LOG.md).
WITH: dict[str, dict[str, Any]] = {
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


def share_that_pays(given: dict[str, Any]) -> float:
    settings = config.from_dict(
        {
            **given,
            "behavior": {"horizon": 10, **given.get("behavior", {})},
            "env": {"id": "toy_envs:TMaze", "num_envs": 8},
            "replay": {"batch_size": 16, "batch_length": 20, "capacity": 20_000},
            "train": {
                **{"env_steps": 6000, "train_ratio": 40, "prefill": 1024},
                **{"eval_every": 0, "eval_episodes": 300},
            },
            "scale": {"chunk_length": 8},
        }
    )
    return local.train(settings).evaluation.mean


@pytest.mark.parametrize("family", WITH)
def test_what_remembers_turns_where_it_pays(family: str) -> None:
    assert share_that_pays(WITH[family]) >= 0.9


@pytest.mark.parametrize("family", WITHOUT)
def test_what_does_not_remember_cannot(family: str) -> None:
    assert share_that_pays(WITHOUT[family]) <= 0.6

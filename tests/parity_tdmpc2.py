"""How TD-MPC2's recorded values map to our agent: sizes, names, batches and random draws.

What must stay true: recorded transitions k (observation, action, reward, terminated) are our steps
k + 1, and recorded tensors are time-major where ours are batch-major.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from parity import Values, open_values
from small import vector
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.latent_td import QDraw
from worldflux_dist.data import Batch
from worldflux_dist.spaces import Spaces


@pytest.fixture(scope="session")
def recorded_tdmpc2(shared: Path) -> Values:
    return open_values(shared / "parity" / "tdmpc2.npz")


def recorded_config(ref: Values) -> dict[str, Any]:
    return json.loads(str(ref.raw("meta/config")))


def make_agent(
    ref: Values, obs: gym_spaces.Space | None = None, termination: str = "hard", **options: Any
) -> Any:
    """A fresh agent of the recorded sizes; `options` replace some of the model's."""
    c = recorded_config(ref)
    sizes = {
        "encoder_units": c["enc_dim"],
        "encoder_layers": c["num_enc_layers"],
        "units": c["mlp_dim"],
        "latent": c["latent_dim"],
        "num_q": c["num_q"],
        "horizon": c["horizon"],
        "episode_length": c["episode_length"],
        "termination": termination,
    }
    planner = {
        "samples": c["num_samples"],
        "elites": c["num_elites"],
        "proposals": c["num_pi_trajs"],
        "iterations": c["iterations"],
    }
    spaces = Spaces(obs or vector(5), gym_spaces.Box(-1.0, 1.0, (c["action_dim"],)))
    return Agent("tdmpc2:5m", spaces, sizes | options, {"dropout": c["dropout"]}, planner)


# ---------------------------------------------------------------------------------- names

NETWORKS = {
    "world_model.encoder.": "_encoder.state.",
    "world_model.dynamics.": "_dynamics.",
    "world_model.reward.": "_reward.",
    "world_model.terminal.": "_termination.",
    "behavior.actor.": "_pi.",
    "behavior.qs.": "_Qs.params.",
    "behavior.target_qs.": "_target_Qs_params.",
}
LAYER = r"(?:(?P<member>\d)\.)?(?:layers\.(?P<number>\d)|out)(?P<norm>\.norm)?.*\.(?P<leaf>\w+)"


def reference_name(name: str) -> tuple[str, int | None]:
    """The reference's name of our parameter and, for Qs, which member of its stack that is."""
    ours, theirs = next(pair for pair in NETWORKS.items() if name.startswith(pair[0]))
    match = re.fullmatch(LAYER, name.removeprefix(ours))
    assert match, name
    last = 1 if ours == "world_model.encoder." else 2
    number = last if match["number"] is None else match["number"]
    norm = "ln." if match["norm"] else ""
    member = None if match["member"] is None else int(match["member"])
    return f"{theirs}{number}.{norm}{match['leaf']}", member


def theirs_of(values: dict[str, Tensor], name: str) -> Tensor:
    """What was recorded for our parameter of that name."""
    theirs, member = reference_name(name)
    return values[theirs] if member is None else values[theirs][member]


def load_parameters(agent: Any, values: Values) -> Any:
    """The agent with all its parameters as recorded."""
    recorded = dict(values.items())
    with torch.no_grad():
        for name, param in agent.named_parameters():
            value = theirs_of(recorded, name)
            assert param.shape == value.shape, name
            param.copy_(value)
    return agent


def loaded(ref: Values, params: str = "model/params/", **options: Any) -> Any:
    """A fresh agent with the parameters recorded there."""
    return load_parameters(make_agent(ref, **options), ref.under(params))


def bins(logits: Tensor) -> Tensor:
    """The logits of the 101 bins; those beyond them have no probability."""
    assert not logits.softmax(-1)[..., 101:].any()
    return logits[..., :101]


# ----------------------------------------------------------------------- batches and draws


def batch_major(value: Tensor) -> Tensor:
    """(T, B, ...) -> (B, T, ...), without a last axis of one."""
    value = value.transpose(0, 1)
    return value.squeeze(-1) if value.shape[-1] == 1 else value


def batch_of(v: Values) -> Batch:
    """The recorded update's batch, as arrays. NaN where nothing led to the first observation."""

    def shifted(key: str, fill: Any) -> np.ndarray:
        value = batch_major(v[key])
        first = torch.full_like(value[:, :1], fill)
        return torch.cat([first, value], 1).numpy()

    terminal = shifted("terminated", 0.0) > 0
    first, last = np.zeros_like(terminal), np.zeros_like(terminal)
    last[:, -1] = terminal[:, -1]
    obs = {"obs": batch_major(v["obs"]).contiguous().numpy()}
    return Batch(obs, shifted("action", np.nan), shifted("reward", np.nan), first, last, terminal)


def draws_of(v: Values, kinds: Iterable[str]) -> list[Tensor]:
    """The recorded draws in order, whose kinds must be these."""
    kinds = list(kinds)
    assert v.raw("draws/order").tolist() == kinds
    return [v[f"draws/draw{number:02}_{kind}"] for number, kind in enumerate(kinds)]


def pair_of(permutation: Tensor) -> Tensor:
    return permutation[:2].long()


def update_draws(v: Values) -> tuple[QDraw, QDraw]:
    """Those of the value target and of the policy loss."""
    a, b, c, d = draws_of(v, ["randn_like", "randperm"] * 2)
    return QDraw(batch_major(a), pair_of(b)), QDraw(batch_major(c), pair_of(d))

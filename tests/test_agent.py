"""The agent and its learner: what runners are sent, one loss, and files that are broken.

What every family must do as an agent is in test_families_learning.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import (
    FAMILY,
    family_batch,
    make_agent,
    make_small,
    perturbed,
    random_batch,
    same_sums,
    tensors,
)

from worldflux_dist.agent import Agent
from worldflux_dist.learner import Learner, LearnerConfig, NonFiniteLossError
from worldflux_dist.storage import CheckpointError

# ------------------------------------------------------------------- what it is made of


@FAMILY
def test_a_batch_is_trained_on_where_it_lies_and_stays_as_it_is(family: str) -> None:
    """Batches lie in memory that processes share: no copy is made, and nothing is written there."""
    agent = make_small(family, "dict", "mixed")
    batch = family_batch(agent)
    before = {name: value.copy() for name, value in batch.columns().items()}
    for value in batch.columns().values():
        value.flags.writeable = False
    learner = Learner(agent, LearnerConfig(device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors_of = learner.ahead(batch).tensors.columns()
        learner.step(batch)
    for name, value in batch.columns().items():
        assert np.shares_memory(tensors_of[name].numpy(), value)
        np.testing.assert_array_equal(value, before[name])


def test_runners_are_sent_only_what_acting_needs() -> None:
    agent, other = perturbed(make_agent("disc")), make_agent("disc")
    sent = agent.inference_state()
    assert {".".join(name.split(".")[:2]) for name in sent} == {
        "world_model.encoder",
        "world_model.core",
        "world_model.posterior",
        "behavior.actor",
    }
    other.load_arrays(sent)
    obs = {key: value[:, 0] for key, value in random_batch(agent.spaces).obs.items()}
    acted = []
    for each in (agent, other):
        torch.manual_seed(0)
        acted.append(each.act_batch(obs, np.ones(3, bool))[0])
    assert np.array_equal(*acted)
    sent["behavior.actor.mlp.0.linear.bias"] += 1  # a copy, not a view
    assert agent.inference_state()["behavior.actor.mlp.0.linear.bias"][0] != pytest.approx(
        sent["behavior.actor.mlp.0.linear.bias"][0]
    )


def test_loss_is_the_weighted_sum_of_all_means() -> None:
    agent = perturbed(make_agent("disc"))
    loss, logged, _ = agent(tensors(random_batch(agent.spaces)))
    scales = {"rep": 0.1, "replay_value": 0.3}
    names = ["dyn", "rep", "reward", "continue", "rec/image", "rec/vector"]
    names += ["policy", "value", "replay_value"]
    want = sum(scales.get(name, 1.0) * logged[f"loss/{name}"].item() for name in names)
    same_sums(loss, want)
    assert {name for name in logged if name.startswith("loss/")} == {f"loss/{n}" for n in names}
    assert not any(value.requires_grad for value in logged.values())


# ------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("name", ["world_model.safetensors", "behavior.safetensors", "agent.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_broken_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    make_agent("cont").save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = FileNotFoundError if (name, damage) == ("agent.json", "missing") else CheckpointError
    with pytest.raises(error, match=str(tmp_path)):
        Agent.load(tmp_path)


def test_weights_of_another_agent_are_refused(tmp_path: Path) -> None:
    """Fewer, more or other weights than the recipe has never load in silence."""
    make_agent("cont").save(tmp_path / "cont")
    make_agent("disc").save(tmp_path / "disc")
    make_agent("disc", hidden=32).save(tmp_path / "wide")
    recipe = (tmp_path / "disc" / "agent.json").read_bytes()
    for other in ("cont", "wide"):
        (tmp_path / other / "agent.json").write_bytes(recipe)
        with pytest.raises(CheckpointError, match=other):
            Agent.load(tmp_path / other)


# ----------------------------------------------------------------------------- learning


def make_learner(kind: str = "disc", **options: Any) -> Any:
    torch.manual_seed(0)
    return Learner(make_agent(kind, warmup=2), LearnerConfig(device="cpu", **options))


def test_every_step_moves_the_slow_critic() -> None:
    learner = make_learner("cont")
    behavior = perturbed(learner.agent).behavior
    before = behavior.slow_critic[0].linear.weight.clone()
    learner.step(random_batch(learner.agent.spaces))
    want = 0.98 * before + 0.02 * behavior.critic[0].linear.weight
    same_sums(behavior.slow_critic[0].linear.weight, want)
    assert not torch.equal(want, before)


def test_read_only_arrays_can_be_learned_from() -> None:
    learner = make_learner("cont")
    batch = random_batch(learner.agent.spaces)
    for value in batch.columns().values():
        value.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it is handed memory it may not write to
        assert np.isfinite(learner.step(batch)["loss"])


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    """A loss may still be finite when a weight no longer is."""
    learner = Learner(make_agent("cont"))
    with torch.no_grad():
        next(learner.agent.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="not finite after gradient step 0"):
        learner.save(tmp_path)
    assert not list(tmp_path.iterdir())

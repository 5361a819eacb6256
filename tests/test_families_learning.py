"""What every family must do: learn, continue, save, load and act, in all kinds of spaces."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import (
    CASES,
    FAMILIES,
    FAMILY,
    IMAGE,
    VARIANTS,
    family_batch,
    look,
    make_case,
    make_small,
    perturbed,
    random_batch,
    same_sums,
    tensors,
    vector,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from worldflux_dist.agent import Agent
from worldflux_dist.learner import Learner, LearnerConfig, NonFiniteLossError


def make_learner(case: tuple[str, str, str]) -> Learner:
    return Learner(make_case(case), LearnerConfig(device="cpu"))


# ------------------------------------------------------------------------------- learning


@CASES
def test_two_steps_move_every_parameter(case: tuple[str, str, str]) -> None:
    """With a finite gradient in the first; every one is some optimizer's and no other's."""
    learner = make_learner(case)
    agent, batch = learner.agent, family_batch(learner.agent)
    before = {name: p.clone() for name, p in agent.named_parameters() if p.requires_grad}
    owned = [
        id(p) for o in learner.optimizers.values() for g in o.param_groups for p in g["params"]
    ]
    assert sorted(owned) == sorted(id(p) for p in agent.parameters() if p.requires_grad)
    metrics = learner.step(batch)
    assert all(np.isfinite(value) for value in metrics.values())
    for name, param in agent.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
        assert param.grad is None or param.grad.isfinite().all(), name
    learner.step(batch)
    still = [n for n, p in agent.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still


FALLING = {
    "dreamerv3": ("rec/image", "rec/vector", "reward", "replay_value"),
    "tdmpc2": ("consistency", "reward", "value"),
    "jepa": ("prediction", "rec/image", "rec/vector", "reward", "replay_value"),
    "token": ("rec/image", "tokens/image", "reward", "replay_value"),
    "diffusion": ("denoise", "reward", "replay_value"),
    **dict.fromkeys(VARIANTS, ("rec/image", "rec/vector", "reward", "replay_value")),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@FAMILY
def test_learning_lowers_the_loss(family: str, precision: Any) -> None:
    torch.manual_seed(0)
    sizes = FAMILIES[VARIANTS.get(family, (family,))[0]][1]
    warm = {name: 0 for name in ("warmup", "tokenizer_warmup") if name in sizes}
    agent = make_small(family, "dict", "discrete", learning_rate=3e-3, **warm)
    learner = Learner(agent, LearnerConfig(device="cpu", precision=precision))
    batch = family_batch(agent)
    history = [learner.step(batch) for _ in range(12)]
    for name in FALLING[family]:
        assert history[-1][f"loss/{name}"] < 0.9 * history[0][f"loss/{name}"], name
    assert all(value.dtype == torch.float32 for value in agent.state_dict().values())


@CASES
def test_a_saved_learner_continues_bit_for_bit(case: tuple[str, str, str], tmp_path: Path) -> None:
    straight = make_learner(case)
    batches = [family_batch(straight.agent, seed) for seed in range(4)]
    torch.manual_seed(1)
    for batch in batches[:2]:
        straight.step(batch)
    straight.save(tmp_path)
    ends = [straight.step(batch) for batch in batches[2:]]
    torch.manual_seed(2)
    resumed = Learner(Agent.load(tmp_path), LearnerConfig(device="cpu"))
    resumed.load(tmp_path)
    assert resumed.gradient_steps == 2
    assert [resumed.step(batch) for batch in batches[2:]] == ends
    assert resumed.gradient_steps == straight.gradient_steps == 4
    for name, value in straight.agent.state_dict().items():
        assert torch.equal(resumed.agent.state_dict()[name], value), name


SEEN = {
    **{"dreamerv3": "rec/vector", "tdmpc2": "consistency", "jepa": "prediction"},
    **{"token": "tokens/vector", "diffusion": "denoise"},
    **dict.fromkeys(VARIANTS, "denoise"),
}


@pytest.mark.parametrize("column", ["reward", "obs/vector"])
@FAMILY
def test_nan_is_named_and_changes_nothing(family: str, column: str) -> None:
    term = f"loss/{column if column == 'reward' else SEEN[family]}"
    learner = make_learner((family, "dict", "discrete"))
    batch = family_batch(learner.agent)
    learner.step(batch)
    learner.step(batch)

    def everything() -> list[Tensor]:
        states = [optimizer.state_dict()["state"] for optimizer in learner.optimizers.values()]
        leaves = pytree.tree_leaves([states, dict(learner.agent.named_parameters())])
        return [value.detach().clone() for value in leaves]

    before = everything()
    batch.columns()[column][1, 3] = np.nan
    with pytest.raises(NonFiniteLossError, match=rf"{term}.* became nan at gradient step 3"):
        learner.step(batch)
    assert learner.gradient_steps == 2
    assert all(torch.equal(a, b) for a, b in zip(everything(), before, strict=True))
    for name, value in learner.agent.state_dict().items():  # the running scales of returns too
        assert value.isfinite().all(), name


@pytest.mark.parametrize("shape", [(84, 84, 1), (96, 72, 3), (10, 10, 3)])
@FAMILY
def test_images_of_any_size_train(family: str, shape: tuple[int, ...]) -> None:
    space = gym_spaces.Box(0, 255, shape, np.uint8)
    depth = {} if family == "tdmpc2" else {"depth": 2, "multipliers": (2, 3, 4, 4)}
    depth |= {"channels": (4, 4, 8)} if family == "diffusion" else {}
    model = make_small(family, space, "discrete", **depth).world_model
    batch = tensors(random_batch(model.spaces, 2, 6))
    losses = model.loss(batch).losses
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    preds = model.decode(model.encode(batch.obs["obs"][:, 0])).preds
    assert not model.decodes_obs or preds["obs"].shape == (2, *shape)


# --------------------------------------------------------------------------------- acting


NATIVE = [
    (vector(3), gym_spaces.Discrete(4, start=-1)),
    (vector(3), gym_spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)),
    (
        gym_spaces.Dict({"cam": IMAGE, "pos": vector(2), "kind": gym_spaces.Discrete(3)}),
        gym_spaces.Dict({"move": gym_spaces.Box(-1, 1, (2,)), "jump": gym_spaces.Discrete(2)}),
    ),
    (
        gym_spaces.Tuple((vector(2), gym_spaces.MultiBinary(3))),
        gym_spaces.Tuple((gym_spaces.MultiDiscrete([2, 3]), gym_spaces.Box(-1, 1, (1,)))),
    ),
]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    return np.array_equal(left, right)


@pytest.mark.parametrize(("observation", "action"), NATIVE)
@FAMILY
def test_save_load_and_act_in_native_spaces(
    family: str, observation: gym_spaces.Space, action: gym_spaces.Space, tmp_path: Path
) -> None:
    """Loaded, copied and pickled agents act as the one they were made from."""
    agent = perturbed(make_small(family, observation, action))
    agent.save(tmp_path / "saved")
    others = [Agent.load(tmp_path / "saved"), copy.deepcopy(agent)]
    others.append(pickle.loads(pickle.dumps(agent)))
    for other in others:
        assert json.dumps(other.recipe) == json.dumps(agent.recipe)
        assert other.world_model.config == agent.world_model.config
        assert other.behavior.config == agent.behavior.config
        assert (other.planner is None) == (agent.planner is None)
        assert agent.planner is None or other.planner.config == agent.planner.config
        for name, value in agent.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    observation.seed(0)
    for step in range(4):
        obs, chosen = observation.sample(), []
        for each in (agent, *others):
            torch.manual_seed(step)
            chosen.append(each.act(obs))
        assert action.contains(chosen[0]), chosen[0]
        assert all(same(chosen[0], one) for one in chosen)
    assert action.contains(agent.act(obs, greedy=False))


@FAMILY
def test_reset_forgets_the_episode(family: str) -> None:
    agent = make_case((family, "vector", "continuous"))
    obs = np.ones(5, np.float32)

    def act() -> Any:
        torch.manual_seed(0)
        return agent.act(obs)

    first = act()
    assert not same(first, act())  # it remembers having been here
    agent.reset()
    assert same(first, act())


@CASES
def test_acting_remembers_what_was_seen_and_done(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    model = agent.world_model
    state, action, carry = model.initial(3), torch.zeros(3, agent.spaces.action_dim), None
    for time in range(3):
        first = np.array([time == 0] * 3)
        torch.manual_seed(time)
        with torch.no_grad():
            state = model.update(state, action, look(agent, time), torch.from_numpy(first))
        torch.manual_seed(time)
        chosen, carry = agent.act_batch(look(agent, time), first, carry)
        action = torch.from_numpy(chosen)
        for name, value in state.tensors.items():
            assert torch.equal(carry[f"state/{name}"], value), name


@CASES
def test_rows_of_a_batch_reset_on_their_own(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    _, carry = agent.act_batch(look(agent), np.ones(3, bool))
    acted, carries = [], []
    for first, start in (([True, False, False], carry), ([True] * 3, carry), ([True] * 3, None)):
        torch.manual_seed(0)
        action, after = agent.act_batch(look(agent, 1), np.array(first), start)
        acted.append(action)
        carries.append(after)
    mixed, fresh, new = carries
    assert np.array_equal(acted[1], acted[2])
    assert mixed["action"].shape == acted[0].shape == (3, agent.spaces.action_dim)
    assert all(torch.equal(value, new[name]) for name, value in fresh.items())
    for name, value in mixed.items():
        same_sums(value[0], fresh[name][0], msg=name)
    for row in (1, 2):
        assert any(not torch.equal(value[row], fresh[name][row]) for name, value in mixed.items())

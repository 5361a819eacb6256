"""What every family must do: verbs, State and losses, each kind of observation and of action.

A family added to models/ is tested here as soon as small.py knows a small preset of it.
Learning and acting are in test_families_learning.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import (
    CASES,
    FAMILY,
    LENGTH,
    family_batch,
    look,
    make_case,
    make_small,
    same_sums,
    tensors,
    vector,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from worldflux_dist.agent import Agent
from worldflux_dist.models.base import State, create_world_model
from worldflux_dist.spaces import Spaces


def actions(agent: Any, *lead: int) -> Tensor:
    flat = agent.spaces.random_action(np.random.default_rng(0), int(np.prod(lead)))
    return torch.from_numpy(flat).view(*lead, -1)


def remembered(model: Any, agent: Any) -> State:
    """A state (3, ...) in which nothing is zero any more."""
    state = model.update(model.encode(look(agent)), actions(agent, 3), look(agent, 1))
    return model.transition(state, actions(agent, 3))


def assert_same(got: State, want: State, rtol: float = 0, atol: float = 0) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    for name, value in want.tensors.items():
        torch.testing.assert_close(got.tensors[name], value, rtol=rtol, atol=atol, msg=name)


def form(state: State) -> dict[str, tuple]:
    return {name: (value.dtype, value.shape) for name, value in state.tensors.items()}


# ------------------------------------------------------------------------------- verbs


@CASES
@torch.no_grad()
def test_shapes_of_every_verb(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    model, act = agent.world_model, actions(agent, 3)
    state = model.initial(3)
    assert all(len(value) == 3 and not value.any() for value in state.tensors.values())
    assert form(model.encode(look(agent))) == form(state)
    assert form(model.update(state, act, look(agent))) == form(state)
    assert form(model.transition(state, act)) == form(state)
    stacked = State.stack([remembered(model, agent)] * 2)
    assert model.features(stacked).shape == (2, 3, model.feature_dim)
    assert agent.behavior.act(model.features(stacked)).shape == (2, 3, agent.spaces.action_dim)
    assert agent.behavior.value(model.features(stacked)).shape == (2, 3)
    preds = model.decode(stacked).preds
    assert set(preds) == {"continue"} | {
        name for name, has in (("obs", model.decodes_obs), ("reward", model.decodes_reward)) if has
    }
    assert set(model.decode(stacked, ("continue",)).preds) == {"continue"}
    assert preds["continue"].shape == (2, 3)
    assert ((preds["continue"] >= 0) & (preds["continue"] <= 1)).all()
    if model.decodes_reward:
        assert preds["reward"].shape == (2, 3)
        assert preds["reward"].abs().min() > 0
    if model.decodes_obs:
        obs = preds["obs"] if isinstance(preds["obs"], dict) else {"obs": preds["obs"]}
        assert {k: v.shape[2:] for k, v in obs.items()} == {
            k: spec.shape for k, spec in agent.spaces.obs.items()
        }
    rollout = model.rollout(state, agent.behavior.act, 4)
    assert rollout.actions.shape == (4, 3, agent.spaces.action_dim)
    assert rollout.rewards.shape == rollout.continues.shape == (4, 3)
    assert rollout.start_continue.shape == (3,)
    assert model.features(rollout.states).shape == (5, 3, model.feature_dim)


@CASES
def test_loss_output_agrees_in_its_shapes(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    model, batch = agent.world_model, tensors(family_batch(agent))
    output = model.loss(batch)
    lead = output.batch.reward.shape  # (B, T) or, of windows, (more rows, fewer steps)
    assert 0.5 * batch.reward.numel() < lead.numel() <= batch.reward.numel()
    for value in (*output.batch.columns().values(), *pytree.tree_leaves(output.states)):
        assert value.shape[:2] == lead
    assert form(output.path) == form(output.states)
    assert model.features(output.path).shape == (*lead, model.feature_dim)
    assert model.features(output.path).requires_grad
    for name, loss in output.losses.items():
        assert loss.requires_grad, name
        assert loss.shape in (lead, (lead[0], lead[1] - 1)), name
    assert not any(value.requires_grad for value in output.metrics.values())
    assert set(model.loss_scales) <= {*output.losses, "termination"}
    more = agent.behavior.loss(model, output)
    assert not set(more.losses) & set(output.losses)
    assert set(agent.behavior.loss_scales) <= set(more.losses)


@CASES
@torch.no_grad()
def test_one_seed_gives_one_result(case: tuple[str, str, str]) -> None:
    def results() -> list[Any]:
        agent = make_case(case)
        model = agent.world_model
        state = remembered(model, agent)
        loss, metrics, _ = agent(tensors(family_batch(agent)))
        action, carry = agent.act_batch(look(agent), np.ones(3, bool))
        noise = None if model.noise_shape is None else torch.rand(3, *model.noise_shape)
        torch.manual_seed(torch.seed())  # with its noise given, a transition draws nothing
        after = model.transition(state, actions(agent, 3), noise)
        return [state, loss, metrics, torch.from_numpy(action), carry, after]

    for one, other in zip(
        pytree.tree_leaves(results()), pytree.tree_leaves(results()), strict=True
    ):
        assert torch.equal(one, other)


@CASES
@torch.no_grad()
def test_a_first_step_forgets_state_and_action(case: tuple[str, str, str]) -> None:
    """And `encode` is that step: update(initial, 0, obs, is_first)."""
    agent = make_case(case)
    model, act, obs = agent.world_model, actions(agent, 3), look(agent, 2)
    before, reset = remembered(model, agent), torch.tensor([True, False, True])
    assert act.any(-1).all()
    torch.manual_seed(3)
    fresh = model.encode(obs)
    torch.manual_seed(3)
    zero = torch.zeros_like(act)
    assert_same(fresh, model.update(model.initial(3), zero, obs, torch.ones(3, dtype=torch.bool)))
    torch.manual_seed(3)
    mixed = model.update(before, act, obs, reset)
    assert_same(mixed[reset], fresh[reset], 1e-5, 1e-6)
    torch.manual_seed(3)
    assert_same(mixed[1:2], model.update(before, act, obs)[1:2], 1e-5, 1e-6)  # None resets none
    differs = [not torch.equal(mixed.tensors[n][1], v[1]) for n, v in fresh.tensors.items()]
    assert any(differs)


@CASES
@torch.no_grad()
def test_rollout_is_transition_and_decode_by_hand(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    model, taken = agent.world_model, actions(agent, 4, 3)
    start = remembered(model, agent)
    noise = None if model.noise_shape is None else torch.rand(4, 3, *model.noise_shape)
    rollout = model.rollout(start, taken, noise=noise)
    states = [start]
    for h in range(4):
        states.append(model.transition(states[-1], taken[h], None if noise is None else noise[h]))
        preds = model.decode(states[-1]).preds
        # Sums of random shares of bins up to 5e8: more than the last digits of the result.
        torch.testing.assert_close(rollout.rewards[h], preds["reward"], rtol=5e-4, atol=1e-4)
        same_sums(rollout.continues[h], preds["continue"])
    assert_same(rollout.states, State.stack([model.visible(model.essential(s)) for s in states]))
    same_sums(rollout.start_continue, model.decode(start).preds["continue"])

    def policy(features: Tensor) -> Tensor:
        return features[:, : model.spaces.action_dim]

    led = model.rollout(start, policy, 4, noise)
    replayed = model.rollout(start, led.actions, noise=noise)
    want = policy(model.features(led.states)[:-1].flatten(0, 1)).view_as(led.actions)
    same_sums(led.actions, want)
    assert_same(led.states, replayed.states)


@CASES
@torch.no_grad()
def test_state_is_a_pytree(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    state = remembered(agent.world_model, agent)
    other = pytree.tree_map(lambda value: value + 1, state)
    assert isinstance(other, State)
    stacked = State.stack([state, other], dim=1)  # (B, 2, ...)
    assert_same(stacked.flatten()[0::2], state)
    assert_same(stacked.flatten()[1::2], other)
    grad = state.map(lambda value: value.float().requires_grad_())
    assert not any(value.requires_grad for value in grad.detach().tensors.values())


@CASES
@torch.no_grad()
def test_a_fresh_model_predicts_a_reward_of_exactly_zero(case: tuple[str, str, str]) -> None:
    agent = make_small(*case)
    model = agent.world_model
    for state in (model.encode(look(agent)), remembered(model, agent)):
        assert model.decode(state, ("reward",)).preds["reward"].eq(0).all()
        assert agent.behavior.value(model.features(state)).eq(0).all()


@CASES
def test_nothing_before_a_reset_reaches_the_losses_after_it(case: tuple[str, str, str]) -> None:
    agent = make_case(case)
    reset = LENGTH - 2  # inside a window of every family, with a step after it
    batch = family_batch(agent)
    other = batch.map(np.copy)
    for one in (batch, other):
        one.is_first[:] = one.is_last[:] = one.is_terminal[:] = False
        one.is_first[:, reset] = one.is_last[:, reset - 1] = True
        one.action[:, reset] = one.reward[:, reset] = 0
    for name, value in family_batch(agent, seed=1).columns().items():
        if not name.startswith("is_"):
            other.columns()[name][:, :reset] = value[:, :reset]
    found = []
    for one in (batch, other):
        torch.manual_seed(1)
        output = agent.world_model.loss(tensors(one))
        begun = output.batch.is_first.cumsum(1) > 0
        rows = begun.any(1)  # windows that the reset lies in
        found.append(
            {n: (v[rows], begun[rows][:, -v.shape[1] :]) for n, v in output.losses.items()}
        )
    for name, (value, begun) in found[0].items():
        changed = found[1][name][0]
        assert begun.sum() == 2 * 3
        same_sums(value[begun], changed[begun], msg=name)
    assert not torch.allclose(found[0]["reward"][0], found[1]["reward"][0])


# ------------------------------------------------------------------------------- creation


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dreamer3:size1m", {}, "no world-model family 'dreamer3': did you mean 'dreamerv3'"),
        ("dreamerv3:size12", {}, "no preset 'dreamerv3:size12': did you mean 'dreamerv3:size12m'"),
        ("dreamerv3", {}, "no preset 'dreamerv3'"),
        ("dreamerv3:tiny", {"deters": 8}, "no option 'deters': did you mean 'deter'"),
        (
            "dreamerv3:tiny",
            {"learning_rate": -1.0},
            "learning_rate is -1.0: it must be gr",
        ),
        ("dreamerv3:tiny", {"unimix": 1.0}, "unimix is 1.0: it must be less than 1"),
        ("dreamerv3:tiny", {"discount": 1.5}, "discount is 1.5: it must be at most 1"),
        ("dreamerv3:tiny", {"agc": -0.3}, "agc is -0.3: it must be at least 0"),
        ("tdmpc:5m", {}, "no world-model family 'tdmpc': did you mean 'tdmpc2'"),
        ("tdmpc2:6m", {}, "no preset 'tdmpc2:6m': did you mean 'tdmpc2:"),
        ("tdmpc2:tiny", {"latents": 8}, "no option 'latents': did you mean 'latent'"),
        ("tdmpc2:tiny", {"discount": 0.9}, "no option 'discount'"),
        ("tdmpc2:tiny", {"latent": 8.0}, "model_options.latent is 8.0: it must be a valid integer"),
        ("tdmpc2:tiny", {"latent": 12}, "latent is 12: it must be a multiple of 8"),
        ("tdmpc2:tiny", {"num_q": 1}, "num_q is 1: it must be at least 2"),
        (
            "tdmpc2:tiny",
            {"termination": "off"},
            "termination is 'off': it must be 'soft'",
        ),
    ],
)
def test_wrong_names_and_values_are_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_world_model(name, vector(3), gym_spaces.Discrete(2), **options)


@FAMILY
def test_unsupported_spaces_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"action space .* is not supported"):
        create_world_model(f"{family}:tiny", vector(3), gym_spaces.Text(5))
    with pytest.raises(ValueError, match=r"observation space .* is not supported"):
        create_world_model(f"{family}:tiny", gym_spaces.Text(5), gym_spaces.Discrete(2))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("1m", 1_214_651),
        ("5m", 4_960_618),
        ("19m", 18_062_442),
        ("48m", 47_208_298),
        ("317m", 312_595_417),
    ],
)
def test_tdmpc2_has_the_published_sizes(preset: str, count: int) -> None:
    """Trained parameters of the reference, for 24 numbers seen and 6 actions."""
    with torch.device("meta"):
        spaces = Spaces(vector(24), gym_spaces.Box(-1, 1, (6,)))
        agent = Agent(f"tdmpc2:{preset}", spaces, {"termination": "none"})
    ours = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    assert ours == count

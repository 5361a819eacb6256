"""The imaginer: every family's posteriors, imagined batches, and what is learned from them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from fixed_draws import fix_draws
from small import FAMILY, LENGTH, family_batch, make_small, perturbed, same_sums, tensors

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.imaginer import Imaginer
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import WorldModel

CRITIC = {"kind": "actor_critic", "horizon": 4}
ARRAYS = ("features", "actions", "rewards", "continues", "start_continue")


def dreaming(family: str, obs: str = "dict", action: str = "mixed") -> Any:
    torch.manual_seed(0)
    return perturbed(make_small(family, obs, action, CRITIC))


@FAMILY
def test_observing_a_batch_is_updating_step_by_step(family: str) -> None:
    model = dreaming(family).world_model
    batch = tensors(family_batch(dreaming(family)))
    noise = torch.rand(3, LENGTH, 8 if family == "dreamerv3" else 2)
    states, steps = model.observe(batch, noise)
    scanned, _ = WorldModel.observe(model, batch, noise)
    assert torch.equal(steps.reward, batch.reward)
    state = model.initial(3)
    for t in range(LENGTH):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t], obs, batch.is_first[:, t], noise[:, t])
        for name, value in states.tensors.items():
            same_sums(value[:, t], state.tensors[name])
            same_sums(value[:, t], scanned.tensors[name][:, t])
            assert not value.requires_grad
    assert states.tensors.keys() == model.essential(state).tensors.keys()


@pytest.mark.parametrize("action", ["continuous", "discrete"])
@FAMILY
def test_imagined_batches(family: str, action: str) -> None:
    agent = dreaming(family, "vector", action)
    batch = family_batch(agent)
    for value in batch.columns().values():
        value.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it is handed memory it may not write to
        imagined = Imaginer(agent).imagine(batch)
    num, features = 3 * LENGTH, agent.world_model.feature_dim
    assert imagined.features.shape == (5, num, features)
    assert imagined.actions.shape == (4, num, agent.spaces.action_dim)
    assert imagined.rewards.shape == imagined.continues.shape == (4, num)
    assert imagined.start_continue.shape == (num,)
    for name in ARRAYS:
        value = getattr(imagined, name)
        assert value.dtype == np.float32 and value.base is None and value.flags.writeable, name
        assert np.isfinite(value).all() and value.any(), name
    for name in ("reward", "is_last", "is_terminal"):
        assert np.array_equal(getattr(imagined, name), getattr(batch, name)), name
    assert Imaginer(agent, horizon=2).imagine(batch).rewards.shape == (2, num)


@FAMILY
def test_published_parts_are_all_that_imagining_needs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a part too few, an imaginer would dream with weights that nobody has trained."""
    fix_draws(monkeypatch)
    trained = dreaming(family)
    torch.manual_seed(1)
    fresh = make_small(family, "dict", "mixed", CRITIC)
    for part in ("world_model", "behavior"):
        fresh.load_arrays(trained.inference_state(part))
    batch = family_batch(trained)
    found, want = (Imaginer(agent).imagine(batch) for agent in (fresh, trained))
    for name in ARRAYS:
        same_sums(getattr(found, name), getattr(want, name), msg=name)


@FAMILY
def test_rows_keep_what_was_imagined_from_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_draws(monkeypatch)
    # Where a level of a drawn pixel is rounded otherwise, all that follows differs.
    agent = dreaming(family, "vector" if family == "diffusion" else "dict")
    batch = family_batch(agent)
    whole = Imaginer(agent).imagine(batch)
    whole.model_version, whole.policy_version = 7, 5
    part, want = whole.rows(slice(1, 3)), Imaginer(agent).imagine(batch.map(lambda x: x[1:3]))
    assert (part.model_version, part.policy_version) == (7, 5)
    for name in (*ARRAYS, "reward", "is_last", "is_terminal"):
        got = getattr(part, name)
        np.testing.assert_allclose(got, getattr(want, name), rtol=1e-4, atol=1e-4, err_msg=name)
    doubled = part.map(lambda value: 2 * value)
    assert (doubled.model_version, doubled.rewards.sum()) == (7, 2 * part.rewards.sum())


def test_a_policy_learns_elsewhere_what_it_learns_with_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All three losses and every gradient of the behavior, from the same weights and draws."""
    fix_draws(monkeypatch)
    together, apart = dreaming("dreamerv3"), dreaming("dreamerv3")
    batch = family_batch(together)
    fused = Learner(together, LearnerConfig(device="cpu")).step(batch)
    imagined = Imaginer(apart).imagine(batch)
    alone = Learner(apart, LearnerConfig(device="cpu"), "behavior").step(imagined)
    names = {n for n in alone if n != "loss" and not n.startswith(("grad_norm/", "learning_rate/"))}
    assert {"loss/policy", "loss/value", "loss/replay_value", "return_scale"} <= names
    for name in names:
        assert alone[name] == pytest.approx(fused[name], rel=1e-4), name
    wanted = dict(together.behavior.named_parameters())
    for name, param in apart.behavior.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, wanted[name].grad, rtol=1e-3, atol=1e-5)
    assert all(param.grad is None for param in apart.world_model.parameters())


def test_a_behavior_that_does_not_imagine_is_refused() -> None:
    agent = make_small("tdmpc2")
    sentence = "latent_td does not learn in imagination: set behavior.kind to actor_critic, or "
    for ask in (lambda: Imaginer(agent), lambda: Learner(agent, part="behavior")):
        with pytest.raises(ValueError, match=sentence + "imagination.mode to fused"):
            ask()


def test_imagined_is_made_of_tensors_without_gradient() -> None:
    agent = dreaming("dreamerv3")
    batch = tensors(family_batch(agent))
    rollout = agent.world_model.rollout(
        agent.world_model.loss(batch).states.flatten(), agent.behavior.act, 2
    )
    assert rollout.states.tensors["deter"].requires_grad
    assert not Imagined.of(agent.world_model, rollout, batch).features.requires_grad


@pytest.mark.parametrize("action", ["continuous", "discrete"])
def test_actions_that_the_policy_has_given_up_count_less(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """min(1, pi / mu): nothing changes for the policy that acted, nor for likelier actions."""
    fix_draws(monkeypatch)
    agent = dreaming("dreamerv3", "vector", action)
    imagined = Imaginer(agent).imagine(family_batch(agent)).map(torch.from_numpy)
    behavior, discount = agent.imagining(), agent.world_model.discount

    def policy_loss(shift: float | None) -> torch.Tensor:
        fresh = behavior.normalizer.state_dict()
        fresh = {name: value.clone() for name, value in fresh.items()}
        kept = imagined.log_prob
        imagined.log_prob = None if shift is None else kept + shift
        loss = behavior.imagined_loss(imagined, discount).losses["policy"]
        imagined.log_prob = kept
        behavior.normalizer.load_state_dict(fresh)
        return loss.detach()

    own, same, likelier, given_up = map(policy_loss, (None, 0.0, -1.0, 1000.0))
    same_sums(same, own)
    same_sums(likelier, own)
    # Only the entropy bonus is left of an action that the policy would hardly take now.
    entropy = behavior.actor.log_prob_and_entropy(
        behavior.actor(imagined.features[:-1]), imagined.actions
    )[1]
    going = torch.cat([imagined.start_continue[None], imagined.continues[:-1]]).cumprod(0)
    bonus = -going * behavior.config.entropy_scale * entropy
    same_sums(given_up, bonus.detach())
    assert not torch.allclose(given_up, own)

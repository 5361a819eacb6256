"""TD-MPC2's invariants: the simplex, and who learns from which loss.

Its windows are in test_tdmpc2_windows.py, the reference's numbers in test_parity_tdmpc2.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import family_batch, look, losses_of, make_tdmpc2, same_sums, tensors, unbroken_batch
from torch import Tensor, nn

from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import State
from worldflux_dist.models.tdmpc2 import TDMPC2Config
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.activations import mish, simnorm
from worldflux_dist.nn.layers import BinOutput
from worldflux_dist.nn.optim import ClippedAdam


def gradient(loss: Tensor, module: nn.Module) -> float:
    """The largest entry of the gradient; 0 where the loss does not reach the module."""
    params = list(module.parameters())
    grads = torch.autograd.grad(loss.sum(), params, retain_graph=True, allow_unused=True)
    return max(0.0 if grad is None else float(grad.abs().max()) for grad in grads)


# ------------------------------------------------------------------------------ functions


def test_mish_and_its_gradient() -> None:
    x = torch.cat([torch.linspace(-30, 30, 121), torch.tensor([-1e4, 1e4])]).double()
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-9, atol=1e-12)
    x.requires_grad_()
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(mish, x[:121].detach().requires_grad_())
    weight = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
    got, want = (torch.autograd.grad(f(x), x, weight)[0] for f in (mish, F.mish))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    x = torch.linspace(-30, 30, 121).requires_grad_()
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(mish(x.detach()), F.mish(x), rtol=1e-5, atol=2e-6)


def test_simnorm_is_a_softmax_of_eight_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(4, 3, 24, generator=generator)
    weight = torch.randn(x.shape, generator=generator)
    x.requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)

    same_sums(simnorm(x), plain(x))
    got, want = (torch.autograd.grad(f(x), x, weight)[0] for f in (simnorm, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for huge in (1e3 * x.detach(), 1e9 * x.detach(), torch.full((8,), 1e9), torch.full((8,), -1e9)):
        totals = simnorm(huge).unflatten(-1, (-1, 8)).sum(-1)
        same_sums(totals, torch.ones_like(totals))


def test_bins_beyond_the_last_have_no_probability() -> None:
    out = BinOutput(4, 101)
    nn.init.normal_(out.weight)
    logits = out(torch.randn(5, 4))
    assert logits.shape == (5, 104)
    assert logits.softmax(-1)[:, 101:].eq(0).all()
    bins = dist.symlog_bins(101)
    torch.testing.assert_close(
        dist.twohot_predict(logits, bins), dist.twohot_predict(logits[:, :101], bins)
    )


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
@torch.no_grad()
def test_latents_stay_on_the_simplices(obs: str) -> None:
    agent = make_tdmpc2(obs)
    model = agent.world_model
    seen = {k: v if v.dtype == np.uint8 else 1e6 * v for k, v in look(agent).items()}
    state = model.encode(seen)
    far = State(state.tensors | {"latent": 1e6 * torch.randn(3, 16)})
    action = torch.full((3, 2), 1e6)
    for one in (state, model.transition(state, action), model.transition(far, action)):
        latent = one.tensors["latent"]
        assert (latent >= 0).all()
        same_sums(latent.unflatten(-1, (2, 8)).sum(-1), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("length", "discount"),
    [(1, 0.95), (25, 0.95), (100, 0.95), (200, 0.975), (500, 0.99), (1000, 0.995), (9999, 0.995)],
)
def test_discount_of_an_episode_length(length: int, discount: float) -> None:
    assert TDMPC2Config(episode_length=length).discount == pytest.approx(discount)


# -------------------------------------------------------------------- who learns from what


def test_target_qs_have_no_gradient_and_follow_slowly() -> None:
    agent = make_tdmpc2()
    learner = Learner(agent, LearnerConfig(device="cpu"))
    behavior = agent.behavior
    before = [p.clone() for p in behavior.target_qs.parameters()]
    learner.step(family_batch(agent))
    for old, target, q in zip(
        before, behavior.target_qs.parameters(), behavior.qs.parameters(), strict=True
    ):
        assert target.grad is None
        torch.testing.assert_close(target, 0.99 * old + 0.01 * q)
        assert not torch.equal(target, old)


def test_which_losses_reach_which_part() -> None:
    agent = make_tdmpc2()
    model, behavior = agent.world_model, agent.behavior
    found = losses_of(agent, unbroken_batch(agent))
    parts = {name: getattr(model, name) for name in ("encoder", "dynamics", "reward", "terminal")}
    parts |= {name: getattr(behavior, name) for name in ("qs", "actor")}
    reached = {
        loss: {name for name, part in parts.items() if gradient(value, part) > 0}
        for loss, value in found.items()
    }
    shared = {"encoder", "dynamics"}
    assert reached == {
        "consistency": shared,
        "reward": shared | {"reward"},
        "termination": shared | {"terminal"},
        "value": shared | {"qs"},
    }


@pytest.mark.parametrize("action", ["continuous", "discrete", "mixed"])
def test_the_policy_loss_teaches_the_actor_alone(action: str) -> None:
    """All else has the gradients of the first stage; the actor those of the second, at which the
    Qs have stepped and the latents are the old ones."""
    agent = make_tdmpc2(action=action, clip=1e9, behavior={"clip": 1e9, "dropout": 0.0})
    other, batch = copy.deepcopy(agent), family_batch(agent)
    learner = Learner(agent, LearnerConfig(device="cpu"))
    torch.manual_seed(1)
    learner.step(batch)
    torch.manual_seed(1)
    loss, _, path = other(tensors(batch))
    assert not path[0].requires_grad
    loss.backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert not any("actor" in name for name in grads)
    for name, param in agent.named_parameters():
        if not name.startswith("behavior.actor") and param.requires_grad:
            same_sums(param.grad, grads[name], msg=name)
    other.behavior.qs.load_state_dict(agent.behavior.qs.state_dict())
    other.policy_loss(path)[0].backward()
    for mine, theirs in zip(
        agent.behavior.actor.parameters(), other.behavior.actor.parameters(), strict=True
    ):
        same_sums(mine.grad, theirs.grad)
        assert mine.grad.abs().max() > 0


def test_what_is_to_be_predicted_has_no_gradient() -> None:
    agent = make_tdmpc2()
    batch = unbroken_batch(agent)
    batch.obs["obs"].requires_grad_()
    for loss in losses_of(agent, batch).values():
        (grad,) = torch.autograd.grad(loss.sum(), batch.obs["obs"], retain_graph=True)
        assert grad[:, 0].abs().min() > 0
        assert not grad[:, 1:].any()


def test_dropout_is_in_the_learned_qs_alone() -> None:
    agent = make_tdmpc2(behavior={"dropout": 0.5})
    behavior, output = agent.behavior, agent.world_model.loss(unbroken_batch(agent))
    features, reward = output.states.tensors["latent"].detach(), output.batch.reward
    draw = behavior.value_noise((3, 4), "cpu")
    ahead = behavior.value_noise((3, 3), "cpu")

    def differs(function: Any) -> bool:
        behavior.scale.fill_(1.0)
        first = function()
        behavior.scale.fill_(1.0)
        return not torch.equal(first, function())

    assert not differs(lambda: behavior.value(features, draw))
    assert not differs(lambda: behavior.target(features, reward, torch.ones(3, 4), draw))
    assert differs(lambda: behavior.loss(agent.world_model, output, ahead).losses["value"])
    assert differs(lambda: behavior.policy_loss(features, torch.ones(features.shape[1]), draw)[0])
    behavior = make_tdmpc2(action="discrete", behavior={"dropout": 0.5}).behavior
    draw = behavior.value_noise((3, 4), "cpu")
    assert differs(lambda: behavior.policy_loss(features, torch.ones(features.shape[1]), draw)[0])


def test_the_expected_q_of_a_choice_is_its_average() -> None:
    behavior = make_tdmpc2(action="discrete", behavior={"dropout": 0.0}).behavior
    features = torch.rand(3, 4, 16)
    draw = behavior.value_noise((3, 4), "cpu")
    got = behavior._expected_q(features, behavior.policy(features).action, draw.pair)
    probs, want = behavior.actor(features).softmax(-1), 0.0
    for choice in range(3):
        action = F.one_hot(torch.tensor(choice), 3).float().expand(3, 4, 3)
        want = want + probs[..., choice] * behavior.q(features, action, draw.pair).mean(0)
    same_sums(got, want)
    assert gradient(got, behavior.actor) > 0
    assert gradient(got, behavior.qs) == 0


def test_the_value_is_the_mean_and_the_target_the_least_of_two_qs() -> None:
    behavior = make_tdmpc2(behavior={"num_q": 4}).behavior
    features = torch.rand(5, 16)
    pairs = set()
    for seed in range(40):
        torch.manual_seed(seed)
        draw = behavior.value_noise((5,), "cpu")
        pairs.add(tuple(sorted(draw.pair.tolist())))
        action = behavior.act(features, noise=draw.action)
        each = behavior.q(features, action, torch.arange(4))[draw.pair]
        same_sums(behavior.value(features, draw), each.mean(0))
        reward, going = torch.randn(5), torch.rand(5)
        logits = behavior.target_qs(torch.cat([features, action], -1))[draw.pair]
        slow = dist.symexp(dist.twohot_predict(logits, behavior.bins))
        assert not torch.allclose(slow, each)
        want = reward + going * slow.amin(0)
        same_sums(behavior.target(features, reward, going, draw), want)
    assert len(pairs) == 6


def test_the_encoder_learns_slower() -> None:
    agent = make_tdmpc2(learning_rate=1e-2)
    optimizer = agent.stages()["model"][0]
    assert isinstance(optimizer, ClippedAdam)
    slow = {id(p) for p in agent.world_model.encoder.parameters()}
    first, rest = optimizer.param_groups
    assert {id(p) for p in first["params"]} == slow
    assert (first["lr"], rest["lr"]) == pytest.approx((3e-3, 1e-2))
    before = copy.deepcopy(agent.world_model)
    Learner(agent, LearnerConfig(device="cpu")).step(family_batch(agent))

    def moved(name: str) -> float:
        new, old = (getattr(model, name).parameters() for model in (agent.world_model, before))
        return max(float((a - b).detach().abs().max()) for a, b in zip(new, old, strict=True))

    assert moved("encoder") == pytest.approx(3e-3, rel=0.01)  # Adam's first step is its rate
    assert moved("dynamics") == pytest.approx(1e-2, rel=0.01)


def test_clipping_cuts_the_norm_of_all_gradients_together() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = ClippedAdam([{"params": [params[0]], "lr": 0.0}, {"params": [params[1]]}], 0.1, 2.0)
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(params[0].grad, torch.tensor([1.2, 0.0]))
    torch.testing.assert_close(params[1].grad, torch.tensor([1.6]))
    assert optimizer.state[params[1]]["exp_avg"].item() == pytest.approx(0.16)
    params[0].grad, params[1].grad = torch.tensor([0.3, 0.0]), torch.tensor([0.4])
    optimizer.step()
    assert params[1].grad.item() == pytest.approx(0.4)

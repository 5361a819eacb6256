"""TD-MPC2's invariants: the simplex, who learns from which loss, windows, resets, frames.

The reference's numbers are in test_parity_tdmpc2.py.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import LENGTH, family_batch, look, make_small, perturbed, random_batch, tensors
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import State
from worldflux_dist.models.tdmpc2 import TDMPC2Config
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.mish import BinOutput, mish, simnorm
from worldflux_dist.nn.optim import ClippedAdam
from worldflux_dist.nn.vision import random_shift

STILL = 0.5  # noise of a random shift that moves nothing


def make_agent(obs: str = "vector", action: str = "continuous", **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(make_small("tdmpc2", obs, action, **options))


def make_batch(agent: Any, size: int = 3, length: int = 4, seed: int = 0) -> Batch:
    """A (B, T) batch of tensors without a reset."""
    batch = random_batch(agent.spaces, size + 2, length, seed).map(lambda value: value[2:])
    return tensors(batch)


def losses_of(agent: Any, batch: Batch, **more: Any) -> dict[str, Tensor]:
    """The model's and the value losses, (B, H) and (num_q, B, H), the same draws each time."""
    torch.manual_seed(1)
    output = agent.world_model.loss(batch, **more)
    return output.losses | agent.behavior.loss(agent.world_model, output).losses


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
    torch.testing.assert_close(mish(x), F.mish(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mish(x.detach()), F.mish(x), rtol=1e-5, atol=1e-6)


def test_simnorm_is_a_softmax_of_eight_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(4, 3, 24, generator=generator)
    weight = torch.randn(x.shape, generator=generator)
    x.requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)

    torch.testing.assert_close(simnorm(x), plain(x))
    got, want = (torch.autograd.grad(f(x), x, weight)[0] for f in (simnorm, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for scale in (1e3, 1e6):
        huge = simnorm(x.detach() * scale)
        torch.testing.assert_close(huge.unflatten(-1, (-1, 8)).sum(-1), torch.ones(4, 3, 3))


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
    agent = make_agent(obs)
    model, seen = agent.world_model, look(agent)
    state = model.encode(
        {
            k: v * (1e6 if k in ("obs", "vector") and v.dtype != np.uint8 else 1)
            for k, v in seen.items()
        }
    )
    far = State(state.tensors | {"latent": 1e6 * torch.randn(3, 16)})
    action = torch.full((3, 2), 1e6)
    for one in (state, model.transition(state, action), model.transition(far, action)):
        latent = one.tensors["latent"]
        assert (latent >= 0).all()
        torch.testing.assert_close(latent.unflatten(-1, (2, 8)).sum(-1), torch.ones(3, 2))


@pytest.mark.parametrize(
    ("length", "discount"),
    [(1, 0.95), (25, 0.95), (100, 0.95), (200, 0.975), (500, 0.99), (1000, 0.995), (9999, 0.995)],
)
def test_discount_of_an_episode_length(length: int, discount: float) -> None:
    assert TDMPC2Config(episode_length=length).discount == pytest.approx(discount)


# -------------------------------------------------------------------- who learns from what


def test_target_qs_have_no_gradient_and_follow_slowly() -> None:
    agent = make_agent()
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
    agent = make_agent()
    model, behavior = agent.world_model, agent.behavior
    found = losses_of(agent, make_batch(agent))
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
    agent = make_agent(action=action, clip=1e9, behavior={"clip": 1e9, "dropout": 0.0})
    other, batch = copy.deepcopy(agent), family_batch(agent)
    learner = Learner(agent, LearnerConfig(device="cpu"))
    torch.manual_seed(1)
    learner.step(batch)
    torch.manual_seed(1)
    loss, _, features = other(tensors(batch))
    assert not features.requires_grad
    loss.backward()
    grads = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert not any("actor" in name for name in grads)
    for name, param in agent.named_parameters():
        if not name.startswith("behavior.actor") and param.requires_grad:
            torch.testing.assert_close(param.grad, grads[name], msg=name)
    other.behavior.qs.load_state_dict(agent.behavior.qs.state_dict())
    other(None, "policy", features)[0].backward()
    for mine, theirs in zip(
        agent.behavior.actor.parameters(), other.behavior.actor.parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert mine.grad.abs().max() > 0


def test_what_is_to_be_predicted_has_no_gradient() -> None:
    agent = make_agent()
    batch = make_batch(agent)
    batch.obs["obs"].requires_grad_()
    for loss in losses_of(agent, batch).values():
        (grad,) = torch.autograd.grad(loss.sum(), batch.obs["obs"], retain_graph=True)
        assert grad[:, 0].abs().min() > 0
        assert not grad[:, 1:].any()


def test_dropout_is_in_the_learned_qs_alone() -> None:
    agent = make_agent(behavior={"dropout": 0.5})
    behavior, output = agent.behavior, agent.world_model.loss(make_batch(agent))
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
    assert differs(lambda: behavior.policy_loss(features, draw)[0])
    choices = make_agent(action="discrete", behavior={"dropout": 0.5}).behavior
    assert not torch.equal(
        *(choices.policy_loss(features, choices.value_noise((3, 4), "cpu"))[0] for _ in range(2))
    )


def test_the_expected_q_of_a_choice_is_its_average() -> None:
    behavior = make_agent(action="discrete", behavior={"dropout": 0.0}).behavior
    features = torch.rand(3, 4, 16)
    draw = behavior.value_noise((3, 4), "cpu")
    got = behavior._expected_q(features, behavior.policy(features).action, draw.pair)
    probs, want = behavior.actor(features).softmax(-1), 0.0
    for choice in range(3):
        action = F.one_hot(torch.tensor(choice), 3).float().expand(3, 4, 3)
        want = want + probs[..., choice] * behavior.q(features, action, draw.pair).mean(0)
    torch.testing.assert_close(got, want)
    assert gradient(got, behavior.actor) > 0
    assert gradient(got, behavior.qs) == 0


def test_the_value_is_the_mean_and_the_target_the_least_of_two_qs() -> None:
    behavior = make_agent(behavior={"num_q": 4}).behavior
    behavior.target_qs.load_state_dict(behavior.qs.state_dict())
    features = torch.rand(5, 16)
    pairs = set()
    for seed in range(20):
        torch.manual_seed(seed)
        draw = behavior.value_noise((5,), "cpu")
        pairs.add(tuple(sorted(draw.pair)))
        action = behavior.act(features, noise=draw.action)
        each = behavior.q(features, action, range(4))[list(draw.pair)]
        torch.testing.assert_close(behavior.value(features, draw), each.mean(0))
        reward, going = torch.randn(5), torch.rand(5)
        want = reward + going * each.amin(0)
        torch.testing.assert_close(behavior.target(features, reward, going, draw), want)
    assert len(pairs) == 6


def test_the_encoder_learns_slower() -> None:
    agent = make_agent(learning_rate=1e-2)
    optimizer = agent.optimizers()["model"]
    assert isinstance(optimizer, ClippedAdam)
    slow = {id(p) for p in agent.world_model.encoder.parameters()}
    first, rest = optimizer.param_groups
    assert {id(p) for p in first["params"]} == slow
    assert (first["lr"], rest["lr"]) == pytest.approx((3e-3, 1e-2))
    before = copy.deepcopy(agent.world_model)
    Learner(agent, LearnerConfig(device="cpu")).step(family_batch(agent))

    def moved(name: str) -> float:
        pairs = zip(
            getattr(agent.world_model, name).parameters(),
            getattr(before, name).parameters(),
            strict=True,
        )
        return max(float((a - b).abs().max()) for a, b in pairs)

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


# ------------------------------------------------------------------------- windows, resets


def cut(batch: Batch, length: int) -> Batch:
    return batch.map(lambda value: value.reshape(-1, length, *value.shape[2:]))


def test_long_rows_are_windows() -> None:
    agent = make_agent()
    long = make_batch(agent, 16, 64)
    want = losses_of(agent, cut(long, 4))
    for batch in (long, cut(long, 16)):
        got = losses_of(agent, batch)
        assert all(torch.equal(got[name], value) for name, value in want.items())
    assert want["consistency"].shape == (256, 3)
    more = make_batch(agent, 16, 67)
    more = more.map(lambda value: value.clone())
    for name, value in long.columns().items():
        more.columns()[name][:, :64] = value
    got = losses_of(agent, more)  # three steps over
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_rows_too_short_for_a_window_are_refused() -> None:
    for obs, window in (("vector", 4), ("image", 6)):
        agent = make_agent(obs)
        losses_of(agent, make_batch(agent, length=window))
        with pytest.raises(ValueError, match=rf"windows of {window} steps and replay gives 3: set"):
            agent.world_model.loss(make_batch(agent, length=3))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_reset_takes_away_its_losses_and_restarts_the_path(at: int) -> None:
    agent = make_agent()
    model, batch = agent.world_model, make_batch(agent)
    plain = losses_of(agent, batch)
    batch.is_first[1, at] = batch.is_last[1, at - 1] = batch.is_terminal[1, at - 1] = True
    batch.action[1, at] = batch.reward[1, at] = 0
    output, found = model.loss(batch), losses_of(agent, batch)
    for name in ("consistency", "reward", "value"):
        assert not found[name][..., 1, at - 1].any(), name
        kept = [k for k in range(3) if k != at - 1]
        assert found[name][..., kept].abs().min() > 0, name
        for row in (0, 2):
            torch.testing.assert_close(found[name][..., row, :], plain[name][..., row, :])
    assert found["termination"][1, at - 1] == 0
    path, seen = output.path.tensors["latent"], output.states.tensors["latent"]
    assert torch.equal(path[1, at], seen[1, at])
    assert not torch.equal(path[0, at], seen[0, at])
    assert not output.states.tensors["before"][1, at].any()
    for t in range(at + 1, 4):
        state = model.transition(output.path[1:2, t - 1], batch.action[1:2, t])
        torch.testing.assert_close(state.tensors["latent"], path[1:2, t])


def test_states_of_a_window_are_those_of_single_updates() -> None:
    agent = make_agent()
    model, batch = agent.world_model, tensors(family_batch(agent))
    states = model.loss(batch).states
    state = model.initial(3)
    first = batch.is_first.clone()
    first[:, ::4] = True  # what lies before a window is not known
    for t in range(LENGTH):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t] * ~first[:, t, None], obs, first[:, t])
        rows = states.map(lambda value: value.unflatten(0, (3, 3))[:, t // 4, t % 4])
        for name in ("latent", "before"):
            torch.testing.assert_close(rows.tensors[name], state.tensors[name], msg=name)


def test_losses_by_hand() -> None:
    agent = make_agent(behavior={"dropout": 0.0})
    model, behavior, batch = agent.world_model, agent.behavior, make_batch(agent)
    batch.is_terminal[2, 3] = True
    output, draw = model.loss(batch), behavior.value_noise((3, 3), "cpu")
    value = behavior.loss(model, output, draw).losses["value"]
    state = seen = model.encode({"obs": batch.obs["obs"][:, 0]})
    for k in range(3):
        action, weight = batch.action[:, k + 1], 0.5**k
        seen = model.encode({"obs": batch.obs["obs"][:, k + 1]}).tensors["latent"]
        pair = torch.cat([state.tensors["latent"], action], -1)
        noise = draw._replace(action=draw.action[:, k])
        going = model.discount * torch.tensor([1.0, 1.0, 0.0 if k == 2 else 1.0])
        target = dist.symlog(behavior.target(seen, batch.reward[:, k + 1], going, noise))
        logits = behavior.qs(pair)
        want = [weight * dist.twohot_loss(one, target, bins=behavior.bins) for one in logits]
        torch.testing.assert_close(value[..., k], torch.stack(want))
        reward = dist.twohot_loss(
            model.reward(pair), dist.symlog(batch.reward[:, k + 1]), bins=model.bins
        )
        torch.testing.assert_close(output.losses["reward"][:, k], weight * reward)
        state = model.transition(state, action)
        latent = state.tensors["latent"]
        error = (latent - seen).square().mean(-1)
        torch.testing.assert_close(output.losses["consistency"][:, k], weight * error)
        ended = batch.is_terminal[:, k + 1].float()
        logit = model.terminal(latent).squeeze(-1)
        want_ended = F.binary_cross_entropy_with_logits(logit, ended, reduction="none")
        torch.testing.assert_close(output.losses["termination"][:, k], want_ended)
    assert agent.world_model.loss_scales == {"consistency": 20, "reward": 0.1, "termination": 1}
    assert behavior.loss_scales == {"value": 0.1}


@torch.no_grad()
def test_what_termination_makes_of_continue() -> None:
    going = {}
    for kind in ("soft", "hard", "none"):
        agent = make_agent(termination=kind)
        model = agent.world_model
        if model.terminal is not None:
            for param in model.terminal.parameters():
                param *= 20
        state = model.encode(look(agent))
        going[kind] = model.decode(state, ("continue",)).preds["continue"]
        assert ("termination" in losses_of(agent, make_batch(agent))) == (kind != "none")
        if kind == "soft":
            ends = torch.sigmoid(model.terminal(state.tensors["latent"]).squeeze(-1))
            torch.testing.assert_close(going[kind], 0.99 * (1 - ends))
    assert (going["none"] == 0.99).all()
    assert torch.equal(going["hard"], 0.99 * (going["soft"] >= 0.99 / 2))
    assert 0 < going["soft"].min() < 0.99 / 2 < going["soft"].max() < 0.99


@torch.no_grad()
def test_the_first_reward_is_zero_and_others_belong_to_the_pair_that_led_there() -> None:
    agent = make_agent()
    model, action = agent.world_model, torch.rand(3, 2)
    start = model.encode(look(agent))
    assert model.decode(start).preds["reward"].eq(0).all()
    pair = torch.cat([start.tensors["latent"], action], -1)
    want = dist.symexp(dist.twohot_predict(model.reward(pair), model.bins))
    for state in (model.transition(start, action), model.update(start, action, look(agent, 1))):
        torch.testing.assert_close(model.decode(state).preds["reward"], want)


# --------------------------------------------------------------------------------- frames


def test_stacks_hold_the_last_frames_and_begin_anew() -> None:
    """And a window's stacks are those of single updates."""
    agent = make_agent("dict")
    model, batch = agent.world_model, make_batch(agent, 2, 12)
    batch.is_first[0, 0] = batch.is_first[1, 4] = batch.is_first[0, 9] = batch.is_first[1, 11] = (
        True
    )
    seen: list[Tensor] = []
    hook = model.encoder.cnns[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    still = torch.full((2, 2), STILL)
    state, latents, begun = model.initial(2), [], [0, 0]
    for t in range(12):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t], obs, batch.is_first[:, t], still)
        latents.append(state.tensors["latent"])
        for i in range(2):
            begun[i] = t if batch.is_first[i, t] else begun[i]
            if i == 0 or t >= 4:
                times = [max(t - back, begun[i]) for back in (2, 1, 0)]
                assert torch.equal(seen[-1][i], batch.obs["image"][i, times])
    hook.remove()
    output = model.loss(batch, noise=torch.full((4, 4, 2), STILL))
    found = output.states.tensors["latent"].unflatten(0, (2, 2))  # (B, windows, 4, L)
    torch.testing.assert_close(found[:, 0], torch.stack(latents[2:6], 1))
    torch.testing.assert_close(found[0, 1], torch.stack(latents[8:12], 1)[0])
    torch.testing.assert_close(output.batch.reward, cut(batch, 6).reward[:, 2:])


def test_shifts_are_small_shared_by_frames_and_repeat_edges() -> None:
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (49, 3, 9, 10, 2)).astype(np.uint8)
    )
    grid = torch.arange(7) / 7 + 1e-3
    noise = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(49, 2)
    moved = random_shift(images, noise)
    assert moved.dtype == torch.uint8
    for i in range(49):
        x, y = i // 7, i % 7  # of the window in the padded image
        padded = F.pad(images[i].permute(0, 3, 1, 2).float(), (3, 3, 3, 3), mode="replicate")
        want = padded[:, :, y : y + 9, x : x + 10].permute(0, 2, 3, 1)
        assert torch.equal(moved[i].float(), want)
    assert torch.equal(random_shift(images, torch.full((49, 2), STILL)), images)
    torch.manual_seed(0)
    assert not torch.equal(random_shift(images), images)

"""Value learning and the actor-critic: equations by hand, and where gradients may go."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import make_agent, perturbed, random_batch, same_sums, tensors
from torch import Tensor, nn

from worldflux_dist.behaviors import returns
from worldflux_dist.behaviors.actor_critic import Actor, ActorCritic, ActorCriticConfig
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.data import Batch
from worldflux_dist.nn import distributions as dist
from worldflux_dist.spaces import ActionPart, Spaces

CHOICE, BOX = ActionPart("discrete", 3), ActionPart("continuous", 2)


def make_behavior(*parts: ActionPart, **options: Any) -> Any:
    torch.manual_seed(0)
    return ActorCritic(6, 8, parts or (CHOICE,), ActorCriticConfig(**options))


def make_imagined(horizon: int = 4, num: int = 5, start_continue: float = 0.9) -> Imagined:
    """Made-up features, rewards and continues, with actions of the three choices, from one row."""
    torch.manual_seed(1)
    actions = torch.eye(3)[torch.randint(3, (horizon, num))]
    going = 0.5 + 0.5 * torch.rand(horizon, num)
    features, rewards = torch.randn(horizon + 1, num, 6), torch.randn(horizon, num)
    start, zeros = torch.full((num,), start_continue), torch.zeros(1, num)
    return Imagined(features, actions, rewards, going, start, zeros, zeros.bool(), zeros.bool())


def replay_value_loss(
    behavior: Any, path: Tensor, batch: Batch, start_returns: Tensor, discount: float
) -> Tensor:
    """(T - 1, B) on the path of a batch, of whose states these are the imagined returns: each dream
    is one step long, with the return as its reward, and ends there."""
    num = batch.reward.numel()
    ended, actions = torch.zeros(1, num), torch.eye(3)[:1].expand(1, num, 3)
    features = path.detach().flatten(0, 1).expand(2, num, -1)
    dream = (start_returns.reshape(1, num), ended, torch.ones(num))
    steps = (batch.reward, batch.is_last, batch.is_terminal)
    imagined = Imagined(features, actions, *dream, *steps)
    return behavior.imagined_loss(imagined, discount, path).losses["replay_value"]


# ---------------------------------------------------------------------------- returns


def test_lambda_0_is_one_step_and_lambda_1_the_whole_sum() -> None:
    r, c, v = torch.randn(4, 2), torch.rand(4, 2), torch.randn(4, 2)
    torch.testing.assert_close(returns.lambda_return(r, c, v, 0.0), r + c * v)
    want = v[-1]
    for t in (3, 2, 1, 0):
        want = r[t] + c[t] * want
        torch.testing.assert_close(returns.lambda_return(r, c, v, 1.0)[t], want)


def test_lambda_return_by_hand() -> None:
    r, c = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.5, 0.8, 1.0])
    v = torch.tensor([10.0, 20.0, 40.0])
    # R2 = 4 + 40;  R1 = 2 + .8 (.25 * 20 + .75 * 44);  R0 = 1 + .5 (.25 * 10 + .75 * R1)
    want = torch.tensor([1 + 0.5 * (2.5 + 0.75 * 32.4), 32.4, 44.0])
    torch.testing.assert_close(returns.lambda_return(r, c, v, 0.75), want)


def test_normalizer_averages_percentiles_then_takes_the_maximum() -> None:
    normalizer = returns.ReturnNormalizer(rate=0.5)
    x = torch.arange(101.0)
    assert normalizer.update(x).item() == pytest.approx(47.5 - 2.5)  # updated before use
    assert normalizer.update(x / 10).item() == pytest.approx(28.5 - 1.5)
    normalizer = returns.ReturnNormalizer()
    assert normalizer.update(x).item() == 1  # .01 * 90: the maximum comes after the average
    assert normalizer.high.item() == pytest.approx(0.95)
    assert normalizer.low.item() == pytest.approx(0.05)
    assert set(dict(normalizer.named_buffers())) == {"low", "high"}


# ----------------------------------------------------------------------- replay values


def replay_batch() -> Batch:
    """Row 0 ends in a terminal step at t = 2, row 1 is truncated there, row 2 goes on."""
    reward = torch.tensor([[0.0, 1, 2, 0, 4]] * 3)
    last = torch.zeros(3, 5, dtype=torch.bool)
    last[:2, 2] = True
    terminal = last.clone()
    terminal[1] = False
    first = last.roll(1, 1)
    return Batch({}, torch.zeros(3, 5, 1), reward, first, last, terminal)


def test_truncation_bootstraps_and_a_terminal_step_does_not() -> None:
    """Replay targets by hand, with discount .5 and lambda .5. Every bootstrap is the imagined
    return of that state (10 t here), the loss has T - 1 rows, and is_last rows are zero."""
    behavior = make_behavior(lambda_=0.5)
    imagined = 10 * torch.arange(5.0).expand(3, 5)
    # A step that goes on: R_t = r' + .5 (.5 * 10 (t + 1) + .5 R_{t+1}), and R_3 = 4 + .5 * 40.
    target = torch.tensor(
        [
            [1 + 2.5 + 0.25 * 2, 2.0, 0 + 7.5 + 6, 24],  # arriving in the end is worth its reward
            [1 + 2.5 + 0.25 * 12, 2 + 0.5 * 20, 0 + 7.5 + 6, 24],  # or that and the bootstrap
            [1 + 2.5 + 0.25 * 10.375, 2 + 5 + 0.25 * 13.5, 0 + 7.5 + 6, 24],
        ]
    )
    batch = replay_batch()
    features = torch.randn(3, 5, 6)
    with torch.no_grad():
        for param in behavior.parameters():
            param += 0.1 * torch.randn(param.shape)
        logits = behavior.critic(features)
        slow = dist.twohot_predict(behavior.slow_critic(features), behavior.bins)
        want = dist.twohot_loss(logits[:, :-1], target, slow[:, :-1], bins=behavior.bins)
        want[:2, 2] = 0
        got = replay_value_loss(behavior, features, batch, imagined, 0.5)
    assert got.shape == (4, 3)
    same_sums(got.t(), want)


def test_a_loss_on_masked_rows_is_not_made_up_for() -> None:
    behavior, batch = make_behavior(), replay_batch()
    losses = []
    for last in (batch.is_last, torch.zeros_like(batch.is_last)):
        part = Batch({}, batch.action, 0 * batch.reward, batch.is_first, last, last & False)
        losses.append(
            replay_value_loss(behavior, torch.randn(3, 5, 6), part, torch.zeros(3, 5), 1.0)
        )
    masked, whole = losses  # a fresh critic gives every row the same loss, 2 ln 255
    same_sums(whole, torch.full((4, 3), 2 * np.log(255).item()))
    assert masked.sum().item() == pytest.approx(whole.sum().item() * 10 / 12, rel=1e-5)


# -------------------------------------------------------------------------- imagination


def test_losses_of_imagined_steps_by_hand() -> None:
    """H of the H + 1 states; the weight of a state is the product of continues up to it, the
    start's own included; advantages against the fast critic over the normaliser's scale."""
    behavior, imagined = make_behavior(return_rate=1.0), make_imagined()
    with torch.no_grad():
        for param in behavior.parameters():
            param += 0.1 * torch.randn(param.shape)
    found, features = behavior.imagined_loss(imagined, 1.0), imagined.features
    losses, metrics = found.losses, found.metrics
    with torch.no_grad():
        value = behavior.value(features)
        slow = dist.twohot_predict(behavior.slow_critic(features), behavior.bins)
        assert not torch.allclose(value, slow)
        target = returns.lambda_return(imagined.rewards, imagined.continues, value[1:], 0.95)
        same_sums(metrics["return_imagined"], target.mean(), 255, target.abs().max().item())
        low, high = np.percentile(target.numpy(), [5, 95])
        scale = max(1.0, high - low)
        same_sums(metrics["return_scale"], scale, 255, target.abs().max().item())
        weight = torch.stack([imagined.start_continue, *imagined.continues[:-1]]).cumprod(0)
        logs = behavior.actor(features[:-1])[0][0].log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        log_prob = (logs * imagined.actions).sum(-1)
        advantage = (target - value[:-1]) / scale
        policy = -weight * (log_prob * advantage + 3e-4 * entropy)
        logits = behavior.critic(features[:-1])
        fit = dist.twohot_loss(logits, target, slow[:-1], bins=behavior.bins)
    same_sums(losses["policy"], policy, 255)
    same_sums(losses["value"], weight * fit)


def test_a_start_predicted_terminal_has_no_weight() -> None:
    behavior = make_behavior()
    losses = behavior.imagined_loss(make_imagined(start_continue=1e-9), 1.0).losses
    assert losses["policy"].abs().max() < 1e-6
    assert losses["value"].abs().max() < 1e-6


def test_a_fresh_critic_predicts_exactly_zero_and_the_slow_one_follows() -> None:
    behavior = make_behavior()
    features = torch.randn(50, 6)
    assert behavior.value(features).eq(0).all()
    fast, slow = behavior.critic, behavior.slow_critic
    before = [p.clone() for p in slow.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(fast.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in slow.parameters())
    with torch.no_grad():
        for param in fast.parameters():
            param += torch.randn(param.shape)
    behavior.update_targets()
    for new, old, source in zip(slow.parameters(), before, fast.parameters(), strict=True):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * source)


def test_imagination_starts_at_the_state_and_has_no_gradient() -> None:
    agent: Any = perturbed(make_agent("disc"))
    state = agent.world_model.initial(3).map(lambda value: value.requires_grad_())
    rollout = agent.behavior.imagine(agent.world_model, state, 4)
    assert rollout.states.tensors["deter"].shape == (5, 3, 64)
    assert torch.equal(rollout.states.tensors["deter"][0], state.tensors["deter"])
    assert rollout.actions.shape == (4, 3, 3)
    assert not any(v.requires_grad for v in [*rollout.states.tensors.values(), rollout.rewards])
    assert agent.behavior.imagine(agent.world_model, state).rewards.shape == (5, 3)  # its horizon


# -------------------------------------------------------------------------------- actor


def test_discrete_policies_have_no_uniform_share() -> None:
    actor = Actor(2, 4, 1, (CHOICE,))
    logits = torch.tensor([[20.0, 0.0, 0.0]])
    log_prob, entropy = actor.log_prob_and_entropy([(logits,)], torch.tensor([[0.0, 1.0, 0.0]]))
    assert log_prob.item() == pytest.approx(-20, abs=1e-3)  # mixed it would be ln(.01 / 3)
    assert 0 < entropy.item() < 1e-6
    uniform = torch.zeros(1, 3)
    assert actor.log_prob_and_entropy([(uniform,)], torch.eye(3)[:1])[1].item() == pytest.approx(
        np.log(3)
    )


def test_continuous_policies_are_normal_and_not_squashed() -> None:
    torch.manual_seed(0)
    actor = Actor(4, 8, 1, (BOX,))
    mean, std = actor(torch.randn(100, 4))[0]
    assert mean.abs().max() < 0.1  # output scale .01
    start = 0.9 / (1 + np.exp(-2)) + 0.1
    torch.testing.assert_close(std, torch.full((100, 2), start), rtol=0, atol=0.01)
    with torch.no_grad():
        actor.heads[0].bias.fill_(50.0)
        actor.heads[1].bias.copy_(torch.tensor([50.0, -50.0]))
    mean, std = actor(torch.zeros(4000, 4))[0]
    assert mean.eq(1).all()  # tanh
    torch.testing.assert_close(std[0], torch.tensor([1.0, 0.1]))
    sample = actor.sample([(mean, std)])
    torch.testing.assert_close(sample.mean(0), torch.ones(2), rtol=0, atol=0.1)
    torch.testing.assert_close(sample.std(0), std[0], rtol=0.1, atol=0)
    assert sample.max() > 2
    assert torch.equal(actor.sample([(mean, std)], greedy=True), mean)


def test_parts_of_an_action_add_up() -> None:
    spaces = Spaces(
        gym_spaces.Box(-1, 1, (3,)),
        gym_spaces.Dict({"a": gym_spaces.MultiDiscrete([2, 3]), "b": gym_spaces.Box(-1, 1, (2,))}),
    )
    torch.manual_seed(0)
    actor = Actor(4, 8, 1, spaces.action_parts)
    policy = actor(torch.randn(6, 4))
    action = actor.sample(policy)
    assert action.shape == (6, 7)
    assert action[:, :2].sum(-1).eq(1).all()
    assert action[:, 2:5].sum(-1).eq(1).all()
    log_prob, entropy = actor.log_prob_and_entropy(policy, action)
    (two,), (three,), normal = policy
    parts = [
        torch.distributions.OneHotCategorical(logits=two),
        torch.distributions.OneHotCategorical(logits=three),
        torch.distributions.Independent(torch.distributions.Normal(*normal), 1),
    ]
    pieces = action.split([2, 3, 2], -1)
    want = sum(p.log_prob(x) for p, x in zip(parts, pieces, strict=True))
    same_sums(log_prob, want)
    same_sums(entropy, sum(p.entropy() for p in parts))
    greedy = actor.sample(policy, greedy=True)
    assert torch.equal(greedy[:, 2:5].argmax(-1), three.argmax(-1))


# ---------------------------------------------------------------------------- gradients


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    params = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [g for g in grads if g is not None and g.any()]


@pytest.mark.parametrize("kind", ["disc", "cont"])
def test_which_losses_reach_the_world_model(kind: str) -> None:
    agent: Any = perturbed(make_agent(kind))
    batch = tensors(random_batch(agent.spaces))
    model, behavior = agent.world_model, agent.behavior
    output = model.loss(batch)
    states = output.states
    with torch.no_grad():
        actions = model.rollout(states.flatten(), behavior.act, 5).actions
    attached = model.rollout(states.flatten(), actions)  # its gradient is cut all the same
    losses = behavior.loss(model, output, rollout=attached).losses
    assert losses["policy"].shape == losses["value"].shape == (5, 18)
    for name in ("policy", "value"):
        assert not gradients(losses[name].sum(), model), name
    assert not gradients(losses["policy"].sum(), behavior.critic)
    assert not gradients(losses["value"].sum(), behavior.actor)
    assert gradients(losses["policy"].sum(), behavior.actor)
    assert gradients(losses["value"].sum(), behavior.critic)
    for part in (model.encoder, model.core, model.posterior, behavior.critic):
        assert gradients(losses["replay_value"].sum(), part)
    for part in (model.decoder, model.reward, behavior.actor):
        assert not gradients(losses["replay_value"].sum(), part)


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("kind", ["disc", "cont"])
def test_bfloat16_keeps_the_gradients(kind: str) -> None:
    """Imagination without gradient must not leave cast weights behind that the losses then use:
    after it, the gradients on a fixed rollout point where those of float32 point."""
    agent: Any = perturbed(make_agent(kind))
    batch = tensors(random_batch(agent.spaces))
    model, behavior = agent.world_model, agent.behavior
    with torch.no_grad():
        states = model.loss(batch).states
        rollout = behavior.imagine(model, states.flatten())
    found = []
    for enabled in (False, True):
        behavior.normalizer = returns.ReturnNormalizer()  # the same scale for both
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model.loss(batch)
            behavior.imagine(model, output.states.flatten())
            losses = behavior.loss(model, output, rollout=rollout).losses
        found.append(
            {
                "actor": flat(gradients(losses["policy"].sum(), behavior.actor)),
                "critic": flat(gradients(losses["value"].sum(), behavior.critic)),
            }
        )
    for name, exact in found[0].items():
        half = found[1][name]
        assert half.shape == exact.shape, f"{name} parameters lost their gradient"
        assert torch.cosine_similarity(half, exact, dim=0) > 0.95, name
        assert half.norm().item() == pytest.approx(exact.norm().item(), rel=0.2), name


def test_bfloat16_reaches_every_parameter() -> None:
    agent: Any = perturbed(make_agent("disc"))
    batch = tensors(random_batch(agent.spaces))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = agent(batch)
    loss.backward()
    lost = [name for name, p in agent.named_parameters() if p.requires_grad and p.grad is None]
    assert not lost
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in agent.parameters())


def test_what_is_imagined_teaches_the_behavior_alone() -> None:
    """The stage on imagined batches is the fused losses' weighted sum, on the starts' features."""
    agent: Any = perturbed(make_agent("disc"))
    batch = tensors(random_batch(agent.spaces))
    output = agent.world_model.loss(batch)
    rollout = agent.behavior.imagine(agent.world_model, output.states.flatten())
    fused = copy.deepcopy(agent.behavior).loss(agent.world_model, output, rollout).losses
    total, metrics, _ = agent.imagined_loss(Imagined.of(agent.world_model, rollout, batch))
    for name, loss in fused.items():
        same_sums(metrics[f"loss/{name}"], loss.mean())
    want = fused["policy"].mean() + fused["value"].mean() + 0.3 * fused["replay_value"].mean()
    same_sums(total, want)
    total.backward()
    assert all(param.grad is None for param in agent.world_model.parameters())
    learned = [param for param in agent.behavior.parameters() if param.requires_grad]
    assert all(param.grad is not None for param in learned)

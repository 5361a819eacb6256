"""DreamerV3's equations against values recorded from the public reference implementation.

Layers, distributions, losses with their gradients, optimizer traces and fresh weights, with the
tolerances that come with the values; test_parity_models.py compares whole models. Skipped where
the folder is absent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    PREDICTIONS,
    Values,
    close,
    close_to_norm,
    noise_for,
    recorded,
    reference_name,
)
from small import make_agent
from torch import Tensor, nn

from worldflux_dist.behaviors import returns
from worldflux_dist.behaviors.actor_critic import Actor, ActorCritic, ActorCriticConfig
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import BlockLinear, Linear, RMSNorm
from worldflux_dist.nn.optim import LaProp
from worldflux_dist.nn.vision import Conv
from worldflux_dist.spaces import ActionPart

ref = recorded  # the fixture


# --------------------------------------------------------------------------------- layers


def test_linear_layers(ref: Values) -> None:
    for name in ("linear", "linear_shaped"):
        v = ref.under(f"prim/{name}/")
        layer = Linear(5, v["bias"].numel())
        layer.load_state_dict({"weight": v["kernel"].t(), "bias": v["bias"]})
        close(layer(v["x"]).reshape(v["y"].shape), v["y"], 1e-5, name)
    v = ref.under("prim/blocklinear/")
    block = BlockLinear(12, 8, 4)
    block.load_state_dict({"weight": v["kernel"], "bias": v["bias"]})
    close(block(v["x"]), v["y"])


def test_norm_convolution_pooling_and_activation(ref: Values) -> None:
    for name in ("rmsnorm", "rmsnorm_nhwc"):
        v = ref.under(f"prim/{name}/")
        norm = RMSNorm(len(v["scale"]))
        norm.load_state_dict({"scale": v["scale"]})
        close(norm(v["x"]), v["y"], 1e-5, name)
    v = ref.under("prim/conv_k5_same/")
    conv = Conv(3, 6)
    conv.load_state_dict({"weight": v["kernel"].permute(3, 2, 0, 1), "bias": v["bias"]})
    close(conv(v["x"].permute(0, 3, 1, 2)).permute(0, 2, 3, 1), v["y"])
    v = ref.under("prim/maxpool2x2/")
    close(F.max_pool2d(v["x"].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1), v["y"], 0)
    v = ref.under("prim/upsample2x/")
    close(F.interpolate(v["x"].permute(0, 3, 1, 2), scale_factor=2).permute(0, 2, 3, 1), v["y"], 0)
    v = ref.under("prim/silu/")
    close(F.silu(v["x"]), v["y"])


def test_symlog_and_symexp(ref: Values) -> None:
    close(dist.symlog(ref["symlog/x"]), ref["symlog/y"])
    close(dist.symexp(ref["symexp/x"]), ref["symexp/y"])


def test_initialisation(ref: Values) -> None:
    """Spread and cut of fresh weights; zero biases and outputs, norm scales of one."""
    torch.manual_seed(0)
    linear, block, conv = Linear(256, 300), BlockLinear(512, 1024, 8), Conv(16, 64)
    ours = [linear.weight, linear.bias, block.weight, block.bias, conv.weight, conv.bias]
    ours += [Linear(256, 300, 0.01).weight, Linear(256, 255, 0.0).weight, RMSNorm(64).scale]
    columns = list(ref.raw("init/columns"))
    for name, row, weight in zip(ref.raw("init/names"), ref["init/stats"], ours, strict=True):
        v = dict(zip(columns, row.tolist(), strict=True))
        assert weight.numel() == v["size"], name
        compare_spread(str(name), weight, v)
        if v["std"]:
            sigma = v["sqrt(1/fan)"] * (0.01 if ".01" in name else 1.0)
            assert weight.std().item() == pytest.approx(sigma, rel=0.02), name
            assert weight.abs().max() <= 2 * 1.1368 * sigma * 1.0001, name
    wanted = dict(zip(ref.raw("init/model_names"), ref["init/model_stats"], strict=True))
    for kind in ("disc", "cont"):
        torch.manual_seed(1)
        agent = make_agent(kind)
        for name, weight in agent.named_parameters():
            theirs = f"{kind}:{reference_name(agent, name)}"
            size, mean, std, low, high = wanted.pop(theirs).tolist()
            assert weight.numel() == size, theirs
            compare_spread(theirs, weight, {"mean": mean, "std": std, "min": low, "max": high})
    assert not wanted, sorted(wanted)


def compare_spread(name: str, weight: Tensor, want: dict[str, float]) -> None:
    """Same mean and spread up to sampling error (5 standard errors); constants exactly."""
    if want["std"] == 0:
        assert (weight == want["mean"]).all(), name
        return
    error = 5 * want["std"] / weight.numel() ** 0.5
    assert weight.std().item() == pytest.approx(want["std"], abs=error), name
    assert weight.mean().item() == pytest.approx(want["mean"], abs=2 * error), name
    if weight.numel() >= 1000:  # the cut, which both come close to
        assert weight.max().item() == pytest.approx(want["max"], rel=0.05), name
        assert weight.min().item() == pytest.approx(want["min"], rel=0.05), name


# ---------------------------------------------------------------------------- two-hot


def test_twohot_targets_and_loss(ref: Values) -> None:
    bins = dist.symexp_bins(255)
    assert torch.equal(bins, -bins.flip(0))
    close(bins, ref["twohot/bins"])
    close(dist.symexp_bins(8), ref["twohot/bins_even8"])
    bins, target = ref["twohot/bins"], ref["twohot/target"]
    below, weight = dist.twohot_target(target, bins)
    dense = torch.zeros(len(target), 255)
    dense.scatter_(1, below[:, None], (1 - weight)[:, None])
    dense.scatter_(1, below[:, None] + 1, weight[:, None])
    close(dense, ref["twohot/weights"])
    logits = ref["twohot/logits"].requires_grad_()
    loss = dist.twohot_loss(logits, target, bins=bins)
    close(loss, ref["twohot/loss"], PREDICTIONS)
    loss.sum().backward()
    close(logits.grad, ref["twohot/loss_grad_logits"])


def test_twohot_predictions(ref: Values) -> None:
    bins = dist.symexp_bins(255)
    logits = ref["twohot/pred_logits"].requires_grad_()
    prediction = dist.twohot_predict(logits, bins)
    size = 1 + (logits.softmax(-1) * bins.abs()).sum(-1).detach()  # float32 cannot do better
    close(prediction / size, ref["twohot/pred"] / size)
    prediction.sum().backward()
    close(logits.grad / size[:, None], ref["twohot/pred_grad_logits"] / size[:, None], 1e-4)
    for key, constant in (("pred_uniform", 0.0), ("pred_uniform_const", 3.7)):
        exact = dist.twohot_predict(torch.full((2, 255), constant), bins)
        assert torch.equal(exact, ref[f"twohot/{key}"]), key
    one = 200 * F.one_hot(torch.tensor([0, 64, 127, 128, 200, 254]), 255).float()
    close(dist.twohot_predict(one, bins), ref["twohot/onehot_bin_pred"])


# ---------------------------------------------------------------------- distributions


def test_onehot_distribution(ref: Values) -> None:
    v = ref.under("onehot/")
    probs, other = dist.unimix(v["logits"]), dist.unimix(v["logits_other"])
    close(probs, v["probs"])
    close(probs.log(), v["mixed_logits"])
    log_prob, entropy = (probs.log() * v["event"]).sum(-1), -(probs * probs.log()).sum(-1)
    close(log_prob, v["logp_per_group"])
    close(log_prob.sum(-1), v["logp"])
    close(entropy, v["entropy_per_group"])
    close(entropy.sum(-1), v["entropy"])
    close(dist.kl_onehot(probs[..., None, :], other[..., None, :]), v["kl_per_group"])
    close(dist.kl_onehot(probs, other), v["kl"])
    actor = Actor(2, 2, 1, (ActionPart("discrete", 4),))
    close(actor.sample([(v["logits"],)], greedy=True), v["mode"], 0)
    assert torch.equal(dist.sample_onehot(probs, noise_for(v["event"], v["logits"])), v["event"])


def test_straight_through(ref: Values) -> None:
    v = ref.under("onehot/")
    logits = v["logits"].requires_grad_()
    sample = dist.straight_through(v["st_value"], dist.unimix(logits))
    assert torch.equal(sample, v["st_value"])
    (sample * v["st_weight"]).sum().backward()
    close(logits.grad, v["st_grad_logits"])


def test_kl_losses_and_their_gradients(ref: Values) -> None:
    v = ref.under("kl/")
    post, prior = v["post"].requires_grad_(), v["prior"].requires_grad_()
    p, q = dist.unimix(post), dist.unimix(prior)
    close(dist.kl_onehot(p, q), v["raw"])
    dyn = dist.kl_onehot(p.detach(), q).clamp(min=1.0)
    rep = dist.kl_onehot(p, q.detach()).clamp(min=1.0)
    close(dyn, v["dyn"])
    close(rep, v["rep"])
    free = v["raw"] < 1
    assert free.any()
    pairs = ((dyn, prior, post, "dyn", "prior", "post"), (rep, post, prior, "rep", "post", "prior"))
    for loss, into, stopped, name, key, zero in pairs:
        grad, none = torch.autograd.grad(loss.mean(), (into, stopped), allow_unused=True)
        close(grad, v[f"{name}_grad_{key}"], 1e-5, name)
        assert not grad[free].any()
        assert not v[f"{name}_grad_{key}"][free].any()
        assert none is None
        assert not v[f"{name}_grad_{zero}"].any()


def test_bernoulli_normal_and_categorical(ref: Values) -> None:
    v = ref.under("binary/")
    close(dist.bernoulli_loss(v["logit"], v["target"]), v["loss"])
    probability = torch.sigmoid(v["logit"])
    close(probability, v["prob1"])
    assert torch.equal(probability > 0.5, v["pred"])
    v = ref.under("normal/")
    close(dist.normal_log_prob(v["event"], v["mean"], v["std"]), v["logp"])
    close(dist.normal_entropy(v["std"]), v["entropy"])
    v = ref.under("categorical/")
    actor = Actor(2, 2, 1, (ActionPart("discrete", 3),))
    event = F.one_hot(v["event"].long(), 3).float()
    log_prob, entropy = actor.log_prob_and_entropy([(v["logits"],)], event)
    close(log_prob, v["logp"])
    close(entropy, v["entropy"])


# --------------------------------------------------------------- returns and behavior


@pytest.mark.parametrize("name", ["default", "lam0", "lam1", "disc1"])
def test_lambda_return(ref: Values, name: str) -> None:
    last, term, rew, boot = (
        ref[f"lambda_return/{key}"].float().t() for key in ("last", "term", "rew", "boot")
    )
    discount, lambda_ = ref[f"lambda_return/{name}_disc_lam"]
    got = returns.lambda_return(
        rew[1:], discount * (1 - term[1:]), boot[1:], lambda_ * (1 - last[1:])
    )
    close(got.t(), ref[f"lambda_return/{name}_ret"], PREDICTIONS)


def test_return_normalizer(ref: Values) -> None:
    normalizer = returns.ReturnNormalizer()
    for i in range(3):
        x = ref[f"retnorm/x{i}"]
        close(
            torch.quantile(x, torch.tensor([0.05, 0.95])),
            torch.stack([ref[f"retnorm/perc5_{i}"], ref[f"retnorm/perc95_{i}"]]),
        )
        scale = normalizer.update(x)
        close(normalizer.low, ref[f"retnorm/lo{i}"])
        close(normalizer.high, ref[f"retnorm/hi{i}"])
        close(normalizer.low, ref[f"retnorm/offset{i}"])
        close(scale, ref[f"retnorm/scale{i}"])


class Columns(nn.Module):
    """A head whose output is a slice of the features: recorded logits go in as features."""

    def __init__(self, start: int, size: int) -> None:
        super().__init__()
        self.start, self.size = start, size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.start + self.size]


def behavior_on_logits(parts: tuple[ActionPart, ...], sizes: list[int]) -> ActorCritic:
    """A behavior whose features are [critic logits, slow critic logits, each actor output]."""
    behavior = ActorCritic(4, 4, parts, ActorCriticConfig(horizon=5))
    behavior.critic, behavior.slow_critic = Columns(0, 255), Columns(255, 255)
    behavior.actor.mlp = Columns(510, sum(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    behavior.actor.heads = nn.ModuleList(map(Columns, starts, sizes))
    return behavior


@pytest.mark.parametrize("kind", ["disc", "cont"])
def test_imagination_losses_and_their_gradients(ref: Values, kind: str) -> None:
    v = ref.under(f"imag_{kind}/")
    if kind == "disc":
        parts, outputs = (ActionPart("discrete", 3),), ["policy_logits"]
        actions = F.one_hot(v["act"].long(), 3).float()
    else:
        parts, outputs = (ActionPart("continuous", 2),), ["policy_mean_raw", "policy_std_raw"]
        actions = v["act"]
    names = ["value_logits", "slow_logits", *outputs]
    behavior = behavior_on_logits(parts, [v[name].shape[-1] for name in outputs])
    behavior.normalizer.low.copy_(v["lo_before"])
    behavior.normalizer.high.copy_(v["hi_before"])
    features = torch.cat([v[name] for name in names], -1).transpose(0, 1).requires_grad_()
    rewards, going = (v[name].t().contiguous().requires_grad_() for name in ("rew", "con"))
    dream = (actions.transpose(0, 1)[:-1], rewards[1:], going[1:], going[0])
    row = torch.zeros(1, len(going[0]))
    imagined = Imagined(features, *dream, row, row.bool(), row.bool())
    found = behavior.imagined_loss(imagined, 1.0)
    losses, metrics = found.losses, found.metrics
    target = returns.lambda_return(rewards[1:], going[1:], behavior.value(features)[1:], 0.95)
    close(behavior.value(features), v["value_pred"].t(), PREDICTIONS)
    slow = dist.twohot_predict(behavior.slow_critic(features), behavior.bins)
    close(slow, v["slow_pred"].t(), PREDICTIONS)
    close(target, v["ret"].t(), PREDICTIONS)
    close(losses["policy"], v["loss_policy"].t(), PREDICTIONS)
    close(losses["value"], v["loss_value"].t(), PREDICTIONS)
    close(behavior.normalizer.low, v["lo_after"])
    close(behavior.normalizer.high, v["hi_after"])
    close(metrics["return_scale"], (v["hi_after"] - v["lo_after"]).clamp(min=1))
    assert (metrics["return_scale"] > 1) == (kind == "disc")
    total = losses["policy"].mean() + losses["value"].mean()
    close(total, v["total"], PREDICTIONS)
    total.backward()
    assert features.grad is not None
    start = 0
    for name in names:
        want = v[f"grad_{name}"].transpose(0, 1)
        grad = features.grad[..., start : start + want.shape[-1]]
        start += want.shape[-1]
        if name == "slow_logits":
            assert not want.any()
            assert not grad.any()
        else:
            close_to_norm(grad, want, want.norm(), 1e-4, name)
    for name, leaf in (("grad_rew", rewards), ("grad_con", going)):
        assert not v[name].any()
        assert leaf.grad is None


def test_replay_value_loss_and_its_gradient(ref: Values) -> None:
    v = ref.under("repl/")
    behavior = behavior_on_logits((ActionPart("discrete", 3),), [3])
    features = torch.cat([v["value_logits"], v["slow_logits"], torch.zeros(3, 7, 3)], -1)
    features.requires_grad_()
    discount = 1 - 1 / 333
    last, term = v["last"].float().t(), v["term"].float().t()
    target = returns.lambda_return(
        v["rew"].t()[1:], discount * (1 - term[1:]), v["boot"].t()[1:], 0.95 * (1 - last[1:])
    )
    close(target.t(), v["ret"], PREDICTIONS)
    num = v["boot"].numel()  # dreams of one step, which end there: the reward is the return
    dream = (torch.zeros(1, num, 3), v["boot"].reshape(1, num), torch.zeros(1, num))
    starts = features.detach().flatten(0, 1).expand(2, num, -1)
    imagined = Imagined(starts, *dream, torch.ones(num), v["rew"], v["last"], v["term"])
    loss = behavior.imagined_loss(imagined, discount, features).losses["replay_value"]
    close(loss.t(), v["loss"], PREDICTIONS)
    close(loss.mean(), v["mean"], PREDICTIONS)
    loss.mean().backward()
    assert features.grad is not None
    want = v["grad_value_logits"]
    close_to_norm(features.grad[..., :255], want, want.norm(), 1e-4, "value logits")
    assert not v["grad_slow_logits"].any()
    assert not features.grad[..., 255:].any()


# ----------------------------------------------------------- optimizer and slow critic

VARIANTS: dict[str, dict[str, Any]] = {
    "nowarm": {"warmup": 0},
    "warm3": {"warmup": 3},
    "warm1000": {},
    "nowarm_lr1e-2": {"warmup": 0, "lr": 1e-2},
    "noagc": {"warmup": 0, "agc": 0},
}
TENSORS = ("kernel", "zero_kernel", "bias", "scale", "block")


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimizer_trace(ref: Values, variant: str) -> None:
    """Parameters in float32; updates in float64, because a float32 parameter of size 1 holds a
    change of 4e-5 to one part in 600 only."""
    options = VARIANTS[variant]
    rate = options.get("lr", 4e-5)
    for dtype in (torch.float32, torch.float64):
        params = {name: nn.Parameter(ref[f"opt/param_{name}"].to(dtype)) for name in TENSORS}
        optimizer = LaProp(params.values(), **options)
        for i in range(5):
            before = {name: p.detach().clone() for name, p in params.items()}
            for name, p in params.items():
                p.grad = ref[f"opt/grad_{name}"][i].to(dtype)
            optimizer.step()
            for name, p in params.items():
                close(p, ref[f"opt/{variant}_param_{name}"][i], 5e-6, name)
                if dtype == torch.float64:
                    update = ref[f"opt/{variant}_update_{name}"][i] / rate
                    close((p - before[name]) / rate, update, 2e-4, f"{name} {i}")


def test_adaptive_clipping(ref: Values) -> None:
    """The first second moment is what clipping let through, squared."""
    params = {name: nn.Parameter(ref[f"opt/param_{name}"].clone()) for name in TENSORS}
    optimizer = LaProp(params.values())
    for name, p in params.items():
        p.grad = ref[f"opt/grad_{name}"][0].clone()
    optimizer.step()
    for name, p in params.items():
        clipped = ref[f"opt/agc_clipped0_{name}"]
        passed = (optimizer.state[p]["nu"] / (1 - 0.999)).sqrt()
        close_to_norm(passed, clipped.abs(), clipped.norm(), 1e-5, name)
        assert torch.equal(optimizer.state[p]["mu"].sign(), clipped.sign())


def test_slow_critic(ref: Values) -> None:
    assert (ref.raw("slow/init_equal") == 1).all()
    behavior = ActorCritic(3, 4, (ActionPart("discrete", 2),), ActorCriticConfig(layers=1))
    for name, value in behavior.critic.state_dict().items():
        assert torch.equal(value, behavior.slow_critic.state_dict()[name])
    fast, slow = behavior.critic[0].linear.weight, behavior.slow_critic[0].linear.weight
    for i in range(3):
        with torch.no_grad():
            fast.copy_(ref[f"slow/source{i}"])
            slow.copy_(ref[f"slow/before{i}"])
        behavior.update_targets()
        close(slow, ref[f"slow/after{i}"], 1e-6)

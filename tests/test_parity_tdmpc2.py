"""TD-MPC2's equations against values recorded from the public reference implementation.

Layers, networks, targets, policy, moving averages and fresh weights; test_parity_updates.py has
whole gradient steps and test_parity_planner.py plans. Skipped where the folder is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces as gym_spaces
from parity import PREDICTIONS, Values, close, close_to_norm
from parity_tdmpc2 import (
    batch_of,
    bins,
    loaded,
    make_agent,
    pair_of,
    recorded_config,
    recorded_tdmpc2,
    reference_name,
    update_draws,
)
from small import tensors
from torch import Tensor, nn

from worldflux_dist.behaviors.latent_td import LatentTD, LatentTDConfig, QDraw
from worldflux_dist.models.tdmpc2 import TDMPC2Config
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.activations import mish, simnorm
from worldflux_dist.nn.layers import MISH, SIMPLEX, NormedLinear
from worldflux_dist.spaces import ActionPart

TWO_HOT = 1e-4  # tolerance of weights, whose position among the bins loses digits

ref = recorded_tdmpc2  # the fixture


def value_of(logits: Tensor) -> Tensor:
    return dist.symexp(dist.twohot_predict(logits, dist.symlog_bins(101)))


# ------------------------------------------------------------------------------ constants


def test_constants(ref: Values) -> None:
    """The recorded configuration has our default constants."""
    want, agent = recorded_config(ref), make_agent(ref)
    model, behavior, planner = TDMPC2Config(), LatentTDConfig(), agent.planner.config
    scales = agent.world_model.loss_scales | agent.behavior.loss_scales
    for name in ("reward", "value", "termination", "consistency"):
        assert scales[name] == want[f"{name}_coef"], name
    assert model.rho == want["rho"]
    assert model.learning_rate == behavior.learning_rate == want["lr"]
    assert model.encoder_rate == want["enc_lr_scale"]
    assert behavior.target_rate == want["tau"]
    assert behavior.entropy_scale == want["entropy_coef"]
    for name in ("log_std_min", "log_std_max"):
        assert getattr(behavior, name) == want[name]
    for name in ("horizon", "temperature", "min_std", "max_std"):
        assert getattr(planner, name) == want[name]
    assert model.clip == behavior.clip == ref["update1/clip"]
    for edges in (agent.world_model.bins, agent.behavior.bins):
        assert [len(edges), edges[0], edges[-1]] == [want[n] for n in ("num_bins", "vmin", "vmax")]


def test_discount(ref: Values) -> None:
    for length, want in zip(ref["init/discount_T"], ref["init/discount"], strict=True):
        close(TDMPC2Config(episode_length=int(length)).discount, want, 1e-6)
    assert make_agent(ref).world_model.discount == pytest.approx(ref["td/discount"].item())


# --------------------------------------------------------------------------------- layers


def test_symlog_and_two_hot(ref: Values) -> None:
    v = ref.under("math/")
    x, edges = v["symlog_x"][:, 0], dist.symlog_bins(101)
    close(dist.symlog(v["symlog_x"]), v["symlog"])
    close(dist.symexp(v["symexp_x"]), v["symexp"])
    below, weight = dist.twohot_target(dist.symlog(x), edges)
    dense = torch.zeros(len(x), 101)
    dense.scatter_(1, below[:, None], (1 - weight)[:, None])
    dense.scatter_(1, below[:, None] + 1, weight[:, None])
    close(dense, v["two_hot"], TWO_HOT)
    logits = v["logits"]
    close(dist.twohot_loss(logits, dist.symlog(x), bins=edges), v["soft_ce"][:, 0], TWO_HOT)
    close(value_of(logits), v["two_hot_inv"][:, 0], PREDICTIONS)
    assert not v["two_hot_inv_uniform"].any()
    assert not value_of(torch.tensor([[0.0] * 101, [3.7] * 101])).any()


def test_mish_simnorm_and_normed_layers(ref: Values) -> None:
    x = ref["math/mish_x"]
    close(mish(x), ref["math/mish"])
    close(mish(x.clone().requires_grad_()), ref["math/mish"])
    close(simnorm(ref["prim/simnorm_x"]), ref["prim/simnorm"])
    for name, kind in (("mish", MISH), ("simnorm", SIMPLEX)):
        v = ref.under(f"prim/normedlinear_{name}/")
        layer = NormedLinear(7, 16, kind)
        layer.linear.load_state_dict({"weight": v["weight"], "bias": v["bias"]})
        layer.norm.load_state_dict({"weight": v["ln.weight"], "bias": v["ln.bias"]})
        close(layer(v["x"]), v["y"], 1e-5, name)


def test_image_encoder(ref: Values) -> None:
    """Stacks of three frames, shifted, through the convolutions to a latent without more layers."""
    image = gym_spaces.Box(0, 255, (64, 64, 3), np.uint8)
    encoder = make_agent(ref, image, latent=128, channels=8).world_model.encoder
    params = ref.under("rgb/params/")
    state = {}
    for name, value in params.items():
        number, leaf = name.split(".")
        state[f"cnns.0.{int(number) - 2}.{leaf}"] = value  # they count shift and scaling too
    encoder.load_state_dict(state)
    frames = ref["rgb/image"].unflatten(1, (3, 3)).permute(0, 1, 3, 4, 2)
    noise = (ref["rgb/shift"].flatten(1) + 0.5) / 7  # of 7 crops in each direction
    with torch.no_grad():
        close(encoder({"obs": frames}, noise), ref["rgb/z"], 1e-4)


def test_initialisation(ref: Values) -> None:
    """Same spread up to sampling error (5 standard errors); constants exactly."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"encoder_units": 256, "units": 256, "latent": 128}
    agent = make_agent(ref, **sizes)
    image = gym_spaces.Box(0, 255, (64, 64, 3), np.uint8)
    convolutions = make_agent(ref, image, latent=128, channels=8).world_model.encoder.cnns[0]
    ours: dict[str, list[Tensor]] = {}
    for name, param in agent.named_parameters():
        ours.setdefault(reference_name(name)[0], []).append(param)
    for name, param in convolutions.named_parameters():
        number, leaf = name.split(".")
        ours[f"rgb.{int(number) + 2}.{leaf}"] = [param]
    assert ref.raw("init/columns").tolist() == ["size", "mean", "std", "min", "max"]
    names = ref.raw("init/names").tolist()
    assert set(names) == set(ours)
    for name, row in zip(names, ref["init/stats"].tolist(), strict=True):
        weight = torch.stack(ours[name]).detach()
        size, mean, std, low, high = row
        assert weight.numel() == size, name
        if std == 0:
            assert (weight == mean).all(), name
            continue
        error = 5 * std / size**0.5
        assert weight.mean().item() == pytest.approx(mean, abs=2 * error), name
        assert weight.std().item() == pytest.approx(std, abs=error), name
        if name.startswith("rgb") and size > 500:  # uniform: both come close to the ends
            assert weight.min().item() == pytest.approx(low, rel=0.02), name
            assert weight.max().item() == pytest.approx(high, rel=0.02), name
    for online, target in zip(
        agent.behavior.qs.parameters(), agent.behavior.target_qs.parameters(), strict=True
    ):
        assert torch.equal(online, target)


# ----------------------------------------------------------------------- networks one by one


def test_model(ref: Values) -> None:
    v, agent = ref.under("model/"), loaded(ref)
    model = agent.world_model
    with torch.no_grad():
        seen = model.encode(v["obs"])
        after = model.transition(seen, v["action"])
        close(model.features(seen), v["z"])
        close(model.features(after), v["z_next"])
        close(bins(model.reward(after.tensors["origin"])), v["reward_logits"])
        close(model.terminal(model.features(after)), v["term_logit"])
        preds = model.decode(after, ("reward", "continue")).preds
        soft = loaded(ref, termination="soft").world_model.decode(after, ("continue",)).preds
    close(preds["reward"], v["reward"][:, 0], PREDICTIONS)
    ended = v["term_prob"][:, 0]
    close(soft["continue"], 0.975 * (1 - ended))
    close(preds["continue"], 0.975 * (ended <= 0.5).float(), 1e-6)
    assert preds["continue"].any() and not preds["continue"].all()


def test_values(ref: Values) -> None:
    v, behavior = ref.under("model/"), loaded(ref).behavior
    both = torch.cat([v["z"], v["action"]], -1)
    with torch.no_grad():
        close(bins(behavior.qs(both)), v["q_logits"])
        close(bins(behavior.target_qs(both)), v["q_target_logits"])
        close(value_of(behavior.qs(both)), v["q_all"][..., 0], PREDICTIONS)
        pair = pair_of(v["q_avg_perm"])
        close(behavior.q(v["z"], v["action"], pair).mean(0), v["q_avg"][:, 0], PREDICTIONS)
        low = value_of(behavior.target_qs(both, pair_of(v["q_min_perm"]))).amin(0)
        close(low, v["q_min_target"][:, 0], PREDICTIONS)


def test_target(ref: Values) -> None:
    v, behavior = ref.under("td/"), loaded(ref).behavior
    draw = QDraw(v["eps"], pair_of(v["perm"]))
    going = v["discount"] * (1 - v["terminated"])[..., 0]
    target = behavior.target(v["next_z"], v["reward"][..., 0], going, draw)
    close(target, v["target"][..., 0], PREDICTIONS)


def behavior_on_raw(size: int) -> Any:
    """A behavior whose features are what its actor would put out, for `size` actions."""
    behavior: Any = LatentTD(4, 4, (ActionPart("continuous", size),), LatentTDConfig())
    behavior.actor = nn.Identity()
    return behavior


def test_squashed_gaussian(ref: Values) -> None:
    v, behavior = ref.under("math/"), behavior_on_raw(3)
    _, log_std = behavior.gaussian(torch.cat([v["log_std_x"]] * 2, -1))
    close(log_std, v["log_std"])
    raw = torch.cat([v["mean_in"], torch.atanh((v["logstd_in"] + 10) / 6 - 1)], -1)
    policy = behavior.policy(raw, v["eps"])
    close(policy.action, v["squashed_action"])
    close(policy.log_prob, v["squashed_logprob"][:, 0], 1e-4)
    close(policy.entropy, -3 * v["gaussian_logprob"][:, 0])
    close(behavior.act(raw, greedy=True), v["squashed_mean"])


def test_policy(ref: Values) -> None:
    v, behavior = ref.under("pi/"), loaded(ref).behavior
    with torch.no_grad():
        raw = behavior.actor(v["z"])
        policy = behavior.policy(v["z"], v["eps"])
        close(raw, v["raw"])
        close(behavior.gaussian(raw)[1], v["log_std"])
        close(behavior.act(v["z"], greedy=True), v["mean"])
    close(policy.action, v["action"])
    close(-policy.log_prob, v["entropy"][:, 0], PREDICTIONS)
    close(policy.entropy, v["scaled_entropy"][:, 0], PREDICTIONS)


def test_gradient_of_the_scaled_entropy(ref: Values) -> None:
    v = ref.under("pi/")
    raw = v["ent_raw"].requires_grad_()
    entropy = behavior_on_raw(2).policy(raw, v["ent_eps"]).entropy
    close(entropy, v["ent_scaled_entropy"][:, 0], PREDICTIONS)
    entropy.sum().backward()
    assert raw.grad is not None
    want = v["ent_grad_raw"]
    close_to_norm(raw.grad, want, want.norm(), 1e-4, "raw")
    assert not raw.grad[:, :2].any()


# -------------------------------------------------------------- averages and dropout


def test_scale_of_qs(ref: Values) -> None:
    behavior = behavior_on_raw(2)
    for i in range(3):
        before = behavior.scale.clone()
        scale = behavior.update_scale(ref[f"scale/x{i}"])
        close(scale, ref[f"scale/value{i}"][0])
        low, high = ref[f"scale/percentiles{i}"].flatten()
        close(scale, 0.99 * before + 0.01 * max(high - low, torch.ones(())))


def test_scale_follows_first_states_only(ref: Values) -> None:
    """The recorded updates cannot tell: their spread is below 1 everywhere."""
    behavior = loaded(ref).behavior
    torch.manual_seed(0)
    features = torch.rand(33, 2, 24)
    features[:, 0] = features[0, 0]
    with torch.no_grad():
        for member in behavior.qs:
            member.out.weight *= 100
    values = behavior.value(features[:, 1], QDraw(torch.zeros(33, 2), torch.arange(2)))
    assert values.std() > 10
    behavior.scale.fill_(2.3)
    behavior.policy_loss(
        features, torch.tensor([1.0, 0.5]), QDraw(torch.zeros(33, 2, 2), torch.arange(2))
    )
    close(behavior.scale, 0.99 * 2.3 + 0.01)


def test_target_average(ref: Values) -> None:
    behavior = make_agent(ref).behavior
    close(behavior.config.target_rate, ref["soft/tau"], 1e-7)
    with torch.no_grad():
        for name, qs in (("source", behavior.qs), ("before", behavior.target_qs)):
            for member, value in zip(qs, ref[f"soft/{name}"], strict=True):
                member.layers[0].linear.weight.copy_(value)
    behavior.update_targets()
    got = torch.stack([member.layers[0].linear.weight for member in behavior.target_qs])
    close(got, ref["soft/after"], 1e-6)


def test_where_dropout_is_active(ref: Values) -> None:
    """In the first layer of the Qs that learn and that the policy learns from; not in targets."""
    flags = dict(flag.split("=") for flag in ref.raw("init/training_flags").tolist())
    assert flags == {"_Qs": "True", "_detach_Qs": "True", "_target_Qs": "False", "_pi": "True"}
    active = {}
    for text in ref.raw("init/dropout_active").tolist():
        place, rate, on = text.split(":")
        network, layer = place.split(".", 1)
        assert layer == "module.0.dropout"
        assert float(rate) == LatentTDConfig().dropout
        active[network] = on
    assert active == {network: flags[network] for network in active}
    agent, batch = loaded(ref), tensors(batch_of(ref.under("update1/")))
    with torch.no_grad():
        output = agent.world_model.loss(batch)
    agent.behavior.config = LatentTDConfig(num_q=4, dropout=0.5)
    model, behavior, features = agent.world_model, agent.behavior, output.path.tensors["latent"]
    draw = update_draws(ref.under("update1/"))
    rest, going = features[:, 1:], torch.ones_like(batch.reward[:, 1:])
    assert varies(lambda: behavior.loss(model, output, draw[0]).losses["value"])
    assert varies(lambda: behavior.policy_loss(features, torch.ones(features.shape[1]), draw[1])[0])
    assert not varies(lambda: behavior.target(rest, batch.reward[:, 1:], going, draw[0]))
    assert not varies(lambda: behavior.value(features, draw[1]))
    member, x = behavior.qs[0], torch.ones(3, 26)
    first = member.layers[0]
    with torch.random.fork_rng():
        got = seeded(lambda: member(x, 0.5))
        hidden = seeded(lambda: mish(first.norm(F.dropout(first.linear(x), 0.5))))
    close(got, member.out(member.layers[1](hidden)))


def seeded(compute: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return compute()


def varies(compute: Callable[[], Tensor]) -> bool:
    return not torch.equal(compute(), compute())

"""DreamerV3's world model: its invariants, and the details that ports of it get wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces as gym_spaces
from small import (
    family_batch,
    make_agent,
    make_small,
    perturbed,
    random_batch,
    same_sums,
    tensors,
    vector,
)
from torch import Tensor

from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import State, create_world_model
from worldflux_dist.models.dreamerv3 import PRESETS
from worldflux_dist.nn import distributions as dist

KINDS = pytest.mark.parametrize("kind", ["disc", "cont"])
GROUPS, CLASSES = 8, 4


def make_model(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(make_agent(kind, **options)).world_model


def random_state(num: int, seed: int = 1) -> State:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(CLASSES, (num, GROUPS), generator=generator)
    deter = torch.randn(num, 64, generator=generator)
    return State({"deter": deter, "stoch": F.one_hot(index, CLASSES).float()})


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


def assert_equal(got: State, want: State, exactly: bool = False) -> None:
    for name, value in want.tensors.items():
        rtol, atol = (0, 0) if exactly else (1e-5, 1e-6)
        torch.testing.assert_close(got.tensors[name], value, rtol=rtol, atol=atol)


def gradient_size(loss: Tensor, module: torch.nn.Module) -> float:
    grads = torch.autograd.grad(
        loss, list(module.parameters()), retain_graph=True, allow_unused=True
    )
    return sum(float(g.abs().sum()) for g in grads if g is not None)


# ----------------------------------------------------------------------------- filter


@KINDS
def test_scan_equals_single_updates(kind: str) -> None:
    model = make_model(kind)
    batch = tensors(random_batch(model.spaces))
    start, noise = random_state(3), uniform(3, 6, GROUPS)
    with torch.no_grad():
        scanned = model.loss(batch, start, noise).states
        state = start
        for t in range(6):
            obs = {key: value[:, t] for key, value in batch.obs.items()}
            state = model.update(state, batch.action[:, t], obs, batch.is_first[:, t], noise[:, t])
            assert_equal(scanned[:, t], state)
    assert scanned.tensors["stoch"].sum(-1).eq(1).all()


def test_no_gradient_crosses_a_reset() -> None:
    model = make_model("disc")
    batch = tensors(random_batch(model.spaces))  # rows 0 and 1 reset at t = 3, row 2 does not
    tokens = torch.randn(3, 6, model.encoder.size_out).requires_grad_()
    start = random_state(3).map(Tensor.requires_grad_)
    states, _ = model.filter(tokens, batch.action, batch.is_first, start, uniform(3, 6, GROUPS))
    features = model.features(states)[:, 3:].square().sum()
    features.backward()
    assert tokens.grad is not None
    reached = tokens.grad[:, :3].abs().sum((-1, -2)) > 0
    assert reached.tolist() == [False, False, True]
    for value in start.tensors.values():
        assert value.grad is not None
        assert (value.grad.flatten(1).abs().sum(1) > 0).tolist() == [False, False, True]


# ------------------------------------------------------------------------------- core


@pytest.mark.parametrize("blocks", [8, 4])
def test_core_follows_the_equations(blocks: int) -> None:
    """Block g reads [deter_g, x0, x1, x2]; in each block the order is reset, candidate, update."""
    core = make_model("cont", blocks=blocks).core
    state, action = random_state(3), torch.tensor([[0.5, -0.2], [4.0, 1.0], [-3.0, 0.0]])
    deter, stoch = state.tensors["deter"], state.tensors["stoch"].flatten(1)
    size = 64 // blocks
    unit = torch.tensor([[0.5, -0.2], [1.0, 1.0], [-1.0, 0.0]])  # a / max(1, |a|)
    with torch.no_grad():
        inputs = [core.in_deter(deter), core.in_stoch(stoch), core.in_action(unit)]
        parts = []
        for g in range(blocks):
            own = slice(g * size, (g + 1) * size)
            read = torch.cat([deter[:, own], *inputs], -1)
            parts.append(read @ core.hid_weight[:, own] + core.hid_bias[own])
        hidden = F.silu(core.hid_norm(torch.cat(parts, -1)))
        want = []
        for g in range(blocks):
            own = slice(g * size, (g + 1) * size)
            bias = core.gates.bias[3 * g * size : 3 * (g + 1) * size]
            reset, candidate, update = (hidden[:, own] @ core.gates.weight[g] + bias).chunk(3, -1)
            candidate = torch.tanh(torch.sigmoid(reset) * candidate)
            update = torch.sigmoid(update - 1)
            want.append(update * candidate + (1 - update) * deter[:, own])
        got = core(deter, stoch, core.embed_action(action))
    torch.testing.assert_close(got, torch.cat(want, -1), rtol=1e-5, atol=1e-6)


def test_blocks_are_separate_but_for_the_shared_inputs() -> None:
    """With the shared view of deter cut, swapping blocks 1 and 2 of it moves no other block."""
    core = make_model("disc").core
    seen: list[Tensor] = []
    core.hid_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        core.in_deter.norm.scale.zero_()
        state = random_state(3)
        deter, stoch = state.tensors["deter"], state.tensors["stoch"].flatten(1)
        order = [0, 2, 1, 3, 4, 5, 6, 7]
        swapped = deter.view(3, 8, 8)[:, order].flatten(1)
        for value in (deter, swapped):
            core(value, stoch, core.embed_action(torch.eye(3)))
    changed = (seen[0] != seen[1]).view(3, 8, 8).any(0).any(-1)
    assert changed.tolist() == [False, True, True, False, False, False, False, False]


# ----------------------------------------------------------------------------- losses


def raw_kl(model: Any, batch: Batch, start: State, noise: Tensor) -> Tensor:
    """KL(posterior || prior) (B, T) before the clip, of mixed probabilities."""
    shape = batch.reward.shape
    tokens = model.encoder({key: value.flatten(0, 1) for key, value in batch.obs.items()})
    states, logits = model.filter(
        tokens.unflatten(0, shape), batch.action, batch.is_first, start, noise
    )
    post = 0.99 * logits.softmax(-1) + 0.01 / CLASSES
    prior = 0.99 * model.prior_logits(states.tensors["deter"]).softmax(-1) + 0.01 / CLASSES
    return (post * (post / prior).log()).sum((-1, -2))


@KINDS
def test_free_nats_are_per_element_with_exactly_no_gradient_below(kind: str) -> None:
    model = make_model(kind)
    batch = tensors(random_batch(model.spaces, size=8))
    start, noise = random_state(8), uniform(8, 6, GROUPS)
    with torch.no_grad():
        raw = raw_kl(model, batch, start, noise)
    model.config = replace(model.config, free_nats=raw.median().item())
    losses = model.loss(batch, start, noise).losses
    free = raw < raw.median()
    assert free.any()
    assert not free.all()
    for name in ("dyn", "rep"):
        same_sums(losses[name], raw.clamp(min=raw.median().item()))
        assert gradient_size(losses[name][free].sum(), model) == 0
        assert gradient_size(losses[name][~free].sum(), model) > 0


def test_dyn_teaches_the_prior_and_rep_the_posterior() -> None:
    model = make_model("disc", free_nats=0.0)
    batch = tensors(random_batch(model.spaces, size=8, length=1))
    losses = model.loss(batch).losses
    reached = {
        name: [
            gradient_size(losses[name].sum(), part) > 0 for part in (model.prior, model.posterior)
        ]
        for name in ("dyn", "rep")
    }
    assert reached == {"dyn": [True, False], "rep": [False, True]}
    assert gradient_size(losses["dyn"].sum(), model.encoder) == 0
    assert model.loss_scales == {"dyn": 1.0, "rep": 0.1, "reward": 1.0}


def test_every_class_keeps_its_share() -> None:
    """Samples and KL use mixed probabilities: finite for a certain prior, at least .01 / C each."""
    model = make_model("disc")
    logits = torch.zeros(1, GROUPS, CLASSES)
    logits[..., 0] = 1e4
    edge = 0.99 + 0.01 / CLASSES
    noise = torch.linspace(edge - 1e-3, 1 - 1e-4, GROUPS)[None]
    assert model.sample(logits, noise)[..., 0].sum() == 1  # only the first lies below the edge
    with torch.no_grad():
        model.prior[2].bias.view(GROUPS, CLASSES)[:, 0] = 1e4
    losses = model.loss(tensors(random_batch(model.spaces))).losses
    assert losses["dyn"].isfinite().all()
    assert (losses["dyn"] <= GROUPS * np.log(CLASSES / 0.01)).all()


def test_reconstruction_sums_over_dimensions_and_pixels() -> None:
    model = make_model("disc")
    batch = tensors(random_batch(model.spaces))
    output = model.loss(batch, noise=uniform(3, 6, GROUPS))
    decoded = model.reconstruct(output.states)
    error = decoded["vector"] - dist.symlog(batch.obs["vector"])
    same_sums(output.losses["rec/vector"], error.square().sum(-1))
    error = decoded["image"] - batch.obs["image"].float() / 255
    same_sums(output.losses["rec/image"], error.square().sum((-1, -2, -3)))
    assert all(loss.shape == (3, 6) for loss in output.losses.values())


def test_reward_and_continue_losses_belong_to_the_state_they_arrive_with() -> None:
    model = make_model("disc")
    batch = tensors(random_batch(model.spaces))
    output = model.loss(batch, noise=uniform(3, 6, GROUPS))
    features = model.features(output.states)
    want = dist.twohot_loss(model.reward(features), batch.reward, bins=model.bins)
    same_sums(output.losses["reward"], want)
    going = torch.full((3, 6), 1 - 1 / 333)
    going[0, 2] = 0  # terminal; the truncation in row 1 goes on
    logit = model.proceed(features).squeeze(-1)
    want = F.binary_cross_entropy_with_logits(logit, going, reduction="none")
    same_sums(output.losses["continue"], want)


# -------------------------------------------------------------------- encoder, decoder


def test_order_of_features_tokens_and_decoder_inputs() -> None:
    """Features are [deter, stoch], the vector decoder reads [stoch, deter]; tokens are vectors
    first, with sorted keys, then images."""
    model = make_model("disc")
    state = random_state(3)
    deter, stoch = state.tensors["deter"], state.tensors["stoch"].flatten(1)
    assert torch.equal(model.features(state), torch.cat([deter, stoch], -1))
    seen: list[Tensor] = []
    model.decoder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.decode(state)
    assert torch.equal(seen[0], torch.cat([stoch, deter], -1))
    obs = {key: value[:, 0] for key, value in tensors(random_batch(model.spaces)).obs.items()}
    tokens = model.encoder(obs)
    vectors = model.encoder.mlp(dist.symlog(obs["vector"]))
    same_sums(tokens[:, : vectors.shape[1]], vectors)
    same_sums(tokens[:, vectors.shape[1] :], model.encoder.cnns[0](obs["image"]))
    model = make_model("cont")
    obs = {key: value[:, 0] for key, value in tensors(random_batch(model.spaces)).obs.items()}
    both = torch.cat([obs["avel"], obs["zpos"]], -1)
    same_sums(model.encoder(obs), model.encoder.mlp(dist.symlog(both)))


def test_decode_speaks_the_observations_own_units() -> None:
    model = make_model("disc")
    state = random_state(3)
    preds, means = model.decode(state).preds, model.reconstruct(state)
    same_sums(preds["obs"]["vector"], dist.symexp(means["vector"]))
    same_sums(preds["obs"]["image"], means["image"] * 255)
    assert set(model.decode(state, ("reward",)).preds) == {"reward"}
    assert preds["reward"].shape == preds["continue"].shape == (3,)
    single = create_world_model("dreamerv3:tiny", vector(5), gym_spaces.Discrete(2))
    assert single.decode(single.encode(np.ones((2, 5), np.float32))).preds["obs"].shape == (2, 5)


# --------------------------------------------------------------------------- creation


def test_presets_have_the_published_sizes() -> None:
    table = {
        "size1m": (512, 64, 4),
        "size12m": (2048, 256, 16),
        "size25m": (3072, 384, 24),
        "size50m": (4096, 512, 32),
        "size100m": (6144, 768, 48),
        "size200m": (8192, 1024, 64),
        "size400m": (12288, 1536, 96),
    }
    for name, (deter, hidden, depth) in table.items():
        c = PRESETS[name]
        assert (c.deter, c.hidden, c.units) == (deter, hidden, hidden), name
        assert (c.classes, c.depth, c.groups, c.blocks) == (depth, depth, 32, 8), name


def test_barlow_twins_take_the_place_of_a_decoder() -> None:
    """Nothing is decoded; the loss falls, and reaches the encoder through the posterior alone."""
    torch.manual_seed(0)
    options = {"reconstruction": "barlow", "learning_rate": 3e-3, "warmup": 0}
    agent = perturbed(make_small("dreamerv3", "dict", "discrete", **options))
    model, batch = agent.world_model, family_batch(agent)
    assert not model.decodes_obs and "obs" not in model.decode(model.initial(2)).preds
    output = model.loss(tensors(batch))
    assert not any(name.startswith("rec/") for name in output.losses)
    output.losses["barlow"].mean().backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "core", "posterior", "projector"}
    with torch.no_grad():  # a posterior that does not look: nothing is left that could reach it
        model.posterior[0].linear.weight[:, model.config.deter :] = 0
    model.zero_grad()
    model.loss(tensors(batch)).losses["barlow"].mean().backward()
    assert not any(p.grad.any() for p in model.encoder.parameters())
    learner = Learner(agent, LearnerConfig(device="cpu"))
    history = [learner.step(batch)["loss/barlow"] for _ in range(20)]
    assert history[-1] < 0.8 * history[0]

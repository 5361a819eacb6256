"""Scalings, distributions, layers, image networks and the optimizer, against closed forms."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import make_small, same_sums
from torch import Tensor, nn

from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MLP, BlockGRU, BlockLinear, Linear, NormedLinear, RMSNorm
from worldflux_dist.nn.optim import LaProp, groups, learning_rate
from worldflux_dist.nn.vision import Conv, ImageDecoder, ImageEncoder

BINS = dist.symexp_bins(255)
# Raw targets of every size and sign, the ends of the bins and beyond.
TARGETS = torch.cat(
    [sign * torch.logspace(-6, 8, 200) for sign in (1, -1)]
    + [torch.tensor([0.0, 4.8e8, -4.8e8, 1e9, -1e9, float(BINS[100]), float(BINS[-1])])]
)


def dense(target: Tensor, bins: Tensor = BINS) -> Tensor:
    """Two-hot weights (..., bins)."""
    below, weight = dist.twohot_target(target, bins)
    weights = torch.zeros(*target.shape, len(bins))
    weights.scatter_(-1, below[..., None], (1 - weight)[..., None])
    return weights.scatter_(-1, below[..., None] + 1, weight[..., None])


# ------------------------------------------------------------------- scalings, two-hot


def test_symlog_and_symexp_undo_each_other() -> None:
    x = TARGETS.clamp(-1e8, 1e8)
    torch.testing.assert_close(dist.symexp(dist.symlog(x)), x, rtol=1e-5, atol=1e-9)
    assert dist.symlog(torch.tensor(-1.0)).item() == pytest.approx(-np.log(2))


@pytest.mark.parametrize("num", [255, 8])
def test_bins_are_antisymmetric_and_constant_logits_predict_zero(num: int) -> None:
    bins = dist.symexp_bins(num)
    assert len(bins) == num
    assert torch.equal(bins, -bins.flip(0))
    assert bins[-1].item() == pytest.approx(np.expm1(20))
    for constant in (0.0, 3.7, -50.0):
        assert dist.twohot_predict(torch.full((4, num), constant), bins).eq(0).all()


def test_twohot_weights() -> None:
    weights = dense(TARGETS)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(TARGETS)))
    assert (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    value = (weights.double() * BINS).sum(-1)
    clamped = TARGETS.double().clamp(BINS[0].double(), BINS[-1].double())
    # The two products are rounded at the size of the bins, 0.17 apart near 0.
    torch.testing.assert_close(value, clamped, rtol=1e-5, atol=1e-7)
    assert weights[TARGETS == 1e9, -1] == 1
    assert weights[TARGETS == -1e9, 0] == 1
    assert weights[TARGETS == 0, 127] == 1
    halfway = (BINS[200] + BINS[201]) / 2  # linear in raw space, not in symlog space
    assert dense(halfway)[200].item() == pytest.approx(0.5, abs=1e-5)


def test_twohot_loss_and_gradient() -> None:
    torch.manual_seed(0)
    targets, others = torch.tensor([1e6, -1e6, 0.3, 0.0]), torch.tensor([0.0, 2.0, -5.0, 1e12])
    logits = (3 * torch.randn(4, 255)).requires_grad_()
    loss = dist.twohot_loss(logits, targets, others, bins=BINS)
    weights = dense(targets) + dense(others)
    torch.testing.assert_close(loss, -(weights * logits.log_softmax(-1)).sum(-1))
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(logits.grad, 2 * logits.softmax(-1).detach() - weights)


def test_twohot_prediction_is_a_mean_in_raw_space() -> None:
    logits = torch.full((255,), -200.0)
    logits[127], logits[200] = 0.0, 0.0
    assert dist.twohot_predict(logits, BINS).item() == pytest.approx(BINS[200].item() / 2)
    half = logits.bfloat16()  # computed in float32 all the same
    assert dist.twohot_predict(half, BINS).dtype == torch.float32


# ---------------------------------------------------------------------- distributions


def test_unimix_bounds_every_class() -> None:
    probs = dist.unimix(torch.tensor([[100.0, 0.0, -100.0, 0.0]]))
    torch.testing.assert_close(probs, torch.tensor([[0.9925, 0.0025, 0.0025, 0.0025]]))
    assert probs.sum().item() == pytest.approx(1)


def test_sampling_frequencies_match_probabilities() -> None:
    torch.manual_seed(0)
    probs = dist.unimix(torch.randn(3, 5) * 2)
    noise = torch.rand(100_000, 3)
    samples = dist.sample_onehot(probs.expand(100_000, 3, 5), noise)
    assert samples.sum(-1).eq(1).all()
    error = (probs * (1 - probs) / 100_000).sqrt()
    assert ((samples.mean(0) - probs).abs() < 4 * error).all()


def test_sampling_at_the_ends_and_without_gradient() -> None:
    probs = torch.tensor([[0.25, 0.25, 0.5]]).expand(4, 3).clone().requires_grad_()
    noise = torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24])
    samples = dist.sample_onehot(probs, noise)
    assert samples.argmax(-1).tolist() == [0, 1, 2, 2]
    assert not samples.requires_grad
    low = torch.full((1, 7), 1 / 7) - 1e-7  # sums to less than 1, as rounded probabilities do
    assert dist.sample_onehot(low, torch.tensor([1 - 2**-24])).sum() == 1


def test_straight_through_uses_the_mixed_probabilities() -> None:
    logits = torch.randn(2, 3, 4).requires_grad_()
    weight, onehot = torch.randn(2, 3, 4), F.one_hot(torch.randint(4, (2, 3)), 4).float()
    sample = dist.straight_through(onehot, dist.unimix(logits))
    assert torch.equal(sample, onehot)
    (got,) = torch.autograd.grad((sample * weight).sum(), logits)
    p = logits.softmax(-1)
    want = 0.99 * p * (weight - (p * weight).sum(-1, keepdim=True))
    torch.testing.assert_close(got, want)


def test_kl_sums_over_groups() -> None:
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    want = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert dist.kl_onehot(p, q).item() == pytest.approx(want, rel=1e-5)
    assert dist.kl_onehot(p, p).item() == 0


def test_densities_match_torch() -> None:
    x, mean, std = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5, 3) + 0.1
    normal = torch.distributions.Normal(mean, std)
    torch.testing.assert_close(dist.normal_log_prob(x, mean, std), normal.log_prob(x).sum(-1))
    torch.testing.assert_close(dist.normal_entropy(std), normal.entropy().sum(-1))
    bernoulli = torch.distributions.Bernoulli(logits=torch.randn(5))
    target = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    loss = dist.bernoulli_loss(bernoulli.logits, target)
    torch.testing.assert_close(loss, -bernoulli.log_prob(target))


# ----------------------------------------------------------------------------- layers


def test_initialisation() -> None:
    """std = outscale * sqrt(1 / fan_in), cut at 2 * 1.1368 of it; a block layer's fan is its full
    width; every linear and convolution has a bias of 0."""
    torch.manual_seed(0)
    layers: list[tuple[nn.Module, float]] = [
        (Linear(256, 300), 1 / 16),
        (Linear(256, 300, outscale=0.01), 0.01 / 16),
        (BlockLinear(512, 1024, 8), 512**-0.5),
        (Conv(16, 64), 1 / 20),
    ]
    for layer, std in layers:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert weight.abs().max().item() == pytest.approx(2 * 1.1368 * std, rel=0.01)
        assert not bias.any()
    assert not Linear(16, 255, outscale=0.0)(torch.randn(3, 16)).any()
    assert NormedLinear(4, 4).norm.scale.eq(1).all()


def test_blocks_see_their_own_slice_only() -> None:
    layer = BlockLinear(12, 8, 4)
    x = torch.randn(2, 3, 12)
    moved = x.clone()
    moved[..., 3:6] += 1  # the input of block 1
    changed = (layer(moved) != layer(x)).any(0).any(0)
    assert changed.tolist() == [False] * 2 + [True] * 2 + [False] * 4
    want = torch.block_diag(*layer.weight.detach())
    same_sums(layer(x), x @ want + layer.bias)


@pytest.mark.parametrize("blocks", [1, 4])
def test_units_with_a_span_keep_what_they_hold(blocks: int) -> None:
    """One step from nothing but a memory of 1: u = 1 / steps, of 2 to 32 steps, spread evenly."""
    torch.manual_seed(0)
    core = BlockGRU(1024, 4, 2, 8, blocks, span=32)
    with torch.no_grad():
        core.gates.weight.zero_()  # the bias decides; a candidate of 0
        kept = core(torch.ones(1, 1024), torch.zeros(1, 4), torch.zeros(1, 8))[0]
    steps = 1 / (1 - kept)
    assert steps.min() >= 1.99 and steps.max() <= 32.01
    assert steps.mean() == pytest.approx(17, abs=1)  # 9 of deviation / sqrt(1024) is 0.3


def test_models_hand_their_span_to_their_memory() -> None:
    for family, part, options in (("dreamerv3", "core", {}), ("jepa", "memory", {"memory": "gru"})):
        for span in (0, 8):
            model = make_small(family, memory_span=span, **options).world_model
            assert getattr(model, part).gates.bias.any() == bool(span), family


def test_rms_norm() -> None:
    norm = RMSNorm(4)
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    y = norm(x)
    torch.testing.assert_close(y[0], x[0].detach() / np.sqrt(25 / 4 + 1e-4))
    y.sum().backward()
    assert not y[1].any()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[1], torch.full((4,), 100.0))  # 1 / sqrt(eps)


def test_mlp_is_linear_norm_silu() -> None:
    mlp = MLP(3, 8, 2, partial(Linear, size_out=5))
    x = torch.randn(7, 3)
    hidden = x
    for i in range(2):
        layer = mlp[i]
        assert isinstance(layer, NormedLinear)
        raw = F.linear(hidden, layer.linear.weight, layer.linear.bias)
        hidden = F.silu(raw / (raw.square().mean(-1, keepdim=True) + 1e-4).sqrt())
    out = mlp[2]
    assert isinstance(out, Linear)
    same_sums(mlp(x), F.linear(hidden, out.weight, out.bias))
    assert len(MLP(3, 8, 2)) == 2


# ----------------------------------------------------------------------------- images


@pytest.mark.parametrize("shape", [(84, 84, 1), (96, 72, 3), (10, 10, 3), (64, 64, 3)])
def test_images_of_any_size(shape: tuple[int, int, int]) -> None:
    encoder = ImageEncoder(shape, 2, (2, 3, 4, 4))
    decoder = ImageDecoder(shape, 16, 8, 4, 2, (2, 3, 4, 4))
    image = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    tokens = encoder(image)
    cells = -(-shape[0] // 16) * -(-shape[1] // 16)
    assert tokens.shape == (2, encoder.size_out) == (2, cells * 8)
    decoded = decoder(torch.randn(2, 16), torch.randn(2, 8))
    assert decoded.shape == image.shape
    assert (decoded > 0).all()
    assert (decoded < 1).all()
    decoded.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_odd_images_are_padded_by_repetition() -> None:
    torch.manual_seed(0)
    small, whole = ImageEncoder((10, 14, 3), 2, (2, 3)), ImageEncoder((12, 16, 3), 2, (2, 3))
    whole.load_state_dict(small.state_dict())
    image = torch.randint(0, 256, (2, 10, 14, 3), dtype=torch.uint8)
    padded = np.pad(image.numpy(), ((0, 0), (0, 2), (0, 2), (0, 0)), "edge")
    same_sums(small(image), whole(torch.from_numpy(padded)))


def test_encoder_order_is_conv_pool_norm_silu_and_flattens_height_width_channel() -> None:
    torch.manual_seed(0)
    encoder = ImageEncoder((8, 8, 3), 2, (2, 3))
    with torch.no_grad():
        for norm in encoder.norms:
            norm.scale.uniform_(0.5, 2)
    image = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    x = image.float() / 255 - 0.5
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        x = F.max_pool2d(conv(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * norm.scale
        x = x * torch.sigmoid(x)
    same_sums(encoder(image), x.flatten(1))


def test_decoder_branches() -> None:
    """Channels of block g come from slice g of deter; norm and SiLU follow the sum of branches."""
    decoder = ImageDecoder((8, 8, 3), 16, 8, 4, 4, (2, 4))  # 16 channels, 2 per block
    inputs = []
    decoder.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    deter, stoch = torch.randn(1, 16), torch.randn(1, 8)
    moved = deter.clone()
    moved[:, 6:8] += 1  # the slice of block 3
    for d in (deter, moved):
        decoder(d, stoch)
    changed = (inputs[0] != inputs[1]).flatten(0, 2).any(0)
    assert changed.nonzero().flatten().tolist() == [6, 7]
    own = decoder.from_deter(deter).view(1, 8, 2, 2, 2).permute(0, 2, 3, 1, 4).flatten(3)
    both = own + decoder.from_stoch(stoch).view(1, 2, 2, 16)
    same_sums(inputs[0], both)
    assert decoder.from_stoch[0].linear.out_features == 2 * 4


# -------------------------------------------------------------------------- optimizer


def laprop(
    x: np.ndarray, grads: list[np.ndarray], lr: float, agc: float, warmup: int
) -> np.ndarray:
    """The rule written out for one tensor, in float64."""
    nu, mu = np.zeros_like(x), np.zeros_like(x)
    for i, u in enumerate(grads):
        if agc:
            limit = agc * np.maximum(1e-3, np.linalg.norm(x))
            u = u / np.maximum(1.0, np.linalg.norm(u) / limit)
        nu = 0.999 * nu + 0.001 * u * u
        u = u / (np.sqrt(nu / (1 - 0.999 ** (i + 1))) + 1e-20)
        mu = 0.9 * mu + 0.1 * u
        x = x - lr * (min(1.0, i / warmup) if warmup else 1.0) * mu / (1 - 0.9 ** (i + 1))
    return x


@pytest.mark.parametrize(("agc", "warmup"), [(0.3, 0), (0.3, 3), (0.0, 2)])
def test_laprop_follows_the_rule(agc: float, warmup: int) -> None:
    """Weights, a zero tensor (the floor of clipping), biases and scales alike; a parameter that
    has no gradient is left alone."""
    rng = np.random.default_rng(0)
    starts = [rng.normal(size=(4, 3)), np.zeros((3, 2)), rng.normal(size=5), np.ones(5)]
    grads = [
        [10.0 ** rng.integers(-4, 3) * rng.normal(size=x.shape) for x in starts] for _ in range(6)
    ]
    params = [nn.Parameter(torch.from_numpy(x.copy())) for x in [*starts, np.ones(2)]]
    optimizer = LaProp(params, lr=1e-2, agc=agc, warmup=warmup)
    for step in grads:
        for p, g in zip(params, step, strict=False):
            p.grad = torch.from_numpy(g)
        optimizer.step()
    for i, x in enumerate(starts):
        want = laprop(x, [step[i] for step in grads], 1e-2, agc, warmup)
        np.testing.assert_allclose(params[i].detach().numpy(), want, rtol=1e-9, atol=1e-12)
    assert torch.equal(params[-1].detach(), torch.ones(2, dtype=torch.float64))


def test_laprop_warms_up_from_zero() -> None:
    """Update 1 has rate 0, the full rate comes with update `warmup` + 1."""
    param = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LaProp([param], lr=0.1, agc=0, warmup=4)
    sizes = []
    for _ in range(7):
        before = param.item()
        param.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        sizes.append(before - param.item())
    np.testing.assert_allclose(sizes, [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1], atol=1e-12)


def test_a_stage_that_starts_later_then_moves_as_from_the_beginning() -> None:
    early, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    stages = [{"params": [early]}, {"params": [late], "start": 3}]
    optimizer = LaProp(stages, lr=0.1, agc=0, warmup=2)
    path = []
    for _ in range(6):
        rates = [learning_rate(group) for group in optimizer.param_groups]
        early.grad = late.grad = torch.full((3,), 0.5)
        optimizer.step()
        path.append((early.mean().item(), late.mean().item(), *rates))
    ahead, behind, early_rates, late_rates = zip(*path, strict=True)
    assert behind == (1.0, 1.0, 1.0, *ahead[:3])
    assert late_rates == (0.0, 0.0, 0.0, *early_rates[:3])


def test_groups_split_parameters_by_module() -> None:
    layer, other, rest = (nn.Linear(2, 2) for _ in range(3))
    params = [*layer.parameters(), *rest.parameters()]
    split = groups(params, (layer, {"lr": 0.5}), (other, {"lr": 0.1}))
    assert [[id(p) for p in group["params"]] for group in split] == [
        [id(p) for p in layer.parameters()],
        [id(p) for p in rest.parameters()],
    ]
    assert split[0]["lr"] == 0.5 and "lr" not in split[1]


def test_laprop_continues_from_its_state() -> None:
    def make(value: Tensor) -> tuple[nn.Parameter, LaProp]:
        param = nn.Parameter(value.clone())
        return param, LaProp([param], warmup=2)

    torch.manual_seed(0)
    grads = torch.randn(4, 3)
    param, optimizer = make(torch.ones(3))
    for i, grad in enumerate(grads):
        if i == 2:
            saved, (param_b, other) = optimizer.state_dict(), make(param.detach())
            other.load_state_dict(saved)
            param, optimizer = param_b, other
        param.grad = grad
        optimizer.step()
    straight, optimizer = make(torch.ones(3))
    for grad in grads:
        straight.grad = grad
        optimizer.step()
    assert torch.equal(param, straight)

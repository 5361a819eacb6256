"""Denoising: objectives in closed form, running moments, denoisers, and what they learn."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from small import perturbed, same_sums, tensors
from torch import Tensor

from worldflux_dist.data import Batch
from worldflux_dist.nn.denoisers import ImageDenoiser, VectorDenoiser
from worldflux_dist.nn.denoising import EDM, Draws, Objective, Shortcut
from worldflux_dist.nn.statistics import RunningMoments
from worldflux_dist.nn.unet import AdaptiveNorm, UNet


def affine(noisy: Tensor, level: Tensor) -> Tensor:
    """A network that can be computed by hand."""
    return 0.5 * noisy + level[:, :1] + 0.25 * level[:, -1:] ** 2


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


# ------------------------------------------------------------------------------------ edm


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_edm_input_and_target_have_variance_one(sigma: float, offset: float) -> None:
    torch.manual_seed(0)
    edm = EDM(offset=offset)
    x = edm.std * torch.randn(400_000, 1)
    noisy = x + sigma * torch.randn_like(x) + offset * torch.randn_like(x)
    scaled, _, target = edm.regression(x, noisy, torch.full((len(x),), sigma))
    assert scaled.std().item() == pytest.approx(1, abs=0.005)
    assert target.std().item() == pytest.approx(1, abs=0.005)


def test_edm_leaves_alone_what_has_no_noise() -> None:
    x = torch.randn(8, 3)
    clean = EDM().denoise(affine, x, torch.full((8,), 1e-6), [])
    torch.testing.assert_close(clean, x, rtol=0, atol=1e-4)
    assert (EDM().denoise(affine, x, torch.full((8,), 1.0), []) - x).abs().min() > 1e-2


def test_edm_sampler_is_eulers() -> None:
    edm, noise = EDM(), torch.randn(5, 2)
    middle = ((5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert edm.sigmas(1) == pytest.approx([5, 0])
    assert edm.sigmas(3) == pytest.approx([5, middle, 0.002, 0])

    def euler(x: Tensor, sigma: float, following: float) -> Tensor:
        clean = edm.denoise(affine, x, torch.full((5,), sigma), [])
        return x + (x - clean) / sigma * (following - sigma)

    same_sums(edm.sample(affine, noise, [], 1), euler(5 * noise, 5, 0))
    two = euler(euler(5 * noise, 5, 0.002), 0.002, 0)
    same_sums(edm.sample(affine, noise, [], 2), two)
    unit = EDM(unit_start=True).sample(affine, noise, [], 1)
    same_sums(unit, euler(noise, 5, 0))


def test_edm_draws_what_its_network_knows() -> None:
    """F = 0 is the best denoiser of N(0, sd^2): many small steps give its standard deviation."""
    x = EDM().sample(lambda noisy, level: 0 * noisy, torch.randn(20_000, 1), [], 200)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_edm_loss_by_hand() -> None:
    x, noise = column(0.3, -0.2), column(1.0, -2.0)
    level = torch.tensor([[0.5, 0.0], [1.0, 0.0]])  # the median of sigma, and its upper end
    found = EDM().loss(affine, x, [], 0, Draws(noise, level, noise))
    for i, sigma in enumerate((np.exp(-0.4), 20.0)):
        total = sigma**2 + 0.25
        y = x[i] + sigma * noise[i]
        target = (x[i] - 0.25 / total * y) / (sigma * 0.5 / np.sqrt(total))
        c = np.log(sigma) / 4
        answer = 0.5 * y / np.sqrt(total) + c + 0.25 * c**2
        assert found[i].item() == pytest.approx(((answer - target) ** 2).item(), rel=1e-4)


# -------------------------------------------------------------------------------- shortcut


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_shortcut_samples_in_steps_of_equal_size(steps: int) -> None:
    z = torch.randn(5, 2)
    found = Shortcut().sample(affine, z, [], steps)
    for i in range(steps):
        tau = i / steps
        told = torch.tensor([[tau, np.log2(steps) / 3]], dtype=torch.float32).expand(5, 2)
        z = z + (affine(z, told) - z) / (1 - tau) / steps
    same_sums(found, z)


def test_shortcut_loss_by_hand() -> None:
    """Of the first row from two steps of 1/4 in place of one from 1/2 to 1, of the other from the
    data, at the smallest step."""
    x, noise = column(0.3, -0.2), column(1.0, -2.0)
    level = torch.tensor([[0.6, 0.4], [0.6, 0.4]])
    found = Shortcut().loss(affine, x, [], 1, Draws(noise, level, noise))

    def predict(z: Tensor, tau: float, halvings: float) -> Tensor:
        return affine(z[None], torch.tensor([[tau, halvings / 3]]))[0]

    z = 0.5 * noise[0] + 0.5 * x[0]
    first = (predict(z, 0.5, 2) - z) / 0.5
    middle = z + 0.25 * first
    second = (predict(middle, 0.75, 2) - middle) / 0.25
    error = (predict(z, 0.5, 1) - z) / 0.5 - (first + second) / 2
    want = (0.9 * 0.5 + 0.1) * 0.5**2 * error**2
    assert found[0].item() == pytest.approx(want.item(), rel=1e-4)
    z = 0.4 * noise[1] + 0.6 * x[1]
    want = (0.9 * 0.6 + 0.1) * (predict(z, 0.6, 3) - x[1]) ** 2
    assert found[1].item() == pytest.approx(want.item(), rel=1e-4)


def test_a_network_that_knows_the_answer_has_no_loss() -> None:
    x = torch.full((8, 2), 0.7)
    assert Shortcut().loss(lambda noisy, level: x[: len(noisy)], x, [], 4).max() < 1e-10
    sample = Shortcut().sample(lambda noisy, level: x, torch.randn(8, 2), [], 4)
    same_sums(sample, x)


# ------------------------------------------------------------------------- running moments


def test_running_moments_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    moments = RunningMoments(3, rate=0.1)
    same_sums(moments.std, torch.ones(3))
    batches = [rng.normal([0, 1e3, -5], [1, 2, 0], (50, 3)).astype(np.float32) for _ in range(30)]
    for k, values in enumerate(batches[:10]):
        moments.take(torch.from_numpy(values).view(5, 10, 3), torch.ones(5, 10, dtype=torch.bool))
        assert not moments.mean.any() or k  # nothing moves before the update
        moments.update()
        seen = np.concatenate(batches[: k + 1]).astype(np.float64)
        np.testing.assert_allclose(moments.mean, seen.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments.var, seen.var(0), rtol=1e-3, atol=1e-5)
    mean = moments.mean.double().numpy()
    square = moments.var.double().numpy() + mean**2
    for values in batches[10:]:
        moments.take(torch.from_numpy(values), torch.ones(50, dtype=torch.bool))
        moments.update()
        mean = 0.9 * mean + 0.1 * values.mean(0, dtype=np.float64)
        square = 0.9 * square + 0.1 * np.square(values, dtype=np.float64).mean(0)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var, square - mean**2, rtol=1e-3, atol=1e-5)
    assert moments.std.tolist()[2] == pytest.approx(1e-4)  # it does not vary


def test_parts_of_a_batch_count_as_one_and_what_is_not_finite_does_not() -> None:
    values = torch.randn(12, 2)
    whole, parts = RunningMoments(2), RunningMoments(2)
    keep = torch.ones(12, dtype=torch.bool)
    whole.take(values, keep)
    more = torch.cat([values, torch.tensor([[torch.nan, torch.inf], [99.0, 99.0]])])
    parts.take(more[:5], keep[:5])
    parts.take(more[5:], torch.cat([keep[5:], torch.tensor([True, False])]))
    for moments in (whole, parts):
        moments.update()
    same_sums(parts.mean, whole.mean)
    same_sums(parts.var, whole.var)
    parts.update()  # with nothing taken
    same_sums(parts.mean, whole.mean)


# ------------------------------------------------------------------------------ denoisers


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (7, 20)])
def test_unet_takes_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = UNet(6, 3, 5, 1, (4, 8, 8), 1, 16)
    inputs = (torch.randn(2, 3, *size), torch.randn(2, 1), torch.randn(2, 3, *size))
    cond = torch.randn(2, 5)
    assert net(*inputs, cond).eq(0).all()
    perturbed(net)
    found = net(*inputs, cond)
    assert found.shape == (2, 3, *size)
    for i, value in enumerate((*inputs, cond)):  # everything that it is told has a say
        changed = [*inputs, cond]
        changed[i] = value + 0.5
        assert not torch.allclose(net(*changed), found, atol=1e-3)
    same_sums(net(*(value[:1] for value in inputs), cond[:1]), found[:1])
    height, width = size  # padded at the lower right, by repetition, to whole cells of 4 x 4
    rows, columns = (torch.arange(-(-n // 4) * 4).clamp(max=n - 1) for n in size)
    noisy, frames = (inputs[i][:, :, rows][..., columns] for i in (0, 2))
    same_sums(net(noisy, inputs[1], frames, cond)[..., :height, :width], found)


def test_a_condition_scales_and_shifts() -> None:
    norm = perturbed(AdaptiveNorm(64, 3))
    x, cond = 5 + 2 * torch.randn(2, 64, 4, 4), torch.randn(2, 3)
    grouped = x.unflatten(1, (2, 32))
    mean, var = (f((2, 3, 4), keepdim=True) for f in (grouped.mean, grouped.var))
    plain = ((grouped - mean) / var.sqrt()).flatten(1, 2)
    scale, shift = norm.modulation(cond)[..., None, None].split(64, 1)
    want = torch.nn.functional.silu((1 + scale) * plain + shift)
    torch.testing.assert_close(norm(x, cond), want, rtol=0, atol=0.02)


@torch.no_grad()
def test_images_are_drawn_in_their_256_levels() -> None:
    edm = EDM(0.5, 0.3)
    denoiser = ImageDenoiser(edm, (8, 6, 3), 2, 4, (4, 8), 1, 8)
    history, told = torch.randint(0, 256, (5, 2, 8, 6, 3), dtype=torch.uint8), torch.randn(5, 4)
    normal = torch.randn(5, denoiser.noise_size)
    found = denoiser.sample(normal, history, told, 2)
    pixels = edm.sample(lambda noisy, level: 0 * noisy, normal.view(5, 3, 8, 6), [], 2)
    assert found.dtype == torch.uint8
    want = ((pixels.clamp(-1, 1) + 1) / 2 * 255).round().permute(0, 2, 3, 1)
    assert torch.equal(found.float(), want)
    frames = denoiser._frames(history)
    assert frames.shape == (5, 6, 8, 6) and frames.min() >= -1 and frames.max() <= 1
    same_sums(frames[:, 3:].permute(0, 2, 3, 1), history[:, 1].float() / 127.5 - 1)


def test_vectors_are_drawn_in_their_own_units() -> None:
    """A fresh network answers 0, and the shortcut takes that for x: the mean change."""
    denoiser = VectorDenoiser(Shortcut(), 2, 1, 1, 8, 1)
    newest, told = torch.tensor([[3.0, -1.0], [1.0, 2.0]]), torch.zeros(2, 1)
    denoiser.take(newest + torch.tensor([10.0, 0.0]), newest, torch.ones(2, dtype=torch.bool))
    denoiser.update_targets()
    found = denoiser.sample(torch.randn(2, 2), newest[:, None], told, 1)
    same_sums(found, newest + torch.tensor([10.0, 0.0]))


# -------------------------------------------------------------------------------- learning


def pendulum(episodes: int, seed: int) -> Batch:
    """(episodes, 101) steps of random play."""
    envs = gymnasium.make_vec("Pendulum-v1", episodes, "sync", max_episode_steps=101)
    rng = np.random.default_rng(seed)
    obs, reward = [envs.reset(seed=seed)[0]], [np.zeros(episodes)]
    action = rng.uniform(-1, 1, (episodes, 101, 1)).astype(np.float32)
    action[:, 0] = 0
    for t in range(1, 101):
        seen, earned, *_ = envs.step(2 * action[:, t])
        obs.append(seen)
        reward.append(earned)
    first = np.zeros((episodes, 101), bool)
    first[:, 0] = True
    flag = np.zeros_like(first)
    columns = np.stack(obs, 1).astype(np.float32), np.stack(reward, 1).astype(np.float32)
    return tensors(Batch({"obs": columns[0]}, action, columns[1], first, flag, flag))


OBJECTIVES: dict[str, tuple[Objective, int]] = {"edm": (EDM(), 3), "shortcut": (Shortcut(), 2)}


def denoiser(name: str, x: Tensor, told: Tensor, num: int, residual: bool = True) -> Any:
    """A denoiser of x (N, 2, n), first and second observation, after `num` gradient steps."""
    torch.manual_seed(0)
    size, cond = x.shape[-1], told.shape[-1]
    net = VectorDenoiser(OBJECTIVES[name][0], size, 1, cond, 64, 2, residual)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(num):
        rows = torch.randint(len(x), (256,))
        before, after = x[rows].unbind(1)
        net.take(after, before, torch.ones(256, dtype=torch.bool))
        optimizer.zero_grad()
        net.loss(after, before[:, None], told[rows], 64).mean().backward()
        optimizer.step()
        net.update_targets()
    return net


def one_step(name: str, residual: bool) -> float:
    """Squared error of Pendulum's next observation, by that of the present one."""
    (train, test) = (pendulum(episodes, seed) for episodes, seed in ((32, 0), (64, 1)))

    def pairs(batch: Batch) -> tuple[Tensor, Tensor]:
        obs = batch.obs["obs"]
        both = torch.stack([obs[:, :-1], obs[:, 1:]], 2).flatten(0, 1)
        return both, batch.action[:, 1:].flatten(0, 1)

    net = denoiser(name, *pairs(train), 600, residual)
    (x, told), scale = pairs(test), test.obs["obs"].flatten(0, 1).std(0)
    with torch.no_grad():
        normal = torch.randn(len(x), 3)
        found = net.sample(normal, x[:, :1], told, OBJECTIVES[name][1])
    error, persistence = (((y - x[:, 1]) / scale).square().mean() for y in (found, x[:, 0]))
    return (error / persistence).item()


@pytest.mark.learning
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_changes_are_learned_better_than_the_whole(objective: str) -> None:
    residual, absolute = (one_step(objective, each) for each in (True, False))
    assert residual < 0.02
    assert residual < absolute / 3


@pytest.mark.learning
@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_two_outcomes_stay_two(objective: str) -> None:
    """y' is 1 or -1, as likely: the mean of both is no outcome."""
    torch.manual_seed(0)
    y = torch.randint(0, 2, (4096, 2, 1)) * 2.0 - 1
    net = denoiser(objective, y, torch.zeros(4096, 1), 600)
    before = torch.tensor([[1.0], [-1.0]]).repeat(250, 1)
    with torch.no_grad():
        drawn = net.sample(torch.randn(500, 1), before[:, None], torch.zeros(500, 1), 4)
    assert drawn.abs().mean() > 0.8
    for start in (0, 1):
        assert 0.3 < (drawn[start::2] > 0).float().mean() < 0.7

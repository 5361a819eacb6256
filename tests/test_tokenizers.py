"""Tokenizers: their numbers, that a code keeps its token, and what they learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import IMAGE, vector

from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.tokenizers import FSQ, VQ, Bins, Categorical, Identity, draw, perplexity
from worldflux_dist.spaces import ObsSpec, Spaces

STAGES = (2, 4)


def spec(space: Any) -> ObsSpec:
    return Spaces(space, gym_spaces.Discrete(2)).obs["obs"]


def test_identity_takes_one_hots_apart() -> None:
    space = gym_spaces.MultiDiscrete([2, 5, 3])
    tokenizer = Identity.of(space)
    ids = torch.tensor([[1, 4, 0], [0, 0, 2]])
    assert (tokenizer.num_tokens, tokenizer.vocab) == (3, 5)
    obs = torch.from_numpy(spec(space).convert(ids.numpy()))
    assert torch.equal(tokenizer.encode(obs), ids) and torch.equal(tokenizer.decode(ids), obs)
    one = Identity.of(gym_spaces.Discrete(4, start=-1))
    assert one.encode(torch.eye(4)).flatten().tolist() == [0, 1, 2, 3]


def test_the_published_bins() -> None:
    bins = Bins.of(vector(2)).bins
    assert bins.shape == (2, 125) and torch.equal(bins[0], bins[1])
    assert torch.equal(bins[0], -bins[0].flip(0)) and bins[0, 62] == 0 and bins[0, 124] == 6
    torch.testing.assert_close(bins[0, 93], torch.tensor(math.log(1 + math.pi)))
    near, far = bins[0, 62:94].diff(), bins[0, 93:].diff()
    torch.testing.assert_close(near, near[:1].expand(31))
    torch.testing.assert_close(far, far[:1].expand(31))


def test_bins_lie_between_the_bounds_of_a_space() -> None:
    low, high = np.float32([-2, -np.inf, 0]), np.float32([3, 1, 3.4e38])
    tokenizer = Bins.of(gym_spaces.Box(low, high))
    ends = dist.symexp(tokenizer.bins[0, [0, -1]])
    torch.testing.assert_close(ends, torch.tensor([-2.0, 3.0]))
    assert tokenizer.bins[1:, -1].tolist() == [6, 6]  # bounded on one side, or hardly: not at all
    bits = Bins.of(gym_spaces.MultiBinary(4))
    seen = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    assert torch.equal(bits.decode(bits.encode(seen)), seen)


@pytest.mark.parametrize("space", [vector(3), gym_spaces.Box(-2, 5, (3,))])
def test_bins_are_the_nearest_and_keep_their_token(space: gym_spaces.Box) -> None:
    tokenizer = Bins.of(space)
    every = torch.arange(125)[:, None].expand(-1, 3)
    assert torch.equal(tokenizer.encode(tokenizer.decode(every)), every)
    low, high = tokenizer.bins[0, 0], tokenizer.bins[0, -1]
    x = low + (high - low) * torch.rand(5000, 3)  # in symlog space
    ids = tokenizer.encode(dist.symexp(x))
    error = (dist.symlog(tokenizer.decode(ids)) - x).abs()
    widths = torch.nn.functional.pad(tokenizer.bins[0].diff(), (1, 1))
    half = torch.maximum(widths[:-1], widths[1:])[ids] / 2
    assert (error <= half + 1e-5).all()
    beyond = tokenizer.encode(torch.tensor([[-1e9, 1e9, torch.inf]]))
    assert beyond.tolist() == [[0, 124, 124]]


@pytest.mark.parametrize("levels", [(8, 8, 8), (5, 2, 3), (4,)])
def test_fsq_codes_keep_their_token(levels: tuple[int, ...]) -> None:
    tokenizer = FSQ(spec(IMAGE), levels, 16, 4, STAGES)
    every = torch.arange(math.prod(levels))[None]
    codes = tokenizer.codes(every)
    assert codes.shape == (1, math.prod(levels), len(levels))
    assert torch.equal(tokenizer.tokens(codes), every)
    assert codes.min() == -1 and codes.max() == 1 and len(codes.unique(dim=1)[0]) == every.numel()
    jitter = (torch.rand_like(codes) - 0.5) * 0.99 * 2 / (torch.tensor(levels) - 1)
    assert torch.equal(tokenizer.tokens(codes + jitter), every)  # what is nearest
    latent = torch.randn(2, 16, len(levels), requires_grad=True)
    ids, given, losses = tokenizer.quantize(latent)
    assert torch.equal(given.detach(), tokenizer.codes(ids)) and not losses
    given.sum().backward()
    want = 1 - torch.tanh(latent.detach()) ** 2  # straight through the rounding
    torch.testing.assert_close(latent.grad, want)
    assert tokenizer.tokens(torch.full((1, 1, len(levels)), torch.nan)).item() == 0


def test_fsq_by_hand() -> None:
    tokenizer = FSQ(spec(vector(2)), (3, 2), 16, 4, STAGES)
    codes = torch.tensor([[[-1.0, 1.0], [0.1, -0.2], [0.9, 0.2]]])
    assert tokenizer.tokens(codes).tolist() == [[0 * 2 + 1, 1 * 2 + 0, 2 * 2 + 1]]
    assert tokenizer.codes(torch.tensor([[1, 2, 5]])).tolist() == [[[-1, 1], [0, -1], [1, 1]]]


def test_vq_takes_the_nearest_code_and_both_move_towards_each_other() -> None:
    tokenizer = VQ(spec(vector(2)), 4, 2, 16, 4, STAGES)
    tokenizer.table.data = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    latent = torch.tensor([[[1.5, 0.0], [0.0, 0.5]]], requires_grad=True)
    ids, codes, losses = tokenizer.quantize(latent)
    assert ids.tolist() == [[1, 0]] and torch.equal(codes.detach(), tokenizer.codes(ids).detach())
    torch.testing.assert_close(losses["commit"].detach(), torch.tensor([2 * (0.25 + 0.25)]))
    losses["commit"].sum().backward()
    assert latent.grad is not None and tokenizer.table.grad is not None
    torch.testing.assert_close(latent.grad, torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]]))
    want = torch.tensor([[0.0, -1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(tokenizer.table.grad, want)
    latent.grad = None
    codes.sum().backward()
    assert latent.grad.eq(1).all()  # type: ignore[union-attr]


def test_vq_revives_codes_that_nobody_uses() -> None:
    tokenizer = VQ(spec(vector(2)), 4, 2, 16, 4, STAGES)
    table = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    tokenizer.table.data = table.clone()
    tokenizer.refresh()
    assert torch.equal(tokenizer.table, table)  # all were used alike so far
    for _ in range(500):
        tokenizer.count(torch.tensor([[0, 0, 0, 1]]))
    torch.testing.assert_close(tokenizer.usage[:2], torch.tensor([0.75, 0.25]), atol=0.01, rtol=0)
    tokenizer.refresh()
    assert torch.equal(tokenizer.table[:2], table[:2])
    assert torch.equal(tokenizer.table[2], 1.01 * table[0])  # the most used one has a twin
    assert torch.equal(tokenizer.table[3], table[3])  # the next one has no more than its share
    torch.testing.assert_close(tokenizer.usage[[0, 2]], tokenizer.usage[0].expand(2))
    torch.testing.assert_close(tokenizer.usage.sum(), torch.tensor(1.0), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["fsq", "vq"])
@pytest.mark.parametrize("space", [IMAGE, vector(5)])
def test_a_trained_tokenizer_learns_to_reconstruct(kind: str, space: Any) -> None:
    torch.manual_seed(0)
    sizes = (16, 4, STAGES)
    made = FSQ(spec(space), (8, 8), *sizes) if kind == "fsq" else VQ(spec(space), 64, 8, *sizes)
    tokenizer: Any = made
    assert tokenizer.num_tokens == (16 if space is IMAGE else 8)
    obs = torch.randn(64, 5)
    if space is IMAGE:
        shade = torch.randint(0, 256, (64, 2, 2, 3), dtype=torch.uint8)
        obs = shade.repeat_interleave(8, 1).repeat_interleave(8, 2)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    history = []
    for _ in range(60):
        losses = tokenizer.losses(obs)
        assert all(loss.shape == (64,) for loss in losses.values())
        optimizer.zero_grad()
        sum(loss.mean() for loss in losses.values()).backward()
        optimizer.step()
        tokenizer.refresh()
        history.append(losses["rec"].mean().item())
    assert history[-1] < 0.5 * history[0]
    ids = tokenizer.encode(obs)
    assert ids.shape == (64, tokenizer.num_tokens) and 0 <= ids.min() <= ids.max() < 64
    found, want = tokenizer.decode(ids), obs.float()
    assert found.shape == obs.shape and found.dtype == torch.float32
    found, want = (x / 255 if space is IMAGE else dist.symlog(x) for x in (found, want))
    error = (found - want).square().flatten(1).sum(-1).mean()
    assert error < 2 * history[-1]
    assert perplexity(ids, 64) > 0.1 * len(ids.unique())


def test_one_hots_are_drawn_by_their_probabilities_and_have_their_gradient() -> None:
    logits = torch.tensor([[[2.0, 0.0, -9.0], [0.0, 1.0, 0.0]]], requires_grad=True)
    probs = dist.unimix(logits, 0.03)
    assert torch.equal(
        draw(probs, torch.tensor([[0.5, 0.99]]))[0], torch.tensor([1, 0, 0, 0, 0, 1])
    )
    many = draw(probs.detach().expand(20000, -1, -1)).unflatten(-1, (2, 3))
    assert many.sum(-1).eq(1).all() and not many.requires_grad
    torch.testing.assert_close(many.mean(0), probs[0].detach(), atol=0.02, rtol=0)
    assert many[:, 0, 2].sum() > 100  # 1 % of what is all but ruled out
    weight = torch.randn(6)
    (found,) = torch.autograd.grad((draw(probs) * weight).sum(), logits, retain_graph=True)
    (want,) = torch.autograd.grad((probs.flatten(1) * weight).sum(), logits)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("space", [IMAGE, vector(5)])
def test_a_categorical_tokenizer_learns_to_reconstruct(space: Any) -> None:
    torch.manual_seed(0)
    tokenizer = Categorical(spec(space), 6, 8, 0.01, 16, 4, STAGES)
    obs = torch.randn(64, 5)
    if space is IMAGE:
        shade = torch.randint(0, 256, (64, 2, 2, 3), dtype=torch.uint8)
        obs = shade.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert tokenizer.encode(obs).shape == (64, 48) and tokenizer.entries == 48
    optimizer = torch.optim.Adam(tokenizer.parameters(), 5e-3)
    history = []
    for _ in range(150):
        error = tokenizer.error(tokenizer.encode(obs), obs)
        assert error.shape == (64,)
        optimizer.zero_grad()
        error.mean().backward()
        assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())
        optimizer.step()
        history.append(error.mean().item())
    assert np.mean(history[-10:]) < 0.6 * np.mean(history[:10])
    found = tokenizer.decode(tokenizer.encode(obs))
    assert found.shape == obs.shape and found.dtype == torch.float32
    found, want = (x / 255 if space is IMAGE else dist.symlog(x) for x in (found, obs.float()))
    assert (found - want).square().flatten(1).sum(-1).mean() < 2 * np.mean(history[-10:])


def test_perplexity_counts_what_occurs() -> None:
    assert perplexity(torch.tensor([[3, 3, 3]]), 8) == 1
    torch.testing.assert_close(perplexity(torch.arange(8)[None], 8), torch.tensor(8.0))

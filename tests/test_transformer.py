"""The block-causal transformer: who sees whom, and that a cache gives what the pass gives."""

from __future__ import annotations

import pytest
import torch
from small import same_sums
from torch import Tensor

from worldflux_dist.nn.transformer import BlockTransformer, attend, rotate

CONTEXT, PLACES, WIDTH = 5, 3, 16


def make(layers: int = 2) -> BlockTransformer:
    torch.manual_seed(0)
    made = BlockTransformer(WIDTH, layers, 2, PLACES, CONTEXT)
    with torch.no_grad():
        for param in made.parameters():
            param += 0.1 * torch.randn(param.shape)
    return made


def steps_of(length: int, resets: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    first = torch.rand(4, length) < 0.15 * resets
    first[0] = False
    return torch.randn(4, length, PLACES, WIDTH), first


def stepped(model: BlockTransformer, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, T, P, W), and after each step its cache and how many of its blocks count."""
    cache, blocks = torch.zeros(len(x), *model.cache_shape), torch.zeros(len(x), dtype=torch.long)
    found, caches, counts = [], [], []
    for t in range(x.shape[1]):
        blocks = blocks * ~first[:, t]
        cache = cache * (~first[:, t]).view(-1, 1, 1, 1, 1, 1)
        out, cache = model.step(x[:, t], cache, blocks)
        blocks = (blocks + 1).clamp(max=CONTEXT - 1)
        found.append(out)
        caches.append(cache)
        counts.append(blocks)
    return torch.stack(found, 1), torch.stack(caches, 1), torch.stack(counts, 1)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 10, 13, 31])
@torch.no_grad()
def test_steps_with_a_cache_are_the_pass(length: int) -> None:
    """To 1e-5, whether or not the steps fill chunks, far beyond the context, across resets."""
    model, (x, first) = make(), steps_of(length)
    out, kept = model(x, first)
    found, caches, blocks = stepped(model, x, first)
    torch.testing.assert_close(found, out, rtol=0, atol=1e-5)
    # What step t + 1 may start from is the cache after step t.
    cut = model.caches(kept[:, :-1], blocks_before(blocks), 0)
    assert len(cut[0]) == length and not cut[:, 0].any()
    torch.testing.assert_close(cut[:, 1:], caches[:, :-1], rtol=0, atol=1e-5)


def blocks_before(blocks: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(blocks[:, :1]), blocks], 1)[:, :-1]


@torch.no_grad()
def test_a_step_counts_only_what_is_said_to_count() -> None:
    model = make()
    cache, x = torch.randn(4, *model.cache_shape), torch.randn(4, PLACES, WIDTH)
    blocks = torch.tensor([0, 1, 2, 4])
    out, after = model.step(x, cache, blocks)
    assert torch.equal(after[:, :-1], cache[:, 1:])
    other = cache.clone()
    for row, number in enumerate(blocks):
        other[row, : CONTEXT - 1 - int(number)] = 100.0
    assert torch.equal(model.step(x, other, blocks)[0], out)
    other[1, -1] += 1
    assert (model.step(x, other, blocks)[0] != out).flatten(1).any(1).tolist() == [
        False, True, False, False
    ]  # fmt: skip


@torch.no_grad()
def test_who_sees_whom() -> None:
    """A change at one position moves all of its block and the blocks that see it, in one layer the
    `context` - 1 that follow; neither what came before nor another episode."""
    model, (x, first) = make(layers=1), steps_of(14, resets=False)
    first[1, 6] = True
    out, _ = model(x, first)
    x[:2, 4, 1, :] += 1
    moved = (model(x, first)[0] != out).any(-1)  # (B, T, P)
    assert not moved[2:].any()
    assert moved[0].all(1).tolist() == [4 <= t < 4 + CONTEXT for t in range(14)]
    assert moved[1].all(1).tolist() == [4 <= t < 6 for t in range(14)]
    assert torch.equal(moved.any(-1), moved.all(-1))


@torch.no_grad()
def test_only_distances_count() -> None:
    """The same blocks at another time give the same, when nothing before them is in sight."""
    model, (x, first) = make(layers=1), steps_of(CONTEXT, resets=False)
    late = torch.cat([torch.randn(4, 300, PLACES, WIDTH), x], 1)
    begun = torch.zeros(4, 300 + CONTEXT, dtype=torch.bool)
    begun[:, 300] = True
    same_sums(model(late, begun)[0][:, 300:], model(x, first)[0])
    query, key = torch.randn(2, 1, 1, 1, 8).double()
    products = [
        (rotate(query, torch.tensor([t + 3])) * rotate(key, torch.tensor([t]))).sum()
        for t in (0, 5, 100_000)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3))
    assert not torch.allclose(rotate(query, torch.tensor([3])), query)


def test_attention_by_hand() -> None:
    """One head of 2 numbers; the second position sees both, the first itself."""
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[None, :, None]
    key = torch.tensor([[1.0, 1.0], [0.0, 3.0]])[None, :, None]
    value = torch.tensor([[1.0, 10.0], [2.0, 20.0]])[None, :, None]
    mask = torch.tensor([[True, False], [True, True]])
    share = torch.softmax(torch.tensor([2.0, 6.0]) / 2**0.5, 0)
    second = share[0] * torch.tensor([1.0, 10.0]) + share[1] * torch.tensor([2.0, 20.0])
    want = torch.stack([torch.tensor([1.0, 10.0]), second])[None]
    torch.testing.assert_close(attend(query, key, value, mask), want)

"""A transformer over steps that are blocks of positions: the memory of token and diffusion models.

A block sees all of itself and the last blocks of its episode, `context` of them with itself:

    attend(t, s)  <=>  t - context < s <= t  and no episode begins in s + 1 .. t

Positions are told by rotation (RoPE) of queries and keys by their block's number, so that only
distances count; places inside a block by a learned embedding. What must stay true: one step with a
cache gives what the pass over all steps gives, after any number of steps. Hence the band instead of
a window that is full at some time, keys that are kept as they are before rotation, and angles of
distances, which never grow. Attention is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.layers import Linear, RMSNorm

SLOWEST = 100.0  # blocks in which the slowest pair of numbers turns by one radian


def rotate(x: Tensor, blocks: Tensor) -> Tensor:
    """Turn (..., T, P, heads, D) by the number of each block, (T,): pair i, of entries i and
    i + D / 2, by the angle number * SLOWEST^(-2 i / D).

    Angles are float64: a float32 of some thousand radians has lost its fourth digit.
    """
    half = x.shape[-1] // 2
    powers = torch.arange(half, dtype=torch.float64, device=x.device) / half
    angles = (blocks.double()[:, None] * SLOWEST**-powers)[:, None, None]  # (T, 1, 1, D / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x.split(half, -1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class Layer(nn.Module):
    """Pre-norm attention and MLP, both added to what came in: (..., W) -> (..., W)."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        small = (2 * depth) ** -0.5  # what `depth` layers add keeps the size of what came in
        self.heads = heads
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.project = Linear(width, 3 * width)
        self.merge = Linear(width, width, outscale=small)
        self.widen, self.narrow = Linear(width, 4 * width), Linear(4 * width, width, outscale=small)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., heads, W / heads) each."""
        parts = self.project(self.attention_norm(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        return query, key, value

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """What the layer makes of x (..., W) and of what attention read for it."""
        x = x + self.merge(attended)
        return x + self.narrow(F.silu(self.widen(self.mlp_norm(x))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention within (N, K, W) by a mask (K, K), where no blocks are."""
        return self.add(x, attend(*self.queries_keys_values(x), mask))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """(N, Q, heads, D) of (N, S, heads, D) by a mask that says who sees whom -> (N, Q, W)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(-2)


class BlockTransformer(nn.Module):
    """Steps of P embedded positions (B, T, P, W) -> what is known after each, of the same shape.

    Its cache of a step holds keys and values of the `context` - 1 blocks before the next one,
    (B, context - 1, P, layers, 2, W), oldest first and zero where the episode has none. A row of
    it is all that a row needs: rows can be chosen, repeated and put in another order.
    """

    def __init__(self, width: int, layers: int, heads: int, positions: int, context: int) -> None:
        super().__init__()
        self.context = context
        self.places = nn.Parameter(0.1 * torch.randn(positions, width))
        self.layers: Any = nn.ModuleList(Layer(width, heads, layers) for _ in range(layers))
        self.norm = RMSNorm(width)

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Of one row."""
        return self.context - 1, len(self.places), len(self.layers), 2, self.places.shape[1]

    def forward(self, x: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, P, W), is_first (B, T) -> the same shape, and keys and values
        (B, T, P, layers, 2, W).

        Steps are taken in chunks of `context`, each of which sees itself and the one before.
        """
        length, chunk = x.shape[1], min(self.context, x.shape[1])
        before = chunk if length > chunk else 0
        more = -length % chunk
        mask = self._mask(is_first, chunk, before, more)
        steps, kept = torch.arange(length, device=x.device), []
        x = x + self.places
        for layer in self.layers:
            query, key, value = layer.queries_keys_values(x)
            kept.append(torch.stack([key.flatten(-2), value.flatten(-2)], -2))
            query, key = rotate(query, steps), rotate(key, steps)
            read = attend(
                _chunks(query, chunk, 0, more),
                _chunks(key, chunk, before, more),
                _chunks(value, chunk, before, more),
                mask,
            )
            read = read.unflatten(1, (chunk, -1)).unflatten(0, (len(x), -1)).flatten(1, 2)
            x = layer.add(x, read[:, :length])
        return self.norm(x).float(), torch.stack(kept, 3).float()

    def _mask(self, is_first: Tensor, chunk: int, before: int, more: int) -> Tensor:
        """(B * chunks, 1, chunk * P, (before + chunk) * P), true where a position sees another."""
        episode = F.pad(is_first.cumsum(1), (0, more), value=-2)  # a step that is none sees itself
        seen = F.pad(episode, (before, 0), value=-1).unfold(1, before + chunk, chunk)
        seeing = episode.unflatten(1, (-1, chunk))  # (B, chunks, chunk)
        at = torch.arange(before + chunk, device=is_first.device)
        distance = at[before:, None] - at
        band = (distance >= 0) & (distance < self.context)
        mask = (band & (seeing[..., None] == seen[:, :, None])).flatten(0, 1)
        num = len(self.places)
        mask = mask[:, :, None, :, None].expand(-1, -1, num, -1, num)
        return mask.flatten(3, 4).flatten(1, 2).unsqueeze(1)

    def step(self, x: Tensor, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """One block (B, P, W) behind a cache of which the last `blocks` (B,) count -> what is known
        after it (B, P, W), and its cache."""
        back = torch.arange(1 - self.context, 1, device=x.device)  # of blocks, up to this one
        seen = (-back <= blocks[:, None]).repeat_interleave(len(self.places), 1)
        mask, kept = seen[:, None, None], []  # (B, 1, 1, context * P)
        x = x + self.places
        for number, layer in enumerate(self.layers):
            query, key, value = layer.queries_keys_values(x)
            kept.append(torch.stack([key.flatten(-2), value.flatten(-2)], -2))
            past = cache[:, :, :, number].unflatten(-1, (layer.heads, -1)).to(key.dtype)
            key = rotate(torch.cat([past[:, :, :, 0], key[:, None]], 1), back)
            value = torch.cat([past[:, :, :, 1], value[:, None]], 1)
            x = layer.add(x, attend(query, key.flatten(1, 2), value.flatten(1, 2), mask))
        newest = torch.stack(kept, 2).float()[:, None]
        return self.norm(x).float(), torch.cat([cache[:, 1:], newest], 1)

    def caches(self, kept: Tensor, blocks: Tensor, first: int) -> Tensor:
        """The caches (B, T - first, ...) of steps `first`.. of T, of which `blocks` (B, T) count,
        from the keys and values (B, T - 1, ...) of the blocks between them."""
        size = self.context - 1
        padded = F.pad(kept, (0, 0) * 4 + (size, 0))
        cut = padded.unfold(1, size, 1)[:, first:].movedim(-1, 2)
        counts = torch.arange(size, 0, -1, device=kept.device) <= blocks[:, first:, None]
        return cut * counts[(..., *[None] * 4)]


def _chunks(x: Tensor, chunk: int, before: int, more: int) -> Tensor:
    """(B, T, P, heads, D) -> (B * chunks, (before + chunk) * P, heads, D): steps in chunks, behind
    the `before` steps before each; zero where there are none."""
    x = F.pad(x, (0, 0) * 3 + (before, more))
    return x.unfold(1, before + chunk, chunk).movedim(-1, 2).flatten(2, 3).flatten(0, 1)

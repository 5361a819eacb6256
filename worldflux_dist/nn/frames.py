"""Frames of tokens as a transformer reads and foretells them: embeddings and logits.

A frame is the K tokens of all observations of a step, side by side. What must stay true: each
observation has its own vocabulary, and a token that it does not have is never drawn.

An embedder says how many `positions` a block has, and how many of the first ones are `ahead`: what
comes out there foretells the next frame. Packed frames, of one-hots, have one position for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import BlockLinear, Linear, NormedLinear, RMSNorm
from worldflux_dist.nn.products import full_precision
from worldflux_dist.nn.tokenizers import Tokenizer, draw
from worldflux_dist.nn.transformer import Layer

SHORTEST = 60.0  # radians from 0 to 1 of the shortest waves


class Embedder(nn.Module):
    """A frame's K tokens and an action as a block of K + 1 vectors, and a frame as one vector.

    Each token has a table of its own, but those of one image share one. Bins begin as waves of the
    numbers they stand for, so that near ones begin alike: what is learned of one is then
    learned of its neighbours.
    """

    offsets: Tensor

    def __init__(self, tokenizers: Sequence[Tokenizer], action_dim: int, width: int) -> None:
        super().__init__()
        tables: list[Tensor] = []
        offsets: list[int] = []
        for tokenizer in tokenizers:
            for token in range(tokenizer.num_tokens):
                if token == 0 or not tokenizer.shared:
                    tables.append(_first_table(tokenizer, token, width))
                offsets.append(sum(map(len, tables[:-1])))
        self.table = nn.Parameter(torch.cat(tables))
        self.register_buffer("offsets", torch.tensor(offsets), persistent=False)
        self.action = Linear(action_dim, width)
        self.frame = NormedLinear(len(offsets) * width, width)
        self.positions, self.ahead = len(offsets) + 1, len(offsets)

    def tokens(self, ids: Tensor) -> Tensor:
        """(..., K) -> (..., K, W)."""
        return F.embedding(ids + self.offsets, self.table)

    def forward(self, ids: Tensor, action: Tensor) -> Tensor:
        """The block (..., K + 1, W) of tokens (..., K) and the action (..., A) that follows."""
        acted = self.action(_bounded(action))
        return torch.cat([self.tokens(ids), acted.unsqueeze(-2)], -2)

    def pooled(self, ids: Tensor) -> Tensor:
        """(..., K) -> (..., W). In float32 under autocast, too: a policy sees what it acts on."""
        with full_precision(ids):
            return self.frame(self.tokens(ids).flatten(-2))


def _bounded(action: Tensor) -> Tensor:
    """a / max(1, |a|)"""
    return action / action.detach().abs().clamp(min=1)


def _first_table(tokenizer: Tokenizer, token: int, width: int) -> Tensor:
    values = tokenizer.values()
    if values is None:
        return 0.1 * torch.randn(tokenizer.vocab, width)
    return 0.1 * waves(values[token], width)


def waves(values: Tensor, width: int) -> Tensor:
    """Numbers (V,) in [-1, 1] -> `width` random waves of them (V, W), of size 1. Long ones and
    short ones are as likely."""
    turns = torch.exp(math.log(SHORTEST) * torch.rand(width))
    return math.sqrt(2) * (values[:, None] * turns + 2 * math.pi * torch.rand(width)).cos()


class Predictor(nn.Module):
    """What the transformer says of a frame (N, K, W) -> logits of its tokens. Those of bins begin
    as waves, too.

    In autoregressive mode one more layer lets each position see the tokens before its own.
    """

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        width: int,
        num_heads: int,
        autoregressive: bool,
        rare: float,
    ) -> None:
        super().__init__()
        self.rare = rare
        self.nums = [tokenizer.num_tokens for tokenizer in tokenizers]
        self.heads = nn.ModuleList()
        for number, tokenizer in enumerate(tokenizers):
            num, vocab = tokenizer.num_tokens, tokenizer.vocab
            shared = tokenizer.shared
            head = Linear(width, vocab) if shared else BlockLinear(num * width, num * vocab, num)
            values = tokenizer.values()
            if values is not None:
                first = torch.stack([waves(each, width).t() for each in values])
                head.weight.data = 0.3 * width**-0.5 * first
            self.heads.append(head)
            limit = -1e9 * (torch.arange(vocab) >= torch.tensor(tokenizer.sizes)[:, None]).float()
            self.register_buffer(f"limit{number}", limit, persistent=False)
        self.given: Linear | None = None
        if autoregressive:
            self.given = Linear(width, width)
            self.layer = Layer(width, num_heads, 1)

    def forward(self, ahead: Tensor, drawn: Tensor) -> list[Tensor]:
        """Logits (N, K_i, V_i) of each observation's tokens, float32; `drawn` (N, K, W) are the
        embedded tokens, of which each position sees those before it, in autoregressive mode."""
        if self.given is not None:
            x = ahead + self.given(F.pad(drawn[:, :-1], (0, 0, 1, 0)))
            causal = torch.ones(2 * [x.shape[1]], dtype=torch.bool, device=x.device).tril()
            ahead = self.layer(x, causal)
        logits = []
        for number, part in enumerate(ahead.split(self.nums, 1)):
            head, limit = self.heads[number], getattr(self, f"limit{number}")
            x = head(part if isinstance(head, Linear) else part.flatten(1))
            logits.append(x.float().reshape(-1, *limit.shape) + limit)
        return logits

    def sample(self, ahead: Tensor, embedder: Embedder, noise: Tensor) -> Tensor:
        """Tokens (N, K) by uniform noise (N, K).

        Those that are less likely than `rare` times the likeliest one are not drawn.
        Autoregressive: K rounds, in which all tokens are drawn anew given those of the round
        before. After round i the first i no longer change.
        """
        ids = torch.zeros_like(noise, dtype=torch.long)
        for _ in range(1 if self.given is None else noise.shape[1]):
            drawn = []
            logits = self(ahead, embedder.tokens(ids))
            for x, uniform in zip(logits, noise.split(self.nums, 1), strict=True):
                probs = x.softmax(-1)
                likely = probs >= self.rare * probs.amax(-1, keepdim=True)
                drawn.append(dist.sample_index(probs * likely, uniform))
            ids = torch.cat(drawn, 1)
        return ids


class PackedEmbedder(nn.Module):
    """A frame's one-hots side by side, (..., K V), and an action, mixed into a block of one vector;
    and a frame alone as one vector. Each is weighted by its own size, as otherwise the few numbers
    of an action would hardly count among the many of a frame."""

    positions = ahead = 1

    def __init__(self, tokenizers: Sequence[Tokenizer], action_dim: int, width: int) -> None:
        super().__init__()
        size = sum(tokenizer.entries for tokenizer in tokenizers)
        self.seen, self.action = Linear(size, width), Linear(action_dim, width)
        self.mix = nn.Sequential(RMSNorm(width), nn.SiLU(), Linear(width, width))
        self.frame = NormedLinear(size, width)

    def tokens(self, onehots: Tensor) -> Tensor:
        return onehots

    def forward(self, onehots: Tensor, action: Tensor) -> Tensor:
        """The block (..., 1, W) of a frame (..., K V) and the action (..., A) that follows."""
        return self.mix(self.seen(onehots) + self.action(_bounded(action))).unsqueeze(-2)

    def pooled(self, onehots: Tensor) -> Tensor:
        """(..., K V) -> (..., W), in float32."""
        with full_precision(onehots):
            return self.frame(onehots)


class PackedPredictor(nn.Module):
    """What the transformer says of a frame (N, 1, W) -> the probabilities of its tokens, all of V
    values, of which a share `mix` is uniform."""

    def __init__(self, tokenizers: Sequence[Tokenizer], width: int, mix: float) -> None:
        super().__init__()
        self.nums, self.mix = [tokenizer.num_tokens for tokenizer in tokenizers], mix
        self.head = Linear(width, sum(tokenizer.entries for tokenizer in tokenizers))

    def probs(self, ahead: Tensor) -> Tensor:
        """(N, 1, W) -> (N, K, V), float32."""
        logits = self.head(ahead).reshape(ahead.shape[0], sum(self.nums), -1)
        return dist.unimix(logits, self.mix)

    def divergences(self, ahead: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """KL(seen || probs) (B, T) of probabilities (B, T, K, V) that were seen and those of
        (B, T, 1, W), twice: with the gradient of what was foretold, and of what was seen."""
        probs = self.probs(ahead.flatten(0, 1)).view_as(seen)
        return dist.kl_onehot(seen.detach(), probs), dist.kl_onehot(seen, probs.detach())

    def forward(self, ahead: Tensor, drawn: Tensor) -> list[Tensor]:
        """Their logarithms (N, K_i, V) by observation; what was `drawn` does not matter."""
        return list(self.probs(ahead).log().split(self.nums, 1))

    def sample(self, ahead: Tensor, embedder: PackedEmbedder, noise: Tensor) -> Tensor:
        """One-hots side by side (N, K V) by uniform noise (N, K)."""
        return draw(self.probs(ahead), noise)

"""Tokenizers: an observation as K whole numbers, and back.

    identity  Discrete and MultiDiscrete: they are tokens already
    bins      vectors: the nearest of 125 values in symlog space, one token a number; not trained
    fsq, vq   images, one token for each cell of the encoder's grid; and vectors, 8 tokens
    categorical   all: tokens of the whole frame, drawn, and learned with what foretells them

fsq (finite scalar quantisation, Mentzer et al. 2023) rounds each of a few bounded numbers to one of
its levels and needs no loss but the reconstruction's; vq (van den Oord et al. 2017) takes the
nearest of learned codes, which are drawn to the encoder's outputs, and those to them by `COMMIT`.

What must stay true: tokens carry no gradient, so that a tokenizer learns from its own losses alone,
but for categorical ones, which are no numbers but one-hots with the gradient of their
probabilities; and a code of bins or fsq that is tokenized again gives the same token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from gymnasium import spaces as gym_spaces
from torch import Tensor, nn

from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MLP, Linear, init_weight
from worldflux_dist.nn.vision import GridDecoder, ImageEncoder, grid
from worldflux_dist.spaces import ObsSpec

NUM_BINS = 125
KNEE, FAR = math.log1p(math.pi), 6.0  # in symlog space: 32 bins up to one, 31 more to the other
UNBOUNDED = 1e6  # a bound beyond this one is none
VECTOR_TOKENS = 8
COMMIT = 1.0
IDLE = 0.03  # of an even share of tokens: a code that has less is given to others


class Tokenizer(nn.Module, ABC):
    """One observation's. `sizes` (K,) says how many values each token has, `vocab` the most of
    them; `shared`, whether one value means the same in all tokens, as in the cells of an image;
    `entries`, how many numbers a frame's tokens are, K."""

    shared = False

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes, self.num_tokens, self.vocab = tuple(sizes), len(sizes), max(sizes)
        self.entries = self.num_tokens

    @abstractmethod
    def encode(self, obs: Tensor) -> Tensor:
        """Observations (N, ...) -> tokens (N, K) int64."""

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """Tokens (N, K) -> observations (N, ...) in their own units, float32."""

    def losses(self, obs: Tensor) -> dict[str, Tensor]:
        """What it learns from observations (N, ...): losses (N,) by name, if it learns."""
        return {}

    def values(self) -> Tensor | None:
        """(K, vocab) numbers that the tokens stand for, in about [-1, 1], where near ones are
        alike."""
        return None

    def refresh(self) -> None:
        """After every gradient step."""


class Identity(Tokenizer):
    """Concatenated one-hot vectors of these sizes."""

    @classmethod
    def of(cls, space: Any) -> Identity:
        multi = isinstance(space, gym_spaces.MultiDiscrete)
        return cls(space.nvec.flatten().tolist() if multi else [int(space.n)])

    def encode(self, obs: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in obs.split(self.sizes, -1)], -1)

    def decode(self, ids: Tensor) -> Tensor:
        columns = zip(ids.unbind(-1), self.sizes, strict=True)
        return torch.cat([F.one_hot(column, size) for column, size in columns], -1).float()


class Bins(Tokenizer):
    """Each number's nearest bin in symlog space: evenly between its bounds where the space has
    them, else +-KNEE and +-FAR's, fine in the middle."""

    bins: Tensor
    edges: Tensor

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        super().__init__([NUM_BINS] * len(low))
        bins = torch.stack([_bins(a, b) for a, b in zip(low, high, strict=True)])
        self.register_buffer("bins", bins.float(), persistent=False)  # (n, 125)
        middle = (bins[:, 1:] + bins[:, :-1]) / 2
        self.register_buffer("edges", middle.float(), persistent=False)

    @classmethod
    def of(cls, space: Any) -> Bins:
        if isinstance(space, gym_spaces.Box):
            return cls(space.low.flatten().tolist(), space.high.flatten().tolist())
        num = math.prod(space.shape)  # MultiBinary
        return cls([0] * num, [1] * num)

    def encode(self, obs: Tensor) -> Tensor:
        return (dist.symlog(obs).unsqueeze(-1) > self.edges).sum(-1)

    def decode(self, ids: Tensor) -> Tensor:
        return dist.symexp(self.bins.expand(*ids.shape, -1).gather(-1, ids.unsqueeze(-1)))[..., 0]

    def values(self) -> Tensor:
        return self.bins / self.bins.abs().amax(-1, keepdim=True)


def _bins(low: float, high: float) -> Tensor:
    if -UNBOUNDED < low < high < UNBOUNDED:
        first, last = (math.copysign(math.log1p(abs(x)), x) for x in (low, high))
        return torch.linspace(first, last, NUM_BINS, dtype=torch.float64)
    near = torch.linspace(0, KNEE, 32, dtype=torch.float64)
    half = torch.cat([near, torch.linspace(KNEE, FAR, 32, dtype=torch.float64)[1:]])
    return torch.cat([-half[1:].flip(0), half])


class Autoencoder(Tokenizer):
    """A trained tokenizer: encoder to K vectors (K, D), decoder of as many. The networks are a
    subclass's; those of an image whose cells are the tokens go through a cell at a time."""

    image: bool
    encoder: nn.Module
    to_latent: nn.Module
    decoder: nn.Module

    def latent(self, obs: Tensor) -> Tensor:
        x = self.encoder(obs if self.image else dist.symlog(obs))
        if self.shared:
            x = x.unflatten(-1, (self.num_tokens, -1))
        return self.to_latent(x).float().reshape(obs.shape[0], self.num_tokens, -1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Codes (N, K, D), or one-hots side by side, -> an image in [0, 1] or a vector in symlog
        space."""
        return self.decoder(codes if self.shared else codes.flatten(1)).float()

    def restore(self, codes: Tensor) -> Tensor:
        """The same in the observation's own units."""
        x = self.reconstruct(codes)
        return 255 * x if self.image else dist.symexp(x)

    def error(self, codes: Tensor, obs: Tensor) -> Tensor:
        """The squared error (N,), summed over the observation."""
        target = obs.float() / 255 if self.image else dist.symlog(obs)
        error = F.mse_loss(self.reconstruct(codes), target, reduction="none")
        return error.flatten(1).sum(-1)


class Quantized(Autoencoder):
    """An autoencoder each of whose K vectors is quantised.

    A subclass says how K `latent`s become codes of `code_size` numbers.
    """

    def __init__(
        self, spec: ObsSpec, vocab: int, latent: int, units: int, depth: int, stages: Sequence[int]
    ) -> None:
        self.image = spec.kind == "image"
        shape, multipliers = spec.shape, tuple(stages)
        num = math.prod(grid(shape, len(multipliers))) if self.image else VECTOR_TOKENS
        super().__init__([vocab] * num)
        self.shared = self.image
        if self.image:
            self.encoder = ImageEncoder(shape, depth, multipliers)
            self.to_latent = Linear(depth * multipliers[-1], latent)
            self.decoder = GridDecoder(shape, latent, depth, multipliers)
        else:
            self.encoder = MLP(shape[0], units, 2)
            self.to_latent = Linear(units, num * latent)
            self.decoder = MLP(num * latent, units, 2, partial(Linear, size_out=shape[0]))

    @abstractmethod
    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents (N, K, D) -> tokens (N, K), their codes (N, K, D) with the gradient of a copy,
        and losses (N,) beside the reconstruction's."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """Tokens (N, K) -> codes (N, K, D)."""

    @torch.no_grad()
    def encode(self, obs: Tensor) -> Tensor:
        return self.quantize(self.latent(obs))[0]

    def decode(self, ids: Tensor) -> Tensor:
        return self.restore(self.codes(ids))

    def losses(self, obs: Tensor) -> dict[str, Tensor]:
        """With `rec`, the squared error."""
        ids, codes, more = self.quantize(self.latent(obs))
        self.count(ids)
        return {"rec": self.error(codes, obs)} | more

    def count(self, ids: Tensor) -> None:
        """Take notice of which tokens occur."""


class FSQ(Quantized):
    """Code numbers are 2 d / (L - 1) - 1 with the digits d = round((L - 1) (1 + tanh z) / 2) of a
    token, the first one the highest."""

    levels: Tensor
    weights: Tensor

    def __init__(
        self, spec: ObsSpec, levels: Sequence[int], units: int, depth: int, stages: Sequence[int]
    ) -> None:
        vocab = math.prod(levels)
        super().__init__(spec, vocab, len(levels), units, depth, stages)
        counts = torch.tensor(levels)
        self.register_buffer("levels", counts, persistent=False)
        weights = vocab // counts.cumprod(0)
        self.register_buffer("weights", weights, persistent=False)

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        bounded = torch.tanh(latent)
        ids = self.tokens(bounded.detach())
        return ids, self.codes(ids) + (bounded - bounded.detach()), {}

    def tokens(self, codes: Tensor) -> Tensor:
        """The tokens (N, K) nearest to numbers (N, K, D) in [-1, 1]."""
        top = self.levels - 1
        digits = ((codes + 1) / 2 * top).round().long()
        digits = torch.minimum(digits.clamp(min=0), top)  # a broken number is a token, too
        return (digits * self.weights).sum(-1)

    def codes(self, ids: Tensor) -> Tensor:
        digits = ids.unsqueeze(-1) // self.weights % self.levels
        return 2 * digits / (self.levels - 1) - 1


class VQ(Quantized):
    """Codes are rows of a learned table. One that is hardly used becomes a near copy of one that is
    used most, so that the two share what that one stands for."""

    usage: Tensor

    def __init__(
        self, spec: ObsSpec, vocab: int, latent: int, units: int, depth: int, stages: Sequence[int]
    ) -> None:
        super().__init__(spec, vocab, latent, units, depth, stages)
        self.table = nn.Parameter(torch.empty(vocab, latent))
        init_weight(self.table, 1)
        self.register_buffer("usage", torch.full((vocab,), 1 / vocab))

    def quantize(self, latent: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        flat, table = latent.detach(), self.table.detach()
        ids = (table.square().sum(-1) - 2 * F.linear(flat, table)).argmin(-1)
        codes = self.codes(ids)
        drawn = (codes - flat).square().flatten(1).sum(-1)
        committed = (latent - codes.detach()).square().flatten(1).sum(-1)
        losses = {"commit": drawn + COMMIT * committed}
        return ids, codes.detach() + (latent - flat), losses

    def codes(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table)

    @torch.no_grad()
    def count(self, ids: Tensor) -> None:
        shares = torch.zeros_like(self.usage)
        ones = torch.full_like(ids.flatten(), 1 / ids.numel(), dtype=shares.dtype)
        shares = shares.scatter_add(0, ids.flatten(), ones)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(shares)
            shares /= torch.distributed.get_world_size()
        self.usage.lerp_(shares, 0.01)

    @torch.no_grad()
    def refresh(self) -> None:
        """No random draw: all ranks of a group do the same."""
        even = 1 / self.vocab
        order = self.usage.argsort(descending=True, stable=True)
        idle = self.usage < IDLE * even
        model = order[idle.cumsum(0) - 1]  # the n-th idle code copies the n-th of the most used
        given = idle & (self.usage[model] > even)
        self.table.copy_(torch.where(given[:, None], 1.01 * self.table[model], self.table))
        copies = torch.zeros_like(self.usage).scatter_add(0, model, given.to(self.usage.dtype))
        usage = self.usage / (1 + copies)
        self.usage.copy_(torch.where(given, usage[model], usage))


class Categorical(Autoencoder):
    """Each of the K vectors is the logits of one of V values; all of them are about the whole
    frame. Tokens are one-hots side by side, (N, K V), with the gradient of their probabilities.

    A variational autoencoder without a prior of its own: what foretells the tokens is that.
    """

    def __init__(
        self,
        spec: ObsSpec,
        num: int,
        vocab: int,
        mix: float,
        units: int,
        depth: int,
        stages: Sequence[int],
    ) -> None:
        super().__init__([vocab] * num)
        self.image, self.mix, self.entries = spec.kind == "image", mix, num * vocab
        shape, multipliers = spec.shape, tuple(stages)
        if self.image:
            encoder, top = ImageEncoder(shape, depth, multipliers), depth * multipliers[-1]
            self.encoder, size, cells = encoder, encoder.size_out, grid(shape, len(multipliers))
            self.decoder = nn.Sequential(
                Linear(self.entries, size),
                nn.Unflatten(-1, (math.prod(cells), top)),
                GridDecoder(shape, top, depth, multipliers),
            )
        else:
            self.encoder, size = MLP(shape[0], units, 2), units
            self.decoder = MLP(self.entries, units, 2, partial(Linear, size_out=shape[0]))
        self.to_latent = Linear(size, self.entries)

    def posterior(self, obs: Tensor) -> Tensor:
        """Probabilities (N, K, V) of the tokens of observations (N, ...), a share `mix` uniform."""
        return dist.unimix(self.latent(obs), self.mix)

    def encode(self, obs: Tensor) -> Tensor:
        return draw(self.posterior(obs))

    def decode(self, ids: Tensor) -> Tensor:
        return self.restore(ids)


def draw(probs: Tensor, noise: Tensor | None = None) -> Tensor:
    """One-hots side by side (..., K V) by uniform noise (..., K), with the gradient of the
    probabilities (..., K, V) that they are drawn from."""
    if noise is None:
        noise = torch.rand(probs.shape[:-1], device=probs.device)
    onehot = dist.sample_onehot(probs, noise)
    return (dist.straight_through(onehot, probs) if probs.requires_grad else onehot).flatten(-2)


def fitting(spec: ObsSpec) -> tuple[str, ...]:
    """The kinds of tokenizers that fit an observation, the best first; categorical fits all."""
    if spec.kind == "image":
        return ("fsq", "vq")
    if isinstance(spec.space, gym_spaces.Discrete | gym_spaces.MultiDiscrete):
        return ("identity", "fsq", "vq")
    return ("bins", "fsq", "vq")


def perplexity(ids: Tensor, vocab: int) -> Tensor:
    """exp(-sum p ln p) () of how often each token occurs: how many are in use."""
    counts = torch.zeros(vocab, device=ids.device)
    counts = counts.scatter_add(
        0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=counts.dtype)
    )
    share = counts / ids.numel()
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum())

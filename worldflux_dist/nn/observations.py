"""Networks from all observations of an environment to one vector and back, and its two heads.

Vectors, in symlog, go through one MLP, each image through convolutions of its own; names are
sorted, vectors first. What must stay true: what is decoded is in the observation's own units, and
a fresh reward head predicts exactly 0. The names of parameters are part of the checkpoint format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MLP, BinOutput, Linear
from worldflux_dist.nn.vision import ImageDecoder, ImageEncoder
from worldflux_dist.spaces import Spaces


class ObsEncoder(nn.Module):
    """Observations (N, ...) -> one vector (N, size_out): vectors first (keys sorted), then images.

    `units` is the width of the vectors' three layers, `depth` times each of the `multipliers` that
    of an image's stages, unless `make_cnn` makes another network for an image's shape. `visible`
    says for each observation which of its parts are seen; only such networks know parts.
    """

    def __init__(
        self,
        spaces: Spaces,
        units: int,
        depth: int,
        multipliers: tuple[int, ...],
        make_cnn: Callable[[tuple[int, ...]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.vectors, self.images = spaces.vectors, spaces.images
        size = sum(spaces.obs[key].shape[0] for key in self.vectors)
        self.mlp = MLP(size, units, 3) if self.vectors else None
        make = make_cnn or partial(ImageEncoder, depth=depth, multipliers=multipliers)
        cnns = [make(spaces.obs[key].shape) for key in self.images]
        self.cnns = nn.ModuleList(cnns)
        self.size_out = sum(cnn.size_out for cnn in cnns) + units * bool(self.vectors)

    def forward(self, obs: dict[str, Tensor], visible: dict[str, Tensor] | None = None) -> Tensor:
        tokens = []
        if self.mlp is not None:
            vectors = [dist.symlog(obs[key]) for key in self.vectors]
            if visible is not None:  # zero and not there are told apart by what reads this
                pairs = zip(vectors, self.vectors, strict=True)
                vectors = [x.masked_fill(~visible[key], 0.0) for x, key in pairs]
            tokens.append(self.mlp(torch.cat(vectors, -1)))
        for key, cnn in zip(self.images, self.cnns, strict=True):
            tokens.append(cnn(obs[key]) if visible is None else cnn(obs[key], visible[key]))
        return torch.cat(tokens, -1)


class ObsEmbedder(nn.Module):
    """Observations (N, ...) -> embeddings (N, size_out) in float32, which no norm holds: a
    regulariser of nn/collapse.py does. All else is as in `ObsEncoder`."""

    def __init__(
        self,
        spaces: Spaces,
        size: int,
        units: int,
        depth: int,
        multipliers: tuple[int, ...],
        make_cnn: Callable[[tuple[int, ...]], Any] | None = None,
    ) -> None:
        super().__init__()
        self.size_out = size
        self.obs = ObsEncoder(spaces, units, depth, multipliers, make_cnn)
        self.out = Linear(self.obs.size_out, size)

    def forward(self, obs: dict[str, Tensor], visible: dict[str, Tensor] | None = None) -> Tensor:
        emb: Tensor = self.out(self.obs(obs, visible)).float()
        return emb


class ObsDecoder(nn.Module):
    """(deter (..., D), stoch (..., S)) -> observations in float32: symlog vectors and images in
    [0, 1]. D is a multiple of MULTIPLE where there are
    images."""

    MULTIPLE = ImageDecoder.BLOCKS

    def __init__(
        self,
        spaces: Spaces,
        deter: int,
        stoch: int,
        units: int,
        depth: int,
        multipliers: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.vectors, self.images = spaces.vectors, spaces.images
        self.mlp = MLP(stoch + deter, units, 3) if self.vectors else None
        self.outs = nn.ModuleList(Linear(units, spaces.obs[k].shape[0]) for k in self.vectors)
        sizes = (deter, stoch, units, depth, multipliers)
        self.cnns = nn.ModuleList(ImageDecoder(spaces.obs[k].shape, *sizes) for k in self.images)

    def forward(self, deter: Tensor, stoch: Tensor) -> dict[str, Tensor]:
        lead, decoded = deter.shape[:-1], {}
        deter, stoch = deter.flatten(0, -2), stoch.flatten(0, -2)
        if self.mlp is not None:
            x = self.mlp(torch.cat([stoch, deter], -1))
            decoded = {key: out(x) for key, out in zip(self.vectors, self.outs, strict=True)}
        for key, cnn in zip(self.images, self.cnns, strict=True):
            decoded[key] = cnn(deter, stoch)
        return {key: value.float().unflatten(0, lead) for key, value in decoded.items()}

    def losses(self, decoded: dict[str, Tensor], obs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`rec/<key>` (B, T): squared errors of what `forward` gave, summed over an observation."""
        losses = {}
        for key, value in decoded.items():
            target = obs[key].float() / 255 if key in self.images else dist.symlog(obs[key])
            error = F.mse_loss(value, target, reduction="none")
            losses[f"rec/{key}"] = error.flatten(2).sum(-1)
        return losses

    def observations(self, decoded: dict[str, Tensor]) -> Any:
        """What `forward` gave in the observations' own units: a dict, or the only one."""
        obs = {
            key: value * 255 if key in self.images else dist.symexp(value)
            for key, value in decoded.items()
        }
        return obs["obs"] if set(obs) == {"obs"} else obs


class OutcomeHeads(nn.Module):
    """Reward, as two-hot bins, and the probability of going on, of x (..., size_in)."""

    bins: Tensor

    def __init__(self, size_in: int, units: int, layers: int = 1) -> None:
        super().__init__()
        self.reward = MLP(size_in, units, layers, partial(BinOutput, bins=255))
        self.proceed = MLP(size_in, units, layers, partial(Linear, size_out=1))
        self.register_buffer("bins", dist.symexp_bins(255), persistent=False)

    def decode(self, x: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
        """`reward` (...) and `continue` (...), those of them that are among `heads`."""
        preds = {}
        if "reward" in heads:
            preds["reward"] = dist.twohot_predict(self.reward(x), self.bins)
        if "continue" in heads:
            preds["continue"] = torch.sigmoid(self.proceed(x).squeeze(-1).float())
        return preds

    def losses(self, x: Tensor, reward: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropies (...) to rewards (...) and to soft targets `going` (...)."""
        wanted = dist.twohot_loss(self.reward(x), reward, bins=self.bins)
        return wanted, dist.bernoulli_loss(self.proceed(x).squeeze(-1), going)

"""All observations of an environment as one vector: the eyes of families that keep no tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worldflux_dist.nn.distributions import symlog
from worldflux_dist.nn.layers import MLP
from worldflux_dist.nn.vision import ImageEncoder
from worldflux_dist.spaces import Spaces


class ObservationEncoder(nn.Module):
    """Observations (N, ...) -> embeddings (N, size_out) in float32: symlog vectors through an MLP
    (keys sorted), then each image through DreamerV3's convolutions."""

    def __init__(
        self, spaces: Spaces, units: int, layers: int, depth: int, multipliers: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.vectors, self.images = spaces.vectors, spaces.images
        size = sum(spaces.obs[key].shape[0] for key in self.vectors)
        self.mlp = MLP(size, units, layers) if self.vectors else None
        cnns = [ImageEncoder(spaces.obs[k].shape, depth, multipliers) for k in self.images]
        self.cnns = nn.ModuleList(cnns)
        self.size_out = sum(cnn.size_out for cnn in cnns) + units * bool(self.vectors)

    def forward(self, obs: dict[str, Tensor]) -> Tensor:
        parts = []
        if self.mlp is not None:
            parts.append(self.mlp(symlog(torch.cat([obs[key] for key in self.vectors], -1))))
        parts += [cnn(obs[key]) for key, cnn in zip(self.images, self.cnns, strict=True)]
        return torch.cat(parts, -1).float()

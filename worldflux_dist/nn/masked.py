"""Masked prediction: an encoder of image patches that can leave some out, and a predictor of what
the embeddings would have been with all of them.

What must stay true: what is masked reaches a prediction in no way but by its place, neither as a
value nor as a gradient; and nothing is predicted from another episode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.layers import Linear, RMSNorm
from worldflux_dist.nn.transformer import Layer, attend, rotate
from worldflux_dist.spaces import Spaces

BLOCKS, LEAST = 2, 0.25  # of a mask: how many, and the least share of each axis that one covers


class PatchEncoder(nn.Module):
    """Images (N, H, W, C) uint8 -> (N, size_out): patches as positions of a small transformer.

    `visible` (N, P), P patches in rows, says which are seen: the others are zero in what comes out
    and change nothing of the rest. Images are padded to whole patches by repetition.
    """

    def __init__(self, shape: tuple[int, ...], patch: int, width: int, layers: int) -> None:
        super().__init__()
        height, width_, channels = shape
        self.patch, self.grid = patch, patches(shape, patch)
        self.padding = (0, self.grid[1] * patch - width_, 0, self.grid[0] * patch - height)
        self.embed = Linear(patch * patch * channels, width)
        self.places = nn.Parameter(0.1 * torch.randn(self.grid[0] * self.grid[1], width))
        self.layers: Any = nn.ModuleList(Layer(width, 4, layers) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.size_out = len(self.places) * width

    def forward(self, image: Tensor, visible: Tensor | None = None) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 255 - 0.5
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        x = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)  # (N, P, patch^2 C)
        if visible is None:
            visible = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mask = (visible[:, None] | own).unsqueeze(1)  # (N, 1, P, P); what sees nothing sees itself
        x = self.embed(x) + self.places
        for layer in self.layers:
            x = layer(x, mask)
        return (self.norm(x) * visible.unsqueeze(-1)).flatten(1)


def patches(shape: tuple[int, ...], patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover an image (H, W, C)."""
    return -(-shape[0] // patch), -(-shape[1] // patch)


class MaskedPredictor(nn.Module):
    """Embeddings of what is visible -> those of all that is there, in windows (B, T).

    It sees for each step the embedding (D) of its visible part, which parts are masked (M) and the
    action that went in (A); attention goes both ways within an episode.
    """

    def __init__(self, emb: int, parts: int, actions: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = Linear(emb + parts + actions, width)
        self.layers: Any = nn.ModuleList(Layer(width, 4, layers) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.out = Linear(width, emb)

    def forward(self, emb: Tensor, masked: Tensor, action: Tensor, is_first: Tensor) -> Tensor:
        """(B, T, D), (B, T, M) bool, (B, T, A), (B, T) -> (B, T, D)."""
        x = self.embed(torch.cat([emb, masked.to(emb.dtype), action], -1))
        episode, steps = is_first.cumsum(1), torch.arange(x.shape[1], device=x.device)
        mask = (episode[:, :, None] == episode[:, None]).unsqueeze(1)
        for layer in self.layers:
            query, key, value = layer.queries_keys_values(x)
            query, key = (rotate(part.unsqueeze(2), steps).squeeze(2) for part in (query, key))
            x = layer.add(x, attend(query, key, value, mask))
        out: Tensor = self.out(self.norm(x)).float()
        return out


def visible_parts(
    spaces: Spaces, lead: tuple[int, int], patch: int, device: Any
) -> dict[str, Tensor]:
    """What is seen of each observation in windows (B, T): (B, T, P) of an image's patches, (B, T,
    1) of a vector. Hidden are BLOCKS random blocks of time, of an image of space and time, in every
    row."""
    seen = {}
    for key, spec in spaces.obs.items():
        grid = patches(spec.shape, patch) if spec.kind == "image" else (1, 1)
        hidden = torch.zeros(*lead, *grid, dtype=torch.bool, device=device)
        for _ in range(BLOCKS):
            time = _span(lead[0], lead[1], device)[:, :, None, None]
            rows = _span(lead[0], grid[0], device)[:, None, :, None]
            columns = _span(lead[0], grid[1], device)[:, None, None]
            hidden = hidden | (time & rows & columns)
        seen[key] = ~hidden.flatten(2)
    return seen


def _span(num: int, size: int, device: Any) -> Tensor:
    """(num, size): in each row a random run of a LEAST share to all but a LEAST share of places; of
    one place, that one."""
    if size == 1:
        return torch.ones(num, 1, dtype=torch.bool, device=device)
    draw = torch.rand(2, num, 1, device=device)
    length = ((LEAST + (1 - 2 * LEAST) * draw[0]) * size).ceil().clamp(max=size - 1)
    first = (draw[1] * (size - length + 1)).floor()
    at = torch.arange(size, device=device)
    return (at >= first) & (at < first + length)

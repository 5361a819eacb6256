"""Image encoders of DreamerV3 and TD-MPC2 and a decoder, for any size, 1 or 3 channels.

DreamerV3: full-resolution convolutions, pooling down, nearest upsampling up. An image whose sides
are not multiples of 2 ** stages is padded at its lower right edge by repetition on the way in, and
the decoder's output is cut back to size. TD-MPC2: strided convolutions on randomly shifted stacks
of frames. Images are (N, H, W, C) outside, channels-first inside.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldflux_dist.nn.layers import MLP, BlockLinear, Linear, RMSNorm, init_weight


class Conv(nn.Conv2d):
    """Convolution with kernel 5 that keeps height and width."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 5, padding=2)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def reset_parameters(self) -> None:
        init_weight(self.weight, self.weight[0].numel())
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class UpConv(Conv):
    """Nearest 2x upsampling, then the convolution, at a third of the cost.

    Of the 5 taps that an output pixel reads in each direction, the upsampled image shows only 3
    different pixels: the taps are summed per phase (even, odd) into a kernel of 3, and one
    convolution of the small image gives all four phases. The zero padding is the same too.
    """

    taps: Tensor

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out)
        taps = torch.zeros(2, 3, 5)
        for phase in range(2):
            for tap in range(5):
                taps[phase, (phase + tap) // 2, tap] = 1
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("pra,qsb,oiab->opqirs", self.taps, self.taps, self.weight)
        assert self.bias is not None
        bias = self.bias.repeat_interleave(4)
        return F.pixel_shuffle(F.conv2d(x, weight.flatten(0, 2), bias, padding=1), 2)


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise over channels; a view in the channels-last layout, no copy."""
    return F.silu(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def _padded(size: int, stages: int) -> int:
    return -(-size // 2**stages) * 2**stages


def grid(shape: tuple[int, ...], stages: int) -> tuple[int, int]:
    """Rows and columns that are left of an image (H, W, C) after so many stages of pooling."""
    return _padded(shape[0], stages) >> stages, _padded(shape[1], stages) >> stages


class ImageEncoder(nn.Module):
    """Per stage: conv, 2x2 max-pool, RMSNorm over channels, SiLU; flattened as (h, w, c).

    (N, H, W, C) uint8 -> (N, size_out) float.
    """

    def __init__(self, shape: tuple[int, ...], depth: int, multipliers: tuple[int, ...]) -> None:
        super().__init__()
        height, width, channels = shape
        sizes = [channels] + [depth * m for m in multipliers]
        self.convs = nn.ModuleList(Conv(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(RMSNorm(size) for size in sizes[1:])
        stages = len(multipliers)
        self.padding = (0, _padded(width, stages) - width, 0, _padded(height, stages) - height)
        cells = (_padded(height, stages) >> stages) * (_padded(width, stages) >> stages)
        self.size_out = cells * sizes[-1]

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 255 - 0.5  # channels-last in memory
        if any(self.padding):
            x = F.pad(x, self.padding, mode="replicate")
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _norm_silu(norm, F.max_pool2d(conv(x), 2))
        return x.permute(0, 2, 3, 1).flatten(1)


class ImageDecoder(nn.Module):
    """(deter (N, D), stoch (N, S)) -> image (N, H, W, C) in [0, 1].

    The block-linear branch of deter has no norm of its own: RMSNorm and SiLU follow the sum of
    the two branches. Channel index = block * (C / blocks) + c.
    """

    BLOCKS = 8

    def __init__(
        self,
        shape: tuple[int, ...],
        deter: int,
        stoch: int,
        units: int,
        depth: int,
        multipliers: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.height, self.width, channels = shape
        stages = len(multipliers)
        self.low = (_padded(self.height, stages) >> stages, _padded(self.width, stages) >> stages)
        sizes = [depth * m for m in multipliers][::-1]
        cells = self.low[0] * self.low[1]
        self.from_deter = BlockLinear(deter, cells * sizes[0], self.BLOCKS)
        self.from_stoch = MLP(stoch, 2 * units, 1, partial(Linear, size_out=cells * sizes[0]))
        self.norm = RMSNorm(sizes[0])
        self.convs = nn.ModuleList(UpConv(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(RMSNorm(size) for size in sizes[1:])
        self.out = UpConv(sizes[-1], channels)

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        x = self.from_deter(deter).unflatten(-1, (self.BLOCKS, *self.low, -1))
        x = x.permute(0, 2, 3, 1, 4).flatten(-2)  # (N, h, w, C)
        x = x + self.from_stoch(stoch).unflatten(-1, (*self.low, -1))
        x = F.silu(self.norm(x)).permute(0, 3, 1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = _norm_silu(norm, conv(x))
        x = torch.sigmoid(self.out(x).float())
        return x.permute(0, 2, 3, 1)[:, : self.height, : self.width]


class GridDecoder(nn.Module):
    """Cells (N, h w, size_in), a number of stages below an image -> the image (N, H, W, C) in
    [0, 1]: per stage nearest upsampling and conv, as in ImageDecoder."""

    def __init__(
        self, shape: tuple[int, ...], size_in: int, depth: int, multipliers: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.height, self.width, channels = shape
        self.low = grid(shape, len(multipliers))
        sizes = [depth * m for m in multipliers][::-1]
        self.first = Linear(size_in, sizes[0])
        self.convs = nn.ModuleList(UpConv(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.norms = nn.ModuleList(RMSNorm(size) for size in sizes)
        self.out = UpConv(sizes[-1], channels)

    def forward(self, cells: Tensor) -> Tensor:
        first, *norms = self.norms
        x = _norm_silu(first, self.first(cells).unflatten(1, self.low).permute(0, 3, 1, 2))
        for conv, norm in zip(self.convs, norms, strict=True):
            x = _norm_silu(norm, conv(x))
        x = torch.sigmoid(self.out(x).float())
        return x.permute(0, 2, 3, 1)[:, : self.height, : self.width]


def random_shift(images: Tensor, noise: Tensor | None = None, pad: int = 3) -> Tensor:
    """Stacks of frames (N, F, H, W, C), each moved by up to `pad` pixels; edges are repeated.

    `noise` (N, 2) in [0, 1) draws the moves in (x, y), which all frames of a stack share.
    """
    num, _, height, width, _ = images.shape
    if noise is None:
        noise = torch.rand(num, 2, device=images.device)
    move = (noise * (2 * pad + 1)).long() - pad  # (N, 2)
    columns = torch.arange(width, device=images.device) + move[:, :1]
    rows = torch.arange(height, device=images.device) + move[:, 1:]
    n = torch.arange(num, device=images.device)[:, None, None]
    rows, columns = rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]
    return images.transpose(0, 1)[:, n, rows, columns].transpose(0, 1)


class StridedEncoder(nn.Sequential):
    """TD-MPC2's image encoder: convolutions 7, 5, 3, 3 with strides 2, 2, 2, 1 and ReLU between.

    Stacks of frames (N, F, H, W, C) uint8 -> (N, size_out) float, flattened as (c, h, w). Images
    too small for it are enlarged by a whole factor first.
    """

    SMALLEST = 39  # pixels that leave one after the last convolution

    def __init__(self, shape: tuple[int, ...], frames: int, channels: int) -> None:
        height, width, colors = shape
        self.enlarge = -(-self.SMALLEST // min(height, width))
        height, width, size_in = height * self.enlarge, width * self.enlarge, frames * colors
        layers: list[nn.Module] = []
        for kernel, stride in ((7, 2), (5, 2), (3, 2), (3, 1)):
            layers += [nn.Conv2d(size_in, channels, kernel, stride), nn.ReLU()]
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            size_in = channels
        super().__init__(*layers[:-1])
        self.size_out = channels * height * width

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 1, 4, 2, 3).flatten(1, 2).float() / 255 - 0.5
        if self.enlarge > 1:
            x = F.interpolate(x, scale_factor=self.enlarge)
        return super().forward(x).flatten(1)

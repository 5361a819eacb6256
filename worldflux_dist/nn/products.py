"""Dense and block-diagonal products that a CPU takes as fast as it can.

torch gives float32 products to MKL, which on other makers' CPUs does without AVX-512, and
convolutions to oneDNN, which uses it. A product is a 1x1 convolution of images whose pixels are the
rows; a large one takes half of the time that way. torch asks oneDNN only from 16 images on where it
has one thread. All else, GPUs and compiled code among it, gets torch's own products.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux_dist.nn.forms import for_cpu

IMAGES = 16
ROWS, MULTIPLICATIONS = 256, 2**22  # from which on a convolution is the faster one

# Whether this process takes convolutions at all: where the CPU has AVX-512. Tests set it.
CONVOLVE = torch.backends.mkldnn.is_available() and (
    torch.backends.cpu.get_cpu_capability() == "AVX512"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., I), (O, I), (O,) -> (..., O)."""
    if not _large(x, weight):
        return F.linear(x, weight, bias)
    return _convolve(x, weight, bias)


def block_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Slice g of x by block g of the weight: (..., G I), (G, I, O), (G O,) -> (..., G O)."""
    blocks, size_in, size_out = weight.shape
    if _large(x, weight):
        return _convolve(x, weight.transpose(1, 2).flatten(0, 1), bias, blocks)
    inputs = x.reshape(-1, blocks, size_in).transpose(0, 1)  # (G, N, I)
    outputs = torch.baddbmm(bias.view(blocks, 1, size_out), inputs, weight)
    return outputs.transpose(0, 1).reshape(*x.shape[:-1], blocks * size_out)


def full_precision(like: Tensor) -> Any:
    """A context in which what is computed where `like` is stays float32 under autocast."""
    # Autocast does not know the meta device, on which plans are made.
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)


def full_precision_here(like: Tensor) -> Any:
    """As `full_precision`, for many small products one after the other: on a CPU casting costs them
    more than bfloat16 gains. Elsewhere they are left to autocast."""
    return full_precision(like) if for_cpu(like) else contextlib.nullcontext()


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    pixels = x.reshape(IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # channels last in memory
    result = F.conv2d(pixels, weight[:, :, None, None], bias, groups=groups)
    return result.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _large(x: Tensor, weight: Tensor) -> bool:
    if not CONVOLVE or torch.compiler.is_compiling():  # there, rows may be any number
        return False
    rows = x.shape[:-1].numel()
    return (
        rows >= ROWS
        and rows % IMAGES == 0
        and rows * weight.numel() >= MULTIPLICATIONS
        and for_cpu(x)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )

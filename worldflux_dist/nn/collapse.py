"""What keeps embeddings that are learned by prediction from becoming constant.

Each is a function of embeddings (N, D) -> loss (), computed in float32 under autocast too. SIGReg
asks that the embeddings be distributed as N(0, I) along random directions (Balestriero and LeCun
2025, as used by LeWM), VICReg that each dimension vary and no two vary together, Barlow twins
that two views of the same things correlate dimension by dimension and not otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from worldflux_dist.nn.products import full_precision

KNOTS = 17  # points t in [0, 3] at which characteristic functions are compared


def sigreg(x: Tensor, directions: Tensor) -> Tensor:
    """mean over m, sum_t w_t [(mean_n cos(t x_n u_m) - e^{-t^2/2})^2 + (mean_n sin(t x_n u_m))^2]

    of embeddings x (N, D) and directions u (M, D), which are normalised here; w is the trapezoid
    rule on [0, 3], doubled, times e^{-t^2/2}. About 1 / N for samples of N(0, I), 0.4 for
    constants. The published statistic is N times this.
    """
    with full_precision(x):
        unit = directions / directions.norm(dim=-1, keepdim=True)
        t = torch.linspace(0, 3, KNOTS, device=x.device)
        width = torch.full_like(t, 2 * 3 / (KNOTS - 1))
        width[:: KNOTS - 1] *= 0.5
        gaussian = (-t.square() / 2).exp()
        angle = (x.float() @ unit.t()).unsqueeze(-1) * t  # (N, M, T)
        real, imaginary = angle.cos().mean(0) - gaussian, angle.sin().mean(0)
        return ((real.square() + imaginary.square()) * (width * gaussian)).sum(-1).mean()


def sampled_sigreg(x: Tensor, samples: int = 256, directions: int = 32) -> Tensor:
    """sigreg of `samples` of the embeddings x (N, D), or of so many draws as there are of fewer,
    along so many random directions."""
    pick = torch.randint(len(x), (min(samples, len(x)),), device=x.device)
    return sigreg(x[pick], torch.randn(directions, x.shape[1], device=x.device))


def vicreg(x: Tensor, covariance_scale: float = 0.5) -> Tensor:
    """mean_d max(0, 1 - std_d) + c / D sum_{i != j} cov_ij^2 of embeddings x (N, D)."""
    with full_precision(x):
        centered = x.float() - x.float().mean(0)
        num, size = x.shape
        covariance = centered.t() @ centered / (num - 1)
        spread = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        others = covariance.square().sum() - covariance.diagonal().square().sum()
        return spread + covariance_scale / size * others


def barlow(x: Tensor, y: Tensor, off_diagonal: float = 5e-4) -> Tensor:
    """sum_i (1 - c_ii)^2 + lambda sum_{i != j} c_ij^2 with c the correlation over N of the
    dimensions of x and y, both (N, D)."""
    with full_precision(x):
        one, other = _standardised(x.float()), _standardised(y.float())
        correlation = one.t() @ other / len(x)
        own = correlation.diagonal()
        others = correlation.square().sum() - own.square().sum()
        return (1 - own).square().sum() + off_diagonal * others


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean standard deviation () of the dimensions of x (N, D), and how many of them vary on
    their own (): the participation ratio (tr C)^2 / tr C^2 of the covariance, 1 to D."""
    with full_precision(x):
        centered = x.detach().float() - x.detach().float().mean(0)
        covariance = centered.t() @ centered / len(x)
        total = covariance.diagonal().sum()
        ratio = total.square() / covariance.square().sum().clamp(min=1e-30)
        return covariance.diagonal().sqrt().mean(), ratio

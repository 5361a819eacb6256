"""Every random draw of learning made the same, so that it cannot depend on how rows are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def fix_draws(patch: pytest.MonkeyPatch) -> None:
    """As long as `patch` lasts, all draws without a generator are 0.37, permutations keep the order
    and dropout keeps all."""

    def fixed(draw: Any) -> Any:
        def full(*size: Any, **options: Any) -> torch.Tensor:
            drawn = draw(*size, **options)
            return drawn if "generator" in options else drawn.fill_(0.37)

        return full

    for name in ("rand", "randn", "rand_like", "randn_like"):
        patch.setattr(torch, name, fixed(getattr(torch, name)))
    patch.setattr(torch, "randperm", torch.arange)
    patch.setattr(torch.nn.functional, "dropout", lambda x, p: x)

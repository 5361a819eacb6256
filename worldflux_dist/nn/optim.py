"""The optimizers of the families: LaProp for DreamerV3, clipped Adam for TD-MPC2.

Order matters in LaProp: clip, divide by the root of the second moment, then momentum. The first
warmed-up update has learning rate 0 and update i (from 0) has lr * min(1, i / warmup).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def learning_rate(group: dict[str, Any]) -> float:
    """Of the next step of a group of parameters, warm-up included."""
    steps = group.get("steps", 0) - group.get("start", 0)
    warmup = group.get("warmup", 0)
    share = min(1.0, steps / warmup) if warmup else 1.0
    return float(group["lr"]) * share if steps >= 0 else 0.0


def groups(
    params: Sequence[nn.Parameter], *parts: tuple[nn.Module, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: those of `params` that are of each part, with its
    options, then all others. What has no parameters among them is left out."""
    left = {id(param): param for param in params}
    split = []
    for module, options in parts:
        own = [left.pop(id(param)) for param in module.parameters() if id(param) in left]
        split.append({"params": own} | options)
    return [group for group in (*split, {"params": list(left.values())}) if group["params"]]


@torch.no_grad()
def grad_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """L2 norm () of all gradients of an optimizer together, as they are before its step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()


class LaProp(torch.optim.Optimizer):
    """u = agc(g), n = b2 n + (1-b2) u^2, m = b1 m + (1-b1) u / (sqrt(n_hat) + eps), p -= lr m_hat

    agc(g) = g / max(1, |g| / (agc * max(1e-3, |p|))) with one L2 norm per tensor, biases and norm
    scales included; agc = 0 turns it off. Hats are bias corrections. All tensors of a group step
    together. A group whose `start` is not 0 does not move in its first so many steps: a part of a
    family that waits for another one to have learned; its warm-up and its counts begin there.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float = 0.3,
        warmup: int = 1000,
        start: int = 0,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, agc=agc, warmup=warmup, start=start, steps=0)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"nu": torch.zeros_like(p), "mu": torch.zeros_like(p)}
        nus = [self.state[p]["nu"] for p in params]
        mus = [self.state[p]["mu"] for p in params]
        beta1, beta2 = group["betas"]
        warmed = learning_rate(group)
        group["steps"] += 1
        steps = group["steps"] - group["start"]
        if steps <= 0:
            return
        if group["agc"]:
            limit = group["agc"] * torch.stack(torch._foreach_norm(params)).clamp(min=1e-3)
            excess = (torch.stack(torch._foreach_norm(grads)) / limit).clamp(min=1.0)
            updates = torch._foreach_div(grads, list(excess.unbind()))
        else:
            updates = torch._foreach_clone(grads)
        torch._foreach_mul_(nus, beta2)
        torch._foreach_addcmul_(nus, updates, updates, 1 - beta2)
        roots = torch._foreach_div(nus, 1 - beta2**steps)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_div_(updates, roots)
        torch._foreach_lerp_(mus, updates, 1 - beta1)
        rate = warmed / (1 - beta1**steps)
        torch._foreach_add_(params, mus, alpha=-rate)


class ClippedAdam(torch.optim.Adam):
    """Adam on gradients whose global norm, over all groups, is cut to `clip` first."""

    def __init__(self, params: Iterable[Any], lr: float, clip: float, eps: float = 1e-8) -> None:
        super().__init__(params, lr=lr, eps=eps, fused=True)
        self.clip = clip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        params = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(params, self.clip)
        super().step()

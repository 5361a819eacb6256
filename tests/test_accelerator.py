"""What a GPU needs of a gradient step, seen on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small import ACTIONS, FAMILY, family_batch, make_small, perturbed, same_sums
from torch.utils._python_dispatch import TorchDispatchMode

from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.nn import forms

aten = torch.ops.aten
# The host waits for the device in the first ones, and sends it numbers in the last one.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2}
SENDS = {aten.lift_fresh}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device, or send it Python's numbers, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = func.overloadpacket
        by_mask = kind in INDEXED and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if kind in WAITS | SENDS or by_mask:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_what_makes_the_host_wait_is_seen() -> None:
    x = torch.ones(3)
    with Waits() as waits:
        x[x > 0], x.sum().item(), x.nonzero(), torch.tensor([1.0, 2.0])
    assert {name.partition(".")[2] for name in waits.found} == {
        "index.Tensor",
        "_local_scalar_dense.default",
        "nonzero.default",
        "lift_fresh.default",
    }


@pytest.mark.parametrize("action", list(ACTIONS))
@pytest.mark.parametrize("kind", ["actor_critic", "latent_td"])
@FAMILY
def test_a_gradient_step_never_makes_the_host_wait(family: str, kind: str, action: str) -> None:
    """Forward, backward, optimizer and targets of all families and behaviors."""
    torch.manual_seed(0)
    behavior = {"kind": kind} | ({"horizon": 3} if kind == "actor_critic" else {})
    agent = perturbed(make_small(family, "dict", action, behavior))
    learner = Learner(agent, LearnerConfig(device="cpu"), rows=True)
    batch = family_batch(agent)
    learner.step(batch)  # optimizers make their moments
    arrays: list[Any] = []
    batch.map(arrays.append)
    with Waits() as waits:
        learner.step(batch)
    assert waits.found == {"aten.lift_fresh.default": len(arrays)}  # the batch, and nothing else


@pytest.mark.parametrize("kind", ["actor_critic", "latent_td"])
@FAMILY
def test_plain_forms_give_the_same(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU computes in its own way, a GPU gets in the plain one: losses and gradients agree.

    Diffusion without images: what it draws of them is rounded to 256 steps.
    """
    obs = "vector" if family == "diffusion" else "dict"
    ends = []
    for plain in (False, True):
        monkeypatch.setattr(forms, "PLAIN", plain)
        torch.manual_seed(0)
        behavior = {"kind": kind} | ({"horizon": 3} if kind == "actor_critic" else {"dropout": 0.0})
        agent = perturbed(make_small(family, obs, "mixed", behavior))
        learner = Learner(agent, LearnerConfig(device="cpu"), rows=True)
        metrics = learner.step(family_batch(agent))
        losses = [value for name, value in metrics.items() if name.startswith("loss")]
        ends.append((losses, [p.grad for p in agent.parameters() if p.grad is not None]))
    same_sums(ends[0][0], ends[1][0], 1000)
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        same_sums(one, other, 10_000)

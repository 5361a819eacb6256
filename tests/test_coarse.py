"""Imagination in bfloat16: by a twin whose weights are cast once a step; nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small import FAMILY, family_batch, make_small, perturbed
from torch.utils._python_dispatch import TorchDispatchMode

from worldflux_dist.learner import Learner, LearnerConfig


def a_learner(family: str, precision: str, obs: str = "dict", horizon: int = 4) -> Learner:
    torch.manual_seed(0)
    behavior = {"kind": "actor_critic", "horizon": horizon}
    agent = perturbed(make_small(family, obs, "mixed", behavior))
    config: Any = {"device": "cpu", "precision": precision}
    return Learner(agent, LearnerConfig(**config))


class Casts(TorchDispatchMode):
    """Counts how often each tensor of `watched` is cast to bfloat16."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched, self.found = watched, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy:
            name = self.watched.get(args[0].data_ptr())
            if name and kwargs.get("dtype") is torch.bfloat16:
                self.found[name] += 1
        return func(*args, **kwargs)


@FAMILY
def test_no_weight_is_cast_at_every_imagined_step(family: str) -> None:
    """Losses cast theirs, which have a gradient; how far is imagined makes no difference."""
    found = []
    for horizon in (2, 6):
        learner = a_learner(family, "bfloat16", horizon=horizon)
        batch = family_batch(learner.agent)
        weights = {p.data_ptr(): name for name, p in learner.agent.named_parameters()}
        with Casts(weights) as casts:
            learner.step(batch)
        found.append(casts.found)
    assert found[0] and found[0] == found[1]


@FAMILY
def test_a_twin_imagines_what_the_agent_would(family: str) -> None:
    """With its newest weights, and its buffers: after a step the twin is behind, then it is not."""
    learner = a_learner(family, "bfloat16", "vector")
    agent, batch = learner.agent, family_batch(learner.agent)
    names = set(agent.state_dict())
    for _ in range(2):
        learner.step(batch)
    assert set(agent.state_dict()) == names and len(learner.agents) == 2
    twin = learner.agents[1]
    learner.step(batch)
    own, other = agent.state_dict(), twin.state_dict()
    assert own.keys() == other.keys()
    buffers = {name for name, _ in agent.named_buffers()} & names
    for name in buffers:
        torch.testing.assert_close(other[name], own[name], rtol=0, atol=0)
    coarse = [n for n, p in twin.named_parameters() if p.dtype == torch.bfloat16]
    assert len(coarse) > len(names) / 4


@FAMILY
def test_losses_are_those_of_float32_but_for_rounding(family: str) -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        learner, values = a_learner(family, precision, "vector"), []
        batch = family_batch(learner.agent)
        for number in range(3):
            torch.manual_seed(number)
            metrics = learner.step(batch)
            values.append([metrics["loss/value"], metrics["loss/reward"]])
        found.append(torch.tensor(values))
    # 8 bits, through some ten layers and three steps
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("part", ["world_model", "behavior"])
def test_parts_that_do_not_imagine_have_no_twin(part: str) -> None:
    learner = a_learner("dreamerv3", "float32")
    assert learner.agents == [learner.agent]
    config = LearnerConfig(device="cpu", precision="bfloat16")
    assert len(Learner(learner.agent, config, part).agents) == 1

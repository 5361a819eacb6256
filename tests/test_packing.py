"""What imagined batches lose on their way between processes, and how many bytes they take there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small import BOX, FAMILY, family_batch, make_small, perturbed, vector
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.imaginer import Imaginer
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.nn.packing import LEVELS, Part, pack, unpack
from worldflux_dist.spaces import Spaces

CRITIC = {"kind": "actor_critic", "horizon": 4}


def dreaming(family: str) -> Any:
    torch.manual_seed(0)
    return perturbed(make_small(family, "vector", "mixed", CRITIC))


def onehots(groups: int, classes: int) -> Tensor:
    drawn = torch.randint(classes, (3, 5, groups))
    return torch.nn.functional.one_hot(drawn, classes).flatten(-2).float()


@pytest.mark.parametrize("size", [1, 7, 8, 19])
@pytest.mark.parametrize("classes", [2, 256, 257])
def test_every_part_comes_back_within_its_error(size: int, classes: int) -> None:
    torch.manual_seed(size)
    parts = (Part("float", size), Part("bounded", size), Part("onehot", 3 * classes, classes))
    floats = torch.randn(3, 5, size) * 10.0 ** torch.randint(-20, 20, (size,))
    bounded = torch.tanh(3 * torch.randn(3, 5, size))
    bounded[..., 0] = 0.3  # all the same
    drawn = onehots(3, classes)
    packed, ranges = pack(torch.cat([floats, bounded, drawn], -1), parts)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 5, sum(part.nbytes for part in parts))
    found = unpack(packed, ranges, parts).split([part.size for part in parts], -1)
    assert ((found[0] - floats).abs() <= floats.abs() / 256).all()
    spread = bounded.amax((0, 1)) - bounded.amin((0, 1))
    assert ((found[1] - bounded).abs() <= spread / (2 * LEVELS) + 1e-6).all()
    assert torch.equal(found[1][..., 0], bounded[..., 0])
    assert torch.equal(found[2], drawn)


def test_all_levels_of_bounded_features_are_told_apart() -> None:
    levels = torch.arange(LEVELS + 1.0).repeat(8).view(8, -1).t()[torch.randperm(LEVELS + 1)]
    parts = (Part("bounded", 8),)
    packed, ranges = pack(levels, parts)
    assert packed.shape == (LEVELS + 1, 7)
    assert torch.equal(unpack(packed, ranges, parts), levels)


def test_an_imagined_batch_travels_in_a_fifth_of_its_bytes() -> None:
    """DreamerV3's size12m, 16 x 64 replayed steps, horizon 15: 168 MB as float32."""
    num, horizon = 16 * 64, 15
    with torch.device("meta"):
        agent = Agent("dreamerv3:size12m", Spaces(vector(8), BOX))
        parts, size = agent.world_model.feature_parts, agent.world_model.feature_dim
        lead = torch.zeros(horizon, num)
        steps = torch.zeros(16, 64)
        imagined = Imagined(
            *(torch.zeros(horizon + 1, num, size), torch.zeros(horizon, num, 2), lead, lead),
            *(lead[0], steps, steps.bool(), steps.bool(), lead),
        )
        packed = imagined.packed(parts)
    before, after = (
        sum(x.nbytes for x in vars(each).values() if isinstance(x, Tensor))
        for each in (imagined, packed)
    )
    assert before > 167e6
    assert after <= before / 5


def learned(family: str, packed: bool, noise: float = 0.0) -> tuple[dict[str, float], Tensor]:
    """The metrics and gradients of a policy learner's step on the same imagined batch, whose
    features may be packed or off by up to `noise` of their values."""
    agent = dreaming(family)
    imagined = Imaginer(agent, packed=packed).imagine(family_batch(agent))
    assert imagined.features.dtype == (np.uint8 if packed else np.float32)
    if noise:
        off = np.random.default_rng(0).uniform(-noise, noise, imagined.features.shape)
        imagined.features *= (1 + off).astype(np.float32)
    values = Learner(agent, LearnerConfig(device="cpu"), "behavior").step(imagined)
    learning = [p for p in agent.behavior.parameters() if p.requires_grad]
    return values, torch.cat([p.grad.flatten() for p in learning if p.grad is not None])


@FAMILY
def test_packing_changes_what_is_learned_no_more_than_rounding_to_bfloat16(family: str) -> None:
    want, exact = learned(family, packed=False)
    found, packed = learned(family, packed=True)
    for name in ("loss", "loss/value", "loss/replay_value"):
        assert found[name] == pytest.approx(want[name], rel=0.03), name
    rounded = learned(family, packed=False, noise=2**-8)[1]
    assert 0 < (packed - exact).norm() < 2 * (rounded - exact).norm()


@FAMILY
def test_rounding_is_not_taken_for_a_policy_that_has_moved(family: str) -> None:
    """pi / mu is 1 where the learner's policy is the one that acted."""
    agent = dreaming(family)
    imagined = Imaginer(agent, packed=True).imagine(family_batch(agent)).map(torch.from_numpy)
    seen = imagined.unpacked(agent.world_model.feature_parts)
    with torch.no_grad():
        again = agent.behavior.log_prob(seen.features[:-1], seen.actions)
    torch.testing.assert_close(again, imagined.log_prob, rtol=0, atol=1e-5)


@FAMILY
def test_rows_of_a_packed_batch_are_those_of_the_others(family: str) -> None:
    agent = dreaming(family)
    parts = agent.world_model.feature_parts
    imagined = Imaginer(agent, packed=True).imagine(family_batch(agent)).map(torch.from_numpy)
    whole, part = (each.unpacked(parts) for each in (imagined, imagined.rows(slice(1, 3))))
    assert torch.equal(part.features, whole.rows(slice(1, 3)).features)

"""The report card: on a world that is known exactly, every number by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import FAMILY, family_batch, make_small, perturbed
from toy_worlds import Model, ToyConfig

from worldflux_dist import figures
from worldflux_dist.agent import Agent
from worldflux_dist.data import Steps
from worldflux_dist.report_card import report_card
from worldflux_dist.spaces import Spaces

SPACES = Spaces(gym_spaces.Box(-9, 9, (2,)), gym_spaces.Box(-1, 1, (1,)))
DECAY, PUSH = torch.tensor([0.9, 0.8]), torch.tensor([0.5, -0.5])


def linear_world() -> Steps:
    """x' = DECAY x + PUSH a and r' = x_0 - a, in 3 rows of 40 steps; episodes of row 0 end in
    terminal steps 12 and 25 (and of row 1 are cut there), and begin anew right after; row 2 goes on
    throughout, from mid-episode."""
    rng = np.random.default_rng(0)
    obs, action, reward = np.zeros((3, 40, 2)), rng.uniform(-1, 1, (3, 40, 1)), np.zeros((3, 40))
    first, last, terminal = (np.zeros((3, 40), bool) for _ in range(3))
    first[:2, 0] = True
    for end in (12, 25):
        last[:2, end] = first[:2, end + 1] = terminal[0, end] = True
    action[first] = 0
    for t in range(40):
        for row in range(3):
            if first[row, t] or t == 0:
                obs[row, t] = rng.normal(size=2)
            else:
                before, act = obs[row, t - 1], action[row, t, 0]
                obs[row, t] = DECAY.numpy() * before + PUSH.numpy() * act
                reward[row, t] = before[0] - act
    columns = (x.astype(np.float32) for x in (obs, action, reward))
    seen, acted, earned = columns
    return Steps({"obs": seen}, acted, earned, first, last, terminal)


def linear_agent(keep: torch.Tensor, push: torch.Tensor, reward: tuple[float, float]) -> Any:
    """An agent that takes x' for keep x + push a, and r' for reward_0 x_0 + reward_1 a."""
    torch.manual_seed(0)
    agent: Any = Agent("dreamerv3:tiny", SPACES)  # whose behavior is not asked
    model = Model(SPACES, ToyConfig())
    with torch.no_grad():
        model.next.weight.zero_()
        model.next.bias.zero_()
        model.next.weight[:2, :2], model.next.weight[:2, 2] = torch.diag(keep), push
        model.next.weight[2, 0], model.next.weight[2, 2] = reward
    agent.world_model = model
    agent.behavior = type(agent.behavior)(3, 8, SPACES.action_parts, agent.behavior.config)
    return agent


def test_a_perfect_model_has_no_errors() -> None:
    card = report_card(linear_agent(DECAY, PUSH, (1.0, -1.0)), [linear_world()], horizon=5)
    for name in ("obs", "features", "reward"):
        assert card.curves[name].shape == (5,) and card.curves[name].max() < 1e-5, name
    same = card.numbers["return_imagined"], card.numbers["return_obtained"]
    assert same[0] == pytest.approx(same[1], abs=1e-5)
    assert card.numbers["probe"] > 0.999  # features are the observation
    assert card.numbers["end_missed"] == pytest.approx(1)  # its `continue` is a constant


def test_a_model_that_copies_is_persistence_itself() -> None:
    card = report_card(linear_agent(torch.ones(2), torch.zeros(2), (0.0, 0.0)), [linear_world()], 5)
    np.testing.assert_allclose(card.curves["obs"], 1, rtol=1e-5)
    assert card.numbers["return_imagined"] == 0
    assert any("observations" in sentence for sentence in card.weak)


def test_returns_obtained_end_where_episodes_end() -> None:
    """With one value for all states: sums of rewards to the end, and that value after it where it
    is a cut or the end of the row, but not after a terminal step."""
    steps = linear_world()
    agent = linear_agent(DECAY, PUSH, (1.0, -1.0))
    bins = agent.behavior.bins
    index = int((bins - 7).abs().argmin())
    worth = float(bins[index])
    with torch.no_grad():
        agent.behavior.critic[-1].bias[index] = 100
    card = report_card(agent, [steps], 5)
    want = []
    for row in range(3):
        for t in range(39):
            if steps.is_last[row, t]:
                continue
            total, factor = 0.0, 1.0
            for s in range(t + 1, 40):
                total += factor * float(steps.reward[row, s])
                factor *= 0.99
                if steps.is_last[row, s]:
                    break
            if not steps.is_terminal[row, s]:
                total += factor * worth
            want.append(total)
    np.testing.assert_allclose(card.values[:, 1], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(card.values[:, 0], worth, rtol=1e-5)


def test_calibration_counts_every_step_that_is_no_reset() -> None:
    card = report_card(linear_agent(DECAY, PUSH, (1.0, -1.0)), [linear_world()], 5)
    ((predicted, observed, num),) = card.calibration  # it predicts 1 for all
    assert num == 3 * 39 - 4 and predicted == pytest.approx(1)
    assert observed == pytest.approx(1 - 2 / num)
    assert card.numbers["continue_error"] == pytest.approx(2 / num, abs=1e-5)


@FAMILY
@pytest.mark.parametrize("obs", ["vector", "dict"])
def test_every_family_has_a_card_and_a_picture(family: str, obs: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    agent = perturbed(make_small(family, obs, "discrete"))
    card = report_card(agent, [family_batch(agent), family_batch(agent, seed=1)], horizon=3)
    assert ("obs@1" in card.numbers) == agent.world_model.decodes_obs
    assert all(np.isfinite(value) for value in card.numbers.values())
    assert card.spectrum.sum() == pytest.approx(1, abs=1e-4)
    assert len(card.lines()) == 1 + len(card.numbers) + max(1, len(card.weak))
    figures.report_card(card, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_that_are_too_short_are_refused() -> None:
    agent = linear_agent(DECAY, PUSH, (1.0, -1.0))
    with pytest.raises(ValueError, match=r"rows of at least 52 steps"):
        report_card(agent, [linear_world()], horizon=50)
    steps = linear_world()
    steps.is_first[:, ::4] = True
    with pytest.raises(ValueError, match=r"no episode is as long as an open loop of 5 steps"):
        report_card(agent, [steps], horizon=5)

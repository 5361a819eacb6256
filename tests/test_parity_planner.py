"""TD-MPC2's planner against plans recorded from the public reference implementation.

All random draws are the recorded ones. Candidates, their values, and the distribution after every
iteration are compared, then the action and what is kept for the next step. Skipped where the
folder is absent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from parity import PREDICTIONS, Values, close
from parity_tdmpc2 import draws_of, loaded, pair_of, recorded_tdmpc2
from torch import Tensor

from worldflux_dist.behaviors import planner as planning
from worldflux_dist.behaviors.latent_td import QDraw
from worldflux_dist.behaviors.planner import Planner, PlanNoise

ref = recorded_tdmpc2  # the fixture

KINDS = pytest.mark.parametrize("kind", ["first", "warm", "eval", "nonepisodic"])
ITERATIONS = 3
PLANS = 1e-4  # tolerance of values and of what they weigh


class Watched(planning._Search):
    """A search that remembers what each iteration drew from, and its candidates and values."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[dict[str, Tensor]] = []

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        self.seen.append({"mean": mean, "std": std})
        return super().sample(mean, std, noise)

    def score(self, actions: Tensor, value_noise: Any) -> Tensor:
        value = super().score(actions, value_noise)
        self.seen[-1] |= {"actions": actions, "value": value}
        return value


def plan_noise(v: Values) -> PlanNoise:
    """The recorded draws of one environment's plan; a greedy one has no noise on its action."""
    greedy = bool(v.raw("eval_mode"))
    kinds = ["randn_like"] * 3 + ["randn", "randn_like", "randperm"] * ITERATIONS + ["exponential"]
    draws = draws_of(v, kinds if greedy else [*kinds, "randn"])
    values = zip(draws[4:12:3], draws[5:12:3], strict=True)
    return PlanNoise(
        proposals=torch.stack(draws[:3])[:, None],
        samples=torch.stack(draws[3:12:3])[:, :, None],
        transitions=None,
        values=[QDraw(action[None], pair_of(permutation)) for action, permutation in values],
        pick=draws[12][None],
        action=torch.full((1, 2), torch.nan) if greedy else draws[13][None],
    )


@dataclass
class Recorded:
    """A recorded plan: the agent that makes it, the mean (1, H, A) that the plan a step before left
    behind, and its draws."""

    agent: Any
    v: Values
    mean: Tensor
    noise: PlanNoise

    def act(self, greedy: bool) -> tuple[Tensor, Tensor]:
        """The action (A,) and the mean (H, A) left for the next step."""
        agent = self.agent
        agent.planner.draw = lambda *_: self.noise
        carry = {f"state/{k}": x for k, x in agent.world_model.initial(1).tensors.items()}
        carry |= {"action": torch.zeros(1, 2), "plan": self.mean}
        first = np.array([self.v.raw("t0")])
        action, carry = agent.act_batch({"obs": self.v["obs"]}, first, carry, greedy)
        return torch.from_numpy(action)[0], carry["plan"][0]


def recorded_plan(ref: Values, kind: str) -> Recorded:
    v = ref.under(f"plan_{kind}/")
    termination = "none" if kind == "nonepisodic" else "hard"
    agent = loaded(ref, "update2/after/", termination=termination)
    moved = torch.cat([v["prev_mean"][1:], torch.zeros(1, 2)])
    return Recorded(agent, v, moved[None], plan_noise(v))


@KINDS
def test_plans(ref: Values, kind: str) -> None:
    v = ref.under(f"plan_{kind}/")
    action, mean = recorded_plan(ref, kind).act(bool(v.raw("eval_mode")))
    close(action, v["action"], PLANS)
    close(mean[:-1], v["prev_mean_after"][1:], PLANS)
    assert not mean[-1].any()


@KINDS
def test_the_elite_acted_on(ref: Values, kind: str) -> None:
    """A greedy action is the picked elite's first, without noise around it."""
    v = ref.under(f"plan_{kind}/")
    action, _ = recorded_plan(ref, kind).act(greedy=True)
    close(action, v["iter2_actions"][0, v["iter2_elite_idxs"][v["pick"]]], PLANS)


@KINDS
def test_iterations(ref: Values, kind: str) -> None:
    """Candidates, values and elites of each, and the distribution found."""
    v, plan = ref.under(f"plan_{kind}/"), recorded_plan(ref, kind)
    agent, noise, model = plan.agent, plan.noise, plan.agent.world_model
    # A fourth iteration begins with what the third found; its own draws do not matter.
    noise.samples = torch.cat([noise.samples, noise.samples[:1]])
    noise.values = [*noise.values, noise.values[0]]
    config = replace(agent.planner.config, iterations=4)
    planner = Planner(config, agent.spaces.action_parts, model)
    mean = planner.initial(1, "cpu") if v.raw("t0") else plan.mean
    search = Watched(planner, model, agent.behavior, model.encode(v["obs"]), None, noise)
    with torch.no_grad():
        search.run(mean.transpose(0, 1), greedy=True)
    seen = search.seen
    assert (seen[0]["std"] == 2).all()
    for i in range(ITERATIONS):
        want = v.under(f"iter{i}_")
        close(seen[i]["actions"][:, 0], want["actions"], PREDICTIONS, f"actions {i}")
        value = seen[i]["value"][0]
        close(value, want["value"][:, 0], PLANS, f"values {i}")
        best = value.topk(8)
        assert best.indices.tolist() == want["elite_idxs"].tolist()
        score = (0.5 * (best.values - best.values[0])).exp()
        close(score / score.sum(), want["score"][:, 0], PLANS, f"score {i}")
        for name in ("mean", "std"):
            close(seen[i + 1][name][:, 0, 0], want[name], PLANS, f"{name} {i}")
    assert torch.equal(v["iter2_mean"], v["prev_mean_after"])

"""The planner, on models small enough to know the best plan.

The pairings of models, behaviors and planner in an agent are in test_pairings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import BOX, vector
from torch import Tensor

from worldflux_dist.behaviors.base import Behavior, BehaviorLoss
from worldflux_dist.behaviors.planner import Planner, PlannerConfig, PlanNoise
from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.spaces import Spaces

Function = Callable[[Tensor], Tensor]


NO_LOSSES: dict[str, float] = {}


def nothing(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[:-1])


def certain(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:-1])


class Toy(WorldModel):
    """A model that is known: its state is a vector `x`, which is its features too."""

    loss_scales = NO_LOSSES
    discount = 1.0

    reaches_goals = True

    def __init__(
        self,
        action: gym_spaces.Space,
        move: Callable[[Tensor, Tensor], Tensor],
        reward: Function = nothing,
        going: Function = certain,
        size: int = 2,
    ) -> None:
        super().__init__(Spaces(vector(size), action))
        self.feature_dim, self.width, self.native = size, 1, {}
        self.move, self.reward, self.going = move, reward, going

    def initial(self, batch_size: int) -> State:
        return State({"x": torch.zeros(batch_size, self.feature_dim)})

    def update(
        self, state: State, action: Tensor, obs: Any, is_first: Any = None, noise: Any = None
    ) -> State:
        return State({"x": obs["obs"]})

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        return State({"x": self.move(state.tensors["x"], action)})

    def decode(self, state: State, heads: Sequence[str] = ("reward", "continue")) -> Prediction:
        x = state.tensors["x"]
        return Prediction({"reward": self.reward(x), "continue": self.going(x)})

    def features(self, state: State) -> Tensor:
        return state.tensors["x"]

    def loss(self, batch: Batch, start: State | None = None, noise: Any = None) -> LossOutput:
        raise AssertionError("it knows everything")

    def optimizer(self, params: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise AssertionError("it knows everything")

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ()


class Windy(Toy):
    """A model with draws, which it remembers having been given."""

    noise_shape = (2,)

    def __init__(self) -> None:
        super().__init__(BOX, glide)
        self.felt: list[Tensor] = []

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        assert noise is not None
        self.felt.append(noise)
        return super().transition(state, action)


class Rule(Behavior):
    """A policy and a value that are given, which remembers the noise that values came with."""

    loss_scales = NO_LOSSES

    def __init__(self, policy: Function | None = None, value: Function = nothing) -> None:
        super().__init__()
        self.policy, self.worth = policy, value
        self.asked: list[Any] = []

    def act(self, features: Tensor, greedy: bool = False, noise: Tensor | None = None) -> Tensor:
        assert self.policy is not None
        return self.policy(features)

    def value(self, features: Tensor, noise: Any = None) -> Tensor:
        self.asked.append(noise)
        return self.worth(features)

    def loss(self, world_model: WorldModel, output: LossOutput) -> BehaviorLoss:
        return BehaviorLoss({}, {})

    def update_targets(self) -> None:
        pass

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ()


TARGET = torch.tensor([0.3, -0.2])


def to_target(x: Tensor) -> Tensor:
    return -(x - TARGET).square().sum(-1)


def glide(x: Tensor, action: Tensor) -> Tensor:
    return x + 0.5 * action


def plane(reward: Function = to_target, going: Function = certain) -> Toy:
    return Toy(BOX, glide, reward, going)


def make_planner(model: Toy, method: str = "cem", **options: Any) -> Planner:
    config = replace(PlannerConfig(method, samples=256, elites=32, proposals=0), **options)
    return Planner(config, model.spaces.action_parts, model)


def plan(
    model: Toy, planner: Planner, behavior: Behavior | None = None, num: int = 1, **more: Any
) -> tuple[Tensor, Tensor]:
    """Actions (B, A) and means (B, H, A) from the zero state; greedy unless told."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"greedy": True, "mean": planner.initial(num, "cpu")} | more
    return planner.plan(model, behavior or Rule(), model.initial(num), **options)


def close(got: Tensor, want: Any, tolerance: float) -> None:
    torch.testing.assert_close(got, torch.as_tensor(want).expand_as(got), rtol=0, atol=tolerance)


def draws(planner: Planner, model: WorldModel, behavior: Behavior, num: int = 1) -> PlanNoise:
    return planner.draw(num, model, behavior, "cpu")


# ---------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize("method", ["mppi", "cem"])
def test_the_optimum_of_a_quadratic_is_found(method: str) -> None:
    """One step reaches the target, and then it is best to stay: a = 2 target, 0, 0."""
    model = plane()
    planner = make_planner(model, method, temperature=20.0, iterations=16)
    action, ahead = plan(model, planner, num=32)
    close(action, 2 * TARGET, 0.15 if method == "mppi" else 0.05)  # one elite, or their mean
    close(action.mean(0), 2 * TARGET, 0.02)
    close(ahead[:, :2].mean(0), 0.0, 0.02)
    assert not ahead[:, 2].any()


@pytest.mark.parametrize("method", ["mppi", "cem"])
def test_actions_end_at_their_bounds(method: str) -> None:
    model = plane(lambda x: -(x - 5).square().sum(-1))
    for greedy in (True, False):
        action, _ = plan(model, make_planner(model, method), num=16, greedy=greedy)
        assert action.abs().max() <= 1
        close(action, 1.0, 0.05 if greedy else 0.35)


def test_the_best_of_k_classes_is_found() -> None:
    worth = torch.tensor([0.1, 0.7, 0.2, 0.9, 0.3])
    model = Toy(gym_spaces.Discrete(5), lambda x, a: a, lambda x: x @ worth, size=5)
    action, ahead = plan(model, make_planner(model), num=4)
    assert torch.equal(action, torch.eye(5)[[3] * 4])
    # All elites agree; a tenth of the probability stays spread over the classes.
    close(ahead[:, :2], 0.9 * torch.eye(5)[3] + 0.1 / 5, 1e-6)
    close(ahead[:, 2], 0.2, 1e-6)


def test_a_chain_is_planned_where_the_first_reward_misleads() -> None:
    """Action 0 pays 0.3 at once and ends the chain; 1 three times over pays 1 at its end."""

    def move(x: Tensor, action: Tensor) -> Tensor:
        links, fallen = x[:, 0], x[:, 1]
        falls = (1 - fallen) * action[:, 0]
        return torch.stack([links + (1 - fallen) * action[:, 1], fallen + falls, falls], -1)

    def reward(x: Tensor) -> Tensor:
        return 0.3 * x[..., 2] + (x[..., 0] == 3).float()

    model = Toy(gym_spaces.Discrete(2), move, reward, size=3)
    action, ahead = plan(model, make_planner(model))
    assert action.tolist() == [[0, 1]]
    close(ahead[0, :2], [0.05, 0.95], 1e-6)
    myopic, _ = plan(model, make_planner(model, horizon=1))
    assert myopic.tolist() == [[1, 0]]


def test_terminal_values_decide_where_there_is_no_reward() -> None:
    model, behavior = plane(nothing), Rule(value=lambda x: -(x - 0.6).square().sum(-1))
    action, ahead = plan(model, make_planner(model), behavior, num=4)
    close(action + ahead[:, :2].sum(1), 1.2, 0.2)  # half of it is the way
    ended = plane(going=nothing)  # only the first reward counts: what comes after is worth nothing
    far = Rule(value=lambda x: 100 * x.sum(-1))
    action, _ = plan(ended, make_planner(ended, iterations=16), far, num=4)
    close(action, 2 * TARGET, 0.05)


@pytest.mark.parametrize(
    ("going", "cliff", "horizon", "best"),
    [(0.0, 0.0, 2, 0), (0.03, 0.0, 2, 0), (0.1, 0.0, 2, 1), (1.0, 0.0, 2, 1), (0.0, 0.5, 1, 1)],
)
def test_what_lies_behind_an_end_is_not_counted(
    going: float, cliff: float, horizon: int, best: int
) -> None:
    """Action 0 pays 0.2 a step; 1 pays `cliff` once, goes on with probability `going`, then 10."""

    def move(x: Tensor, action: Tensor) -> Tensor:
        over = x[:, 0]
        return torch.stack([torch.maximum(over, action[:, 1]), over], -1)  # over, since last step

    def reward(x: Tensor) -> Tensor:
        return torch.where(x[..., 1] > 0, 10.0, torch.where(x[..., 0] > 0, cliff, 0.2))

    def proceed(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 0, going, 1.0)

    model = Toy(gym_spaces.Discrete(2), move, reward, proceed)
    action, _ = plan(model, make_planner(model, horizon=horizon))
    assert action[0].argmax() == best


def test_a_goal_is_reached() -> None:
    goal = torch.tensor([[0.9, -1.1], [0.0, 0.4]])
    model = plane(lambda x: x.sum(-1))  # the reward would lead elsewhere
    action, ahead = plan(model, make_planner(model, objective="goal"), num=2, goal=goal)
    close(action + ahead[:, :2].sum(1), 2 * goal, 0.2)


# ------------------------------------------------------------------------- how it searches


def test_the_mean_starts_from_the_last_one_and_is_moved_by_one() -> None:
    model = plane(nothing)
    planner = make_planner(model, samples=8, elites=8, iterations=1)
    noise, mean = draws(planner, model, Rule()), 0.1 * torch.arange(6.0).view(1, 3, 2)
    noise.samples.zero_()
    action, ahead = plan(model, planner, mean=mean, noise=noise)
    close(action, mean[:, 0], 1e-6)
    close(ahead, torch.cat([mean[:, 1:], torch.zeros(1, 1, 2)], 1), 1e-6)
    noise.samples.normal_()
    _, ahead = plan(model, planner, mean=mean, noise=noise)
    candidates = (mean[0, :, None] + 2 * noise.samples[0, :, 0]).clamp(-1, 1)
    close(ahead[0, :2], candidates.mean(1)[1:], 1e-6)


def test_the_spread_of_the_elites_stays_between_its_bounds() -> None:
    model = plane(nothing)
    planner = make_planner(model, samples=8, elites=8, iterations=2, min_std=0.3, max_std=0.4)
    noise = draws(planner, model, Rule())
    sides = torch.tensor([10.0, -10.0]).repeat(4)[:, None]
    for first, spread in ((torch.zeros(1), 0.3), (sides, 0.4)):  # elites all one, or far apart
        noise.samples[0] = first
        _, ahead = plan(model, planner, noise=noise)
        close(ahead[0, :2], (spread * noise.samples[1, :, 0]).clamp(-1, 1).mean(1)[1:], 1e-6)


def test_mppi_acts_on_an_elite_drawn_by_its_weight() -> None:
    model = plane()
    planner = make_planner(model, "mppi", samples=16, elites=3, iterations=1, temperature=2.0)
    noise = draws(planner, model, Rule())
    sequences = (2 * noise.samples[0, :, 0]).clamp(-1, 1)  # (H, N, A)
    score = sum(to_target(0.5 * sequences[: h + 1].sum(0)) for h in range(3))
    best = torch.as_tensor(score).topk(3)
    weight = (2.0 * best.values).softmax(0)
    for pick in ([1.0, 1, 1], [1, 1e-9, 1], [1, 1, 1e-9]):
        noise.pick[0] = torch.tensor(pick)
        chosen = (weight / noise.pick[0]).argmax()
        action, ahead = plan(model, planner, noise=noise)
        close(action[0], sequences[0, best.indices[chosen]], 1e-6)
        mean = (weight[:, None] * sequences[:, best.indices]).sum(1)
        close(ahead[0, :2], mean[1:], 1e-5)


def test_a_proposal_that_is_best_is_taken() -> None:
    """The policy proposes along its own way in the model: it knows the target, then stays."""
    model, behavior = plane(), Rule(lambda x: 2 * (TARGET - x))
    few: dict[str, Any] = {"samples": 4, "elites": 1, "iterations": 3}
    planner = make_planner(model, proposals=1, **few)
    action, ahead = plan(model, planner, behavior, num=3)
    close(action, 2 * TARGET, 1e-6)
    close(ahead, 0.0, 1e-6)
    alone, _ = plan(model, make_planner(model, proposals=0, **few), num=3)
    assert (alone - 2 * TARGET).abs().max() > 0.1


def test_exploring_adds_noise_of_the_last_spread() -> None:
    model, behavior = plane(), Rule(lambda x: 2 * (TARGET - x))
    planner = make_planner(model, samples=4, elites=1, proposals=1)
    noise = draws(planner, model, behavior)
    action, _ = plan(model, planner, behavior, greedy=False, noise=noise)
    close(action, 2 * TARGET + 0.05 * noise.action, 1e-6)  # one elite: the least spread
    choice = Toy(gym_spaces.Discrete(5), lambda x, a: a, lambda x: x[..., 3], size=5)
    action, _ = plan(choice, make_planner(choice), num=500, greedy=False)
    assert set(action.sum(-1).tolist()) == {1.0}
    close(action.mean(0), 0.9 * torch.eye(5)[3] + 0.1 / 5, 0.03)


def test_a_model_without_reward_needs_a_goal() -> None:
    model = plane()
    model.decodes_reward = False
    with pytest.raises(ValueError, match=r"set planner.objective to goal"):
        make_planner(model)
    assert make_planner(model, objective="goal")


def test_all_candidates_of_a_step_feel_the_same_wind() -> None:
    """Every step its own, in proposals and in each iteration, and every environment its own."""
    model, behavior = Windy(), Rule(lambda x: x)
    planner = make_planner(model, samples=4, elites=2, proposals=2, iterations=2)
    noise = draws(planner, model, behavior, 5)
    noise.values = ["first", "second"]
    plan(model, planner, behavior, num=5, noise=noise)
    assert behavior.asked == noise.values
    assert noise.transitions is not None
    steps = [0, 1, 0, 1, 2, 0, 1, 2]  # the last action of a proposal needs no step
    for felt, h in zip(model.felt, steps, strict=True):
        wind = felt.unflatten(0, (5, -1))
        assert torch.equal(wind, noise.transitions[h][:, None].expand_as(wind))
    assert len(noise.transitions.flatten(0, 1).unique(dim=0)) == 15

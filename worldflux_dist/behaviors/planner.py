"""Planning: search for actions in any family's imagination, for many environments at once.

Candidate action sequences (H, B, N, A) are rolled out by `transition` and scored by `decode`:

    reward:  sum_k w_k r_k + w_H V(s_H),  w_k = continue_1 ... continue_{k-1}     H steps
    goal:    -|g(s_H) - g(goal)|^2,  g: `WorldModel.goal`, features where a family has no other

MPPI (Gaussian actions) weighs the elites by exp(temperature (score - best)) and acts on one of
them; CEM weighs them alike and acts on the mean, and takes categorical actions too: their
distribution is the elites' frequency of each class. The first candidates are proposed by the
behavior's policy; the mean found is the next step's start, moved by one.

What must stay true: environments do not touch each other, so a batch of B plans equals B single
plans with the same noise; models that draw at random see common random numbers in all candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le, Lt, MaxLen
from torch import Tensor

from worldflux_dist.behaviors.base import Behavior
from worldflux_dist.models.base import State, WorldModel
from worldflux_dist.nn import distributions as dist
from worldflux_dist.settings import Positive, Settings, Units
from worldflux_dist.spaces import ActionPart


@dataclass(frozen=True)
class PlannerConfig(Settings):
    """TD-MPC2's constants. `method` none leaves acting to the policy; auto is mppi for continuous
    actions and cem otherwise. `goal` is a flat observation, for environments with one vector;
    `smoothing` the uniform share of a categorical; `precision` that of the matrix products."""

    section: ClassVar[str] = "planner"

    method: Literal["none", "auto", "mppi", "cem"] = "none"
    objective: Literal["reward", "goal"] = "reward"
    goal: Annotated[tuple[float, ...], MaxLen(10_000)] = ()
    horizon: Annotated[int, Ge(1), Le(1000)] = 3
    iterations: Annotated[int, Ge(1), Le(1000)] = 6
    samples: Units = 512
    elites: Units = 64
    proposals: Annotated[int, Ge(0), Le(2**16)] = 24
    temperature: Annotated[float, Ge(-1e9), Le(1e9)] = 0.5
    min_std: Positive = 0.05
    max_std: Positive = 2.0
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"

    def check(self) -> None:
        if self.goal and self.objective != "goal":
            raise ValueError("planner.goal is given: set planner.objective to goal, too")
        if self.objective == "goal" and self.method == "none":
            raise ValueError("planner.objective is goal: set planner.method, for example to auto")
        if self.min_std > self.max_std:
            raise ValueError(
                f"planner.min_std {self.min_std} must be at most max_std {self.max_std}"
            )
        if self.elites > self.samples or self.proposals >= self.samples:
            raise ValueError(
                f"planner.samples is {self.samples}: it must be at least elites {self.elites} and "
                f"more than proposals {self.proposals}"
            )


@dataclass
class PlanNoise:
    """All random draws of a plan for B environments.

    Of `dist.action_noise`: proposals (H, B, P, A), samples (I, H, B, N - P, A), action (B, A).
    transitions (H, B, ...) are the model's, one for all candidates; pick (B, E) are
    exponential; values holds the behavior's draws for (B, N) final states of each iteration.
    """

    proposals: Tensor
    samples: Tensor
    transitions: Tensor | None
    values: list[Any]
    pick: Tensor
    action: Tensor


class Planner:
    """Plans for environments whose actions have these parts. Holds no state between calls."""

    def __init__(
        self, config: PlannerConfig, parts: tuple[ActionPart, ...], world_model: WorldModel
    ) -> None:
        continuous = all(part.kind == "continuous" for part in parts)
        method = config.method
        if method == "auto":
            method = "mppi" if continuous else "cem"
        if method == "mppi" and not continuous:
            raise ValueError(
                "planner.method mppi draws Gaussian actions and this environment's are discrete: "
                "set planner.method to cem"
            )
        if config.objective == "reward" and not world_model.decodes_reward:
            raise ValueError(
                "planner.objective is reward and this world model predicts none: set "
                "planner.objective to goal and give one in planner.goal or by Agent.set_goal"
            )
        if config.objective == "goal" and not world_model.reaches_goals:
            raise ValueError(
                "planner.objective is goal and distances of this family's states mean nothing: "
                "take jepa or tdmpc2, or set planner.objective to reward"
            )
        self.config, self.parts, self.weighted = config, parts, method == "mppi"
        self.sizes = [part.size for part in parts]
        means = [0.0 if part.kind == "continuous" else 1 / part.size for part in parts]
        start = [torch.full((size,), mean) for size, mean in zip(self.sizes, means, strict=True)]
        self._start = torch.cat(start)

    def initial(self, num: int, device: Any) -> Tensor:
        """The mean (B, H, A) of a first plan: zero, and uniform over classes."""
        self._start = self._start.to(device)  # moved once
        return self._start.expand(num, self.config.horizon, -1)

    def draw(self, num: int, world_model: WorldModel, behavior: Behavior, device: Any) -> PlanNoise:
        """Fresh noise for B = `num` environments."""
        c, shape = self.config, world_model.noise_shape

        def noise(*lead: int) -> Tensor:
            return dist.action_noise(self.parts, lead, device)

        return PlanNoise(
            noise(c.horizon, num, c.proposals),
            noise(c.iterations, c.horizon, num, c.samples - c.proposals),
            None if shape is None else torch.rand(c.horizon, num, *shape, device=device),
            [behavior.value_noise((num, c.samples), device) for _ in range(c.iterations)],
            torch.empty(num, c.elites, device=device).exponential_(),
            noise(num),
        )

    @torch.no_grad()
    def plan(
        self,
        world_model: WorldModel,
        behavior: Behavior,
        state: State,
        mean: Tensor,
        greedy: bool = False,
        goal: Tensor | None = None,
        noise: PlanNoise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Actions (B, A) for states (B, ...), and the mean (B, H, A) for the step after.

        `mean` is what the last call gave, or `initial`; `goal` (B, G) or (1, G) is what
        `WorldModel.goal` gives of it.
        """
        device = mean.device
        bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            noise = noise or self.draw(len(mean), world_model, behavior, device)
            start = world_model.essential(state)
            search = _Search(self, world_model, behavior, start, goal, noise)
            return search.run(mean.transpose(0, 1), greedy)


@dataclass
class _Search:
    """One call of `plan`. Time-major: distributions are (H, B, A), candidates (H, B, N, A)."""

    planner: Planner
    world_model: WorldModel
    behavior: Behavior
    state: State  # its essential part
    goal: Tensor | None
    noise: PlanNoise

    def run(self, mean: Tensor, greedy: bool) -> tuple[Tensor, Tensor]:
        c, noise = self.planner.config, self.noise
        std = torch.full_like(mean, c.max_std)
        proposed = self.propose()
        for i in range(c.iterations):
            sampled = self.sample(mean.unsqueeze(2), std.unsqueeze(2), noise.samples[i])
            actions = torch.cat([proposed, sampled], 2)
            score = self.score(actions, noise.values[i]).nan_to_num(0)  # (B, N)
            best = score.topk(c.elites, dim=1)
            index = best.indices[None, :, :, None].expand(len(actions), -1, -1, actions.shape[-1])
            elites = actions.gather(2, index)  # (H, B, E, A)
            weight = torch.ones_like(best.values)
            if self.planner.weighted:
                weight = (c.temperature * (best.values - best.values[:, :1])).exp()
            weight = (weight / weight.sum(1, keepdim=True)).unsqueeze(-1)
            mean = (weight * elites).sum(2)
            std = (weight * (elites - mean.unsqueeze(2)).square()).sum(2).sqrt()
            std = std.clamp(c.min_std, c.max_std)
            mean = self.smooth(mean)
        first = mean[0]
        if self.planner.weighted:
            pick = (weight.squeeze(-1).log() - noise.pick.log()).argmax(1)
            first = elites[0, torch.arange(len(pick), device=pick.device), pick]
        new = self.planner.initial(len(first), mean.device)[:, :1]  # (B, 1, A)
        ahead = torch.cat([mean[1:].transpose(0, 1), new], 1)
        return self.choose(first, std[0], greedy), ahead

    def propose(self) -> Tensor:
        """The policy's own rollouts (H, B, P, A)."""
        draws, num = self.noise.proposals, self.planner.config.proposals
        if not num:
            return draws
        state, actions = self.expanded(num), []
        for h, draw in enumerate(draws):
            action = self.behavior.act(self.world_model.features(state), noise=draw.flatten(0, 1))
            action = action.clamp(-1, 1)  # a policy may leave it to the environment to clip
            actions.append(action.view_as(draw))
            if h + 1 < len(draws):
                state = self.step(state, action, h)
        return torch.stack(actions)

    def parts(self, *values: Tensor) -> Iterator[Any]:
        """Each part of an action with its share of the values (..., A)."""
        split = [value.split(self.planner.sizes, -1) for value in values]
        return zip(self.planner.parts, *split, strict=True)

    def sample(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Actions (..., A) from Gaussians cut to [-1, 1] and categoricals."""
        drawn = [
            (center + spread * draw).clamp(-1, 1)
            if part.kind == "continuous"
            else dist.sample_onehot(center, draw[..., 0])
            for part, center, spread, draw in self.parts(mean, std, noise)
        ]
        return torch.cat(drawn, -1)

    def score(self, actions: Tensor, value_noise: Any) -> Tensor:
        """What each candidate (H, B, N, A) is worth (B, N)."""
        model, lead = self.world_model, actions.shape[1:3]
        state = self.expanded(lead[1])
        total, weight = 0.0, 1.0
        for h, action in enumerate(actions):
            state = self.step(state, action.flatten(0, 1), h)
            if self.goal is None:
                preds = model.decode(state, ("reward", "continue")).preds
                total = total + weight * preds["reward"]
                weight = weight * preds["continue"]
        if self.goal is not None:
            reached = model.goal(state).unflatten(0, lead)
            return -(reached - self.goal.unsqueeze(1)).square().sum(-1)
        features = model.features(state).unflatten(0, lead)
        value = self.behavior.value(features, value_noise)
        return (total + weight * value.flatten()).unflatten(0, lead)

    def step(self, state: State, action: Tensor, h: int) -> State:
        draws = self.noise.transitions
        if draws is None:
            return self.world_model.transition(state, action)
        common = draws[h].repeat_interleave(len(action) // len(draws[h]), 0)
        return self.world_model.transition(state, action, common)

    def expanded(self, num: int) -> State:
        """Every environment's state `num` times over: (B * num, ...)."""
        return self.state.map(lambda value: value.repeat_interleave(num, 0))

    def smooth(self, mean: Tensor) -> Tensor:
        """Keep every class possible."""
        share = self.planner.config.smoothing
        mixed = [
            center if part.kind == "continuous" else (1 - share) * center + share / part.size
            for part, center in self.parts(mean)
        ]
        return torch.cat(mixed, -1)

    def choose(self, mean: Tensor, std: Tensor, greedy: bool) -> Tensor:
        """The action (B, A) to take: `mean`, or around it while exploring."""
        if not greedy:
            return self.sample(mean, std, self.noise.action)
        best = [
            center.clamp(-1, 1) if part.kind == "continuous" else dist.likeliest(center)
            for part, center in self.parts(mean)
        ]
        return torch.cat(best, -1)

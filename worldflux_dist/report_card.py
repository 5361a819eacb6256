"""The report card of a world model: is it any good, and where does it fail?

From held-out episodes alone: how far its open loop stays with what happened, rewards, ends and
values against those obtained, and what its features hold. What must stay true: every error stands
beside that of knowing nothing (persistence, the mean), so that a model which has collapsed, or an
observation that hardly moves, cannot look good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch, Steps
from worldflux_dist.models.base import State

STARTS, SAMPLES, SIDE = 256, 8, 8  # open loops; draws of a model that draws; a picture's new sides

MEANING = {
    "obs": "open-loop error of observations over persistence's, so many steps ahead",
    "features": "open-loop error of features over persistence's, so many steps ahead",
    "reward": "open-loop error of rewards over that of their mean, so many steps ahead",
    "continue_error": "calibration error of the chance of going on, one step ahead",
    "end_missed": "chance of going on given to steps that ended an episode, one step ahead",
    "value_correlation": "of values with returns obtained",
    "rank": "effective rank of the features (exp of the entropy of their spectrum)",
    "still": "share of feature dimensions that hardly vary",
    "probe": "R2 of a linear probe from features to observations, on other steps",
    "return_imagined": "discounted return over the open loop, as imagined",
    "return_obtained": "the same, as it was",
}


@dataclass(frozen=True)
class ReportCard:
    """`numbers` by name (`obs@5`: five steps ahead); `curves` by name (K,), errors over baselines
    1..K steps ahead; `calibration` (bins, 3): predicted and observed shares of going on and how
    many steps; `values` (n, 2): predicted and obtained; `spectrum` (F,): shares of variance,
    largest first; `weak`: a sentence on each thing that is weak."""

    model: str
    numbers: dict[str, float]
    curves: dict[str, np.ndarray]
    calibration: np.ndarray
    values: np.ndarray
    spectrum: np.ndarray
    weak: list[str]

    def lines(self) -> list[str]:
        width = max(map(len, self.numbers))
        table = [
            f"{name:<{width}}  {value:9.4g}  {MEANING[name.partition('@')[0]]}"
            for name, value in self.numbers.items()
        ]
        verdict = [f"weak: {sentence}" for sentence in self.weak] or ["nothing here is weak"]
        return [f"{self.model} on held-out episodes", *table, *verdict]


@torch.no_grad()
def report_card(agent: Agent, chunks: Sequence[Steps], horizon: int = 15) -> ReportCard:
    """The card of an agent's world model, from steps (N, T) that it has not learned from.

    Rows may hold several episodes. A model that draws is rolled out SAMPLES times and averaged.
    Raises ValueError where no row or no episode is as long as an open loop of `horizon` steps.
    """
    batches = [
        Batch.from_columns(chunk.columns()).map(lambda x: torch.tensor(x, device=agent.device))
        for chunk in chunks
        if chunk.reward.shape[1] > horizon + 1
    ]
    if not batches:
        raise ValueError(
            f"a report card needs rows of at least {horizon + 2} steps: give longer chunks or a "
            "shorter horizon"
        )
    walks = [_Walk(agent, batch, horizon) for batch in batches]
    if not any(walk.totals for walk in walks):
        raise ValueError(
            f"no episode is as long as an open loop of {horizon} steps: give a shorter horizon"
        )
    numbers, curves = _open_loops(walks, agent.world_model.decodes_obs)
    ahead, steps = torch.cat([w.ahead for w in walks]), torch.cat([w.going for w in walks])
    calibration = _calibration(ahead.clamp(0, 1), steps)
    share = calibration[:, 2] / calibration[:, 2].sum()
    gap = np.abs(calibration[:, 0] - calibration[:, 1])
    numbers["continue_error"] = float((share * gap).sum())
    if (steps == 0).any():
        numbers["end_missed"] = float(ahead[steps == 0].mean())
    values = torch.cat([w.values for w in walks])
    numbers["value_correlation"] = float(torch.corrcoef(values.t())[0, 1].nan_to_num())
    features = torch.cat([w.features.flatten(0, 1) for w in walks])
    spectrum = _spectrum(features)
    numbers |= _spread(features, spectrum)
    numbers["probe"] = _probe(features, torch.cat([w.seen.flatten(0, 1) for w in walks]))
    for name in ("imagined", "obtained"):
        returns = torch.cat([getattr(w, name) for w in walks])
        numbers[f"return_{name}"] = float(returns.mean())
    drawn = (calibration, values.cpu().numpy(), spectrum.cpu().numpy())
    return ReportCard(agent.recipe["model"], numbers, curves, *drawn, _weak(numbers, horizon))


class _Walk:
    """One pass over steps (N, T): posteriors, what the model expects of each next step, and open
    loops of K steps from some of them. Loops do not run across a reset.

    `totals`: sums (K,) over all loops, of errors by name and of what they are compared with by
    `<name>/base`; none where no episode is as long as a loop. `ahead` and `going` (n,): expected
    and real continues of single steps. `values` (n, 2); `imagined` and `obtained` (loops,).
    """

    def __init__(self, agent: Agent, batch: Batch, horizon: int) -> None:
        self.agent, self.batch, self.horizon = agent, batch, horizon
        model, (num, length) = agent.world_model, batch.reward.shape
        self.seen = _flat(agent, batch.obs)  # (N, T, n)
        self.samples = SAMPLES if model.noise_shape is not None else 1
        self.stride = max(1, num * (length - horizon) // STARTS)
        state, starts, features, ahead = model.initial(num), [], [], []
        for t in range(length):
            action, first = batch.action[:, t], batch.is_first[:, t]
            expected = model.transition(model.essential(state), action)
            ahead.append(model.decode(expected, ("continue",)).preds["continue"])
            obs = {key: value[:, t] for key, value in batch.obs.items()}
            state = model.update(state, action, obs, first)
            features.append(model.features(state))
            if t % self.stride == 0:
                starts.append(model.essential(state))
        self.features = torch.stack(features, 1)
        moved = ~batch.is_first
        moved[:, 0] = False
        self.ahead = torch.stack(ahead, 1)[moved] / model.discount
        self.going = 1 - batch.is_terminal[moved].float()
        self.values = self._values()
        self._loop(starts)

    def _values(self) -> Tensor:
        """Values of states and the discounted returns obtained after them, to the end of an episode
        or, where it was cut or the row ends, with the value there."""
        b, discount = self.batch, self.agent.world_model.discount
        value = self.agent.behavior.value(self.features)  # (N, T)
        after, returns = value[:, -1], []
        for t in reversed(range(1, b.reward.shape[1])):
            going = discount * (1 - b.is_terminal[:, t].float())
            after = torch.where(b.is_first[:, t], value[:, t - 1], b.reward[:, t] + going * after)
            returns.append(after)
        pairs = torch.stack([value[:, :-1], torch.stack(returns[::-1], 1)], -1)
        return pairs[~b.is_last[:, :-1]]

    def _loop(self, starts: list[State]) -> None:
        """Open loops with the actions that were taken, and what they get wrong."""
        b, horizon, model = self.batch, self.horizon, self.agent.world_model
        totals: dict[str, list[Tensor]] = {}
        imagined, obtained = [], []
        discounts = model.discount ** torch.arange(horizon, device=b.reward.device)
        self.mean_reward = b.reward[~b.is_first].mean()
        for t in range(0, b.reward.shape[1] - horizon, self.stride):
            span = slice(t + 1, t + 1 + horizon)
            whole = ~b.is_first[:, span].any(1)  # (N,) loops within one episode
            if not whole.any():
                continue
            start = starts[t // self.stride][whole]
            actions = b.action[whole, span].transpose(0, 1)  # (K, n, A)
            many = start.map(lambda x: x.repeat_interleave(self.samples, 0))
            rolled = model.rollout(many, actions.repeat_interleave(self.samples, 1))

            def mean(x: Tensor) -> Tensor:
                return x.unflatten(1, (-1, self.samples)).mean(2)

            reward, real = mean(rolled.rewards), b.reward[whole, span].t()  # (K, n)
            pairs = {"reward": (reward - real, self.mean_reward - real)}
            found = mean(model.features(rolled.states)[1:])
            pairs["features"] = _errors(found, self.features[whole], t, span)
            if model.decodes_obs:
                decoded = model.decode(rolled.states[1:], ("obs",)).preds["obs"]
                flat = _flat(self.agent, decoded if isinstance(decoded, dict) else {"obs": decoded})
                pairs["obs"] = _errors(mean(flat), self.seen[whole], t, span)
            for name, (error, baseline) in pairs.items():
                power = 1 if name == "reward" else 2
                for kind, value in ((name, error), (f"{name}/base", baseline)):
                    value = value.abs().pow(power).reshape(horizon, len(actions[0]), -1)
                    totals.setdefault(kind, []).append(value.sum((1, 2)))
            imagined.append((discounts[:, None] * reward).sum(0))
            obtained.append((discounts[:, None] * real).sum(0))
        empty = [torch.zeros(0)]
        self.imagined, self.obtained = torch.cat(imagined or empty), torch.cat(obtained or empty)
        self.totals = {name: torch.stack(value).sum(0) for name, value in totals.items()}
        # Rewards that are nearly all the same are to be known within a twentieth of them.
        if "reward/base" in self.totals:
            least = 0.05 * self.mean_reward.abs() * len(self.obtained)
            self.totals["reward/base"] = self.totals["reward/base"].clamp(min=float(least))


def _errors(found: Tensor, real: Tensor, t: int, span: slice) -> tuple[Tensor, Tensor]:
    """Errors (K, n, ...) of what was found and of staying as it is at t, against real (n, T)."""
    target = real[:, span].transpose(0, 1)
    return found - target, real[:, t] - target


def _flat(agent: Agent, obs: dict[str, Tensor]) -> Tensor:
    """Observations of any leading shape as one vector (..., n): images in small and grey."""
    parts = []
    for key, spec in sorted(agent.spaces.obs.items()):
        value = obs[key].float()
        if spec.kind == "image":
            grey = value.mean(-1) / 255
            small = F.adaptive_avg_pool2d(grey.flatten(0, -3).unsqueeze(1), (SIDE, SIDE))
            value = small.flatten(1).unflatten(0, grey.shape[:-2])
        parts.append(value)
    return torch.cat(parts, -1)


def _open_loops(
    walks: list[_Walk], decodes: bool
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Errors over baselines at 1, 5 and K steps ahead, and for all of them."""
    numbers, curves = {}, {}
    for name in ("obs", "features", "reward") if decodes else ("features", "reward"):
        error, base = (
            torch.stack([w.totals[kind] for w in walks if kind in w.totals]).sum(0)
            for kind in (name, f"{name}/base")
        )
        curves[name] = (error / base.clamp(min=1e-6)).cpu().numpy()
        for ahead in sorted({1, min(5, len(error)), len(error)}):
            numbers[f"{name}@{ahead}"] = float(curves[name][ahead - 1])
    return numbers, curves


def _calibration(predicted: Tensor, real: Tensor, bins: int = 10) -> np.ndarray:
    """Per bin that is not empty: mean prediction, mean outcome, number."""
    index = (predicted * bins).long().clamp(max=bins - 1)
    rows = [
        (float(predicted[here].mean()), float(real[here].mean()), float(here.sum()))
        for here in (index == i for i in range(bins))
        if here.any()
    ]
    return np.array(rows)


def _spectrum(features: Tensor) -> Tensor:
    """Shares of the variance of features (n, F) along their principal axes, largest first."""
    centered = (features - features.mean(0)).double()
    eigenvalues = torch.linalg.eigvalsh(centered.t() @ centered).flip(0).clamp(min=0)
    return (eigenvalues / eigenvalues.sum().clamp(min=1e-30)).float()


def _spread(features: Tensor, spectrum: Tensor) -> dict[str, float]:
    shares, std = spectrum.clamp(min=1e-12), features.std(0)
    rank = float((-(shares * shares.log()).sum()).exp())
    return {"rank": rank, "still": float((std < 0.01 * std.max().clamp(min=1e-6)).float().mean())}


def _probe(features: Tensor, obs: Tensor) -> float:
    """R2 of ridge regression, fitted on one half of the steps and judged on the other: the mean
    over the dimensions of observations that vary."""
    half = len(features) // 2
    x = torch.cat([features, torch.ones_like(features[:, :1])], -1).double()
    y = ((obs - obs[:half].mean(0)) / obs[:half].std(0).clamp(min=1e-6)).double()
    known, rest = slice(0, half), slice(half, None)
    gram = x[known].t() @ x[known]
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=x.device)
    fitted = x[rest] @ torch.linalg.solve(gram + ridge, x[known].t() @ y[known])
    varies = (obs[known].std(0) > 1e-6) & (obs[rest].std(0) > 1e-6)
    error = (fitted - y[rest]).square().mean(0) / y[rest].var(0).clamp(min=1e-12)
    return float((1 - error[varies]).mean())


def _weak(numbers: dict[str, float], horizon: int) -> list[str]:
    """A sentence for each number that a model one can rely on would not have."""
    last = f"@{horizon}"
    rules = [
        ("obs@1", lambda x: x > 0.5, "one step ahead, observations are hardly better than a copy"),
        (
            f"obs{last}",
            lambda x: x > 1,
            f"{horizon} steps ahead, a copy of the observation is better",
        ),
        ("features@1", lambda x: x > 0.5, "one step ahead, features are hardly better than a copy"),
        ("reward@1", lambda x: x > 0.5, "rewards are hardly better than their mean"),
        (f"reward{last}", lambda x: x > 1, f"{horizon} steps ahead, the mean reward is better"),
        ("continue_error", lambda x: x > 0.05, "ends come more or less often than predicted"),
        ("end_missed", lambda x: x > 0.5, "it does not see an episode's end coming"),
        ("value_correlation", lambda x: x < 0.5, "values hardly say which states are better"),
        ("rank", lambda x: x < 2, "features have collapsed onto a line"),
        ("probe", lambda x: x < 0.5, "features hold little of the observations"),
    ]
    weak = [sentence for name, bad, sentence in rules if name in numbers and bad(numbers[name])]
    imagined, obtained = numbers["return_imagined"], numbers["return_obtained"]
    if abs(imagined - obtained) > 0.25 * max(abs(obtained), 0.1):
        weak.append(f"it imagines returns of {imagined:.3g} where {obtained:.3g} were obtained")
    return weak

"""Networks may compute in bfloat16; what is read off them never does.

Returns, values, rewards, log-probabilities, losses and statistics are float32 under autocast, and
as exact as without it: values of 100 to 304, which bfloat16 keeps to a half or a whole, come out as
they were put in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import CASES, FAMILY, family_batch, make_case, make_small, same_sums, tensors
from torch import Tensor

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.nn import distributions as dist

BINS = {"symexp": dist.symexp_bins(255), "symlog": dist.symlog_bins(101)}


def half(enabled: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts, sequences and dataclasses, by where they are."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from leaves(part, f"{name}.{index}")
    elif hasattr(value, "__dataclass_fields__"):
        yield from leaves(vars(value), name)


# ------------------------------------------------------------------------------- all of it


def everything(agent: Any, on: bool) -> dict[str, Tensor]:
    """All that an agent computes, from the same states and draws, by name."""
    batch = tensors(family_batch(agent))
    model, behavior = agent.world_model, agent.behavior
    torch.manual_seed(3)
    with torch.no_grad():  # the states that all start from are float32's, whatever is on
        states = model.observe(batch)[0].flatten()[:8]
        actions = behavior.act(model.features(states)).clamp(-1, 1)
        path = model.rollout(states, actions.expand(3, *actions.shape)).states
    torch.manual_seed(4)
    with half(on):
        found: dict[str, Any] = {"decode": model.decode(path).preds}
        found["rollout"] = model.rollout(states, behavior.act, 2)
        found["value"] = behavior.value(model.features(path))
        found["greedy"] = behavior.act(model.features(path), greedy=True)
        found["actor"] = behavior.actor(model.features(path))  # of which an argmax may tip over
        output = model.loss(batch)
        learned = behavior.loss(model, output)
        found["losses"] = {"model": output.losses, "behavior": learned.losses}
        found["metrics"] = {"model": output.metrics, "behavior": learned.metrics}
        found["states"], found["path"] = (output.states, output.path), learned.path
        total, found["logged"], path_of_policy = agent(batch, rows=True)
        found["total"] = total
        if path_of_policy is not None:
            found["policy"] = agent.policy_loss(path_of_policy)[:2]
        if hasattr(behavior, "log_prob"):
            found["log_prob"] = behavior.log_prob(model.features(states), actions)
        found["target_statistics"] = dict(behavior.named_buffers())
        obs = {key: value[:3, 0].numpy() for key, value in batch.obs.items()}
        acted, carry = agent.act_batch(obs, batch.is_first[:3, 0].numpy())
        found["act"] = {"action": torch.as_tensor(acted), "carry": carry}
    return dict(leaves(found))


@CASES
def test_all_that_comes_out_is_float32_and_close_to_it(case: tuple[str, str, str]) -> None:
    agents = [make_case(case) for _ in range(2)]
    exact, coarse = (everything(agent, on) for agent, on in zip(agents, (False, True), strict=True))
    assert exact.keys() == coarse.keys() and len(exact) > 40
    for name, value in coarse.items():
        if name.startswith(".actor"):  # TD-MPC2's is a network, not what is read off one
            continue
        assert value.dtype == exact[name].dtype, name
        assert value.dtype in (torch.float32, torch.uint8, torch.int64, torch.bool), name
        assert value.isfinite().all(), name
    # What the networks give from the same states is as close as 8 bits and a few layers allow, and
    # so are the means of losses, although a draw may fall otherwise where a probability is rounded.
    # Rewards and values of random bins, some of 1e8, are not: see below.
    for name, want in exact.items():
        if name.startswith((".decode.continue", ".actor", ".log_prob")):
            got = coarse[name].float()
            torch.testing.assert_close(got, want, rtol=0.05, atol=0.05, msg=name)
        if name.startswith((".losses.model.", ".metrics.model.")):
            scale = max(1.0, want.abs().mean().item())
            assert (coarse[name].mean() - want.mean()).abs() < 0.05 * scale, name


def test_two_hot_predictions_do_not_round() -> None:
    for name, bins in BINS.items():
        values = torch.linspace(100, 304, 205) if name == "symexp" else torch.linspace(4, 6, 205)
        below, weight = dist.twohot_target(values, bins)
        logits = torch.full((205, len(bins)), -1e9)
        logits.scatter_(1, below[:, None], torch.log1p(-weight)[:, None])
        logits.scatter_(1, below[:, None] + 1, weight.log().clamp(min=-1e9)[:, None])
        with half():
            found = dist.twohot_predict(logits, bins)
        assert found.dtype == torch.float32 and len(found.unique()) == 205
        same_sums(found, values, terms=len(bins))


# -------------------------------------------------------------------- values of 100 to 304


def certain(agent: Any, level: int) -> float:
    """Make every network of bins predict the same number between 100 and 304, half-way between two
    bins, with weights that bfloat16 holds without rounding; gives the number."""
    bins, symlog = agent.behavior.bins, len(agent.behavior.bins) == 101
    raw = dist.symexp(bins) if symlog else bins
    index = int(((raw > 100) & (raw < 250)).nonzero()[level])
    for param in agent.parameters():
        if len(param) == len(bins):
            param.data.zero_()
            if param.ndim == 1:
                param.data.fill_(-1e9)[index : index + 2] = 0
    model = agent.world_model
    ends = model.terminal.out if symlog else getattr(model, "heads", model).proceed[-1]
    ends.weight.data.zero_()  # going on is as likely as not
    ends.bias.data.zero_()
    middle = bins[index : index + 2].mean()
    return float(dist.symexp(middle) if symlog else middle)


@pytest.mark.parametrize("level", range(3))
@FAMILY
def test_large_values_stay_what_they_are(family: str, level: int) -> None:
    """Through rewards, rollouts, values, targets, plans and what is imagined of them."""
    planner = {"method": "auto", "samples": 16, "elites": 4, "proposals": 4, "iterations": 1}
    agent = make_small(family, "vector", "continuous", planner=planner)
    worth = certain(agent, level)
    assert 100 < worth < 304
    batch, model, behavior = tensors(family_batch(agent)), agent.world_model, agent.behavior
    with torch.no_grad(), half():
        states = model.observe(batch)[0].flatten()[2:8]
        rollout = model.rollout(states, behavior.act, 3)
        features = model.features(states)
        same_sums(rollout.rewards, torch.full((3, 6), worth))
        same_sums(behavior.value(features), torch.full((6,), worth))
        if family == "tdmpc2":
            going, reward = torch.full((6,), 0.5), torch.full((6,), 3.0)
            want = torch.full((6,), 3 + 0.5 * worth)
            same_sums(behavior.target(features, reward, going), want)
            metrics = agent.policy_loss((features[None], torch.ones(6)))[1]
            same_sums(metrics["q"], worth)
        else:
            imagined = Imagined.of(model, rollout, batch.map(lambda x: x[:1, :6]))
            found = copy.deepcopy(behavior).imagined_loss(imagined, 1.0).metrics
            same_sums(found["value"], worth)
            same_sums(found["reward_imagined"], worth)
        score = scores(agent, states)
    going = 0.5 * (model.discount if family == "tdmpc2" else 1.0)
    want = worth * (1 + going + going**2 + going**3)
    same_sums(score, torch.full((6, 16), want))


def scores(agent: Any, states: Any) -> Tensor:
    """What the planner thinks of 16 candidates for each state."""
    from worldflux_dist.behaviors.planner import _Search

    torch.manual_seed(5)
    num = len(next(iter(states.tensors.values())))
    noise = agent.planner.draw(num, agent.world_model, agent.behavior, "cpu")
    search = _Search(agent.planner, agent.world_model, agent.behavior, states, None, noise)
    actions = torch.rand(3, num, 16, agent.spaces.action_dim) * 2 - 1
    with torch.no_grad():
        return search.score(actions, noise.values[0])

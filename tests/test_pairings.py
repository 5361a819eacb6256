"""Every pairing of a world model, a behavior and a planner that an agent can be made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small import FAMILIES, family_batch, look, make_small, perturbed, tensors
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.planner import PlanNoise
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.spaces import Spaces


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def row(noise: PlanNoise, i: int) -> PlanNoise:
    """The draws of environment i alone."""
    one = slice(i, i + 1)

    def value(draw: Any) -> Any:
        return None if draw is None else draw._replace(action=draw.action[one])

    return PlanNoise(
        noise.proposals[:, one],
        noise.samples[:, :, one],
        None if noise.transitions is None else noise.transitions[:, one],
        [value(draw) for draw in noise.values],
        noise.pick[one],
        noise.action[one],
    )


SEARCH = {"samples": 24, "elites": 4, "proposals": 5, "iterations": 2, "horizon": 3}
PAIRS = [
    ("tdmpc2", "continuous", "latent_td", "mppi"),
    ("tdmpc2", "continuous", "actor_critic", "mppi"),
    ("tdmpc2", "discrete", "latent_td", "cem"),
    ("tdmpc2", "mixed", "latent_td", "cem"),
    ("dreamerv3", "continuous", "actor_critic", "mppi"),
    ("dreamerv3", "continuous", "actor_critic", "cem"),
    ("dreamerv3", "continuous", "latent_td", "mppi"),
    ("dreamerv3", "discrete", "actor_critic", "cem"),
    ("token", "mixed", "actor_critic", "cem"),
    ("token", "continuous", "actor_critic", "mppi"),
    ("dreamerv3", "discrete", "latent_td", "none"),
    ("tdmpc2", "continuous", "actor_critic", "none"),
    ("token", "discrete", "actor_critic", "none"),
    ("token", "continuous", "latent_td", "none"),
    ("diffusion", "continuous", "actor_critic", "mppi"),
    ("diffusion", "discrete", "latent_td", "cem"),
    ("diffusion", "mixed", "actor_critic", "none"),
    ("dreamer4", "continuous", "actor_critic", "mppi"),
    ("dreamer4", "discrete", "latent_td", "none"),
    ("latent", "discrete", "actor_critic", "cem"),
    ("jepa", "continuous", "actor_critic", "cem"),
    ("jepa", "discrete", "latent_td", "cem"),
    ("jepa", "mixed", "actor_critic", "none"),
]
PLANS = [pair for pair in PAIRS if pair[3] != "none"]
PAIRINGS = pytest.mark.parametrize("pair", PAIRS, ids=["-".join(pair) for pair in PAIRS])
PLANNED = pytest.mark.parametrize("pair", PLANS, ids=["-".join(pair) for pair in PLANS])


def make_pair(pair: tuple[str, str, str, str], **planner: Any) -> Any:
    family, action, kind, method = pair
    torch.manual_seed(0)
    search = {"method": method} | SEARCH | planner
    return make_small(family, "dict", action, {"kind": kind}, search)


@PLANNED
@torch.no_grad()
def test_a_batch_of_plans_equals_single_plans(pair: tuple[str, str, str, str]) -> None:
    agent = perturbed(make_pair(pair, elites=10))
    model, behavior, planner = agent.world_model, agent.behavior, agent.planner
    state = model.encode(look(agent))
    noise = planner.draw(3, model, behavior, "cpu")
    _, mean = planner.plan(model, behavior, state, planner.initial(3, "cpu"))
    for greedy in (True, False):
        action, ahead = planner.plan(model, behavior, state, mean, greedy, noise=noise)
        assert len(ahead.unique(dim=0)) > 1
        for i in range(3):
            one = slice(i, i + 1)
            alone = planner.plan(
                model, behavior, state[one], mean[one], greedy, noise=row(noise, i)
            )
            close(alone[0], action[one], 1e-4)
            close(alone[1], ahead[one], 1e-4)


def test_rows_of_a_reset_start_from_the_first_mean() -> None:
    agent = perturbed(make_pair(PAIRS[0]))
    obs, first = look(agent, 1), np.array([True, False, False])
    _, carry = agent.act_batch(look(agent), np.ones(3, bool))
    assert carry["plan"].shape == (3, 3, 2)

    def means(plan: Tensor) -> Tensor:
        torch.manual_seed(0)
        return agent.act_batch(obs, first, carry | {"plan": plan})[1]["plan"]

    fresh, other = carry["plan"].clone(), carry["plan"].clone()
    fresh[0] = 0
    other[1] += 0.5
    assert torch.equal(means(carry["plan"]), means(fresh))
    changed = (means(carry["plan"]) != means(other)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


# ------------------------------------------------------------------------------- pairings


@PAIRINGS
def test_every_pairing_learns_and_acts(pair: tuple[str, str, str, str]) -> None:
    """Runners get the weights that acting needs: all of these, and no more than that."""
    search = {"proposals": 20, "temperature": 1e-7}  # every part of the agent has a say
    learner = Learner(make_pair(pair, **search), LearnerConfig(device="cpu"))
    agent: Any = learner.agent
    metrics = [learner.step(family_batch(agent)) for _ in range(2)][-1]
    assert all(np.isfinite(value) for value in metrics.values())
    perturbed(agent, scale=0.3)
    fresh, sent = make_pair(pair, **search), agent.inference_state()
    with torch.no_grad():
        for param in fresh.parameters():
            param.fill_(torch.nan)
    fresh.load_arrays(sent)

    def acted(each: Agent) -> list[Tensor]:
        carry, found = None, []
        torch.manual_seed(0)
        for time in range(2):
            action, carry = each.act_batch(look(agent, time), np.array([time == 0] * 3), carry)
            found += [torch.from_numpy(action), *carry.values()]
        return found

    want = acted(agent)
    for got, value in zip(acted(fresh), want, strict=True):
        assert torch.equal(got, value)
    check_actions(agent.spaces, want[0])
    assert (agent.planner is None) == (pair[3] == "none")
    for part in {".".join(name.split(".")[:2]) for name in sent}:
        fresh.load_arrays({n: v * np.nan for n, v in sent.items() if n.startswith(f"{part}.")})
        changed = [not torch.equal(a, b) for a, b in zip(acted(fresh), want, strict=True)]
        assert any(changed), f"{part} is sent and not needed"
        fresh.load_arrays(sent)


def check_actions(spaces: Spaces, *actions: Tensor) -> None:
    """Numbers in [-1, 1] and one-hots, whatever an actor-critic that acts alone may do."""
    for action in actions:
        assert action.dtype == torch.float32
        for part, value in zip(
            spaces.action_parts,
            action.split([p.size for p in spaces.action_parts], -1),
            strict=True,
        ):
            if part.kind == "discrete":
                assert (value.sort(-1).values == torch.eye(part.size)[-1]).all()
            else:
                assert value.isfinite().all()


@pytest.mark.parametrize("greedy", [True, False])
@PLANNED
def test_planned_actions_stay_in_their_spaces(
    pair: tuple[str, str, str, str], greedy: bool
) -> None:
    agent = perturbed(make_pair(pair), scale=0.5)
    carry = None
    for time in range(3):
        action, carry = agent.act_batch(
            look(agent, time), np.array([time == 0] * 3), carry, greedy=greedy
        )
        check_actions(agent.spaces, torch.from_numpy(action))
        assert np.abs(action).max() <= 1
        assert agent.spaces.decode_action(action) is not None


@PLANNED
def test_plans_in_bfloat16(pair: tuple[str, str, str, str]) -> None:
    agent = perturbed(make_pair(pair, precision="bfloat16"))
    action, carry = agent.act_batch(look(agent), np.ones(3, bool))
    check_actions(agent.spaces, torch.from_numpy(action))
    assert {value.dtype for value in carry.values()} <= {torch.float32, torch.uint8, torch.int64}


def test_bfloat16_gives_nearly_the_same_plan() -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        agent = perturbed(make_pair(PAIRS[0], precision=precision, elites=24, iterations=1))
        torch.manual_seed(0)
        found.append(agent.act_batch(look(agent), np.ones(3, bool))[1]["plan"])
    assert not torch.equal(*found)
    close(found[0], found[1], 0.05)


def test_a_goal_is_set_by_numbers_or_by_an_observation() -> None:
    def agent(goal: Sequence[float]) -> Any:
        torch.manual_seed(0)
        search = SEARCH | {"method": "cem", "objective": "goal", "goal": goal}
        return perturbed(make_small("tdmpc2", planner=search))

    def acted(one: Any) -> np.ndarray:
        torch.manual_seed(0)
        one.reset()
        return one.act(np.zeros(5, np.float32))

    by_numbers, by_obs = agent((1, 2, 3, 4, 5)), agent(())
    with pytest.raises(ValueError, match=r"set planner.goal or call Agent.set_goal"):
        acted(by_obs)
    by_obs.set_goal(np.array([1, 2, 3, 4, 5], np.float32))
    assert np.array_equal(acted(by_numbers), acted(by_obs))
    by_obs.set_goal(np.array([-5, 4, -3, 2, -1], np.float32))
    assert not np.array_equal(acted(by_numbers), acted(by_obs))


# --------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("action", "options", "message"),
    [
        ("discrete", {"method": "mppi"}, "planner.method mppi .* set planner.method to cem"),
        ("mixed", {"method": "mppi"}, "planner.method mppi .* set planner.method to cem"),
        (
            "continuous",
            {"method": "mpi"},
            "planner.method is 'mpi': it must be 'none', 'auto', 'mppi'",
        ),
        (
            "continuous",
            {"objective": "score"},
            "planner.objective is 'score': it must be 'reward' or 'goal'",
        ),
        ("continuous", {"precision": "half"}, "planner.precision is 'half': it must"),
        ("continuous", {"elites": 33}, "planner.samples is 32: it must be at least elites 33"),
        ("continuous", {"proposals": 32}, "planner.samples is 32: .* more than proposals 32"),
        ("continuous", {"horizon": 0}, "planner.horizon is 0: it must be at least 1"),
        ("continuous", {"sample": 3}, "planner has no option 'sample': did you mean 'samples'"),
        ("continuous", {"samples": 3.5}, "planner.samples is 3.5: it must be a valid integer"),
        ("continuous", {"objective": "goal", "goal": [1.0]}, "planner.goal has 1 numbers"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    action: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_small("tdmpc2", "vector", action, planner=options)
    assert "\n" not in str(error.value)


def test_a_goal_without_a_planner_for_it_is_refused() -> None:
    for agent in (make_small("tdmpc2"), make_small("dreamerv3")):
        with pytest.raises(ValueError, match=r"a goal needs planner.objective goal"):
            agent.set_goal(np.zeros(5, np.float32))
    with pytest.raises(ValueError, match=r"call Agent.set_goal"):
        make_small("tdmpc2", "dict", planner={"objective": "goal", "goal": (1.0, 2.0)})


def test_only_an_actor_critic_learns_in_imagination_alone() -> None:
    agent = make_small("tdmpc2")
    with pytest.raises(ValueError, match=r"set behavior.kind to actor_critic"):
        agent.stages("behavior")
    with pytest.raises(ValueError, match=r"no behavior.kind 'latent': did you mean 'latent_td'"):
        make_small("tdmpc2", behavior={"kind": "latent"})


def test_settings_that_would_be_ignored_are_refused() -> None:
    for planner, sentence in (
        ({"goal": (0.0,) * 5}, "set planner.objective to goal"),
        ({"objective": "goal", "method": "none"}, "set planner.method"),
        ({"min_std": 3.0}, "at most max_std"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            make_small("tdmpc2", planner=planner)
    for options in ({"plan_samples": 4}, {"plan_samples": 24}, {"rho": 0.0}, {"latent": 0}):
        with pytest.raises(ValueError, match=next(iter(options)).split("_")[-1]):
            make_small("tdmpc2", **options)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_step_of_a_path_counts_what_its_model_says(family: str) -> None:
    """Predicted steps count less and less; posteriors all alike, wherever their row begins."""
    agent = make_small(family, behavior={"kind": "latent_td"})
    output = agent.world_model.loss(tensors(family_batch(agent)))
    steps = output.batch.reward.shape[1]
    want = [0.5**k for k in range(steps)] if family == "tdmpc2" else [1.0] * steps
    assert output.weight.tolist() == want
    loss = agent.behavior.loss(agent.world_model, output).losses["value"]
    counted = loss.detach().flatten(0, 1).amax(0)  # (T - 1,)
    uniform = torch.tensor(float(np.log(101)))  # fresh Qs: the same loss everywhere
    torch.testing.assert_close(counted, output.weight[:-1] * uniform, rtol=0.02, atol=0)


def test_a_first_call_in_mid_episode_is_a_first_look() -> None:
    agent = make_small("tdmpc2", "image")
    obs = look(agent)
    _, carry = agent.act_batch(obs, np.zeros(len(obs["obs"]), bool))
    frames = carry["state/frames/obs"]
    assert torch.equal(frames[:, 0], frames[:, -1]) and frames.any()


def test_a_goal_is_refused_where_distances_mean_nothing() -> None:
    for family in ("dreamerv3", "token", "diffusion"):
        with pytest.raises(ValueError, match=r"take jepa or tdmpc2, or set planner.objective"):
            make_small(family, planner=SEARCH | {"method": "cem", "objective": "goal"})


def test_a_goal_of_a_family_with_memory_is_an_embedding_alone() -> None:
    """What led to the goal is not known, so the memory is not compared."""
    search = SEARCH | {"method": "cem", "objective": "goal", "goal": (1.0, 2.0, 3.0, 4.0, 5.0)}
    agent = perturbed(make_small("jepa", planner=search, memory="gru"))
    assert agent.goal_features().shape == (1, 16) != (1, agent.world_model.feature_dim)
    assert agent.act(np.zeros(5, np.float32)).shape == (2,)

"""The agent and its learner: acting in native spaces, one loss, and files that continue a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import SIZES, make_agent, perturbed, random_batch, tensors, vector

from worldflux_dist.agent import Agent
from worldflux_dist.behaviors.actor_critic import ActorCriticConfig
from worldflux_dist.checkpoint import CheckpointError
from worldflux_dist.data import Spaces
from worldflux_dist.learner import Learner, LearnerConfig, NonFiniteLossError

IMAGE = gym_spaces.Box(0, 255, (16, 16, 3), np.uint8)
NATIVE = [
    (vector(3), gym_spaces.Discrete(4, start=-1)),
    (vector(3), gym_spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 1.0]), dtype=np.float64)),
    (
        gym_spaces.Dict({"cam": IMAGE, "pos": vector(2), "kind": gym_spaces.Discrete(3)}),
        gym_spaces.Dict({"move": gym_spaces.Box(-1, 1, (2,)), "jump": gym_spaces.Discrete(2)}),
    ),
    (
        gym_spaces.Tuple((vector(2), gym_spaces.MultiBinary(3))),
        gym_spaces.Tuple((gym_spaces.MultiDiscrete([2, 3]), gym_spaces.Box(-1, 1, (1,)))),
    ),
]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    return np.array_equal(left, right)


# ----------------------------------------------------------------------------- acting


@pytest.mark.parametrize(("observation", "action"), NATIVE)
def test_save_load_and_act_in_native_spaces(
    observation: gym_spaces.Space, action: gym_spaces.Space, tmp_path: Path
) -> None:
    options = SIZES | {"multipliers": (2, 4)}
    spaces = Spaces(observation, action)
    agent = perturbed(Agent("dreamerv3:size1m", spaces, options, {"horizon": 7}))
    agent.save(tmp_path / "saved")
    loaded: Any = Agent.load(tmp_path / "saved")
    assert loaded.behavior.config == ActorCriticConfig(horizon=7)
    assert loaded.world_model.config == agent.world_model.config
    for name, value in agent.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    observation.seed(0)
    for step in range(4):
        obs = observation.sample()
        torch.manual_seed(step)
        chosen = agent.act(obs)
        torch.manual_seed(step)
        again = loaded.act(obs)
        assert action.contains(chosen), chosen
        assert same(chosen, again)
    assert action.contains(agent.act(obs, greedy=False))


def test_reset_forgets_the_episode() -> None:
    agent = perturbed(make_agent("cont"))
    rng = np.random.default_rng(0)
    obs = {key: rng.normal(size=n).astype(np.float32) for key, n in (("zpos", 3), ("avel", 2))}

    def act() -> Any:
        torch.manual_seed(0)
        return agent.act(obs)

    first = act()
    assert not same(first, act())  # it remembers having been here
    agent.reset()
    assert same(first, act())


def test_rows_of_a_batch_reset_on_their_own() -> None:
    agent = perturbed(make_agent("disc"))
    obs = {key: value[:, 0] for key, value in random_batch(agent.spaces).obs.items()}
    _, carry = agent.act_batch(obs, np.ones(3, bool))
    torch.manual_seed(0)
    _, mixed = agent.act_batch(obs, np.array([True, False, False]), carry)
    torch.manual_seed(0)
    _, fresh = agent.act_batch(obs, np.ones(3, bool))
    same_rows = [torch.allclose(mixed["state/deter"][i], fresh["state/deter"][i]) for i in range(3)]
    assert same_rows == [True, False, False]
    assert mixed["action"].shape == (3, 3)


def test_runners_are_sent_only_what_acting_needs() -> None:
    agent, other = perturbed(make_agent("disc")), make_agent("disc")
    sent = agent.inference_state()
    assert {".".join(name.split(".")[:2]) for name in sent} == {
        "world_model.encoder",
        "world_model.core",
        "world_model.posterior",
        "behavior.actor",
    }
    other.load_arrays(sent)
    obs = {key: value[:, 0] for key, value in random_batch(agent.spaces).obs.items()}
    acted = []
    for each in (agent, other):
        torch.manual_seed(0)
        acted.append(each.act_batch(obs, np.ones(3, bool))[0])
    assert np.array_equal(*acted)
    sent["behavior.actor.mlp.0.linear.bias"] += 1  # a copy, not a view
    assert agent.inference_state()["behavior.actor.mlp.0.linear.bias"][0] != pytest.approx(
        sent["behavior.actor.mlp.0.linear.bias"][0]
    )


def test_loss_is_the_weighted_sum_of_all_means() -> None:
    agent = perturbed(make_agent("disc"))
    loss, logged, _ = agent(tensors(random_batch(agent.spaces)))
    scales = {"rep": 0.1, "replay_value": 0.3}
    names = ["dyn", "rep", "reward", "continue", "rec/image", "rec/vector"]
    names += ["policy", "value", "replay_value"]
    want = sum(scales.get(name, 1.0) * logged[f"loss/{name}"].item() for name in names)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert {name for name in logged if name.startswith("loss/")} == {f"loss/{n}" for n in names}
    assert not any(value.requires_grad for value in logged.values())


# ------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("name", ["agent.safetensors", "agent.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_broken_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    make_agent("cont").save(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error = FileNotFoundError if (name, damage) == ("agent.json", "missing") else CheckpointError
    with pytest.raises(error, match=str(tmp_path)):
        Agent.load(tmp_path)


def test_weights_of_another_agent_are_refused(tmp_path: Path) -> None:
    """Fewer, more or other weights than the recipe has never load in silence."""
    make_agent("cont").save(tmp_path / "cont")
    make_agent("disc").save(tmp_path / "disc")
    make_agent("disc", hidden=32).save(tmp_path / "wide")
    recipe = (tmp_path / "disc" / "agent.json").read_bytes()
    for other in ("cont", "wide"):
        (tmp_path / other / "agent.json").write_bytes(recipe)
        with pytest.raises(CheckpointError, match=other):
            Agent.load(tmp_path / other)


# ----------------------------------------------------------------------------- learning


def make_learner(kind: str = "disc", **options: Any) -> Any:
    torch.manual_seed(0)
    return Learner(make_agent(kind, warmup=2), LearnerConfig(device="cpu", **options))


@pytest.mark.parametrize("kind", ["disc", "cont"])
def test_a_saved_learner_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    straight = make_learner(kind)
    batches = [random_batch(straight.agent.spaces, seed=i) for i in range(4)]
    torch.manual_seed(1)
    for batch in batches[:2]:
        straight.step(batch)
    straight.save(tmp_path)
    ends = [straight.step(batch) for batch in batches[2:]]
    torch.manual_seed(2)
    resumed = Learner(Agent.load(tmp_path), LearnerConfig(device="cpu"))
    resumed.load(tmp_path)
    assert resumed.gradient_steps == 2
    assert [resumed.step(batch) for batch in batches[2:]] == ends
    assert resumed.gradient_steps == straight.gradient_steps == 4
    for name, value in straight.agent.state_dict().items():
        assert torch.equal(resumed.agent.state_dict()[name], value), name


def test_every_step_moves_the_slow_critic() -> None:
    learner = make_learner("cont")
    behavior = perturbed(learner.agent).behavior
    before = behavior.slow_critic[0].linear.weight.clone()
    learner.step(random_batch(learner.agent.spaces))
    want = 0.98 * before + 0.02 * behavior.critic[0].linear.weight
    torch.testing.assert_close(behavior.slow_critic[0].linear.weight, want)
    assert not torch.equal(want, before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learning_lowers_the_loss(precision: str) -> None:
    torch.manual_seed(0)
    agent = make_agent("disc", learning_rate=3e-3, warmup=0)
    learner = Learner(agent, LearnerConfig(device="cpu", precision=precision))
    batch = random_batch(agent.spaces)
    history = [learner.step(batch) for _ in range(12)]
    for name in ("loss/rec/image", "loss/rec/vector", "loss/reward", "loss/replay_value"):
        assert history[-1][name] < 0.9 * history[0][name], name
    assert all(p.dtype == torch.float32 for p in agent.parameters())


@pytest.mark.parametrize(
    ("column", "term"), [("reward", "loss/reward"), ("obs/vector", "loss/rec/vector")]
)
def test_nan_is_named_and_changes_nothing(column: str, term: str) -> None:
    learner = make_learner()
    batch = random_batch(learner.agent.spaces)
    learner.step(batch)
    learner.step(batch)
    before = {name: value.clone() for name, value in learner.agent.named_parameters()}
    moments = [
        value.clone()
        for optimizer in learner.optimizers.values()
        for entry in optimizer.state.values()
        for value in entry.values()
    ]
    batch.columns()[column][1, 2] = np.nan
    with pytest.raises(NonFiniteLossError, match=rf"{term}.* became nan at gradient step 3"):
        learner.step(batch)
    assert learner.gradient_steps == 2
    for name, value in learner.agent.named_parameters():
        assert torch.equal(value, before[name]), name
    after = [
        value
        for optimizer in learner.optimizers.values()
        for entry in optimizer.state.values()
        for value in entry.values()
    ]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


def test_a_nan_batch_leaves_no_trace_in_the_buffers() -> None:
    """The return normaliser and the slow critic are saved with the agent, so they count too."""
    learner = make_learner()
    batch = random_batch(learner.agent.spaces)
    learner.step(batch)
    batch.obs["vector"][0, 0] = np.nan
    with pytest.raises(NonFiniteLossError):
        learner.step(batch)
    for name, value in learner.agent.state_dict().items():
        assert value.isfinite().all(), name


def test_read_only_arrays_can_be_learned_from() -> None:
    learner = make_learner("cont")
    batch = random_batch(learner.agent.spaces)
    for value in batch.columns().values():
        value.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it is handed memory it may not write to
        assert np.isfinite(learner.step(batch)["loss"])


def test_broken_weights_are_never_saved(tmp_path: Path) -> None:
    """A loss may still be finite when a weight no longer is."""
    learner = Learner(make_agent("cont"))
    with torch.no_grad():
        next(learner.agent.parameters()).view(-1)[0] = torch.inf
    with pytest.raises(NonFiniteLossError, match="not finite after gradient step 0"):
        learner.save(tmp_path)
    assert not list(tmp_path.iterdir())

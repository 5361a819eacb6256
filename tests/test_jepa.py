"""JEPA: regularisers against hand-computed values, prediction over steps, and no collapse."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from pendulum import card, trained
from small import family_batch, make_small, perturbed, same_sums, tensors
from torch import Tensor
from toy_envs import Arm

from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.nn import collapse
from worldflux_dist.nn.masked import visible_parts
from worldflux_dist.replay.buffer import ReplayBuffer, ReplayConfig
from worldflux_dist.runner import EnvRunner
from worldflux_dist.spaces import Spaces


def make_jepa(obs: str = "vector", **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(make_small("jepa", obs, **options))


# ----------------------------------------------------------------------- regularisers


def statistic(x: Tensor) -> float:
    """As published: N times ours, with enough directions that chance is small."""
    torch.manual_seed(1)
    return float(len(x) * collapse.sigreg(x, torch.randn(256, x.shape[1])))


def test_sigreg_is_small_for_a_standard_normal_and_grows_with_the_batch_otherwise() -> None:
    torch.manual_seed(0)
    for num in (128, 1024):
        normal = torch.randn(num, 16)
        assert 0.5 < statistic(normal) < 2
        assert statistic(0 * normal) / num == pytest.approx(0.402, abs=0.005)
        assert statistic(0.5 * normal) / num == pytest.approx(0.15, abs=0.03)
        assert statistic(2 * normal) / num == pytest.approx(0.23, abs=0.03)


def test_sigreg_by_hand() -> None:
    """One direction, two samples: the sums of the definition, term by term."""
    x, t = torch.tensor([[0.5, 9.0], [-1.0, 9.0]]), np.linspace(0, 3, 17)
    weight = np.full(17, 2 * 3 / 16)
    weight[[0, -1]] /= 2
    normal = np.exp(-(t**2) / 2)
    real = (np.cos(0.5 * t) + np.cos(-t)) / 2 - normal
    imaginary = (np.sin(0.5 * t) + np.sin(-t)) / 2
    want = (weight * normal * (real**2 + imaginary**2)).sum()
    got = collapse.sigreg(x, torch.tensor([[7.0, 0.0]]))  # of any length
    assert float(got) == pytest.approx(want, rel=1e-5)


def test_vicreg_and_barlow_by_hand() -> None:
    x = torch.tensor([[1.0, 0.5], [-1.0, -0.5], [1.0, -0.5], [-1.0, 0.5]])  # uncorrelated
    stds = (x.var(0) + 1e-4).sqrt()
    assert float(collapse.vicreg(x)) == pytest.approx(float((1 - stds[1]) / 2), rel=1e-5)
    same = x[:, :1].repeat(1, 2)
    assert float(collapse.vicreg(same)) == pytest.approx(0.25 * 2 * (4 / 3) ** 2, rel=1e-4)
    assert float(collapse.barlow(x, 3 * x + 2)) == pytest.approx(0, abs=1e-3)
    assert float(collapse.barlow(x, -x)) == pytest.approx(2 * 2**2, rel=1e-3)
    assert float(collapse.barlow(same, same, 0.5)) == pytest.approx(0.5 * 2, rel=1e-3)


def test_spread_counts_what_varies_on_its_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 8)
    std, rank = collapse.spread(2 * x)
    assert float(std) == pytest.approx(2, rel=0.03) and float(rank) == pytest.approx(8, rel=0.03)
    std, rank = collapse.spread(x[:, :1].repeat(1, 8))
    assert float(rank) == pytest.approx(1, rel=1e-4)
    std, rank = collapse.spread(torch.ones(16, 8))
    assert float(std) == 0 and rank.isfinite()


# ------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("memory", ["none", "gru"])
def test_predictions_are_rollouts_from_every_step_and_stop_at_resets(memory: str) -> None:
    model = make_jepa(memory=memory, steps=3, rho=0.5).world_model
    batch = tensors(family_batch(make_jepa(memory=memory)))
    batch.is_first[2, 7] = True  # of the row that goes on throughout
    with torch.no_grad():
        states = model.observe(batch)[0]
        path, weight = model._unrolled(states, batch)
        total = 1 + 0.5 + 0.25
        for start in range(11):
            steps = min(3, 11 - start)
            taken = batch.action[:, start + 1 : start + 1 + steps].transpose(0, 1)
            rolled = model.rollout(states[:, start], taken).states
            alive = torch.ones(3)
            for k in range(1, steps + 1):
                alive = alive * (~batch.is_first[:, start + k]).float()
                at = (k - 1, slice(None), start + k - 1)
                same_sums(path.tensors["emb"][at], rolled.tensors["emb"][k])
                same_sums(path.tensors["context"][at], rolled.tensors["context"][k])
                same_sums(weight[at], alive * 0.5 ** (k - 1) / total)
        assert not weight[1, :, 0].any() and not weight[2, :, :2].any()  # before any beginning


@pytest.mark.parametrize("regularizer", ["sigreg", "vicreg", "none"])
def test_targets_have_gradient_but_for_a_teacher(regularizer: str) -> None:
    """Without a teacher both ends of a prediction move; a teacher follows and has no gradient."""
    agent = make_jepa(regularizer=regularizer)
    batch = tensors(family_batch(agent))
    emb = agent.world_model.observe(batch)[0].tensors["emb"].requires_grad_()
    assert agent.world_model._targets(emb, batch) is emb
    teacher = make_jepa(regularizer="ema", target_rate=0.25)
    model = teacher.world_model
    targets = model._targets(emb, batch)
    assert not targets.requires_grad and not any(p.requires_grad for p in model.target.parameters())
    before = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for param in model.encoder.parameters():
            param += 1
    model.update_targets()
    for old, new, own in zip(
        before, model.target.parameters(), model.encoder.parameters(), strict=True
    ):
        same_sums(new, 0.75 * old + 0.25 * own)


def test_a_probe_changes_nothing_but_itself() -> None:
    agent = make_jepa("dict", probe=True)
    batch = tensors(family_batch(agent))
    losses = agent.world_model.loss(batch).losses
    sum(losses[f"rec/{key}"].sum() for key in ("image", "vector")).backward()
    for name, param in agent.world_model.named_parameters():
        assert (param.grad is not None) == name.startswith("probe."), name
    assert make_jepa("dict", probe=False).world_model.probe is None


def test_memory_tells_histories_apart_and_a_markov_state_does_not() -> None:
    for memory in ("none", "gru"):
        agent = make_jepa(memory=memory)
        model, batch = agent.world_model, tensors(family_batch(agent))
        states = []
        with torch.no_grad():
            for shift in (0, 3):
                state = model.encode({"obs": batch.obs["obs"][:, shift]})
                for t in (5, 6):  # the same two last looks and actions
                    obs = {"obs": batch.obs["obs"][:, t]}
                    state = model.update(state, batch.action[:, t], obs)
                states.append(model.features(state))
        assert torch.allclose(*states) == (memory == "none")


# ------------------------------------------------------------------------------ learning


@pytest.mark.learning
def test_pendulum_is_predicted_and_embeddings_do_not_collapse() -> None:
    agent, metrics = trained("jepa:tiny", 400)  # more steps: test_model_gates.py
    numbers = card(agent).numbers
    assert numbers["features@1"] < 0.1 and numbers["features@15"] < 0.5
    assert 0.5 < metrics["emb_std"] < 1.5 and numbers["rank"] > 2 * 2 - 1


@pytest.mark.learning
def test_without_regulariser_and_reward_everything_becomes_one_point() -> None:
    silent = {"reward": 0.0, "continue": 0.0}
    for regularizer, collapses in (("none", True), ("sigreg", False), ("vicreg", False)):
        _, metrics = trained("jepa:tiny", 200, scales=silent, regularizer=regularizer)
        assert (metrics["emb_std"] < 0.1) == collapses


# ---------------------------------------------------------------------- masked prediction


def make_masked(obs: str, **options: Any) -> Any:
    return make_jepa(obs, objective="both", patch=4, **options)


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
def test_what_is_hidden_reaches_its_prediction_in_no_way(obs: str) -> None:
    """Neither as a value nor as a gradient: of the context, and of what is made of it."""
    agent = make_masked(obs)
    model, spaces = agent.world_model, agent.spaces
    batch = tensors(family_batch(agent))
    lead = batch.reward.shape
    visible = visible_parts(spaces, lead, 4, "cpu")
    hidden = torch.cat([~visible[key] for key in sorted(visible)], -1)
    assert hidden.any((1, 2)).all() and not hidden.all(2).all(1).any()

    def predicted(obs: dict[str, Tensor]) -> Tensor:
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        parts = {key: value.flatten(0, 1) for key, value in visible.items()}
        emb = model.encoder(flat, parts).unflatten(0, lead)
        return model.masked(emb, hidden, batch.action, batch.is_first)

    other = {key: value.clone() for key, value in batch.obs.items()}
    for key, seen in visible.items():
        if spaces.obs[key].kind == "vector":
            other[key][~seen[..., 0]] += 3.0
        else:  # 16 x 16 pixels in patches of 4 x 4
            pixels = seen.unflatten(-1, (4, 4)).repeat_interleave(4, -1).repeat_interleave(4, -2)
            other[key] = torch.where(pixels.unsqueeze(-1), other[key], 255 - other[key])
    same_sums(predicted(other), predicted(batch.obs))
    changed = {key: 255 - value for key, value in batch.obs.items()}
    assert not torch.allclose(predicted(changed), predicted(batch.obs))
    if obs == "vector":
        given = {"obs": batch.obs["obs"].clone().requires_grad_()}
        predicted(given).sum().backward()
        reached = given["obs"].grad.abs().sum(-1) > 0
        assert torch.equal(reached, visible["obs"][..., 0])


def test_blocks_hide_a_part_of_every_row() -> None:
    spaces = make_masked("image").spaces
    seen = visible_parts(spaces, (200, 16), 2, "cpu")["obs"]  # 8 x 8 patches
    share = 1 - seen.float().mean((1, 2))
    assert share.min() > 0 and share.max() < 0.9 and 0.15 < share.mean() < 0.6
    times, places = (~seen).any(2).sum(1), (~seen).any(1).sum(1)
    assert times.min() >= 4 and times.float().mean() < 15 and places.min() >= 4


def test_predictions_do_not_cross_a_reset() -> None:
    agent = make_masked("vector")
    model, batch = agent.world_model, tensors(family_batch(agent))
    emb = torch.randn(3, 12, 16)
    hidden, other = torch.zeros(3, 12, 1, dtype=torch.bool), emb.clone()
    other[:, :6] += 1
    one, two = (model.masked(x, hidden, batch.action, batch.is_first) for x in (emb, other))
    same_sums(one[:2, 6:], two[:2, 6:])  # where an episode began at step 6
    assert not torch.allclose(one[2, 6:], two[2, 6:])


def test_masked_alone_shapes_embeddings_by_nothing_else() -> None:
    agent = make_jepa("dict", objective="masked", patch=4, probe=True)
    output = agent.world_model.loss(tensors(family_batch(agent)))
    for name in ("prediction", "reward", "continue"):
        output.losses[name].sum().backward(retain_graph=True)
    reached = {
        n.split(".")[0] for n, p in agent.world_model.named_parameters() if p.grad is not None
    }
    assert reached == {"predictor", "heads", "memory"}
    assert not agent.world_model.features(output.path).requires_grad
    output.losses["masked"].sum().backward()
    reached = {
        n.split(".")[0] for n, p in agent.world_model.named_parameters() if p.grad is not None
    }
    assert reached >= {"encoder", "masked"}


@pytest.mark.learning
def test_masked_prediction_learns_on_vectors_and_images() -> None:
    for obs in ("vector", "dict"):
        agent = make_masked(obs, learning_rate=3e-3, warmup=0)
        learner = Learner(agent, LearnerConfig(device="cpu"))
        history = [learner.step(family_batch(agent))["loss/masked"] for _ in range(30)]
        assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])


def arm_episodes(num: int, length: int, seed: int) -> tuple[Batch, np.ndarray]:
    """Episodes (num, length) of random play, and where elbow and hand are in each picture, of which
    the model is not told: (num, length, 4)."""
    rng, env = np.random.default_rng(seed), Arm()
    pictures, actions, places = [], [], []
    for row in range(num):
        picture, action = env.reset(seed=seed + row)[0], np.zeros(2)
        for _ in range(length):
            pictures.append(picture)
            actions.append(action)
            places.append(np.concatenate(env.places()))
            action = rng.uniform(-1, 1, 2)
            picture = env.step(action)[0]
    obs, action, place = (
        np.stack(x).reshape(num, length, *np.shape(x[0])) for x in (pictures, actions, places)
    )
    flags = np.zeros((num, length), bool)
    first = flags | (np.arange(length) == 0)
    reward = np.zeros((num, length), np.float32)
    return Batch({"obs": obs}, action.astype(np.float32), reward, first, flags, flags), place


def explained(model: Any, seen: list[tuple[Batch, np.ndarray]]) -> np.ndarray:
    """R2 of each coordinate by the best linear map of embeddings on the first of `seen`, judged on
    the second."""
    with torch.no_grad():
        embs = [
            model.encoder({"obs": torch.from_numpy(b.obs["obs"]).flatten(0, 1)}) for b, _ in seen
        ]
    inputs = [np.pad(emb.numpy(), ((0, 0), (0, 1)), constant_values=1.0) for emb in embs]
    wanted, truth = (place.reshape(-1, 4) for _, place in seen)
    weights = np.linalg.lstsq(inputs[0], wanted, rcond=None)[0]
    return 1 - np.square(truth - inputs[1] @ weights).mean(0) / truth.var(0)


@pytest.mark.learning
def test_what_foretells_nothing_is_kept_where_there_is_a_memory() -> None:
    """The cue of the T-maze decides nothing before its end: at full weight, prediction draws the
    embeddings of both cues together (measured: 0.3 apart after these steps, here 12)."""
    torch.manual_seed(0)
    with closing(make_envs(EnvConfig("toy_envs:TMaze", 8), seed=0)) as envs:
        agent = Agent("jepa:tiny", envs.spaces, {"memory": "gru"})
        played = EnvRunner(envs, random_act(envs.spaces, 0)).collect(1000)
    replay = ReplayBuffer(ReplayConfig(batch_size=16, batch_length=20, capacity=10_000))
    replay.add(played)
    learner = Learner(agent, LearnerConfig(device="cpu"), part="world_model")
    for _ in range(250):
        learner.step(replay.sample())
    with torch.no_grad():
        cues = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
        one, other = agent.world_model.encoder({"obs": cues})
    assert torch.dist(one, other) > 2


@pytest.mark.nightly  # a minute and a half
@pytest.mark.learning
def test_masked_prediction_alone_learns_where_an_arm_is() -> None:
    seen = [arm_episodes(400, 8, seed=0), arm_episodes(100, 8, seed=1000)]
    spaces = Spaces(Arm.observation_space, Arm.action_space)
    torch.manual_seed(0)
    agent = Agent(
        "jepa:tiny",
        spaces,
        {"objective": "masked", "memory": "none", "emb": 8, "learning_rate": 4e-3},
    )
    untrained = explained(agent.world_model, seen)
    learner = Learner(agent, LearnerConfig(device="cpu"), part="world_model")
    rng = np.random.default_rng(0)
    for _ in range(600):
        rows = rng.integers(0, 400, 16)
        learner.step(seen[0][0].map(lambda x, rows=rows: x[rows]))
    found = explained(agent.world_model, seen)
    assert untrained.mean() < 0.3 and found.mean() > 0.75  # measured: 0.17 and 0.83

"""Diffusion with a transformer, and on embeddings: what reaches what, and what is learned."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from pendulum import card, trained
from small import family_batch, make_small, perturbed, same_sums, tensors, vector
from test_diffusion import fitted
from torch import Tensor

from worldflux_dist.data import Batch
from worldflux_dist.distributed.roles import loss_sizes
from worldflux_dist.models.base import State, WorldModel
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.spaces import Spaces


def make(kind: str, obs: str = "vector", action: str = "continuous", **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(make_small(kind, obs, action, **options))


def assert_same(got: State, want: State) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    for name, value in want.tensors.items():
        same_sums(got.tensors[name], value, 400, msg=name)


# ------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("split", [1, 5, 11])
@torch.no_grad()
def test_a_pass_and_steps_from_any_split_agree(split: int) -> None:
    """In rows that run far beyond the context of 4, reset, and begin in mid-episode."""
    agent = make("dreamer4", "dict", "mixed")
    model, batch = agent.world_model, tensors(family_batch(agent))
    want, _ = model.observe(batch)
    state = model.observe(batch.map(lambda x: x[:, :split]))[0][:, -1]
    for t in range(split, 12):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t], obs, batch.is_first[:, t])
        assert_same(state, want[:, t])


@torch.no_grad()
def test_nothing_reaches_what_came_before_it_nor_crosses_a_reset() -> None:
    agent = make("dreamer4")
    model, batch = agent.world_model, tensors(family_batch(agent))
    assert batch.is_first[0, 6] and not batch.is_first[2].any()

    def memory(changed: Batch) -> Tensor:
        states = model.observe(changed)[0].tensors
        return torch.cat([states["memory"], states["kv"].flatten(2)], -1)

    before = memory(batch)
    for column in ("obs", "action"):
        other = batch.map(torch.clone)
        (other.obs["obs"] if column == "obs" else other.action)[:, 4, 1] += 1.5
        moved = (memory(other) - before).abs().amax(-1) > 1e-6  # (B, T)
        assert not moved[:, :4].any()
        assert moved[:, 4:6].all() and moved[2, 4:8].all()
        assert not moved[:2, 6:].any()


@torch.no_grad()
def test_what_is_drawn_behind_a_cache_is_what_the_pass_over_all_steps_gives() -> None:
    """A step drawn in K evaluations, by hand: each a pass over the clean steps and the noisy one
    at their end."""
    agent = make("dreamer4")
    model, batch = agent.world_model, tensors(family_batch(agent))
    core, head = model.core, model.denoisers
    core.wanted.mean.fill_(0.3)
    core.wanted.var.fill_(2.0)
    at = 10
    states, _ = model.observe(batch.map(lambda x: x[:, :at]))
    noise = torch.rand(3, *model.noise_shape)
    drawn = model.transition(states[:, -1], batch.action[:, at], noise)
    z = batch.obs["obs"][:, : at + 1].clone()
    first, action = batch.is_first[:, : at + 1], batch.action[:, : at + 1]
    last, action, _ = core.before(z, action, first)
    x, level = core.scaled(z, last), torch.ones(3, at + 1, 2)
    x[:, at] = torch.special.ndtri(noise)
    for i in range(2):
        level[:, at] = torch.tensor([i / 2, 1 / 3])
        out, _ = core.transformer(core.blocks(x, last, action, level), first)
        clean = head.out(out[:, at, 1])
        x[:, at] += (clean - x[:, at]) / (2 - i)
    z[:, at] = core.unscaled(x[:, at], last[:, at])
    same_sums(drawn.tensors["obs/obs"], z[:, at], 1000)
    obs = {"obs": drawn.tensors["obs/obs"]}
    assert_same(drawn, model.update(states[:, -1], batch.action[:, at], obs))


@torch.no_grad()
def test_rows_of_a_state_can_be_chosen_repeated_and_put_in_another_order() -> None:
    agent = make("dreamer4", "dict")
    model, batch = agent.world_model, tensors(family_batch(agent))
    state = model.observe(batch)[0][:, -1]
    order = torch.tensor([2, 0, 2, 1])
    action, noise = batch.action[:, 3], torch.rand(3, *model.noise_shape)
    straight = model.transition(state, action, noise)[order]
    assert_same(model.transition(state[order], action[order], noise[order]), straight)


def test_a_step_is_learned_through_those_before_it() -> None:
    agent = make("dreamer4")
    model, batch = agent.world_model, tensors(family_batch(agent))
    states = model._seen(batch)
    loss = model._denoising(states, batch)["denoise"]
    (grad,) = torch.autograd.grad(loss[2, 7], states.tensors["kv"])
    assert grad[2, 7].flatten(1).any(1).all()  # the context of the step into 8
    grad[2, 7] = 0
    assert not grad.any()


@pytest.mark.parametrize("starts", [2, 50])
def test_imagination_starts_from_the_last_steps(starts: int) -> None:
    agent, few = make("dreamer4"), make("dreamer4", starts=starts)
    batch, num = tensors(family_batch(agent)), min(starts, 12)
    torch.manual_seed(1)
    whole = agent.world_model.loss(batch)
    torch.manual_seed(1)
    output = few.world_model.loss(batch)
    assert output.batch.reward.equal(batch.reward[:, -num:]) and len(output.weight) == num
    assert_same(output.states, whole.states[:, -num:])
    assert_same(few.world_model.observe(batch)[0], output.states)
    assert_same(WorldModel.observe(few.world_model, batch)[0], output.states)
    for name, loss in whole.losses.items():
        assert torch.equal(output.losses[name], loss), name
    start, actions = output.states[:, 0].detach(), torch.rand(2, 3, 2)
    rolled = few.world_model.rollout(start, actions)
    assert not {"kv", "length"} & rolled.states.tensors.keys()


@pytest.mark.parametrize("kind", ["latent", "dreamer4"])
def test_memory_is_planned_on_no_device(kind: str) -> None:
    """The loss's activations are counted on the meta device, where a tensor has no value."""
    with torch.device("meta"):
        agent = make_small(kind, "dict", "mixed")
    replay = ReplayConfig(batch_size=2, batch_length=6)
    assert 1e4 < loss_sizes(agent, replay).kept < 1e8


# -------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", ["latent", "dreamer4"])
def test_what_decodes_embeddings_never_changes_them(kind: str) -> None:
    agent = make(kind, "dict")
    losses = agent.world_model.loss(tensors(family_batch(agent))).losses
    sum(losses[f"rec/{key}"].sum() for key in ("image", "vector")).backward(retain_graph=True)
    for name, param in agent.world_model.named_parameters():
        assert (param.grad is not None) == name.startswith("probe."), name
    model = agent.world_model
    for name in ("denoise", "reward", "regularizer"):  # but these do
        model.zero_grad()
        losses[name].sum().backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.any() for p in model.encoder.parameters()), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "edm"},
            "objective is edm: .* set it to that or backbone to gru",
        ),
        ({"memory": 30}, "memory is 30: .* a multiple of twice its heads, 4"),
        ({"context": 1}, "context is 1: it must be at least 2"),
        ({"backbone": "lstm"}, "backbone is 'lstm': it must be 'gru' or 'transformer'"),
        ({"emb": 12}, "emb is 12: it must be a multiple of 8"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_small("dreamer4", **options)
    assert "\n" not in str(error.value)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    example = Path(__file__).parents[1] / "examples" / "offline.py"
    monkeypatch.setattr("sys.argv", [str(example), "--steps", "2", "--every", "2"])
    runpy.run_path(str(example), run_name="__main__")
    assert "2 gradient steps" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- learning


@pytest.mark.learning
def test_pendulum_is_known_by_a_transformer() -> None:
    agent, _ = trained("diffusion:dreamer4_tiny", 200)
    found = card(agent).numbers
    assert found["obs@1"] < 0.03 and found["obs@15"] < 0.3 and found["reward@1"] < 0.3


@pytest.mark.learning
def test_embeddings_that_are_drawn_do_not_collapse() -> None:
    silent = {"reward": 0.0, "continue": 0.0}
    for scale, low, high in ((1.0, 0.5, 1.5), (0.0, 0.0, 0.3)):
        _, metrics = trained(
            "diffusion:tiny", 200, (16, 8), silent, latent=True, regularizer_scale=scale
        )
        assert low < metrics["emb_std"] < high, metrics["emb_std"]


@pytest.mark.learning
def test_two_outcomes_stay_two() -> None:
    """The next observation is 1 or -1, as likely, whatever came before."""
    rng = np.random.default_rng(0)
    y = (2.0 * rng.integers(0, 2, (64, 32, 1)) - 1).astype(np.float32)
    flag, action = np.zeros((64, 32), bool), np.eye(2, dtype=np.float32)[np.zeros((64, 32), int)]
    columns = ({"obs": y}, action, np.zeros((64, 32), np.float32), flag, flag, flag)
    batch = tensors(Batch(*columns))
    spaces = Spaces(vector(1), gym_spaces.Discrete(2))
    model = fitted(batch, spaces, 250, 32, 5, preset="dreamer4_tiny", steps=4, warmup=0)
    with torch.no_grad():
        state = model.observe(batch.map(lambda x: x[:, :8]))[0].flatten()
        for _ in range(2):
            state = model.transition(state, batch.action[:, :1].expand(64, 8, 2).flatten(0, 1))
            drawn = state.tensors["obs/obs"]
            assert 0.8 < drawn.abs().mean() < 1.2
            assert 0.3 < (drawn > 0).float().mean() < 0.7

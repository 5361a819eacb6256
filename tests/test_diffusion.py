"""Diffusion: what a state remembers, what its losses cover, and what is learned."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from small import family_batch, look, make_small, perturbed, random_batch, same_sums, tensors

from worldflux_dist.data import Batch
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.models.base import create_from_spaces
from worldflux_dist.spaces import Spaces


def test_moments_move_once_in_a_gradient_step() -> None:
    learner = Learner(make_small("diffusion"), LearnerConfig(device="cpu", accumulate=3))
    part, batch = learner.agent.world_model.denoisers[0], family_batch(learner.agent)
    learner.step(batch)
    obs = torch.from_numpy(batch.obs["obs"])
    inside = torch.from_numpy(~batch.is_first[:, 1:])
    same_sums(part.seen.mean, obs[:, :-1].flatten(0, 1).mean(0))
    same_sums(part.wanted.mean, (obs[:, 1:] - obs[:, :-1])[inside].mean(0))
    same_sums(part.wanted.std, (obs[:, 1:] - obs[:, :-1])[inside].std(0, correction=0))
    assert part.wanted.steps == 1
    with torch.no_grad():
        learner.agent.world_model.loss(tensors(batch))
    assert not part.wanted.taken.any()


# ------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("objective", ["edm", "shortcut"])
@torch.no_grad()
def test_fixed_noise_gives_a_fixed_rollout(objective: str) -> None:
    torch.manual_seed(0)
    agent = perturbed(make_small("diffusion", "dict", objective=objective))
    model = agent.world_model
    start = model.encode(look(agent))
    actions, noise = torch.rand(4, 3, 2), torch.rand(4, 3, *model.noise_shape)
    one, other = (model.rollout(start, actions, noise=noise).states.tensors for _ in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    noise[1, 2] = 1 - noise[1, 2]
    changed = model.rollout(start, actions, noise=noise).states.tensors
    for name, value in one.items():
        differs = (value != changed[name]).flatten(2).any(-1)
        assert not differs[:2].any() and not differs[:, :2].any(), name
    assert (one["obs/vector"] != changed["obs/vector"])[2, 2].any()
    assert (one["obs/image"] != changed["obs/image"])[2, 2].any()


@torch.no_grad()
def test_history_begins_with_the_episode_or_the_row() -> None:
    agent = perturbed(make_small("diffusion", history=3))
    batch = tensors(family_batch(agent)).map(lambda value: value[1:2, :8])
    obs, acted = batch.obs["obs"], batch.action
    assert not batch.is_first[0, 0] and batch.is_first[0, 6]
    states, _ = agent.world_model.observe(batch)
    past, before = states.tensors["past/obs"][0], states.tensors["past_action"][0]
    seen = [[0, 0], [0, 0], [0, 1], [1, 2], [2, 3], [3, 4], [6, 6], [6, 6]]
    for t, (one, other) in enumerate(seen):
        assert torch.equal(past[t], obs[0, [one, other]]), t
    zero = torch.zeros(2)
    for t, steps in enumerate([(0, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 0), (0, 7)]):
        for k, step in enumerate(steps):
            assert torch.equal(before[t, k], acted[0, step] if step else zero), (t, k)
    assert not states.tensors["memory"][0, [0, 6]].any()
    assert states.tensors["memory"][0, [1, 5, 7]].any(-1).all()


def test_rows_that_begin_in_mid_episode_say_nothing_of_their_first_reward() -> None:
    agent = perturbed(make_small("diffusion"))
    batch = tensors(family_batch(agent))
    assert batch.is_first[:, 0].tolist() == [True, False, False]
    output = agent.world_model.loss(batch)
    assert (output.losses["reward"][:, 0] != 0).tolist() == [True, False, False]
    assert (output.losses["reward"][:, 1:] != 0).all()
    inside = ~batch.is_first[:, 1:]
    assert torch.equal(output.losses["denoise"] != 0, inside)


def test_images_are_denoised_and_imagined_from_some_steps_only() -> None:
    agent = perturbed(make_small("diffusion", "dict", denoise_steps=4, starts=3))
    model, batch = agent.world_model, tensors(family_batch(agent))
    output = model.loss(batch)
    shapes = {name: loss.shape[1] for name, loss in output.losses.items()}
    assert shapes == {"denoise": 11, "denoise/image": 4, "reward": 12, "continue": 12}
    assert model.features(output.states).shape[:2] == (3, 3)
    assert torch.equal(output.batch.reward, batch.reward[:, -3:])
    states, steps = model.observe(batch)
    for name, value in model.essential(output.states).tensors.items():
        same_sums(states.tensors[name], value, msg=name)
    assert torch.equal(steps.reward, batch.reward[:, -3:])
    learned = agent.behavior.loss(model, output)
    assert learned.losses["replay_value"].shape == (2, 3)
    assert all(loss.isfinite().all() for loss in learned.losses.values())
    assert make_small("diffusion", starts=3).world_model.num_starts is None  # of vectors: all


@pytest.mark.parametrize("objective", ["edm", "shortcut"])
def test_memory_reaches_the_denoisers_if_it_is_to(objective: str) -> None:
    for on in (True, False):
        torch.manual_seed(0)
        options = {"condition_memory": on, "objective": objective}
        agent = perturbed(make_small("diffusion", **options))
        loss = agent.world_model.loss(tensors(family_batch(agent))).losses["denoise"]
        grads = torch.autograd.grad(
            loss.mean(), list(agent.world_model.core.parameters()), allow_unused=True
        )
        assert all((grad is not None and grad.any()) == on for grad in grads)


@torch.no_grad()
def test_imagining_elsewhere_knows_the_moments() -> None:
    agent = make_small("diffusion")
    model = agent.world_model
    model.loss(tensors(family_batch(agent)))
    part = model.denoisers[0]
    part.wanted.mean.fill_(7.0)
    part.seen.var.fill_(3.0)
    fresh = make_small("diffusion")
    fresh.load_arrays(agent.inference_state("world_model"))
    assert fresh.world_model.denoisers[0].wanted.mean.eq(7).all()
    assert fresh.world_model.denoisers[0].seen.var.eq(3).all()
    assert not any(".denoisers." in name for name in agent.inference_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "model_options.steps is 0: it must be at least 1"),
        ({"objective": "shortcut", "steps": 3}, "steps is 3: the shortcut .* in 1, 2 or 4 steps"),
        ({"objective": "ddpm"}, "objective is 'ddpm': it must be 'edm' or 'shortcut'"),
        ({"objective": "shortcut", "denoise_steps": 1}, "denoise_steps is 1: .* needs 2 or more"),
        ({"starts": 1}, "starts is 1: .* set it to 2 or more, or 0 for all"),
        ({"history": 0}, "history is 0: it must be at least 1"),
        ({"frames": 0}, "frames is 0: it must be at least 1"),
        ({"channels": ()}, r"channels is \(\): .* at least 1 item"),
        ({"target": "delta"}, "target is 'delta': it must be 'residual' or 'absolute'"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_small("diffusion", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("objective", "needed"), [("edm", 2), ("shortcut", 3)])
def test_rows_that_are_too_short_are_refused(objective: str, needed: int) -> None:
    agent = make_small("diffusion", objective=objective)
    short = tensors(random_batch(agent.spaces, 2, needed - 1))
    with pytest.raises(ValueError, match=f"set replay.batch_length to {needed} or more"):
        agent.world_model.loss(short)
    losses = agent.world_model.loss(tensors(random_batch(agent.spaces, 2, needed))).losses
    assert losses["denoise"].isfinite().all()


# -------------------------------------------------------------------------------- learning


def fitted(
    batch: Batch,
    spaces: Spaces,
    num: int,
    size: int = 64,
    length: int = 4,
    preset: str = "tiny",
    **options: Any,
) -> Any:
    """A tiny model after `num` gradient steps on `size` windows of a batch each."""
    torch.manual_seed(0)
    model = create_from_spaces(f"diffusion:{preset}", spaces, **options)
    optimizer = model.optimizer([p for p in model.parameters() if p.requires_grad])
    rows, steps = batch.reward.shape
    for _ in range(num):
        row, at = torch.randint(rows, (size, 1)), torch.randint(steps - length + 1, (size, 1))
        window = (row, at + torch.arange(length))
        losses = model.loss(batch.map(operator.itemgetter(window))).losses
        optimizer.zero_grad()
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        optimizer.step()
        model.update_targets()
    return model


@pytest.mark.learning
def test_a_picture_moves_as_the_action_says() -> None:
    """A bright column goes one to the right or to the left, round about."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, (64, 32))
    at = (rng.integers(0, 8, (64, 1)) + (2 * right - 1).cumsum(1)) % 8
    frames = np.where(np.arange(8) == at[..., None], 230, 40).astype(np.uint8)
    frames = np.broadcast_to(frames[:, :, None, :, None], (64, 32, 8, 8, 1)).copy()
    flag, action = np.zeros((64, 32), bool), np.eye(2, dtype=np.float32)[right]
    columns = ({"obs": frames}, action, np.zeros((64, 32), np.float32), flag, flag, flag)
    batch = tensors(Batch(*columns))
    spaces = Spaces(gym_spaces.Box(0, 255, (8, 8, 1), np.uint8), gym_spaces.Discrete(2))
    sizes = {"channels": (16, 32), "depth": 4, "multipliers": (2, 2), "frames": 2}
    model = fitted(batch, spaces, 150, 16, 6, **sizes, denoiser_rate=4e-3)
    with torch.no_grad():
        state = model.observe(batch.map(lambda x: x[:, :4]))[0][:, -1]
        for t in range(4, 8):
            state = model.transition(state, batch.action[:, t])
            found = state.tensors["obs/obs"].float()[..., 0].mean(1).argmax(-1)
            assert (found == torch.from_numpy(at[:, t])).float().mean() > 0.9, t

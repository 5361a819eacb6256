"""TD-MPC2's training windows: how rows of replay become them, resets inside, and frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import (
    LENGTH,
    family_batch,
    look,
    losses_of,
    make_tdmpc2,
    same_sums,
    tensors,
    unbroken_batch,
)
from torch import Tensor

from worldflux_dist.data import Batch
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.vision import random_shift

STILL = 0.5  # noise of a random shift that moves nothing


def cut(batch: Batch, length: int) -> Batch:
    return batch.map(lambda value: value.reshape(-1, length, *value.shape[2:]))


def test_long_rows_are_windows() -> None:
    agent = make_tdmpc2()
    long = unbroken_batch(agent, 16, 64)
    want = losses_of(agent, cut(long, 4))
    for batch in (long, cut(long, 16)):
        got = losses_of(agent, batch)
        assert all(torch.equal(got[name], value) for name, value in want.items())
    assert want["consistency"].shape == (256, 3)
    more = unbroken_batch(agent, 16, 67)
    more = more.map(lambda value: value.clone())
    for name, value in long.columns().items():
        more.columns()[name][:, :64] = value
    got = losses_of(agent, more)  # three steps over
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_rows_too_short_for_a_window_are_refused() -> None:
    for obs, window in (("vector", 4), ("image", 6)):
        agent = make_tdmpc2(obs)
        losses_of(agent, unbroken_batch(agent, length=window))
        with pytest.raises(ValueError, match=rf"windows of {window} steps and replay gives 3: set"):
            agent.world_model.loss(unbroken_batch(agent, length=3))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_reset_takes_away_its_losses_and_restarts_the_path(at: int) -> None:
    agent = make_tdmpc2()
    model, batch = agent.world_model, unbroken_batch(agent)
    plain = losses_of(agent, batch)
    batch.is_first[1, at] = batch.is_last[1, at - 1] = batch.is_terminal[1, at - 1] = True
    batch.action[1, at] = batch.reward[1, at] = 0
    output, found = model.loss(batch), losses_of(agent, batch)
    for name in ("consistency", "reward", "value"):
        assert not found[name][..., 1, at - 1].any(), name
        kept = [k for k in range(3) if k != at - 1]
        assert found[name][..., kept].abs().min() > 0, name
        for row in (0, 2):
            same_sums(found[name][..., row, :], plain[name][..., row, :])
    assert found["termination"][1, at - 1] == 0
    path, seen = output.path.tensors["latent"], output.states.tensors["latent"]
    assert torch.equal(path[1, at], seen[1, at])
    assert not torch.equal(path[0, at], seen[0, at])
    assert not output.states.tensors["origin"][1, at].any()
    for t in range(at + 1, 4):
        state = model.transition(output.path[1:2, t - 1], batch.action[1:2, t])
        same_sums(state.tensors["latent"], path[1:2, t])


def test_states_of_a_window_are_those_of_single_updates() -> None:
    agent = make_tdmpc2()
    model, batch = agent.world_model, tensors(family_batch(agent))
    states = model.loss(batch).states
    state = model.initial(3)
    first = batch.is_first.clone()
    first[:, ::4] = True  # what lies before a window is not known
    for t in range(LENGTH):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t] * ~first[:, t, None], obs, first[:, t])
        rows = states[t // 4 :: 3, t % 4]
        for name in ("latent", "origin"):
            same_sums(rows.tensors[name], state.tensors[name], msg=name)


def test_losses_by_hand() -> None:
    agent = make_tdmpc2(behavior={"dropout": 0.0})
    model, behavior, batch = agent.world_model, agent.behavior, unbroken_batch(agent)
    batch.is_terminal[2, 3] = True
    output, draw = model.loss(batch), behavior.value_noise((3, 3), "cpu")
    value = behavior.loss(model, output, draw).losses["value"]
    state = seen = model.encode({"obs": batch.obs["obs"][:, 0]})
    for k in range(3):
        action, weight = batch.action[:, k + 1], 0.5**k
        seen = model.encode({"obs": batch.obs["obs"][:, k + 1]}).tensors["latent"]
        pair = torch.cat([state.tensors["latent"], action], -1)
        noise = draw._replace(action=draw.action[:, k])
        going = model.discount * torch.tensor([1.0, 1.0, 0.0 if k == 2 else 1.0])
        target = dist.symlog(behavior.target(seen, batch.reward[:, k + 1], going, noise))
        logits = behavior.qs(pair)
        want = [weight * dist.twohot_loss(one, target, bins=behavior.bins) for one in logits]
        same_sums(value[..., k], torch.stack(want))
        reward = dist.twohot_loss(
            model.reward(pair), dist.symlog(batch.reward[:, k + 1]), bins=model.bins
        )
        same_sums(output.losses["reward"][:, k], weight * reward)
        state = model.transition(state, action)
        latent = state.tensors["latent"]
        error = (latent - seen).square().mean(-1)
        same_sums(output.losses["consistency"][:, k], weight * error)
        ended = batch.is_terminal[:, k + 1].float()
        logit = model.terminal(latent).squeeze(-1)
        want_ended = F.binary_cross_entropy_with_logits(logit, ended, reduction="none")
        same_sums(output.losses["termination"][:, k], want_ended)
    assert agent.world_model.loss_scales == {"consistency": 20, "reward": 0.1, "termination": 1}
    assert behavior.loss_scales == {"value": 0.1}


@torch.no_grad()
def test_what_termination_makes_of_continue() -> None:
    going = {}
    for kind in ("soft", "hard", "none"):
        agent = make_tdmpc2(termination=kind)
        model = agent.world_model
        if model.terminal is not None:
            model.terminal.out.bias -= 0.4
        state = model.encode(look(agent))
        going[kind] = model.decode(state, ("continue",)).preds["continue"]
        assert ("termination" in losses_of(agent, unbroken_batch(agent))) == (kind != "none")
        if kind == "soft":
            ends = torch.sigmoid(model.terminal(state.tensors["latent"]).squeeze(-1))
            same_sums(going[kind], 0.99 * (1 - ends))
    assert (going["none"] == 0.99).all()
    assert torch.equal(going["hard"], 0.99 * (going["soft"] >= 0.99 / 2))
    assert 0 < going["soft"].min() < 0.99 / 2 < going["soft"].max() < 0.99


@torch.no_grad()
def test_the_first_reward_is_zero_and_others_belong_to_the_pair_that_led_there() -> None:
    agent = make_tdmpc2()
    model, action = agent.world_model, torch.rand(3, 2)
    start = model.encode(look(agent))
    assert model.decode(start).preds["reward"].eq(0).all()
    pair = torch.cat([start.tensors["latent"], action], -1)
    want = dist.symexp(dist.twohot_predict(model.reward(pair), model.bins))
    for state in (model.transition(start, action), model.update(start, action, look(agent, 1))):
        same_sums(model.decode(state).preds["reward"], want)


# --------------------------------------------------------------------------------- frames


def test_stacks_hold_the_last_frames_and_begin_anew() -> None:
    """And a window's stacks are those of single updates."""
    agent = make_tdmpc2("dict")
    model, batch = agent.world_model, unbroken_batch(agent, 2, 12)
    batch.is_first[[0, 1, 0, 1], [0, 4, 9, 11]] = True
    seen: list[Tensor] = []
    hook = model.encoder.cnns[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    still = torch.full((2, 2), STILL)
    state, latents, begun = model.initial(2), [], [0, 0]
    for t in range(12):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        state = model.update(state, batch.action[:, t], obs, batch.is_first[:, t], still)
        latents.append(state.tensors["latent"])
        for i in range(2):
            begun[i] = t if batch.is_first[i, t] else begun[i]
            if i == 0 or t >= 4:
                times = [max(t - back, begun[i]) for back in (2, 1, 0)]
                assert torch.equal(seen[-1][i], batch.obs["image"][i, times])
    hook.remove()
    output = model.loss(batch, noise=torch.full((4, 4, 2), STILL))
    found = output.states.tensors["latent"].unflatten(0, (2, 2))  # (B, windows, 4, L)
    same_sums(found[:, 0], torch.stack(latents[2:6], 1))
    same_sums(found[0, 1], torch.stack(latents[8:12], 1)[0])
    torch.testing.assert_close(output.batch.reward, cut(batch, 6).reward[:, 2:])


def test_shifts_are_small_shared_by_frames_and_repeat_edges() -> None:
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (49, 3, 9, 10, 2)).astype(np.uint8)
    )
    grid = torch.arange(7) / 7 + 1e-3
    noise = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).view(49, 2)
    moved = random_shift(images, noise)
    assert moved.dtype == torch.uint8
    for i in range(49):
        x, y = i // 7, i % 7  # of the window in the padded image
        padded = F.pad(images[i].permute(0, 3, 1, 2).float(), (3, 3, 3, 3), mode="replicate")
        want = padded[:, :, y : y + 9, x : x + 10].permute(0, 2, 3, 1)
        assert torch.equal(moved[i].float(), want)
    assert torch.equal(random_shift(images, torch.full((49, 2), STILL)), images)
    torch.manual_seed(0)
    assert not torch.equal(random_shift(images), images)


def test_one_frame_is_enough_where_a_picture_tells_all() -> None:
    agent = make_tdmpc2("image", frames=1)
    output = agent.world_model.loss(unbroken_batch(agent, 2, 8))
    assert output.batch.reward.shape == (4, 4)
    assert all(loss.isfinite().all() for loss in output.losses.values())
    state = agent.world_model.encode(look(agent))
    assert state.tensors["frames/obs"].shape[1] == 0

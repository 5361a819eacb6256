"""Storm, the token family's model of packed categorical frames: its losses, and what they reach."""

from __future__ import annotations

from typing import Any

import pytest
import test_families as families
import test_families_learning as learning
import torch
from gymnasium import spaces as gym_spaces
from small import FAMILIES, family_batch, make_small, perturbed, same_sums, tensors, vector
from test_token import check_two_outcomes_stay_two
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.distributed.roles import loss_sizes
from worldflux_dist.models.base import WorldModel
from worldflux_dist.replay.config import ReplayConfig
from worldflux_dist.spaces import Spaces

SIZES = {"width": 16, "units": 16, "groups": 4, "classes": 6, "context": 4, "multipliers": (2, 4)}
SIZES |= {"warmup": 2, "tokenizer_warmup": 2, "learning_rate": 4e-5}


@pytest.fixture(autouse=True)
def storm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small agent of the family is this one."""
    monkeypatch.setitem(FAMILIES, "token", ("storm_tiny", SIZES, {"horizon": 5}))
    monkeypatch.setitem(learning.SEEN, "token", "rec/vector")
    falling = ("rec/image", "rec/vector", "reward", "replay_value")
    monkeypatch.setitem(learning.FALLING, "token", falling)


def make(obs: Any = "dict", action: Any = "mixed", **options: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(make_small("token", obs, action, **options))


# ------------------------------------------------------------------------------- family


@pytest.mark.parametrize("obs", ["vector", "image", "dict"])
@pytest.mark.parametrize(
    "check",
    [
        families.test_shapes_of_every_verb,
        families.test_loss_output_agrees_in_its_shapes,
        families.test_one_seed_gives_one_result,
        families.test_a_first_step_forgets_state_and_action,
        families.test_rollout_is_transition_and_decode_by_hand,
        families.test_a_fresh_model_predicts_a_reward_of_exactly_zero,
        families.test_nothing_before_a_reset_reaches_the_losses_after_it,
        learning.test_two_steps_move_every_parameter,
        learning.test_acting_remembers_what_was_seen_and_done,
        learning.test_rows_of_a_batch_reset_on_their_own,
    ],
    ids=lambda check: check.__name__[5:],
)
def test_it_does_what_every_family_must(check: Any, obs: str) -> None:
    check(("token", obs, "discrete"))


def test_it_learns_in_both_precisions_and_names_what_broke() -> None:
    for precision in ("float32", "bfloat16"):
        learning.test_learning_lowers_the_loss("token", precision)
    learning.test_nan_is_named_and_changes_nothing("token", "obs/vector")


def test_the_published_sizes_are_planned_on_no_device() -> None:
    with torch.device("meta"):
        space = gym_spaces.Box(0, 255, (64, 64, 3), "uint8")
        agent = Agent("token:storm", Spaces(space, gym_spaces.Discrete(6)))
    model = agent.world_model
    state = model.initial(2).tensors
    assert state["tokens"].shape == (2, 32 * 32) and state["kv"].shape == (2, 7, 1, 2, 2, 512)
    assert model.discount == 0.985 and agent.recipe["behavior"]["horizon"] == 16
    assert model.loss_scales == {"dyn": 0.5, "rep": 0.1}
    assert 1e6 < loss_sizes(agent, ReplayConfig(batch_size=2, batch_length=6)).kept < 1e9


# --------------------------------------------------------------------------------- time


@pytest.mark.parametrize("split", [1, 3, 7, 11])
def test_a_pass_and_steps_from_any_split_agree(split: int) -> None:
    """With one position a step, in rows that run beyond the context of 4, reset, and begin in
    mid-episode; with the draws given, all three ways see the same tokens."""
    model, batch = make().world_model, tensors(family_batch(make()))
    noise = torch.rand(3, 12, *model.noise_shape)
    want, _ = model.observe(batch, noise)
    for name, value in model.loss(batch, noise=noise).states.tensors.items():
        same_sums(value, want.tensors[name], msg=name)
    for name, value in WorldModel.observe(model, batch, noise)[0].tensors.items():
        same_sums(value, want.tensors[name], msg=name)
    state = model.observe(batch.map(lambda x: x[:, :split]), noise[:, :split])[0][:, -1]
    for t in range(split, 12):
        obs = {key: value[:, t] for key, value in batch.obs.items()}
        first = batch.is_first[:, t]
        state = model.update(state, batch.action[:, t], obs, first, noise[:, t])
        for name, value in want.tensors.items():
            same_sums(state.tensors[name], value[:, t], msg=name)


def test_frames_are_drawn_by_the_probabilities_that_are_decoded() -> None:
    model, batch = make().world_model, tensors(family_batch(make()))
    state = model.observe(batch)[0][:1, 5].map(lambda x: x.expand(4000, *x.shape[1:]))
    drawn = model.transition(state, batch.action[:1, 6].expand(4000, -1))
    logits = model.decode(drawn[:1], ("tokens",)).preds["tokens"]
    assert {key: value.shape for key, value in logits.items()} == {
        "image": (1, 4, 6), "vector": (1, 4, 6)
    }  # fmt: skip
    want = torch.cat([logits["vector"], logits["image"]], 1)[0].exp()
    found = drawn.tensors["tokens"].unflatten(-1, (8, 6)).mean(0)
    torch.testing.assert_close(found, want, atol=0.03, rtol=0)
    assert want.min() >= 0.01 / 6 and want.max() > 0.3


# ------------------------------------------------------------------------------- losses


def divergence(left: Tensor, right: Tensor) -> Tensor:
    """By hand: of logits (..., K, C), each of which is mixed with 1 % of what is uniform."""
    p, q = (
        0.99 * x.double().exp() / x.double().exp().sum(-1, True) + 0.01 / 6 for x in (left, right)
    )
    return (p * (p / q).log()).sum(-1).sum(-1)


def test_divergences_by_hand() -> None:
    """Of all observations together; below the free nats they are these, and nothing is learned;
    where no frame was foretold they are zero."""
    batch = tensors(family_batch(make()))
    obs = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
    first = batch.is_first.clone()
    first[:, 0] = True
    nats = 0.0
    for _ in range(2):
        model = make(free_nats=nats).world_model
        priors: list[Tensor] = []
        model.predictor.head.register_forward_hook(lambda *given, to=priors: to.append(given[2]))
        output = model.loss(batch)
        hidden = output.path.tensors["hidden"].flatten(0, 1)
        prior = model.predictor.head(hidden).view(36, 8, 6)
        pairs = zip(("vector", "image"), model.tokenizers, strict=True)
        posterior = torch.cat([tokenizer.latent(obs[key]) for key, tokenizer in pairs], 1)
        kl = divergence(posterior, prior).view(3, 12).float()
        for name in ("dyn", "rep"):
            same_sums(output.losses[name], kl.clamp(min=nats) * ~first, msg=name)
        (grad,) = torch.autograd.grad(output.losses["dyn"].sum(), priors[0])
        assert torch.equal(grad.view(3, 12, -1).any(-1), ~first & (kl > nats))
        nats = kl[~first].median().item() + 1e-3


def reached(model: Any, batch: Batch, name: str, step: int) -> Tensor:
    """Steps (T,) whose posterior a loss of one step has a gradient on."""
    latents: list[Tensor] = []
    for tokenizer in model.tokenizers:
        tokenizer.to_latent.register_forward_hook(lambda *given: latents.append(given[2]))
    loss = model.loss(batch).losses[name][:, step].sum()
    grads = torch.autograd.grad(loss, latents, allow_unused=True)
    seen = [grad.view(3, 12, -1).abs().amax((0, 2)) > 0 for grad in grads if grad is not None]
    return torch.stack(seen).any(0)


def test_what_the_losses_reach() -> None:
    """A step's own posterior learns by its reconstruction and rep, and not by dyn; those before it,
    as what is foretold depends on them, by dyn alone."""
    batch = tensors(family_batch(make()))
    batch.is_first[:] = False
    steps = torch.arange(12)
    for name, want in {
        "rec/vector": steps == 6,
        "rec/image": steps == 6,
        "rep": steps == 6,
        "dyn": (steps >= 0) & (steps < 6),  # the context of 4, twice: 6 before it
        "reward": (steps >= 0) & (steps <= 6),
    }.items():
        found = reached(make(free_nats=0.0).world_model, batch, name, 6)
        assert torch.equal(found, want), (name, found)


def test_everything_of_a_step_reaches_what_follows_and_nothing_before() -> None:
    agent = make("vector", "continuous")
    model, batch = agent.world_model, tensors(family_batch(agent))
    batch.is_first[:] = False
    noise = torch.rand(3, 12, *model.noise_shape)
    before = model.observe(batch, noise)[0].tensors["hidden"]
    for column in ("obs", "action"):
        other = batch.map(torch.clone)
        (other.obs["obs"] if column == "obs" else other.action)[0, 5] *= -1
        moved = (model.observe(other, noise)[0].tensors["hidden"] - before).abs().amax(-1) > 1e-6
        ends = 5 + (column == "obs")
        assert not moved[1:].any() and not moved[0, :ends].any()
        assert moved[0, ends : ends + 3].all()


@pytest.mark.learning
def test_two_outcomes_stay_two() -> None:
    """With one group: several are drawn each by itself, and what they share comes out mixed."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0, "tokenizer_warmup": 0}
    agent = make_small("token", vector(1), "continuous", **options, groups=1)
    check_two_outcomes_stay_two(agent.world_model, 150)

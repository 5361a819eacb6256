"""TD-MPC2 (2024): a latent world model without a decoder, made to be planned in.

State: latent (B, L) on a product of simplices (SimNorm), and `origin` (B, L + A), what led to it:
the latent before and the action that went in, zero where nothing came before. Reward belongs to
that pair, so `decode` reads it from there. Images add the last frames they need.

    z_0 = h(o_0),  z_k = d(z_{k-1}, a_k)                             k = 1..H, one window of replay
    L = 20 sum rho^{k-1} |z_k - sg h(o_k)|^2 + 0.1 sum rho^{k-1} CE(R(z_{k-1}, a_k), r_k)
        + BCE(T(z_k), terminal_k)                                    sums are divided by H

The value and policy losses are behaviors/latent_td.py's; behaviors/planner.py plans. Deviations
from the published algorithm, with reasons:

- Replay windows may run over an episode's end: the step into a reset has no loss and the latent
  starts anew there. Terminal steps are then seen at every position, not only at the last.
- The termination head is always trained (`termination: none` leaves it out), and continue is soft,
  discount * (1 - p): the published threshold at one half (`hard`) ignores every doubt.
- Observations may be several, vectors and images: their embeddings are concatenated before the
  last layer. A single image whose convolutions give L numbers has no such layer, as published.
- Discrete actions are one-hot vectors; the behavior and the planner know what to do with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MISH, MLP, SIMPLEX, BinOutput, Linear, MishMLP, NormedLinear
from worldflux_dist.nn.optim import ClippedAdam, groups
from worldflux_dist.nn.vision import StridedEncoder, random_shift
from worldflux_dist.settings import Count, Layers, Positive, Scale, Settings, Share, Units
from worldflux_dist.spaces import Spaces


@dataclass(frozen=True)
class TDMPC2Config(Settings):
    """Sizes and constants; the defaults are the 5 M model and the published constants.

    `episode_length` in decisions sets the discount: clip((T/5 - 1) / (T/5), 0.95, 0.995).
    `frames` is how many of the last images the encoder sees. `num_q`, `target_rate` and the `plan_`
    ones go to the native behavior and planner, as does the horizon; the policy has a learning rate
    of its own, the behavior's.
    """

    section: ClassVar[str] = "model_options"

    encoder_units: Units = 256
    encoder_layers: Layers = 2
    units: Units = 512
    latent: Units = 512
    num_q: Annotated[int, Ge(2), Le(1000)] = 5
    horizon: Annotated[int, Ge(1), Le(1000)] = 3
    frames: Layers = 3
    channels: Annotated[int, Ge(1), Le(1024)] = 32
    episode_length: Count = 500
    termination: Literal["soft", "hard", "none"] = "soft"
    rho: Annotated[float, Gt(0), Le(1)] = 0.5
    target_rate: Share = 0.01
    consistency_scale: Scale = 20.0
    reward_scale: Scale = 0.1
    termination_scale: Scale = 1.0
    learning_rate: Positive = 3e-4
    encoder_rate: Scale = 0.3
    clip: Positive = 20.0
    plan_samples: Annotated[int, Ge(8), Le(2**16)] = 512
    plan_iterations: Annotated[int, Ge(1), Le(900)] = 6
    plan_proposals: Annotated[int, Ge(0), Le(2**16)] = 24

    def check(self) -> None:
        if self.latent % 8:
            raise ValueError(f"model_options.latent is {self.latent}: it must be a multiple of 8")
        if self.plan_proposals >= self.plan_samples:
            raise ValueError(
                f"model_options.plan_samples is {self.plan_samples}: it must be more than "
                f"plan_proposals {self.plan_proposals}"
            )

    @property
    def discount(self) -> float:
        fifth = self.episode_length / 5
        return min(max((fifth - 1) / fifth, 0.95), 0.995)


def _size(encoder: int, units: int, latent: int, layers: int, num_q: int = 5) -> TDMPC2Config:
    return TDMPC2Config(encoder, layers, units, latent, num_q)


PRESETS = {
    "1m": _size(256, 384, 128, 2, num_q=2),
    "5m": TDMPC2Config(),
    "19m": _size(1024, 1024, 768, 3),
    "48m": _size(1792, 1792, 768, 4),
    "317m": _size(4096, 4096, 1376, 5, num_q=8),
    # Learns small tasks in minutes on two cores: narrow and quick to learn, with a quarter of the
    # samples in a plan but more of them from the policy.
    "tiny": replace(
        _size(128, 128, 64, 2, num_q=2),
        learning_rate=1e-3,
        rho=0.7,
        target_rate=0.05,
        plan_samples=128,
        plan_iterations=4,
        plan_proposals=32,
    ),
}


class Encoder(nn.Module):
    """Observations (N, ...) -> latents (N, L) on the simplices. Images are stacks of frames."""

    def __init__(self, spaces: Spaces, config: TDMPC2Config) -> None:
        super().__init__()
        c = config
        self.vectors, self.images = spaces.vectors, spaces.images
        cnns = [StridedEncoder(spaces.obs[k].shape, c.frames, c.channels) for k in self.images]
        self.cnns = nn.ModuleList(cnns)
        size = sum(cnn.size_out for cnn in cnns)
        self.layers: nn.Module | None = None
        if self.vectors:
            num = sum(spaces.obs[k].shape[0] for k in self.vectors)
            self.layers = MLP(num, c.encoder_units, max(c.encoder_layers - 1, 1), kind=MISH)
            size += c.encoder_units
        bare = len(self.images) == 1 and not self.vectors and size == c.latent
        self.out = None if bare else NormedLinear(size, c.latent, SIMPLEX)

    def forward(self, obs: dict[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """`noise` (N, 2) in [0, 1) fixes the random shift of the images."""
        parts = []
        if self.layers is not None:
            parts.append(self.layers(torch.cat([obs[key] for key in self.vectors], -1)))
        for key, cnn in zip(self.images, self.cnns, strict=True):
            parts.append(cnn(random_shift(obs[key], noise)))
        x = torch.cat(parts, -1)
        if self.out is None:  # no norm before it, hence the softmax that nothing is too large for
            return x.float().unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
        return self.out(x)


class TDMPC2(WorldModel):
    """The family's world model. Owns encoder, dynamics, reward and termination."""

    bins: Tensor
    decodes_obs = False
    reaches_goals = True
    pieces = ("loss",)  # a few steps, unrolled

    def __init__(self, spaces: Spaces, config: TDMPC2Config) -> None:
        super().__init__(spaces)
        c = self.config = config
        self.feature_dim, self.width, self.discount = c.latent, c.units, c.discount
        size, units = c.latent + spaces.action_dim, c.units
        simplex = partial(NormedLinear, size_out=c.latent, kind=SIMPLEX)
        logit = partial(Linear, size_out=1, std=0.02)
        self.encoder = Encoder(spaces, c)
        self.dynamics = MishMLP(size, units, simplex)
        self.reward = MishMLP(size, units, partial(BinOutput, bins=101))
        self.terminal = None if c.termination == "none" else MishMLP(c.latent, units, logit)
        self.register_buffer("bins", dist.symlog_bins(101), persistent=False)
        self.update_noise_shape = (2,) if spaces.images else None  # of their random shift
        names = ("consistency", "reward", "termination")
        self.loss_scales = {name: getattr(c, f"{name}_scale") for name in names}
        self.native = {
            "behavior": {"kind": "latent_td", "num_q": c.num_q, "target_rate": c.target_rate},
            "planner": {
                "method": "auto",
                "samples": c.plan_samples,
                "elites": c.plan_samples // 8,
                "proposals": c.plan_proposals,
                "horizon": c.horizon,
                "iterations": c.plan_iterations + 2 * (spaces.action_dim >= 20),
            },
        }

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        slow = (self.encoder, {"lr": c.learning_rate * c.encoder_rate})
        return ClippedAdam(groups(params, slow), c.learning_rate, c.clip)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        return ("encoder", "dynamics", "reward", "terminal") if planning else ("encoder",)

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        c, like = self.config, self.bins
        state = {
            "latent": like.new_zeros(batch_size, c.latent),
            "origin": like.new_zeros(batch_size, c.latent + self.spaces.action_dim),
        }
        for key in self.encoder.images:
            shape = (batch_size, c.frames - 1, *self.spaces.obs[key].shape)
            state[f"frames/{key}"] = torch.zeros(shape, dtype=torch.uint8, device=like.device)
        return State(state)

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        obs = self.tensors(obs)
        if is_first is None:
            is_first = torch.zeros(len(action), dtype=torch.bool, device=action.device)
        keep = (~is_first).float().unsqueeze(-1)
        new = {"origin": torch.cat([state.tensors["latent"], action], -1) * keep}
        for key in self.encoder.images:
            newest = obs[key].unsqueeze(1)
            past = state.tensors[f"frames/{key}"]
            past = torch.where(is_first.view(-1, 1, 1, 1, 1), newest.expand_as(past), past)
            seen = torch.cat([past, newest], 1)  # (B, frames, H, W, C), oldest first
            obs = obs | {key: seen}
            new[f"frames/{key}"] = seen[:, 1:]
        return State({"latent": self.encoder(obs, noise)} | new)

    def essential(self, state: State) -> State:
        return State({name: state.tensors[name] for name in ("latent", "origin")})

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        origin = torch.cat([state.tensors["latent"], action], -1)
        return State(state.tensors | {"latent": self.dynamics(origin), "origin": origin})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        preds: dict[str, Any] = {}
        if "reward" in heads:
            origin = state.tensors["origin"]
            reward = dist.symexp(dist.twohot_predict(self.reward(origin), self.bins))
            moved = origin[..., : self.config.latent].any(-1)
            preds["reward"] = torch.where(moved, reward, 0.0)
        if "continue" in heads:
            preds["continue"] = self._continue(state.tensors["latent"])
        return Prediction(preds)

    def _continue(self, latent: Tensor) -> Tensor:
        if self.terminal is None:
            return torch.full(latent.shape[:-1], self.discount, device=latent.device)
        ends = torch.sigmoid(self.terminal(latent).squeeze(-1).float())
        if self.config.termination == "hard":
            ends = (ends > 0.5).float()
        return self.discount * (1 - ends)

    def features(self, state: State) -> Tensor:
        return state.tensors["latent"]

    # ------------------------------------------------------------------------------ losses

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses (B, H) each: consistency and reward, weighted by rho^(k-1), and termination.

        Rows are cut into windows of `horizon` + 1 steps, behind `frames` - 1 that only show images;
        what is left over at a row's end is not used. `noise` (B, H + 1, 2) fixes the random shifts.
        A window begins with a look, so `start` is not used.
        """
        c = self.config
        context = c.frames - 1 if self.encoder.images else 0
        batch = _windows(batch, context + c.horizon + 1)
        obs = self._stacked(batch, context)
        batch = batch.map(lambda value: value[:, context:])
        batch.obs = obs
        first = self._encode(obs, slice(0, 1), noise)  # before the rest: autocast keeps its casts
        with torch.no_grad():
            later = self._encode(obs, slice(1, None), noise)
        seen = torch.cat([first, later], 1)  # (B, H + 1, L)
        path = self._unroll(seen, batch)
        keep = (~batch.is_first[:, 1:]).float()
        decay = c.rho ** torch.arange(c.horizon + 1, device=keep.device)
        weight = keep * decay[:-1]  # (B, H)
        latent, logits = path.tensors["latent"][:, 1:], self.reward(path.tensors["origin"][:, 1:])
        wanted = dist.symlog(batch.reward[:, 1:])
        losses = {
            "consistency": weight * (latent - later).square().mean(-1),
            "reward": weight * dist.twohot_loss(logits, wanted, bins=self.bins),
        }
        if self.terminal is not None:
            logit, ended = self.terminal(latent).squeeze(-1), batch.is_terminal[:, 1:].float()
            losses["termination"] = keep * dist.bernoulli_loss(logit, ended)
        origin = torch.cat([seen[:, :-1], batch.action[:, 1:]], -1) * keep.unsqueeze(-1)
        states = State({"latent": seen, "origin": F.pad(origin, (0, 0, 1, 0))})
        return LossOutput(losses, {}, states, path, decay, batch)

    def _unroll(self, seen: Tensor, batch: Batch) -> State:
        """Predicted states (B, H + 1): from the first latent seen, anew after every reset."""
        state = State({"latent": seen[:, 0], "origin": self.initial(len(seen)).tensors["origin"]})
        states = [state]
        for t in range(1, seen.shape[1]):
            state = self.transition(state, batch.action[:, t])
            latent = torch.where(batch.is_first[:, t, None], seen[:, t], state.tensors["latent"])
            state = State(state.tensors | {"latent": latent})
            states.append(state)
        return State.stack(states, 1)

    def _stacked(self, batch: Batch, context: int) -> dict[str, Tensor]:
        """Observations without the context; images (B, T, frames, H, W, C) with what came before,
        but nothing from before a reset."""
        obs = {key: value[:, context:] for key, value in batch.obs.items()}
        if not self.encoder.images:
            return obs
        steps = torch.arange(batch.is_first.shape[1], device=batch.is_first.device)
        begun = torch.where(batch.is_first, steps, 0).cummax(1).values  # (B, T) last reset
        back = steps[:, None] - torch.arange(context, -1, -1, device=steps.device)  # (T, frames)
        index = torch.maximum(back, begun[..., None])[:, context:]  # (B, T - context, frames)
        rows = torch.arange(len(index), device=steps.device)[:, None, None]
        return obs | {key: batch.obs[key][rows, index] for key in self.encoder.images}

    def _encode(self, obs: dict[str, Tensor], steps: slice, noise: Tensor | None) -> Tensor:
        part = {key: value[:, steps] for key, value in obs.items()}
        flat = {key: value.flatten(0, 1) for key, value in part.items()}
        noise = None if noise is None else noise[:, steps].flatten(0, 1)
        return self.encoder(flat, noise).unflatten(0, next(iter(part.values())).shape[:2])


def _windows(batch: Batch, length: int) -> Batch:
    """Rows (B, T) cut into (B * (T // length), length)."""
    num = batch.reward.shape[1] // length
    if num == 0:
        raise ValueError(
            f"tdmpc2 trains on windows of {length} steps and replay gives {batch.reward.shape[1]}: "
            f"set replay.batch_length to {length} or a multiple of it"
        )
    return batch.map(
        lambda value: value[:, : num * length].unflatten(1, (num, length)).flatten(0, 1)
    )


Model = TDMPC2

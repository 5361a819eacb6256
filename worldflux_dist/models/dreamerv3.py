"""DreamerV3 (2025): a block-GRU RSSM with categorical latents, trained by reconstruction.

State: deter (B, D) and stoch (B, G, C), zeros at the start. Features are [deter, stoch].

    deter' = core(deter, stoch, action)                       sequence model
    prior(deter'), posterior(deter', tokens)                  G categoricals, 1 % uniform
    L = sum rec + reward + continue + 1.0 dyn + 0.1 rep       dyn = max(1, KL(sg post || prior))
                                                              rep = max(1, KL(post || sg prior))

The policy and value losses are behaviors/actor_critic.py's. `reconstruction: barlow` has no
decoder: as in R2-Dreamer, a projection of the features is to correlate with the encoder's tokens,
detached, dimension by dimension (nn/collapse.py), which on images costs less. Deviations from the
published algorithm, with reasons:

- No replay context: a window sampled in mid-episode starts from the zero state, with its real
  first action, where the reference seeds it with latents stored by the actor and written back by
  the learner. Replay then holds no latents (2 to 13 kB a step) and needs no write-back across
  processes. `loss(start=...)` takes a start state all the same.
- Discrete observations are one-hot vectors with the squared symlog loss, not a categorical.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn import collapse
from worldflux_dist.nn import distributions as dist
from worldflux_dist.nn.layers import MLP, BinOutput, BlockGRU, Linear, NormedLinear
from worldflux_dist.nn.observations import ObsDecoder, ObsEncoder
from worldflux_dist.nn.optim import LaProp
from worldflux_dist.nn.packing import Part
from worldflux_dist.nn.products import full_precision_here, linear
from worldflux_dist.settings import Layers, Positive, Scale, Settings, Units, Whole
from worldflux_dist.spaces import Spaces


@dataclass(frozen=True)
class DreamerV3Config(Settings):
    """Sizes and constants; the defaults are size1m and the published constants.

    `memory_span` is for tasks that pay for what was seen long before: units of the core begin by
    keeping what they hold for up to so many steps (0: about 4, as published). Rare rewards that
    hang on it want a larger `reward_scale`, too.
    """

    section: ClassVar[str] = "model_options"

    deter: Units = 512
    hidden: Units = 64
    groups: Units = 32
    classes: Annotated[int, Ge(2), Le(2**16)] = 4
    blocks: Units = 8
    memory_span: Whole = 0
    units: Units = 64
    depth: Annotated[int, Ge(1), Le(1024)] = 4
    multipliers: Annotated[tuple[Layers, ...], MinLen(1), MaxLen(8)] = (2, 3, 4, 4)
    unimix: Annotated[float, Ge(0), Lt(1)] = 0.01
    free_nats: Scale = 1.0
    dyn_scale: Scale = 1.0
    rep_scale: Scale = 0.1
    reward_scale: Scale = 1.0
    reconstruction: Literal["decoder", "barlow"] = "decoder"
    barlow_scale: Scale = 0.05
    discount: Annotated[float, Gt(0), Le(1)] = 1 - 1 / 333
    learning_rate: Positive = 4e-5
    agc: Scale = 0.3
    warmup: Whole = 1000

    def check(self) -> None:
        if self.deter % self.blocks:
            raise ValueError(
                f"model_options.deter is {self.deter}: it must be a multiple of blocks "
                f"{self.blocks}"
            )


def _size(deter: int, hidden: int, depth: int) -> DreamerV3Config:
    return DreamerV3Config(deter=deter, hidden=hidden, classes=depth, units=hidden, depth=depth)


PRESETS = {
    "size1m": DreamerV3Config(),
    "size12m": _size(2048, 256, 16),
    "size25m": _size(3072, 384, 24),
    "size50m": _size(4096, 512, 32),
    "size100m": _size(6144, 768, 48),
    "size200m": _size(8192, 1024, 64),
    "size400m": _size(12288, 1536, 96),
    # Learns small tasks in minutes on two cores: narrow, with a higher learning rate.
    "tiny": replace(
        DreamerV3Config(), deter=128, groups=16, classes=8, learning_rate=8e-4, warmup=100
    ),
}


class DreamerV3(WorldModel):
    """The family's world model. Owns encoder, core, posterior, prior, decoder and two heads."""

    bins: Tensor
    pieces = ("advance", "look", "judge")

    def __init__(self, spaces: Spaces, config: DreamerV3Config) -> None:
        super().__init__(spaces)
        self.config, self.width, self.discount = config, config.units, config.discount
        latent = config.groups * config.classes
        self.feature_dim = config.deter + latent
        vision = (config.units, config.depth, config.multipliers)
        self.encoder = ObsEncoder(spaces, *vision)
        widths = (config.deter, latent, spaces.action_dim, config.hidden)
        self.core = BlockGRU(*widths, config.blocks, config.memory_span)
        out = partial(Linear, size_out=latent)
        self.posterior = MLP(config.deter + self.encoder.size_out, config.hidden, 1, out)
        self.prior = MLP(config.deter, config.hidden, 2, out)
        self.decoder: ObsDecoder | None = None
        self.projector: Linear | None = None
        self.decodes_obs = config.reconstruction == "decoder"
        if self.decodes_obs:
            self.decoder = ObsDecoder(spaces, config.deter, latent, *vision)
        else:
            self.projector = Linear(self.feature_dim, self.encoder.size_out)
        self.reward = MLP(self.feature_dim, config.units, 1, partial(BinOutput, bins=255))
        self.proceed = MLP(self.feature_dim, config.units, 1, partial(Linear, size_out=1))
        self.register_buffer("bins", dist.symexp_bins(255), persistent=False)
        self.loss_scales = {
            **{"dyn": config.dyn_scale, "rep": config.rep_scale, "reward": config.reward_scale},
            **({} if self.decodes_obs else {"barlow": config.barlow_scale}),
        }
        self.native = {"behavior": {"kind": "actor_critic"}, "planner": {"method": "none"}}
        self.noise_shape = self.update_noise_shape = (config.groups,)

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        return LaProp(params, lr=c.learning_rate, agc=c.agc, warmup=c.warmup)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        acting = ("encoder", "core", "posterior")
        return (*acting, "prior", "reward", "proceed") if planning else acting

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        c, zeros = self.config, self.core.hid_bias.new_zeros
        deter, stoch = zeros(batch_size, c.deter), zeros(batch_size, c.groups, c.classes)
        return State({"deter": deter, "stoch": stoch})

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        if is_first is None:
            is_first = torch.zeros(len(action), dtype=torch.bool, device=action.device)
        tokens = self.encoder(self.tensors(obs))
        noise = None if noise is None else noise[:, None]
        states, _ = self.filter(tokens[:, None], action[:, None], is_first[:, None], state, noise)
        return states[:, 0]

    def filter(
        self,
        tokens: Tensor,
        action: Tensor,
        is_first: Tensor,
        start: State,
        noise: Tensor | None = None,
    ) -> tuple[State, Tensor]:
        """Filter (B, T, ...) tokens and actions -> posterior states (B, T) and logits (B, T, G, C).

        Where is_first, deter, stoch and action are zeroed before the core sees them (a discrete
        action becomes the zero vector, not class 0). `noise` (B, T, G) is uniform in [0, 1).
        On a CPU always in float32.
        """
        c = self.config
        with full_precision_here(tokens):
            keep = (~is_first).to(action.dtype).unsqueeze(-1)  # (B, T, 1)
            acted = self.core.embed_action(action * keep)
            dense = self._posterior_layer.linear
            by_deter, by_tokens = dense.weight.split([c.deter, tokens.shape[-1]], 1)
            looked = linear(tokens.float(), by_tokens, dense.bias)  # all steps at once
            if noise is None:
                noise = torch.rand(*action.shape[:2], c.groups, device=action.device)
            weights = by_deter, *self.core.hidden_weights()
            state, states, logits = start, [], []
            for given in zip(*(x.unbind(1) for x in (keep, acted, looked, noise)), strict=True):
                state, logit = self.look(state, *given, *weights)
                states.append(state)
                logits.append(logit)
            return State.stack(states, 1), torch.stack(logits, 1)

    def look(
        self,
        state: State,
        keep: Tensor,
        acted: Tensor,
        looked: Tensor,
        noise: Tensor,
        by_deter: Tensor,
        *hidden: Tensor,
    ) -> tuple[State, Tensor]:
        """One step of `filter`: the posterior after it, (B, ...), and its logits (B, G, C)."""
        c = self.config
        deter, stoch = state.tensors["deter"] * keep, state.tensors["stoch"].flatten(-2) * keep
        deter = self.core(deter, stoch, acted, hidden)
        x = F.silu(self._posterior_layer.norm(linear(deter, by_deter) + looked))
        logits: Tensor = self.posterior[1](x).unflatten(-1, (c.groups, c.classes))
        return State({"deter": deter, "stoch": self.sample(logits, noise)}), logits

    @property
    def _posterior_layer(self) -> NormedLinear:
        layer = self.posterior[0]
        assert isinstance(layer, NormedLinear)
        return layer

    def _tokens(self, batch: Batch) -> Tensor:
        flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        tokens: Tensor = self.encoder(flat).unflatten(0, batch.reward.shape)
        return tokens

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        start, tokens = self.initial(len(batch.reward)), self._tokens(batch)  # all encoded at once
        return self.filter(tokens, batch.action, batch.is_first, start, noise)[0], batch

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        stoch = state.tensors["stoch"].flatten(-2)
        deter = self.core(state.tensors["deter"], stoch, self.core.embed_action(action))
        logit = self.prior_logits(deter)
        if noise is None:
            noise = torch.rand(logit.shape[:-1], device=deter.device)
        return State({"deter": deter, "stoch": self.sample(logit, noise)})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        features = self.features(state)
        preds: dict[str, Any] = {}
        if "obs" in heads and self.decoder is not None:
            preds["obs"] = self.decoder.observations(self.reconstruct(state))
        if "reward" in heads:
            preds["reward"] = dist.twohot_predict(self.reward(features), self.bins)
        if "continue" in heads:
            preds["continue"] = torch.sigmoid(self.proceed(features).squeeze(-1).float())
        return Prediction(preds)

    def features(self, state: State) -> Tensor:
        return torch.cat([state.tensors["deter"], state.tensors["stoch"].flatten(-2)], -1)

    @property
    def feature_parts(self) -> tuple[Part, ...]:
        c = self.config  # deter is a mean of values of tanh
        return Part("bounded", c.deter), Part("onehot", c.groups * c.classes, c.classes)

    # ------------------------------------------------------------------------------ losses

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses (B, T) each: dyn, rep, reward, continue, and one `rec/<key>` per observation or,
        of all steps together, barlow.

        The reward loss counts resets too (their reward is 0), as the reference's does.
        """
        start = self.initial(len(batch.reward)) if start is None else start
        tokens = self._tokens(batch)
        states, logits = self.filter(tokens, batch.action, batch.is_first, start, noise)
        losses, metrics = self.judge(states, logits, tokens, batch)
        return LossOutput(losses, metrics, states, states, torch.ones_like(batch.reward[0]), batch)

    def judge(
        self, states: State, logits: Tensor, tokens: Tensor, batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of filtered states, and metrics."""
        posterior = dist.unimix(logits, self.config.unimix)
        prior = dist.unimix(self.prior_logits(states.tensors["deter"]), self.config.unimix)
        nats = self.config.free_nats
        features = self.features(states)
        going = (1 - batch.is_terminal.float()) * self.discount
        kl = dist.kl_onehot(posterior.detach(), prior)
        losses = {
            "dyn": kl.clamp(min=nats),
            "rep": dist.kl_onehot(posterior, prior.detach()).clamp(min=nats),
            "reward": dist.twohot_loss(self.reward(features), batch.reward, bins=self.bins),
            "continue": dist.bernoulli_loss(self.proceed(features).squeeze(-1), going),
        }
        if self.decoder is not None:
            losses |= self.decoder.losses(self.reconstruct(states), batch.obs)
        else:
            assert self.projector is not None
            projected, wanted = self.projector(features), tokens.detach()
            twins = collapse.barlow(projected.flatten(0, 1), wanted.flatten(0, 1))
            losses["barlow"] = twins.expand_as(batch.reward)
        metrics = {
            "kl": kl.mean().detach(),
            "prior_entropy": -(prior * prior.log()).sum((-1, -2)).mean().detach(),
            "posterior_entropy": -(posterior * posterior.log()).sum((-1, -2)).mean().detach(),
        }
        return losses, metrics

    def reconstruct(self, state: State) -> dict[str, Tensor]:
        """Decoder means in float32, any leading shape: symlog vectors, images in [0, 1]."""
        assert self.decoder is not None
        decoded: dict[str, Tensor] = self.decoder(
            state.tensors["deter"], state.tensors["stoch"].flatten(-2)
        )
        return decoded

    def prior_logits(self, deter: Tensor) -> Tensor:
        return self.prior(deter).unflatten(-1, (self.config.groups, self.config.classes))

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Straight-through one-hots (..., G, C) of the mixed probabilities."""
        probs = dist.unimix(logits, self.config.unimix)
        onehot = dist.sample_onehot(probs, noise)
        return dist.straight_through(onehot, probs) if probs.requires_grad else onehot


Model = DreamerV3

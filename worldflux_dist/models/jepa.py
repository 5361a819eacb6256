"""JEPA: a world model that predicts embeddings of observations, never the observations.

State: `emb` (B, D), what was seen or predicted, and `context` (B, C), what led to it: the embedding
before and the action that went in or, with a memory, what a GRU made of all of those. It is zero
where nothing came before. Features are the embedding, with a memory both.

    z_t = f(o_t)                                             encoder; no decoder, no teacher
    c_{t+1} = c(c_t, z_t, a_{t+1}),  z'_{t+1} = z_t + g(z_t, c_{t+1})          predictor
    L = sum_k rho^{k-1} |z'_{t+k} - z_{t+k}|^2 / D           unrolled from every t for K steps
        + SIGReg(z) + CE(R(z, c), r) + BCE(P(z, c), continue)

With `objective: masked` or both, an encoder of patches leaves out blocks of time and, of images, of
space, and a transformer over the window predicts the embeddings of the whole from those of what is
left (nn/masked.py); masked alone shapes embeddings by nothing else, dynamics and heads then learn
on them detached.

The losses of reward and continue are those of embeddings seen and of embeddings predicted, and
reach the encoder: with the regulariser (nn/collapse.py) they decide what is worth embedding. The
form is LeWM's; multi-step prediction and heads are as in TD-MPC2. Deviations, with reasons:

- The predictor is an MLP on the last embedding, or on a GRU's memory of all, instead of a
  transformer over the last three: state vectors need no more, and the state stays small.
- The regulariser's weight is per sample: its published statistic grows with the batch.
- `regularizer: ema` predicts what a slowly following encoder gives, both layer-normalised.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn import collapse
from worldflux_dist.nn.layers import MLP, BlockGRU, Linear
from worldflux_dist.nn.masked import MaskedPredictor, PatchEncoder, patches, visible_parts
from worldflux_dist.nn.observations import ObsDecoder, ObsEmbedder, OutcomeHeads
from worldflux_dist.nn.optim import LaProp
from worldflux_dist.nn.products import full_precision
from worldflux_dist.settings import Layers, Positive, Scale, Settings, Share, Units, Whole
from worldflux_dist.spaces import Spaces


@dataclass(frozen=True)
class JEPAConfig(Settings):
    """Sizes and constants; the defaults are `tiny`, which learns small tasks in minutes.

    `memory` is a GRU for what one observation does not show; auto has one where there are images.
    Its units begin by keeping what they hold for up to `memory_span` steps (0: about 4). `steps` is
    how far embeddings are predicted, `rho` what each further step counts. `prediction_scale` counts
    a tenth where there are images or a memory: at full weight, frames that differ in a few pixels
    keep the one embedding they begin with, and what foretells nothing is forgotten before it pays.
    SIGReg compares `samples` embeddings along so many random `directions`. `probe` adds a decoder
    that learns from embeddings and never changes them. Masked prediction sees images as patches of
    `patch` x `patch` pixels, through `masked_layers` of a transformer.
    """

    section: ClassVar[str] = "model_options"

    emb: Units = 32
    units: Units = 64
    layers: Layers = 2
    memory: Literal["none", "gru", "auto"] = "auto"
    memory_size: Units = 128
    memory_span: Whole = 0
    depth: Annotated[int, Ge(1), Le(1024)] = 4
    multipliers: Annotated[tuple[Layers, ...], MinLen(1), MaxLen(8)] = (2, 3, 4, 4)
    steps: Annotated[int, Ge(1), Le(1000)] = 5
    rho: Annotated[float, Gt(0), Le(1)] = 0.5
    prediction_scale: Scale = 10.0
    regularizer: Literal["sigreg", "vicreg", "ema", "none"] = "sigreg"
    regularizer_scale: Scale = 1.0
    directions: Units = 32
    samples: Units = 256
    target_rate: Share = 0.01
    probe: bool = False
    objective: Literal["dynamics", "masked", "both"] = "dynamics"
    patch: Annotated[int, Ge(1), Le(1024)] = 8
    masked_layers: Layers = 2
    masked_scale: Scale = 0.25
    discount: Annotated[float, Gt(0), Le(1)] = 0.99
    learning_rate: Positive = 2e-3
    agc: Scale = 0.3
    warmup: Whole = 100
    plan_samples: Annotated[int, Ge(8), Le(2**16)] = 128
    plan_horizon: Annotated[int, Ge(1), Le(1000)] = 10

    def check(self) -> None:
        if self.objective != "dynamics" and self.units % 8:
            raise ValueError(
                f"model_options.units is {self.units}: masked prediction needs a multiple of 8"
            )
        if self.emb % ObsDecoder.MULTIPLE:
            raise ValueError(
                f"model_options.emb is {self.emb}: it must be a multiple of {ObsDecoder.MULTIPLE}"
            )


PRESETS = {
    "tiny": JEPAConfig(),
    "small": JEPAConfig(emb=64, units=256, layers=3, memory_size=512, depth=6),
    # LeWM's embedding and predictor, about 15 M parameters with images.
    "lewm": JEPAConfig(
        emb=192,
        units=1024,
        layers=6,
        memory_size=1024,
        depth=32,
        directions=1024,
        learning_rate=1e-4,
        warmup=1000,
    ),
}


class JEPA(WorldModel):
    """The family's world model. Owns encoder, predictor, heads, and memory and probe if any."""

    reaches_goals = True
    pieces, exact = ("advance", "memory.step", "_unrolled"), ("memory",)

    def __init__(self, spaces: Spaces, config: JEPAConfig) -> None:
        super().__init__(spaces)
        c = self.config = config
        self.width, self.discount = c.units, c.discount
        recurrent = c.memory == "gru" or (c.memory == "auto" and bool(spaces.images))
        size = c.memory_size if recurrent else c.emb + spaces.action_dim
        self.feature_dim = c.emb + (size if recurrent else 0)
        vision = (c.units, c.depth, c.multipliers)
        patched = None
        if c.objective != "dynamics":
            patched = partial(PatchEncoder, patch=c.patch, width=c.units, layers=c.masked_layers)
        self.encoder = ObsEmbedder(spaces, c.emb, *vision, patched)
        widths = (size, c.emb, spaces.action_dim, c.units)
        self.memory = BlockGRU(*widths, 1, c.memory_span) if recurrent else None
        self.predictor = MLP(
            c.emb + size, c.units, c.layers, partial(Linear, size_out=c.emb, outscale=0.1)
        )
        self.heads = OutcomeHeads(c.emb + size, c.units, c.layers)
        self.probe = ObsDecoder(spaces, c.emb, c.emb, *vision) if c.probe else None
        self.decodes_obs = c.probe
        self.masked: MaskedPredictor | None = None
        if c.objective != "dynamics":
            shapes = [spec.shape for spec in spaces.obs.values() if spec.kind == "image"]
            parts = sum(math.prod(patches(shape, c.patch)) for shape in shapes)
            parts += len(spaces.vectors)
            sizes = (spaces.action_dim, c.units, c.masked_layers)
            self.masked = MaskedPredictor(c.emb, parts, *sizes)
        self.target: ObsEmbedder | None = None
        if c.regularizer == "ema":
            self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.context_dim = size
        self.loss_scales = {
            "prediction": c.prediction_scale * (0.1 if spaces.images or recurrent else 1),
            "regularizer": c.regularizer_scale,
            **({} if self.masked is None else {"masked": c.masked_scale}),
        }
        self.native = {
            "behavior": {"kind": "actor_critic", "horizon": 5},
            "planner": {
                "method": "cem",
                "horizon": c.plan_horizon,
                "samples": c.plan_samples,
                "elites": c.plan_samples // 8,
                "proposals": c.plan_samples // 4,
                "iterations": 3,
            },
        }

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        return LaProp(params, lr=c.learning_rate, agc=c.agc, warmup=c.warmup)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        acting = ("encoder", "memory")
        return (*acting, "predictor", "heads") if planning else acting

    @torch.no_grad()
    def update_targets(self) -> None:
        """target <- target_rate * encoder + (1 - target_rate) * target"""
        if self.target is not None:
            new, old = self.encoder.parameters(), self.target.parameters()
            torch._foreach_lerp_(list(old), list(new), self.config.target_rate)

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        zeros = self.encoder.out.bias.new_zeros
        return State(
            {
                "emb": zeros(batch_size, self.config.emb),
                "context": zeros(batch_size, self.context_dim),
            }
        )

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        emb = state.tensors["emb"]
        keep = emb.any(-1)  # what has seen nothing yet begins here
        if is_first is not None:
            keep = keep & ~is_first
        context = self._context(state.tensors["context"], emb, action)
        context = context * keep.to(context.dtype).unsqueeze(-1)
        return State({"emb": self.encoder(self.tensors(obs)), "context": context})

    def _context(self, context: Tensor, emb: Tensor, action: Tensor) -> Tensor:
        """What leads to the next state, (B, C): of the last one and the action."""
        if self.memory is None:
            return torch.cat([emb, action], -1)
        with full_precision(emb):
            new: Tensor = self.memory(context, emb, self.memory.embed_action(action))
            return new

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        emb = state.tensors["emb"]
        context = self._context(state.tensors["context"], emb, action)
        change = self.predictor(torch.cat([emb, context], -1)).float()
        return State({"emb": emb + change, "context": context})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        preds: dict[str, Any] = self.heads.decode(self._outcome(state), heads)
        if "reward" in preds:  # nothing led to a first state
            preds["reward"] = preds["reward"] * state.tensors["context"].any(-1)
        if "obs" in heads and self.probe is not None:
            preds["obs"] = self.probe.observations(self._probed(state.tensors["emb"]))
        return Prediction(preds)

    def _outcome(self, state: State) -> Tensor:
        return torch.cat([state.tensors["emb"], state.tensors["context"]], -1)

    def _probed(self, emb: Tensor) -> dict[str, Tensor]:
        assert self.probe is not None
        decoded: dict[str, Tensor] = self.probe(emb, emb)
        return decoded

    def features(self, state: State) -> Tensor:
        return state.tensors["emb"] if self.memory is None else self._outcome(state)

    def goal(self, state: State) -> Tensor:
        return state.tensors["emb"]

    # ------------------------------------------------------------------------------ losses

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses: regularizer (B, T), prediction, reward and continue (B, T - 1).

        A row begins with a look, so `start` is not used.
        """
        states = self._seen(batch)
        emb, going = states.tensors["emb"], (1 - batch.is_terminal.float()) * self.discount
        targets = self._targets(emb, batch)
        more = {} if self.masked is None else {"masked": self._masked(targets, batch)}
        if self.config.objective == "masked":
            states, targets = states.detach(), targets.detach()
        wanted = targets[:, 1:]
        keep = (~batch.is_first[:, 1:]).float()
        path, weight = self._unrolled(states, batch)  # (K, B, T - 1)
        outcome = torch.cat([self._outcome(states)[None, :, 1:], self._outcome(path)])
        real = batch.reward[None, :, 1:], going[None, :, 1:]
        reward, proceed = self.heads.losses(outcome, *(x.expand(outcome.shape[:-1]) for x in real))
        losses = more | {
            "prediction": (weight * self._error(path.tensors["emb"], wanted)).sum(0),
            "reward": keep * reward[0] + (weight * reward[1:]).sum(0),
            "continue": proceed[0] + (weight * proceed[1:]).sum(0),
        }
        metrics = self._metrics(emb)
        losses["regularizer"] = self._regularizer(emb).expand_as(batch.reward)
        if self.probe is not None:
            losses |= self.probe.losses(self._probed(emb.detach()), batch.obs)
        weight = torch.ones_like(batch.reward[0])
        return LossOutput(losses, metrics, states, states, weight, batch)

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        return self._seen(batch), batch  # all observations are encoded at once

    def _seen(self, batch: Batch) -> State:
        """Posteriors (B, T)."""
        flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        emb = self.encoder(flat).unflatten(0, batch.reward.shape)
        if self.memory is not None:
            with full_precision(emb):
                context = self.memory.memories(emb, batch.action, batch.is_first)
            return State({"emb": emb, "context": context})
        led = torch.cat([emb[:, :-1], batch.action[:, 1:]], -1)
        led = led * (~batch.is_first[:, 1:]).to(emb.dtype).unsqueeze(-1)
        return State({"emb": emb, "context": F.pad(led, (0, 0, 1, 0))})

    def _unrolled(self, states: State, batch: Batch) -> tuple[State, Tensor]:
        """States (K, B, T - 1) predicted for step t from k = 1..K steps before, all with gradient,
        and what they count: rho^(k - 1), summed to 1 over k, and 0 across resets and beginnings."""
        c, length = self.config, batch.reward.shape[1]
        going = (~batch.is_first).float()
        path, keep = states, torch.ones_like(going)
        paths, weights = [], []
        for k in range(1, min(c.steps, length - 1) + 1):
            path = self.transition(path[:, :-1], batch.action[:, k:])
            keep = keep[:, :-1] * going[:, k:]
            paths.append(path.map(partial(F.pad, pad=(0, 0, k - 1, 0))))
            weights.append(F.pad(keep, (k - 1, 0)) * c.rho ** (k - 1))
        total = sum(c.rho**k for k in range(c.steps))
        return State.stack(paths), torch.stack(weights) / total

    def _masked(self, targets: Tensor, batch: Batch) -> Tensor:
        """The loss (B, T) of predicting embeddings of the whole from a part: over the steps of
        which something is hidden, as large as if that were all."""
        assert self.masked is not None
        lead, c = (targets.shape[0], targets.shape[1]), self.config
        visible = visible_parts(self.spaces, lead, c.patch, targets.device)
        flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        emb = self.encoder(flat, {key: value.flatten(0, 1) for key, value in visible.items()})
        hidden = ~torch.cat([visible[key] for key in sorted(visible)], -1)
        action = batch.action * (~batch.is_first).float().unsqueeze(-1)
        predicted = self.masked(emb.unflatten(0, lead), hidden, action, batch.is_first)
        counts = hidden.any(-1).float()
        return self._error(predicted, targets) * counts / counts.mean()

    def _targets(self, emb: Tensor, batch: Batch) -> Tensor:
        """What is to be predicted (B, T, D)."""
        if self.target is None:
            return emb
        with torch.no_grad():
            flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
            followed: Tensor = self.target(flat).unflatten(0, emb.shape[:2])
            return followed

    def _error(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        if self.target is not None:
            size = (self.config.emb,)
            predicted, wanted = F.layer_norm(predicted, size), F.layer_norm(wanted, size)
        return (predicted - wanted).square().mean(-1)

    def _regularizer(self, emb: Tensor) -> Tensor:
        c, flat = self.config, emb.flatten(0, 1)
        if c.regularizer == "vicreg":
            return collapse.vicreg(flat)
        if c.regularizer != "sigreg":
            return emb.new_zeros(())
        return collapse.sampled_sigreg(flat, c.samples, c.directions)

    def _metrics(self, emb: Tensor) -> dict[str, Tensor]:
        std, rank = collapse.spread(emb.flatten(0, 1))
        return {"emb_std": std, "emb_rank": rank}


Model = JEPA

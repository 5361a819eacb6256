"""Token world models: observations as tokens, and a transformer that predicts the next ones.

State: tokens (B, K) int64, hidden (B, W) and ahead (B, K, W), what the transformer says of the
frame that has come, kv (B, context - 1, K + 1, layers, 2, W), its cache (nn/transformer.py), and
length (B,) int64, the steps seen of this episode, at most `context`; 0 before the first look.

    block_t = [embedded tokens of o_t, embedded a_{t+1}]         K + 1 positions
    ahead_{t+1}, hidden_{t+1} = transformer(block_{<= t})        at the tokens, and at the action
    tokens_{t+1,i} ~ softmax(head_i(ahead_{t+1,i}))              parallel: all at once
                   ~ softmax(head_i(causal(ahead_{t+1,<= i}, tokens_{t+1,< i})))   autoregressive
    features = [pooled tokens, hidden],  reward and continue are read off them
    L = tokens + reward + continue, and each tokenizer's own (nn/tokenizers.py)

Output i of a block predicts token i of the next observation: block teacher forcing (Dedieu et al.
2025), one pass for an imagined step. Deviations from what is published, with reasons:

- The context is a band, not a window that fills: every block sees the `context` blocks up to
  itself. Replay may then give windows of any length, acting never encodes anything again, and
  imagination goes beyond the context as it did in training; no window can be too long.
- No dropout: the cached step and the pass over a batch must agree.
- Bins lie evenly (in symlog space) between the bounds of a space that has them; the published ones
  leave a pole's angle in CartPole 18 values. Vectors of more than `MANY_BINS` numbers are taken by
  fsq, as a block of so many tokens is slow.
- Rare tokens are not drawn: of a hundred bins that a softmax has not yet ruled out each takes
  little, but one is drawn at every other step, and it may stand for 400.
- fsq instead of vq for images, as Simulus has it: its codes do not die.
- A broken (NaN) observation has tokens as any other has: the loss of its tokens is made NaN.

Frames of categorical tokens take one position each, and are learned in another way: see `Storm`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn.frames import Embedder, PackedEmbedder, PackedPredictor, Predictor
from worldflux_dist.nn.observations import OutcomeHeads
from worldflux_dist.nn.optim import LaProp, groups
from worldflux_dist.nn.tokenizers import (
    FSQ,
    VQ,
    Bins,
    Categorical,
    Identity,
    Quantized,
    Tokenizer,
    draw,
    fitting,
    perplexity,
)
from worldflux_dist.nn.transformer import BlockTransformer
from worldflux_dist.settings import Layers, Positive, Scale, Settings, Share, Units, Whole
from worldflux_dist.spaces import ObsSpec, Spaces

Named = dict[str, Tensor]
MANY_BINS = 64  # numbers of a vector
MOST_TOKENS = 1024  # of a frame


@dataclass(frozen=True)
class TokenConfig(Settings):
    """Sizes and constants; the defaults are those of preset small.

    `tokenizer` auto is identity for Discrete and MultiDiscrete observations, bins for vectors and
    fsq for images. `levels` are fsq's, `codes` of `code_size` numbers vq's, `groups` to `rep_scale`
    those of categorical, to which `rare`, `tokens_scale` and `tokenizer_every` say nothing. Tokens
    less likely than `rare` times the likeliest one are not drawn. Imagination begins at the last
    `starts` steps of each row, 0 for all. The tokenizers have their own warm-up and
    `tokenizer_rate` times the learning rate, and learn from every `tokenizer_every`-th step of a
    row alone; all else waits for them until gradient step `start`.
    """

    section: ClassVar[str] = "model_options"

    tokenizer: Literal["auto", "identity", "bins", "fsq", "vq", "categorical"] = "auto"
    mode: Literal["parallel", "autoregressive"] = "parallel"
    rare: Share = 0.01
    width: Units = 128
    layers: Layers = 3
    heads: Units = 4
    context: Annotated[int, Ge(2), Le(1024)] = 16
    units: Units = 128
    depth: Annotated[int, Ge(1), Le(1024)] = 4
    multipliers: Annotated[tuple[Layers, ...], MinLen(1), MaxLen(8)] = (2, 3, 4, 4)
    levels: Annotated[tuple[Annotated[int, Ge(2), Le(64)], ...], MinLen(1), MaxLen(6)] = (8, 8, 8)
    codes: Annotated[int, Ge(2), Le(2**14)] = 512
    code_size: Annotated[int, Ge(1), Le(1024)] = 32
    groups: Annotated[int, Ge(1), Le(1024)] = 32
    classes: Annotated[int, Ge(2), Le(1024)] = 32
    unimix: Annotated[float, Gt(0), Lt(1)] = 0.01
    free_nats: Scale = 1.0
    dyn_scale: Scale = 0.5
    rep_scale: Scale = 0.1
    starts: Whole = 4
    tokens_scale: Scale = 1.0
    discount: Annotated[float, Gt(0), Le(1)] = 1 - 1 / 333
    learning_rate: Positive = 3e-4
    agc: Scale = 0.3
    warmup: Whole = 1000
    start: Whole = 0
    tokenizer_rate: Scale = 1.0
    tokenizer_warmup: Whole = 1000
    tokenizer_every: Annotated[int, Ge(1), Le(1024)] = 4

    def check(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model_options.width is {self.width}: it must be a multiple of twice the heads, "
                f"{2 * self.heads}"
            )
        if self.starts == 1:
            raise ValueError(
                "model_options.starts is 1: it must be 0, for all steps, or at least 2, as what is "
                "learned of replayed rewards needs two"
            )
        if self.tokenizer == "categorical" and self.mode != "parallel":
            raise ValueError("model_options.mode must be parallel where tokens are categorical")
        if math.prod(self.levels) > 2**14:
            raise ValueError(
                f"model_options.levels {self.levels} make more than {2**14} tokens: give fewer"
            )


QUICK: dict[str, Any] = {"learning_rate": 1e-3, "warmup": 100, "tokenizer_warmup": 100}
STORM = replace(
    TokenConfig("categorical", width=512, layers=2, heads=8, context=8, units=512, depth=32),
    multipliers=(1, 2, 4, 8),
    starts=0,
    discount=0.985,
    learning_rate=1e-4,
)
PRESETS = {
    "small": TokenConfig(),
    # The sizes of Dedieu et al. (2025), and of STORM, Zhang et al. (2023).
    "btf": replace(TokenConfig(), heads=8, context=20, learning_rate=1e-3),
    "storm": STORM,
    # They learn small tasks in minutes on two cores: narrow, with a short memory.
    "tiny": TokenConfig(width=64, layers=2, context=8, units=64, starts=8, **QUICK),
    "storm_tiny": replace(
        STORM, groups=16, classes=16, width=64, heads=4, units=64, depth=4, starts=16, **QUICK
    ),
}


def make_tokenizer(key: str, spec: ObsSpec, config: TokenConfig) -> Tokenizer:
    """The tokenizer of one observation. Raises ValueError, with a remedy, for one that does not
    fit."""
    c, fit = config, (*fitting(spec), "categorical")
    many = fit[0] == "bins" and spec.shape[0] > MANY_BINS
    kind = ("fsq" if many else fit[0]) if c.tokenizer == "auto" else c.tokenizer
    if kind not in fit:
        raise ValueError(
            f"model_options.tokenizer {kind} does not fit observation {key!r} ({spec.space}): set "
            f"it to auto, {' or '.join(fit[:-1])}"
        )
    sizes = (c.units, c.depth, c.multipliers)
    makers: dict[str, Callable[[], Tokenizer]] = {
        "identity": partial(Identity.of, spec.space),
        "bins": partial(Bins.of, spec.space),
        "fsq": partial(FSQ, spec, c.levels, *sizes),
        "vq": partial(VQ, spec, c.codes, c.code_size, *sizes),
        "categorical": partial(Categorical, spec, c.groups, c.classes, c.unimix, *sizes),
    }
    made = makers[kind]()
    if made.num_tokens > MOST_TOKENS:
        remedy = "tokenizer to fsq" if spec.kind == "vector" else "multipliers to more of them"
        raise ValueError(
            f"model_options.tokenizer {kind} makes {made.num_tokens} tokens of observation "
            f"{key!r}, more than {MOST_TOKENS}: set model_options.{remedy}"
        )
    return made


class Token(WorldModel):
    """The family's world model. Owns tokenizers, embedder, transformer, predictor and heads."""

    token_type: ClassVar[torch.dtype] = torch.long
    embedder_type: ClassVar[Any] = Embedder
    pieces, exact = ("advance", "transformer.forward"), ("embedder",)

    def __init__(self, spaces: Spaces, config: TokenConfig) -> None:
        super().__init__(spaces)
        c = self.config = config
        self.width, self.discount, self.feature_dim = c.units, c.discount, 2 * c.width
        self.keys = [*spaces.vectors, *spaces.images]
        tokenizers = [make_tokenizer(key, spaces.obs[key], c) for key in self.keys]
        self.entries = [tokenizer.entries for tokenizer in tokenizers]
        self.tokenizers: Any = nn.ModuleList(tokenizers)
        self.embedder: Any = self.embedder_type(tokenizers, spaces.action_dim, c.width)
        positions = self.embedder.positions
        self.transformer = BlockTransformer(c.width, c.layers, c.heads, positions, c.context)
        self.predictor = self._predictor(tokenizers)
        self.heads = OutcomeHeads(self.feature_dim, c.units)
        self.loss_scales = {f"tokens/{key}": c.tokens_scale for key in self.keys}
        self.native = {
            "behavior": {"kind": "actor_critic"},
            "planner": {"method": "none", "samples": 64, "elites": 8, "iterations": 2},
        }
        self.num_tokens = sum(tokenizer.num_tokens for tokenizer in tokenizers)
        self.noise_shape, self.num_starts = (self.num_tokens,), c.starts or None
        sizes = [size for tokenizer in tokenizers for size in tokenizer.sizes]
        self.state_limits = {"tokens": sizes, "length": c.context + 1}

    def _predictor(self, tokenizers: list[Tokenizer]) -> Any:
        c = self.config
        return Predictor(tokenizers, c.width, c.heads, c.mode == "autoregressive", c.rare)

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        own = {"lr": c.learning_rate * c.tokenizer_rate, "warmup": c.tokenizer_warmup, "start": 0}
        split = groups(params, (self.tokenizers, own))
        return LaProp(split, c.learning_rate, agc=c.agc, warmup=c.warmup, start=c.start)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        acting = ("tokenizers", "embedder", "transformer")
        return (*acting, "predictor", "heads") if planning else acting

    def update_targets(self) -> None:
        for tokenizer in self.tokenizers:
            tokenizer.refresh()

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        zeros, width = partial(self.transformer.places.new_zeros, batch_size), self.config.width
        return State(
            {
                "tokens": zeros(sum(self.entries), dtype=self.token_type),
                "hidden": zeros(width),
                "ahead": zeros(self.embedder.ahead, width),
                "kv": zeros(*self.transformer.cache_shape),
                "length": zeros(dtype=torch.long),
            }
        )

    def _remember(self, state: State, action: Tensor, keep: Tensor | None = None) -> State:
        """The state (B) after an action, but for its tokens; rows that `keep` (B,) does not name
        have no past."""
        old, length = state.tensors, state.tensors["length"]
        block = self.embedder(old["tokens"], action)
        out, kv = self.transformer.step(block, old["kv"], (length - 1).clamp(min=0))
        new = {"hidden": out[:, -1], "ahead": out[:, : self.embedder.ahead], "kv": kv}
        if keep is not None:
            length = length * keep
            new = {name: x * keep.view(-1, *[1] * (x.ndim - 1)) for name, x in new.items()}
        return State(old | new | {"length": (length + 1).clamp(max=self.config.context)})

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        keep = state.tensors["length"] > 0
        if is_first is not None:
            keep = keep & ~is_first
        after, obs = self._remember(state, action, keep), self.tensors(obs)
        return State(after.tensors | {"tokens": self._tokens(obs, noise)})

    def _tokens(self, obs: Named, noise: Tensor | None) -> Tensor:
        """The tokens (N, K) of observations (N, ...)."""
        pairs = zip(self.keys, self.tokenizers, strict=True)
        return torch.cat([tokenizer.encode(obs[key]) for key, tokenizer in pairs], -1)

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        after = self._remember(state, action)
        ahead = after.tensors["ahead"]
        if noise is None:
            noise = torch.rand(len(ahead), self.num_tokens, device=ahead.device)
        return State(after.tensors | {"tokens": self.predictor.sample(ahead, self.embedder, noise)})

    def visible(self, state: State) -> State:
        return State({name: state.tensors[name] for name in ("tokens", "hidden", "ahead")})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        """Also `tokens` on request: logits (..., K_i, V_i) of the state's tokens before they were
        seen, which in autoregressive mode are those given the ones before."""
        preds: dict[str, Any] = {}
        ids = state.tensors["tokens"]
        lead, flat = ids.shape[:-1], ids.flatten(0, -2)
        if "obs" in heads:
            parts = zip(self.tokenizers, flat.split(self.entries, -1), strict=True)
            preds["obs"] = self._named([t.decode(part).unflatten(0, lead) for t, part in parts])
        if "tokens" in heads:
            ahead = state.tensors["ahead"].flatten(0, -3)
            logits = self.predictor(ahead, self.embedder.tokens(flat))
            preds["tokens"] = self._named([x.unflatten(0, lead) for x in logits])
        if {"reward", "continue"} & set(heads):
            preds |= self.heads.decode(self.features(state), heads)
        return Prediction(preds)

    def _named(self, values: list[Tensor]) -> Any:
        named = dict(zip(self.keys, values, strict=True))
        return named["obs"] if set(named) == {"obs"} else named

    def features(self, state: State) -> Tensor:
        pooled = self.embedder.pooled(state.tensors["tokens"])
        return torch.cat([pooled, state.tensors["hidden"]], -1)

    # ------------------------------------------------------------------------------ losses

    def _pass(self, ids: Tensor, batch: Batch) -> State:
        """The states (B, T) of a batch with tokens (B, T, K), with gradient but for their caches;
        these are made for the last `num_starts` steps only, (B, starts, ...)."""
        first, length = batch.is_first, ids.shape[1]
        action = F.pad(batch.action[:, 1:], (0, 0, 0, 1))
        out, kept = self.transformer(self.embedder(ids, action), first)
        steps = torch.arange(length, device=ids.device)
        past = steps - torch.where(first, steps, 0).cummax(1).values  # (B, T) blocks of the episode
        out = F.pad(out[:, :-1], (0, 0, 0, 0, 1, 0)) * (past > 0)[..., None, None]
        start = length - min(length, self.num_starts or length)
        kv = self.transformer.caches(kept[:, :-1].detach(), past, start)
        lengths = (past + 1).clamp(max=self.config.context)
        out = {"hidden": out[:, :, -1], "ahead": out[:, :, : self.embedder.ahead]}
        return State({"tokens": ids, **out, "kv": kv, "length": lengths})

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        obs = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        tokens = self._tokens(obs, None if noise is None else noise.flatten(0, 1))
        return self.tail(self._pass(tokens.unflatten(0, batch.reward.shape), batch), batch)

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses (B, T) each: reward, continue, one `tokens/<key>` per observation (their mean),
        and what its tokenizer has: `rec/<key>`, `commit/<key>`. A `Storm` has dyn and rep instead
        of the tokens'; `noise` (B, T, K) fixes its draws.

        A row begins with a look, so `start` is not used. What led to its first step was not seen:
        no tokens and no reward are learned there. The reward loss counts resets (their reward is
        0), tokens are not predicted across them.
        """
        tokens, seen, losses = self._look(batch, noise)
        states = self._pass(tokens, batch)
        moved = (states.tensors["length"] > 1).float()
        surprise, metrics = self._surprise(states, seen, batch)
        losses |= {name: moved * loss for name, loss in surprise.items()}
        going = (1 - batch.is_terminal.float()) * self.discount
        reward, proceed = self.heads.losses(self.features(states), batch.reward, going)
        told = torch.maximum(moved, batch.is_first.float())
        losses |= {"reward": told * reward, "continue": proceed}
        path, steps = self.tail(states, batch)
        weight = torch.ones_like(steps.reward[0])
        return LossOutput(losses, metrics, path, path, weight, steps)

    def _look(self, batch: Batch, noise: Tensor | None) -> tuple[Tensor, Any, Named]:
        """Tokens (B, T, K) of a batch, what `_surprise` needs of them, and the tokenizers' losses
        (B, T)."""
        lead, seen = batch.reward.shape, []
        losses: Named = {}
        for key, tokenizer in zip(self.keys, self.tokenizers, strict=True):
            seen.append(tokenizer.encode(batch.obs[key].flatten(0, 1)).unflatten(0, lead))
            part = batch.obs[key][:, :: self.config.tokenizer_every]
            for name, loss in tokenizer.losses(part.flatten(0, 1)).items():
                losses[f"{name}/{key}"] = self._spread(loss.unflatten(0, part.shape[:2]), lead[1])
        return torch.cat(seen, -1), seen, losses

    def _surprise(self, states: State, seen: Any, batch: Batch) -> tuple[Named, Named]:
        """Losses (B, T) of what was foretold of the tokens that came, and metrics."""
        losses, metrics = {}, {}
        foretold = self.decode(states, ("tokens",)).preds["tokens"]
        for key, tokenizer, ids in zip(self.keys, self.tokenizers, seen, strict=True):
            logits = foretold[key] if isinstance(foretold, dict) else foretold
            loss = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none")
            losses[f"tokens/{key}"] = loss.unflatten(0, ids.shape).mean(-1)
            if self.spaces.obs[key].kind == "vector":
                broken = ~batch.obs[key].isfinite().all(-1)
                losses[f"tokens/{key}"] = losses[f"tokens/{key}"].masked_fill(broken, torch.nan)
            if isinstance(tokenizer, Quantized):
                metrics[f"perplexity/{key}"] = perplexity(ids, tokenizer.vocab)
        return losses, metrics

    def _spread(self, loss: Tensor, length: int) -> Tensor:
        """Losses of every `tokenizer_every`-th step, so many times as large, among zeros (B, T)."""
        every = self.config.tokenizer_every
        return every * F.pad(loss[..., None], (0, every - 1)).flatten(1)[:, :length]


class Storm(Token):
    """Categorical tokens that are learned together with what foretells them, as in STORM: z
    (B, K C), one-hots of `groups` an observation. A step is one position, and ahead = hidden.

        z_t ~ q(. | o_t)                                       posterior, of the frame alone
        hidden_{t+1} = transformer(mix(z_{<= t}, a_{<= t+1}))
        z_{t+1} ~ p(. | hidden_{t+1})                          prior; both are 1 % uniform
        L = rec + reward + continue + 0.5 dyn + 0.1 rep        dyn = max(1, KL(sg q || p))
                                                               rep = max(1, KL(q || sg p))

    All losses reach the encoder through z, straight through the draw, but the KL of a step its own
    posterior by rep alone. z is drawn when acting, too: a policy acts on what it has learned from.
    Free nats are those of a step, as in DreamerV3, not of a batch's mean.
    """

    token_type, embedder_type = torch.float32, PackedEmbedder

    def __init__(self, spaces: Spaces, config: TokenConfig) -> None:
        super().__init__(spaces, config)
        self.loss_scales = {"dyn": config.dyn_scale, "rep": config.rep_scale}
        self.native["behavior"]["horizon"] = 16
        self.update_noise_shape = self.noise_shape
        self.state_limits = {"length": config.context + 1}

    def _predictor(self, tokenizers: list[Tokenizer]) -> Any:
        return PackedPredictor(tokenizers, self.config.width, self.config.unimix)

    def _posterior(self, obs: Named) -> Tensor:
        """Probabilities (N, K, C) of observations (N, ...)."""
        pairs = zip(self.keys, self.tokenizers, strict=True)
        return torch.cat([tokenizer.posterior(obs[key]) for key, tokenizer in pairs], -2)

    def _tokens(self, obs: Named, noise: Tensor | None) -> Tensor:
        return draw(self._posterior(obs), noise)

    def _look(self, batch: Batch, noise: Tensor | None) -> tuple[Tensor, Any, Named]:
        lead, losses = batch.reward.shape, {}
        obs = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        posterior = self._posterior(obs)
        tokens = draw(posterior, None if noise is None else noise.flatten(0, 1))
        parts = zip(self.keys, self.tokenizers, tokens.split(self.entries, -1), strict=True)
        for key, tokenizer, part in parts:
            losses[f"rec/{key}"] = tokenizer.error(part, obs[key]).unflatten(0, lead)
        return tokens.unflatten(0, lead), posterior.unflatten(0, lead), losses

    def _surprise(self, states: State, seen: Any, batch: Batch) -> tuple[Named, Named]:
        dyn, rep = self.predictor.divergences(states.tensors["ahead"], seen)
        nats = self.config.free_nats
        losses = {"dyn": dyn.clamp(min=nats), "rep": rep.clamp(min=nats)}
        return losses, {"kl": dyn.mean().detach()}


def Model(spaces: Spaces, config: TokenConfig) -> Token:
    """The family's: `Storm` with categorical tokens, else `Token`."""
    return (Storm if config.tokenizer == "categorical" else Token)(spaces, config)

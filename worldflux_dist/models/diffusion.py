"""Diffusion: a world model that draws the next observation itself, by denoising.

State: `obs/<key>`, the observation as it is (images uint8); `embed` (B, E), its encoding;
`past/<key>` (B, k - 1, ...) and `past_action`, the history that the denoiser sees beside it;
`memory` (B, M), and `seen` (B,), 1 where there was anything before. Features are [embed, memory].

    m' = core(m, enc(o), a)                       what came before, and the action that went in
    o' ~ p(. | o history, a history, m')          in transition: a denoiser; in update it is seen
    reward(enc(o'), m'), continue(enc(o'), m')    on arrival: heads know state, action and outcome
    L = |F - target|^2 of the denoiser (nn/denoising.py) + reward + continue

Vectors are denoised together: of all of them as one, history and target are normalised by running
moments, and the target is the change o' - o (`target: residual`), scaled to the standard deviation
that the objective expects. Each image has a U-Net on frames in [-1, 1], whose answer is quantised
to the 256 levels that images have. Where there are both, each denoiser also gets enc(o), which has
seen all of them; given that and the memory, vectors and images of one step are drawn apart.

With `latent` the embedding enc(o) is drawn, a vector, and all losses shape the encoder; SIGReg (see
nn/collapse.py) keeps its variance. A decoder that changes nothing shows what was drawn. With
`backbone: transformer` one network is memory and denoiser, as in Dreamer 4: nn/forcing.py.

Deviations from DIAMOND (Alonso et al. 2024), with reasons:

- Its reward model is an LSTM apart, burnt in on a few frames, and its policy another one. Here one
  memory, filtered from the episode's beginning, serves heads and policy, and the denoiser, too
  (`condition_memory`): what is out of sight of the last frames can still be drawn.
- The State holds enc(o) and not only o, because an imagined step needs it four times.
- Reward is two-hot on real rewards, not their sign. There is no attention in the U-Net.
- One optimizer, LaProp, with a rate of its own for the denoisers.

Shortcut forcing is the default: in the same time of learning Pendulum it foresaw one step with half
of EDM's error, in 1, 2 or 4 steps and at every learning rate tried; 15 steps ahead they are close.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn import collapse
from worldflux_dist.nn.denoisers import Denoiser, Denoisers, ImageDenoiser, VectorDenoiser
from worldflux_dist.nn.denoising import EDM, Objective, Shortcut
from worldflux_dist.nn.forcing import Forcing, ForcingHead
from worldflux_dist.nn.history import History, Named, Names
from worldflux_dist.nn.layers import BlockGRU
from worldflux_dist.nn.observations import ObsDecoder, ObsEmbedder, ObsEncoder, OutcomeHeads
from worldflux_dist.nn.optim import LaProp, groups
from worldflux_dist.nn.products import full_precision
from worldflux_dist.settings import Layers, Positive, Scale, Settings, Share, Units, Whole
from worldflux_dist.spaces import Spaces

Length = Annotated[int, Ge(1), Le(64)]


@dataclass(frozen=True)
class DiffusionConfig(Settings):
    """Sizes and constants.

    `steps` is how often the denoiser is asked for one observation. `history` and `frames` are how
    many observations, the last one among them, the denoisers of vectors and of images see.
    `channels` has one number for each level of the U-Net. Images are dear: `denoise_steps` is how
    many steps of a row are denoised in a gradient step, and `starts` from how many, its last ones,
    is imagined; 0 is all. `moment_rate` is the share of a batch in the running moments.

    `latent`: what is drawn is an embedding of `emb` numbers. `backbone` transformer: one of width
    `memory`, with `denoiser_layers` layers and so many `heads`, sees the last `context` steps; on
    images it is always `latent`.
    """

    section: ClassVar[str] = "model_options"

    objective: Literal["edm", "shortcut"] = "shortcut"
    steps: Annotated[int, Ge(1), Le(64)] = 4
    target: Literal["residual", "absolute"] = "residual"
    history: Length = 1
    frames: Length = 4
    condition_memory: bool = True
    backbone: Literal["gru", "transformer"] = "gru"
    heads: Annotated[int, Ge(1), Le(64)] = 4
    context: Annotated[int, Ge(2), Le(1024)] = 8
    latent: bool = False
    emb: Units = 32
    regularizer_scale: Scale = 1.0
    units: Units = 256
    memory: Units = 256
    denoiser_units: Units = 256
    denoiser_layers: Layers = 3
    channels: Annotated[tuple[Units, ...], MinLen(1), MaxLen(8)] = (16, 32, 64, 64)
    channel_blocks: Layers = 1
    depth: Annotated[int, Ge(1), Le(1024)] = 4
    multipliers: Annotated[tuple[Layers, ...], MinLen(1), MaxLen(8)] = (2, 3, 4, 4)
    sigma_offset: Scale = 0.3
    unit_start: bool = False
    denoise_steps: Whole = 2
    starts: Whole = 4
    moment_rate: Share = 0.01
    denoise_scale: Scale = 1.0
    horizon: Annotated[int, Ge(1), Le(10_000)] = 15
    discount: Annotated[float, Gt(0), Le(1)] = 1 - 1 / 333
    learning_rate: Positive = 3e-4
    denoiser_rate: Positive = 3e-4
    agc: Scale = 0.3
    warmup: Whole = 1000

    def check(self) -> None:
        shortcut, forced = self.objective == "shortcut", self.backbone == "transformer"
        wrong, edm = {}, "so set it to one of these or objective to edm"
        if shortcut and self.steps not in Shortcut.STEPS:
            wrong["steps"] = f"the shortcut objective samples in 1, 2 or 4 steps, {edm}"
        if shortcut and self.denoise_steps == 1:
            wrong["denoise_steps"] = f"the shortcut objective needs 2 or more (0 is all), {edm}"
        if forced and not shortcut:
            wrong["objective"] = "a transformer needs shortcut: set it to that or backbone to gru"
        if forced and self.memory % (2 * self.heads):
            wrong["memory"] = f"a transformer needs a multiple of twice its heads, {2 * self.heads}"
        if self.emb % ObsDecoder.MULTIPLE:
            wrong["emb"] = f"it must be a multiple of {ObsDecoder.MULTIPLE}"
        if self.starts == 1:
            wrong["starts"] = "critics learn from step to step: set it to 2 or more, or 0 for all"
        for name, remedy in wrong.items():
            raise ValueError(f"model_options.{name} is {getattr(self, name)}: {remedy}")


# Learns small tasks in minutes on two cores: narrow, with higher learning rates.
TINY = DiffusionConfig(
    steps=2,
    units=64,
    memory=64,
    denoiser_units=128,
    channels=(8, 16, 32, 32),
    depth=4,
    denoise_steps=4,
    starts=2,
    learning_rate=8e-4,
    denoiser_rate=1e-3,
    warmup=100,
)
PRESETS = {
    "tiny": TINY,
    # A transformer in place of GRU and denoiser: Dreamer 4 in small.
    "dreamer4_tiny": replace(
        TINY, backbone="transformer", denoiser_layers=2, starts=8, learning_rate=1e-3
    ),
    "small": DiffusionConfig(),
    # The sizes and constants of DIAMOND, for images.
    "diamond": DiffusionConfig(
        objective="edm",
        steps=3,
        units=512,
        memory=512,
        channels=(64, 64, 64, 64),
        channel_blocks=2,
        depth=32,
        multipliers=(1, 1, 2, 2),
        unit_start=True,
        denoise_steps=8,
        discount=0.985,
        learning_rate=1e-4,
        denoiser_rate=1e-4,
    ),
}


class Diffusion(WorldModel):
    """The family's world model. Owns encoder, memory, denoisers with their moments, heads."""

    pieces: tuple[str, ...] = ("advance", "core.step", "_denoising")
    exact = ("core",)

    def __init__(self, spaces: Spaces, config: DiffusionConfig) -> None:
        super().__init__(spaces)
        c = self.config = config
        self.width, self.discount = c.units, c.discount
        self.latent = c.latent or (c.backbone == "transformer" and bool(spaces.images))
        vision = (c.units, c.depth, c.multipliers)
        self.encoder: Any = (
            ObsEmbedder(spaces, c.emb, *vision) if self.latent else ObsEncoder(spaces, *vision)
        )
        embed = self.encoder.size_out
        self.pictures = {} if self.latent else {f"obs/{key}": key for key in spaces.images}
        vectors = ["embed"] if self.latent else [f"obs/{key}" for key in spaces.vectors]
        shapes = [(c.emb,)] if self.latent else [spaces.obs[key].shape for key in spaces.vectors]
        self.size = sum(shape[0] for shape in shapes)
        self.lengths = dict.fromkeys(vectors, c.history) | dict.fromkeys(self.pictures, c.frames)
        self.feature_dim = embed + c.memory
        self.core = self._make_core()
        self.heads = OutcomeHeads(self.feature_dim, c.units)
        self.history = History(self.lengths, spaces.action_dim)
        self.denoisers: Any = self._make_denoisers()
        self.noise_shape = (self.denoisers.noise_size,)
        self.probe = ObsDecoder(spaces, embed, embed, *vision) if self.latent else None
        self.loss_scales = dict.fromkeys(self.denoisers.parts, c.denoise_scale)
        self.regularized = self.latent and c.regularizer_scale > 0
        self.loss_scales |= {"regularizer": c.regularizer_scale} if self.regularized else {}
        large = bool(self.pictures) or c.backbone == "transformer"  # states
        self.num_starts = (c.starts or None) if large else None
        search = {"samples": 64, "elites": 8, "proposals": 16, "iterations": 2, "horizon": 5}
        self.native = {
            "behavior": {"kind": "actor_critic", "horizon": c.horizon},
            "planner": {"method": "none"} | search,
        }

    def _make_core(self) -> Any:
        c = self.config
        return BlockGRU(c.memory, self.encoder.size_out, self.spaces.action_dim, c.units, blocks=1)

    def _make_denoisers(self) -> Any:
        """One for all vectors, or the embedding, and one for each image."""
        c, spaces, edm = self.config, self.spaces, self.config.objective == "edm"
        mixed = not self.latent and bool(spaces.vectors and spaces.images)
        cond = spaces.action_dim * self.history.num_actions + c.memory * c.condition_memory
        cond += self.encoder.size_out * mixed
        parts: dict[str, tuple[Names, Denoiser]] = {}
        if vectors := tuple(n for n in self.lengths if n not in self.pictures):
            by: Objective = EDM(unit_start=c.unit_start) if edm else Shortcut()
            sizes = (self.size, c.history, cond, c.denoiser_units, c.denoiser_layers)
            residual = c.target == "residual"
            parts["denoise"] = vectors, VectorDenoiser(by, *sizes, residual, c.moment_rate)
        for name, key in self.pictures.items():
            by = EDM(0.5, c.sigma_offset, c.unit_start) if edm else Shortcut()
            shape, net = spaces.obs[key].shape, (c.channels, c.channel_blocks, c.units)
            parts[f"denoise/{key}"] = (name,), ImageDenoiser(by, shape, c.frames, cond, *net)
        return Denoisers(parts, c.condition_memory, mixed, c.denoise_steps)

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        parts = groups(params, (self.denoisers, {"lr": c.denoiser_rate}))
        return LaProp(parts, c.learning_rate, agc=c.agc, warmup=c.warmup)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        acting = ("encoder", "core")
        return (*acting, "denoisers", "heads") if planning else acting

    def update_targets(self) -> None:
        self.denoisers.update_targets()

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        state = self._blank(batch_size)
        state |= self.history.blank(state, batch_size)
        return State(state | {"seen": state["memory"].new_zeros(batch_size)})

    def _blank(self, batch_size: int) -> Named:
        """Zeros of what every state has."""
        zeros = partial(next(self.core.parameters()).new_zeros, batch_size)
        state = {"embed": zeros(self.encoder.size_out), "memory": zeros(self.config.memory)}
        for key, spec in () if self.latent else self.spaces.obs.items():
            kind = torch.uint8 if spec.kind == "image" else torch.float32
            state[f"obs/{key}"] = zeros(*spec.shape, dtype=kind)
        return state

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        obs, old = self.tensors(obs), state.tensors
        keep = old["seen"] if is_first is None else old["seen"] * ~is_first  # (B,)
        memory = self._remember(old["memory"], old["embed"], action) * keep.unsqueeze(-1)
        new = self._look(obs) | {"memory": memory, "seen": torch.ones_like(keep)}
        return State(new | self.history.followed(old, action, new, keep))

    def essential(self, state: State) -> State:
        return State({name: value for name, value in state.tensors.items() if name != "seen"})

    def visible(self, state: State) -> State:
        hidden = ("past", "seen", "kv", "length")
        return State({n: x for n, x in state.tensors.items() if not n.startswith(hidden)})

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        c, old = self.config, state.tensors
        memory = self._remember(old["memory"], old["embed"], action)
        drawn = self.denoisers.draw(old, action, memory, self._normal(noise, action), c.steps)
        new = self._imagined(drawn) | {"memory": memory}
        return State(old | new | self.history.followed(old, action))

    def _imagined(self, drawn: Named) -> Named:
        """What a state holds of what was drawn of it."""
        if self.latent:
            return drawn
        return self._look({name.removeprefix("obs/"): value for name, value in drawn.items()})

    def _normal(self, noise: Tensor | None, action: Tensor) -> Tensor:
        """Normal noise (N, n) of uniform one, which is drawn where there is none."""
        if noise is None:
            noise = torch.rand(len(action), self.denoisers.noise_size, device=action.device)
        return torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6))

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        preds: dict[str, Any] = self.heads.decode(self.features(state), heads)
        if "obs" in heads and self.probe is not None:
            embed = state.tensors["embed"]
            preds["obs"] = self.probe.observations(self.probe(embed, embed))
        elif "obs" in heads:
            obs = {key: state.tensors[f"obs/{key}"] for key in self.spaces.obs}
            preds["obs"] = obs["obs"] if set(obs) == {"obs"} else obs
        return Prediction(preds)

    def features(self, state: State) -> Tensor:
        return torch.cat([state.tensors["embed"], state.tensors["memory"]], -1)

    def _remember(self, memory: Tensor, embed: Tensor, action: Tensor) -> Tensor:
        """m' (B, M). Always in float32: it is small, and errors would add up."""
        with full_precision(memory):
            return self.core(memory, embed, self.core.embed_action(action))

    def _look(self, obs: Named) -> Named:
        """What a state holds of observations (N, ...)."""
        seen = {} if self.latent else {f"obs/{key}": value for key, value in obs.items()}
        return seen | {"embed": self.encoder(obs).float()}

    def _looks(self, batch: Batch) -> Named:
        """`_look` at a batch: (B, T, ...) each."""
        looks = self._look({key: value.flatten(0, 1) for key, value in batch.obs.items()})
        return {name: value.unflatten(0, batch.reward.shape) for name, value in looks.items()}

    # ------------------------------------------------------------------------------ losses

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses (B, T) of reward and continue, and those of the denoisers.

        Rows begin with a look, so `start` is not used. The reward of a first step is that of a
        reset, which is 0, or, in mid-episode, of an action from a state that is not known, and then
        does not count.
        """
        length, needed = batch.reward.shape[1], 2 + (self.config.objective == "shortcut")
        if length < needed:
            raise ValueError(
                f"diffusion ({self.config.objective}) learns from {needed} steps in a row or more "
                f"and replay gives {length}: set replay.batch_length to {needed} or more"
            )
        states = self._seen(batch)
        going = (1 - batch.is_terminal.float()) * self.discount
        told = torch.cat([batch.is_first[:, :1], torch.ones_like(batch.is_first[:, 1:])], 1)
        reward, proceed = self.heads.losses(self.features(states), batch.reward, going)
        losses = {"reward": told * reward, "continue": proceed}
        losses |= self._denoising(states, batch)
        more, metrics = self._embedding(states.tensors["embed"], batch)
        states, batch = self.tail(states, batch)
        weight = torch.ones_like(batch.reward[0])
        return LossOutput(losses | more, metrics, states, states, weight, batch)

    def _denoising(self, states: State, batch: Batch) -> Named:
        return self.denoisers.losses(states.tensors, batch.action, batch.is_first)

    def _embedding(self, embed: Tensor, batch: Batch) -> tuple[Named, Named]:
        """Losses (B, T) of embeddings that are drawn, and of what decodes them; metrics."""
        if self.probe is None:
            return {}, {}
        flat, seen = embed.flatten(0, 1), embed.detach()
        losses = self.probe.losses(self.probe(seen, seen), batch.obs)
        if self.regularized:
            losses["regularizer"] = collapse.sampled_sigreg(flat).expand_as(batch.reward)
        std, rank = collapse.spread(flat)
        return losses, {"emb_std": std, "emb_rank": rank}

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        return self.tail(self._seen(batch), batch)

    def _seen(self, batch: Batch) -> State:
        """Posteriors (B, T), their essential part: `update` step by step, in one pass."""
        state = self._looks(batch)
        with full_precision(state["embed"]):
            state["memory"] = self.core.memories(state["embed"], batch.action, batch.is_first)
        return State(state | self.history.of_steps(state, batch.action, batch.is_first))


class Forced(Diffusion):
    """With a transformer for memory and denoiser, as in Dreamer 4: see nn/forcing.py.

    A state holds the cache of its own and the last blocks, `kv` (B, context - 1, ...), of which
    `length` (B,) count, in place of a history. The memory has seen what the state has, too.
    """

    pieces = ("advance", "_denoising")

    def __init__(self, spaces: Spaces, config: DiffusionConfig) -> None:
        super().__init__(spaces, config)
        self.state_limits = {"length": config.context}

    def _make_core(self) -> Any:
        c = self.config
        sizes = (c.memory, c.denoiser_layers, c.heads, c.context)
        residual = c.target == "residual"
        return Forcing(self.size, self.spaces.action_dim, *sizes, residual, c.moment_rate)

    def _make_denoisers(self) -> Any:
        return ForcingHead(tuple(self.lengths), self.size, self.config.memory)

    def update_targets(self) -> None:
        self.core.update_targets()

    def initial(self, batch_size: int) -> State:
        state = self._blank(batch_size)
        zeros = partial(state["embed"].new_zeros, batch_size)
        kv, length = zeros(*self.core.transformer.cache_shape), zeros(dtype=torch.long)
        return State(state | {"kv": kv, "length": length})

    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        keep = state.tensors["length"] > 0
        keep = keep if is_first is None else keep & ~is_first
        return self._arrived(state.tensors, action, self._look(self.tensors(obs)), keep)

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        old, normal = state.tensors, self._normal(noise, action)
        behind = (self._drawn(old), action, old["kv"], old["length"])
        drawn = self.denoisers.sample(self.core, normal, *behind, self.config.steps)
        sizes = [old[name].shape[-1] for name in self.lengths]
        new = self._imagined(dict(zip(self.lengths, drawn.split(sizes, -1), strict=True)))
        return self._arrived(old, action, new, old["length"] > 0)

    def _arrived(self, old: Named, action: Tensor, new: Named, keep: Tensor) -> State:
        """The state that a look, seen or drawn, makes of the one before where keep (B,)."""
        parts = (self._drawn(new), self._drawn(old), action, old["kv"], old["length"], keep)
        memory, kv, length = self.core.step(*parts)
        return State(new | {"memory": memory, "kv": kv, "length": length})

    def _drawn(self, state: Named) -> Tensor:
        """z (..., n) of a state's tensors."""
        return torch.cat([state[name] for name in self.lengths], -1)

    def _denoising(self, states: State, batch: Batch) -> Named:
        kv, length = states.tensors["kv"], states.tensors["length"]
        steps = (self._drawn(states.tensors), batch.action, batch.is_first)
        return {"denoise": self.denoisers.losses(self.core, *steps, kv, length)}

    def _seen(self, batch: Batch) -> State:
        state = self._looks(batch)
        memory, kv, length = self.core(self._drawn(state), batch.action, batch.is_first)
        return State(state | {"memory": memory, "kv": kv, "length": length})


def Model(spaces: Spaces, config: DiffusionConfig) -> Diffusion:
    """The family's, by its backbone."""
    return (Forced if config.backbone == "transformer" else Diffusion)(spaces, config)

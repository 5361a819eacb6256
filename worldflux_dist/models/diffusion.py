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
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from torch import Tensor, nn

from worldflux_dist.data import Batch
from worldflux_dist.models.base import LossOutput, Prediction, State, WorldModel
from worldflux_dist.nn.denoisers import Denoiser, ImageDenoiser, VectorDenoiser
from worldflux_dist.nn.denoising import EDM, Objective, Shortcut
from worldflux_dist.nn.layers import BlockGRU
from worldflux_dist.nn.observations import ObsEncoder, OutcomeHeads
from worldflux_dist.nn.optim import LaProp, groups
from worldflux_dist.nn.products import full_precision
from worldflux_dist.settings import Layers, Positive, Scale, Settings, Share, Units, Whole
from worldflux_dist.spaces import Spaces

History = Annotated[int, Ge(1), Le(64)]


@dataclass(frozen=True)
class DiffusionConfig(Settings):
    """Sizes and constants.

    `steps` is how often the denoiser is asked for one observation. `history` and `frames` are how
    many observations, the last one among them, the denoisers of vectors and of images see.
    `channels` has one number for each level of the U-Net. Images are dear: `denoise_steps` is how
    many steps of a row are denoised in a gradient step, and `starts` from how many, its last ones,
    is imagined; 0 is all. `moment_rate` is the share of a batch in the running moments.
    """

    section: ClassVar[str] = "model_options"

    objective: Literal["edm", "shortcut"] = "shortcut"
    steps: Annotated[int, Ge(1), Le(64)] = 4
    target: Literal["residual", "absolute"] = "residual"
    history: History = 1
    frames: History = 4
    condition_memory: bool = True
    units: Units = 256
    memory: Units = 256
    denoiser_units: Units = 256
    denoiser_layers: Layers = 3
    channels: Annotated[tuple[Units, ...], MinLen(1), MaxLen(8)] = (32, 64, 64, 64)
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
        if self.objective == "shortcut":
            if self.steps not in Shortcut.STEPS:
                raise ValueError(
                    f"model_options.steps is {self.steps}: the shortcut objective samples in 1, 2 "
                    "or 4 steps, so set it to one of these or objective to edm"
                )
            if self.denoise_steps == 1:
                raise ValueError(
                    "model_options.denoise_steps is 1: the shortcut objective needs 2 or more (0 "
                    "is all), so set it to these or objective to edm"
                )
        if self.starts == 1:
            raise ValueError(
                "model_options.starts is 1: a critic learns from one step to the next, so set it "
                "to 2 or more, or to 0 for all"
            )


PRESETS = {
    # Learns small tasks in minutes on two cores: narrow, with higher learning rates.
    "tiny": DiffusionConfig(
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

    def __init__(self, spaces: Spaces, config: DiffusionConfig) -> None:
        super().__init__(spaces)
        c = self.config = config
        self.width, self.discount = c.units, c.discount
        self.encoder = ObsEncoder(spaces, c.units, c.depth, c.multipliers)
        embed = self.encoder.size_out
        self.feature_dim = embed + c.memory
        self.core = BlockGRU(c.memory, embed, spaces.action_dim, c.units, blocks=1)
        self.heads = OutcomeHeads(self.feature_dim, c.units)
        self.lengths = dict.fromkeys(spaces.vectors, c.history)
        self.lengths |= dict.fromkeys(spaces.images, c.frames)
        self.num_actions = max(self.lengths.values())
        self._make_denoisers()
        self.loss_scales = dict.fromkeys(map(self._loss_name, self.drawn), c.denoise_scale)
        self.num_starts = (c.starts or None) if spaces.images else None
        search = {"samples": 64, "elites": 8, "proposals": 16, "iterations": 2, "horizon": 5}
        self.native = {
            "behavior": {"kind": "actor_critic", "horizon": c.horizon},
            "planner": {"method": "none"} | search,
        }

    def _make_denoisers(self) -> None:
        """One for all vectors and one for each image; `noise_shape` is what they start from."""
        c, spaces, edm = self.config, self.spaces, self.config.objective == "edm"
        cond = spaces.action_dim * self.num_actions + c.memory * c.condition_memory
        cond += self.encoder.size_out * bool(spaces.vectors and spaces.images)
        self.drawn = [tuple(spaces.vectors)] if spaces.vectors else []
        self.drawn += [(key,) for key in spaces.images]
        made: list[Denoiser] = []
        for keys in self.drawn:
            shapes = [spaces.obs[key].shape for key in keys]
            by: Objective = EDM(unit_start=c.unit_start) if edm else Shortcut()
            if keys[0] in spaces.images:
                by = EDM(0.5, c.sigma_offset, c.unit_start) if edm else by
                net = (c.channels, c.channel_blocks, c.units)
                made.append(ImageDenoiser(by, shapes[0], c.frames, cond, *net))
            else:
                size, residual = sum(shape[0] for shape in shapes), c.target == "residual"
                sizes = (size, c.history, cond, c.denoiser_units, c.denoiser_layers)
                made.append(VectorDenoiser(by, *sizes, residual, c.moment_rate))
        self.denoisers = nn.ModuleList(made)
        self.noise_sizes = [denoiser.noise_size for denoiser in made]
        self.noise_shape = (sum(self.noise_sizes),)

    def _loss_name(self, keys: tuple[str, ...]) -> str:
        return f"denoise/{keys[0]}" if keys[0] in self.spaces.images else "denoise"

    @property
    def _parts(self) -> list[tuple[tuple[str, ...], Denoiser]]:
        """What is drawn together, and by what."""
        return list(zip(self.drawn, cast(Any, self.denoisers), strict=True))

    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        c = self.config
        parts = groups(params, (self.denoisers, {"lr": c.denoiser_rate}))
        return LaProp(parts, c.learning_rate, agc=c.agc, warmup=c.warmup)

    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        acting = ("encoder", "core")
        return (*acting, "denoisers", "heads") if planning else acting

    def update_targets(self) -> None:
        for _, denoiser in self._parts:
            denoiser.update_targets()

    # ------------------------------------------------------------------------- five verbs

    def initial(self, batch_size: int) -> State:
        c, zeros = self.config, self.core.hid_bias.new_zeros
        state = {
            "embed": zeros(batch_size, self.encoder.size_out),
            "memory": zeros(batch_size, c.memory),
            "seen": zeros(batch_size),
        }
        for key, length in self.lengths.items():
            spec = self.spaces.obs[key]
            kind = torch.uint8 if spec.kind == "image" else torch.float32
            state[f"obs/{key}"] = zeros(batch_size, *spec.shape, dtype=kind)
            if length > 1:
                state[f"past/{key}"] = zeros(batch_size, length - 1, *spec.shape, dtype=kind)
        if self.num_actions > 1:
            sizes = (self.num_actions - 1, self.spaces.action_dim)
            state["past_action"] = zeros(batch_size, *sizes)
        return State(state)

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
        new = self._followed(old, action, obs) | {"memory": memory}
        for key, value in obs.items():
            if (past := new.get(f"past/{key}")) is not None:
                fresh = keep.view(-1, *[1] * (past.ndim - 1)) == 0
                new[f"past/{key}"] = torch.where(fresh, value.unsqueeze(1).expand_as(past), past)
        if "past_action" in new:
            new["past_action"] = new["past_action"] * keep[:, None, None]
        return State(new | {"seen": torch.ones_like(keep)})

    def essential(self, state: State) -> State:
        return State({name: value for name, value in state.tensors.items() if name != "seen"})

    def visible(self, state: State) -> State:
        return State({n: x for n, x in state.tensors.items() if not n.startswith(("past", "seen"))})

    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        old = state.tensors
        memory = self._remember(old["memory"], old["embed"], action)
        obs = self._draw(old, action, memory, noise)
        return State(old | self._followed(old, action, obs) | {"memory": memory})

    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        preds: dict[str, Any] = self.heads.decode(self.features(state), heads)
        if "obs" in heads:
            obs = {key: state.tensors[f"obs/{key}"] for key in self.spaces.obs}
            preds["obs"] = obs["obs"] if set(obs) == {"obs"} else obs
        return Prediction(preds)

    def features(self, state: State) -> Tensor:
        return torch.cat([state.tensors["embed"], state.tensors["memory"]], -1)

    def _remember(self, memory: Tensor, embed: Tensor, action: Tensor) -> Tensor:
        """m' (B, M). Always in float32: it is small, and errors would add up."""
        with full_precision(memory):
            return self.core(memory, embed, self.core.embed_action(action))

    def _followed(
        self, old: dict[str, Tensor], action: Tensor, obs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state that `obs` makes of the one before, but for the memory."""
        new = {f"obs/{key}": value for key, value in obs.items()} | {
            "embed": self.encoder(obs).float()
        }
        latest = {f"past/{key}": old[f"obs/{key}"] for key in obs} | {"past_action": action}
        for name in (name for name in latest if name in old):
            new[name] = torch.cat([old[name][:, 1:], latest[name].unsqueeze(1)], 1)
        return new

    # --------------------------------------------------------------------------- denoising

    def _condition(self, old: dict[str, Tensor], action: Tensor, memory: Tensor) -> Tensor:
        """What every denoiser is told of the step from the state `old` by `action`: (N, C)."""
        parts = [old["past_action"].flatten(1)] if "past_action" in old else []
        parts.append(action)
        if self.config.condition_memory:
            parts.append(memory)
        if self.spaces.vectors and self.spaces.images:
            parts.append(old["embed"])
        return torch.cat(parts, -1)

    def _history(self, old: dict[str, Tensor], keys: Sequence[str]) -> Tensor:
        """The last observations (N, k, ...), oldest first; vectors as one."""
        newest = torch.cat([old[f"obs/{key}"] for key in keys], -1).unsqueeze(1)
        if f"past/{keys[0]}" not in old:
            return newest
        return torch.cat([torch.cat([old[f"past/{key}"] for key in keys], -1), newest], 1)

    def _draw(
        self, old: dict[str, Tensor], action: Tensor, memory: Tensor, noise: Tensor | None
    ) -> dict[str, Tensor]:
        """The next observations, drawn from uniform `noise` (N, n)."""
        if noise is None:
            noise = torch.rand(len(action), sum(self.noise_sizes), device=action.device)
        normal = torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6))
        told = self._condition(old, action, memory)
        obs: dict[str, Tensor] = {}
        starts = normal.split(self.noise_sizes, -1)
        for (keys, denoiser), start in zip(self._parts, starts, strict=True):
            drawn = denoiser.sample(start, self._history(old, keys), told, self.config.steps)
            sizes = [self.spaces.obs[key].shape[-1] for key in keys]
            obs |= dict(zip(keys, drawn.split(sizes, -1), strict=True))
        return obs

    def _denoising(self, states: State, batch: Batch) -> dict[str, Tensor]:
        """Losses (B, T - 1) of the steps into 1..T-1, of images (B, denoise_steps) of some of them;
        0 for the step into a reset."""
        num, length = batch.reward.shape
        order = torch.rand(length - 1, device=batch.reward.device).argsort(stable=True)
        keep = ~batch.is_first[:, 1:]
        losses = {}
        for keys, denoiser in self._parts:
            image = keys[0] in self.spaces.images
            steps = order[: (image and self.config.denoise_steps) or None]

            def of(value: Tensor, at: Tensor) -> Tensor:
                return value[:, at].transpose(0, 1).flatten(0, 1)  # step after step, as in `order`

            old = {n: of(x, steps) for n, x in states.tensors.items()}
            memory, action = (of(x, steps + 1) for x in (states.tensors["memory"], batch.action))
            told, history = self._condition(old, action, memory), self._history(old, keys)
            target = torch.cat([of(batch.obs[key], steps + 1) for key in keys], -1)
            num_pairs = max(1, len(steps) // 4) * num
            if torch.is_grad_enabled():
                denoiser.take(target, history[:, -1], of(keep, steps))
            loss = denoiser.loss(target, history, told, num_pairs).unflatten(0, (-1, num)).t()
            at = steps.argsort()
            losses[self._loss_name(keys)] = loss[:, at] * keep[:, steps[at]]
        return losses

    # ------------------------------------------------------------------------------ losses

    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses (B, T) of reward and continue, and those of `_denoising`.

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
        states, batch = self.tail(states, batch)
        return LossOutput(losses, {}, states, states, torch.ones_like(batch.reward[0]), batch)

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        return self.tail(self._seen(batch), batch)

    def _seen(self, batch: Batch) -> State:
        """Posteriors (B, T), their essential part: `update` step by step, in one pass."""
        flat = {key: value.flatten(0, 1) for key, value in batch.obs.items()}
        embed = self.encoder(flat).float().unflatten(0, batch.reward.shape)
        with full_precision(embed):
            memory = self.core.memories(embed, batch.action, batch.is_first)
        state = {"embed": embed, "memory": memory}
        state |= {f"obs/{key}": value for key, value in batch.obs.items()}
        rows = torch.arange(len(embed), device=embed.device)[:, None, None]
        now = torch.arange(embed.shape[1], device=embed.device)
        begun = torch.where(batch.is_first, now, 0).cummax(1).values[..., None]  # (B, T, 1)
        for key, length in self.lengths.items():
            if length > 1:  # nothing from before a reset: its first observation again
                back = now[:, None] - torch.arange(length - 1, 0, -1, device=now.device)
                state[f"past/{key}"] = batch.obs[key][rows, torch.maximum(back, begun)]
        if self.num_actions > 1:
            back = now[:, None] - torch.arange(self.num_actions - 2, -1, -1, device=now.device)
            acted = batch.action[rows, back.clamp(min=0)]  # (B, T, k - 1, A)
            state["past_action"] = acted * (back > begun).unsqueeze(-1)
        return State(state)


Model = Diffusion

"""What a world model is: five verbs, one State, one rollout.

`encode`, `update`, `transition` and `decode` are written by each family; `rollout` is written here
once. Policies, critics and planners see a model only through these and through `features`. A new
family is one file in this folder that defines `PRESETS` (name -> frozen config) and `Model`, or
such a module of any installed package (see plugins.py).
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from gymnasium import Space
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from worldflux_dist import plugins
from worldflux_dist.data import Batch
from worldflux_dist.nn.packing import Part
from worldflux_dist.settings import Settings, nearest, parse
from worldflux_dist.spaces import Spaces

Policy = Callable[[Tensor], Tensor]  # features (B, F) -> actions (B, A)


@dataclass
class State:
    """What the model remembers: named tensors that share their leading axes (B, or H B, or B T)."""

    tensors: dict[str, Tensor]

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        return State({name: function(value) for name, value in self.tensors.items()})

    def __getitem__(self, index: Any) -> State:
        return self.map(lambda value: value[index])

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def flatten(self) -> State:
        """Merge the two leading axes: (B, T, ...) -> (B * T, ...)."""
        return self.map(lambda value: value.flatten(0, 1))

    @staticmethod
    def stack(states: Sequence[State], dim: int = 0) -> State:
        names = states[0].tensors
        return State({n: torch.stack([s.tensors[n] for s in states], dim) for n in names})


pytree.register_pytree_node(
    State,
    lambda state: (list(state.tensors.values()), list(state.tensors)),
    lambda values, names: State(dict(zip(names, values, strict=True))),
    serialized_type_name="worldflux_dist.State",
)


@dataclass
class Prediction:
    """`preds["obs"]` in the observation's own units (a dict for several), `preds["reward"]` and
    `preds["continue"]` (a probability that already contains the discount)."""

    preds: dict[str, Any]


@dataclass
class Rollout:
    """An imagined trajectory, time-major: states (H+1, B, ...) with the start (their visible part),
    actions (H, B, A),
    rewards (H, B) and continues (H, B) of states 1..H, start_continue (B,) of state 0."""

    states: State
    actions: Tensor
    rewards: Tensor
    continues: Tensor
    start_continue: Tensor


@dataclass
class LossOutput:
    """Unreduced losses by name, metrics, and states (B, T, ...) of the steps of `batch`.

        step        0          1          2             of one row of `batch`
        obs         o0         o1         o2
                    |          |          |
        states      s0         s1         s2            posteriors: each has seen its obs
                    |
        path        p0 --a1->  p1 --a2->  p2            TD-MPC2: predicted from the first obs
        weight      1          rho        rho^2         DreamerV3: p = s, all of weight 1
                    |          |          |
                    losses of behaviors, whose gradient goes back along the path into the model

    The first axis of each loss is B, or B times a number of windows, those of a row side by side.
    `states` are the posteriors (their essential part): behaviors imagine from them, detached.
    `path` are the states that behaviors may add losses on, with gradient, which is how value
    gradients reach the model: the posteriors themselves, or predictions of them from the first
    observation alone, of which step t counts `weight[t]` (T,). `batch` is the one given; where a
    family trains on shorter windows, its rows cut into such windows; where it has `num_starts`, the
    last so many steps of its rows.
    """

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    states: State
    path: State
    weight: Tensor
    batch: Batch


class WorldModel(nn.Module, ABC):
    """Base of all families. Owns the networks; invariant: nothing here shifts time.

    Attributes a family sets: `feature_dim` F, `width` (units of its own MLPs, which behaviors
    copy), `discount` (what `continue` contains), `loss_scales` (weight of each loss), `native`
    (values of the behavior and the planner it was published with: what it gets where none are asked
    for), `noise_shape` and `update_noise_shape` (of one row's uniform draws in `transition` and in
    `update`; None where there are none), `state_limits` (what the whole numbers of a state stay
    below; uint8 need none), `num_starts` (imagination starts from the last so many steps of each
    row, so that large states stay few; None is all), whether `decode` gives an `obs` and a
    `reward`, whether distances of `goal` mean something, and `pieces`: methods, its own or those of
    a submodule, that are worth compiling (compiled.py), and `exact`: submodules whose weights stay
    float32 in imagination, too (coarse.py).
    """

    feature_dim: int
    width: int
    discount: float
    loss_scales: dict[str, float]
    native: dict[str, dict[str, Any]]
    noise_shape: tuple[int, ...] | None = None
    update_noise_shape: tuple[int, ...] | None = None
    state_limits: Mapping[str, Any] = MappingProxyType({})
    num_starts: int | None = None
    decodes_obs: bool = True
    decodes_reward: bool = True
    reaches_goals: bool = False
    pieces: tuple[str, ...] = ("advance",)
    exact: tuple[str, ...] = ()

    def __init__(self, spaces: Spaces) -> None:
        super().__init__()
        self.spaces = spaces

    @abstractmethod
    def initial(self, batch_size: int) -> State:
        """The state before anything was seen."""

    @abstractmethod
    def update(
        self,
        state: State,
        action: Tensor,
        obs: Any,
        is_first: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> State:
        """Posterior: acted (action (B, A) went in) and looked (obs came out).

        Rows with is_first (B,) forget state and action. `noise` fixes the family's random draws.
        """

    @abstractmethod
    def transition(self, state: State, action: Tensor, noise: Tensor | None = None) -> State:
        """Prior: acted with (B, A), eyes closed."""

    @abstractmethod
    def decode(
        self, state: State, heads: Sequence[str] = ("obs", "reward", "continue")
    ) -> Prediction:
        """Those of `heads` that the family gives, of any leading shape: the obs of this state, the
        reward on arriving in it, the probability of going on from it."""

    @abstractmethod
    def features(self, state: State) -> Tensor:
        """(..., F): all that policies and critics see."""

    @property
    def feature_parts(self) -> tuple[Part, ...]:
        """What features are made of, for those that travel between processes."""
        return (Part("float", self.feature_dim),)

    def goal(self, state: State) -> Tensor:
        """(..., G): what a plan to a goal brings near to that of the goal, for families whose
        distances mean something (`reaches_goals`)."""
        return self.features(state)

    @abstractmethod
    def loss(
        self, batch: Batch, start: State | None = None, noise: Tensor | None = None
    ) -> LossOutput:
        """Losses of a (B, T) batch of tensors, from state `start` (default: initial)."""

    @abstractmethod
    def optimizer(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The family's optimizer over its own and the behavior's parameters."""

    @abstractmethod
    def inference_modules(self, planning: bool = False) -> tuple[str, ...]:
        """Names of the submodules that `update` needs, and with `planning` also `transition` and
        the decoding of reward and continue: what runners are sent."""

    def essential(self, state: State) -> State:
        """The part of a state that `transition`, `decode` and `features` need: what is carried
        through imagination."""
        return state

    def visible(self, state: State) -> State:
        """The part of an essential state that `decode` and `features` need: what is kept of every
        imagined step. A memory that only `transition` reads, such as a cache, is not in it."""
        return state

    def update_targets(self) -> None:
        """After every gradient step, where the family has networks that follow others."""

    def encode(self, obs: Any, noise: Tensor | None = None) -> State:
        """The state of a first look: update(initial, 0, obs, is_first=True, noise)."""
        obs = self.tensors(obs)
        num = next(iter(obs.values())).shape[0]
        state = self.initial(num)
        device = next(iter(state.tensors.values())).device
        action = torch.zeros(num, self.spaces.action_dim, device=device)
        first = torch.ones_like(action[:, 0], dtype=torch.bool)
        return self.update(state, action, obs, first, noise)

    @torch.no_grad()
    def observe(self, batch: Batch, noise: Tensor | None = None) -> tuple[State, Batch]:
        """What imagination starts from: posteriors (B, T), their essential part, and their steps.

        The steps are those of `batch`, or the last `num_starts` of each row. `update` step by step
        from the initial state, without gradient; `noise` (B, T, ...) fixes its draws.
        """
        num, length = batch.reward.shape
        state, states = self.initial(num), []
        first = length - min(length, self.num_starts or length)
        for t in range(length):
            obs = {key: value[:, t] for key, value in batch.obs.items()}
            draws = None if noise is None else noise[:, t]
            state = self.update(state, batch.action[:, t], obs, batch.is_first[:, t], draws)
            if t >= first:
                states.append(self.essential(state))
        return State.stack(states, 1), batch.map(lambda value: value[:, first:])

    def tail(self, states: State, batch: Batch) -> tuple[State, Batch]:
        """What of (B, T) states and their steps imagination starts from; of states, what was made
        for no other steps may be as short already."""
        num = min(self.num_starts or batch.reward.shape[1], batch.reward.shape[1])
        return states.map(lambda value: value[:, -num:]), batch.map(lambda value: value[:, -num:])

    def rollout(
        self,
        state: State,
        actions: Tensor | Policy,
        horizon: int | None = None,
        noise: Tensor | None = None,
    ) -> Rollout:
        """Imagine from state (B, ...) with given actions (H, B, A) or `horizon` steps of a policy.

        `noise` (H, ...) fixes the draws of each transition.
        """
        if horizon is None:
            assert isinstance(actions, Tensor), "a policy needs a horizon"
            horizon = len(actions)
        state = self.essential(state)
        states, taken = [self.visible(state)], []
        for action, reached in self.walk(state, actions, horizon, noise):
            states.append(self.visible(reached))
            taken.append(action)
        path = State.stack(states)
        preds = self.decode(path, ("reward", "continue")).preds
        reward, going = preds["reward"], preds["continue"]
        return Rollout(path, torch.stack(taken), reward[1:], going[1:], going[0])

    def walk(
        self, state: State, actions: Tensor | Policy, horizon: int, noise: Tensor | None = None
    ) -> Iterator[tuple[Tensor, State]]:
        """The steps of a rollout from an essential state, one by one: action and next state."""
        for h in range(horizon):
            act = actions[h] if isinstance(actions, Tensor) else actions
            action, state = self.advance(state, act, None if noise is None else noise[h])
            yield action, state

    def advance(
        self, state: State, act: Tensor | Policy, noise: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step of imagination: the action (B, A), given or chosen by a policy, and the
        essential state it leads to."""
        action = act if isinstance(act, Tensor) else act(self.features(state))
        return action, self.transition(state, action, noise)

    def tensors(self, obs: Any) -> dict[str, Tensor]:
        """Converted observations (see `Spaces.encode_obs`) as tensors on the model's device."""
        device = next(self.parameters()).device
        named = obs if isinstance(obs, dict) else {"obs": obs}
        kinds = {"image": torch.uint8, "vector": torch.float32}
        return {
            key: torch.as_tensor(value, dtype=kinds[self.spaces.obs[key].kind], device=device)
            for key, value in named.items()
        }


# ------------------------------------------------------------------------------- creation


def families() -> list[str]:
    """Names of all families: the modules beside this one, and those that other packages bring."""
    own = tuple(_own())
    return sorted([*own, *plugins.entries(plugins.FAMILIES, own)])


def _own() -> list[str]:
    folder = importlib.import_module("worldflux_dist.models").__path__
    return [m.name for m in pkgutil.iter_modules(folder) if m.name != "base"]


def _family(name: str) -> Any:
    """The module of a family. Raises ValueError for one that another package brings broken."""
    if name in _own():
        return importlib.import_module(f"worldflux_dist.models.{name}")
    entry = plugins.entries(plugins.FAMILIES)[name]
    module = plugins.load(entry)
    model, presets = getattr(module, "Model", None), getattr(module, "PRESETS", None)
    wrong = ""
    if not isinstance(model, type) or not issubclass(model, WorldModel):
        wrong = "has no Model: define one, a subclass of WorldModel"
    elif model.__abstractmethods__:
        wrong = f"lacks {', '.join(sorted(model.__abstractmethods__))}: define them in its Model"
    elif not isinstance(presets, dict) or not presets:
        wrong = "has no PRESETS: define some, a dict of names and frozen configs"
    elif not all(isinstance(preset, Settings) for preset in presets.values()):
        broken = next(n for n, preset in presets.items() if not isinstance(preset, Settings))
        wrong = f"has a preset {broken!r} that is no config: make it a dataclass of Settings"
    if wrong:
        raise ValueError(f"family {name!r} of the package {plugins.package(entry)} {wrong}")
    return module


def create_from_spaces(name: str, spaces: Spaces, **options: Any) -> WorldModel:
    """As create_world_model, from Spaces already made."""
    family, _, preset = name.partition(":")
    if family not in families():
        raise ValueError(f"no world-model family {family!r:.100}: {nearest(family, families())}")
    module = _family(family)
    names = [f"{family}:{p}" for p in module.PRESETS]
    if preset not in module.PRESETS:
        raise ValueError(f"no preset {name!r:.100}: {nearest(name, names)}")
    model: WorldModel = module.Model(
        spaces, parse(module.PRESETS[preset], options, f"{name} has no option {{}}")
    )
    return model


def create_world_model(
    name: str, observation_space: Space, action_space: Space, **options: Any
) -> WorldModel:
    """Build a world model by `family:preset`, for example "dreamerv3:size12m".

    `options` replace single fields of the preset. Raises ValueError, naming the nearest known
    name, for an unknown family, preset or option, and for spaces that are not supported.
    """
    return create_from_spaces(name, Spaces(observation_space, action_space), **options)

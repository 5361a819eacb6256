"""Requests as they come in, held to the model's names, shapes and limits before they touch it.

Whatever is wrong is one ValueError that names the field. Sizes are counted before anything is
allocated: a horizon of a billion costs nothing but the sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Le

from worldflux_dist.serve import wire
from worldflux_dist.serve.dreams import HEADS, ActOn, Arrays, Dreams, Encode, Imagine
from worldflux_dist.settings import Count, Positive, Settings

MB = 2**20
Bytes = Annotated[int, Ge(1024), Le(2**30)]
Spec = dict[str, tuple[np.dtype, tuple[int, ...]]]  # of one row


@dataclass(frozen=True)
class Limits(Settings):
    """What a call may ask for, and how many may wait.

    `lanes` are rows times samples of a call, `batch_lanes` those of all calls in a batch, `steps`
    of a sequence to encode, `seconds` what a call may take with its waiting. More than `calls` at a
    time are refused.
    """

    section: ClassVar[str] = "limits"

    horizon: Count = 1024
    lanes: Count = 4096
    batch_lanes: Count = 1024
    samples: Count = 256
    steps: Count = 1024
    request_bytes: Bytes = 8 * MB
    answer_bytes: Bytes = 64 * MB
    calls: Count = 256
    seconds: Positive = 60.0


class Requests:
    """Turns messages into calls. Owns the names and shapes of a model's tensors."""

    def __init__(self, dreams: Dreams, limits: Limits) -> None:
        agent, model, spaces = dreams.agent, dreams.model, dreams.agent.spaces
        self.limits, self.spaces = limits, spaces
        self.num_starts = dreams.num_starts
        blank = model.initial(1)
        self.obs: Spec = {name: (np.dtype(x.dtype), x.shape) for name, x in spaces.obs.items()}
        self.state = _spec(blank.tensors)
        self.essential = _spec(model.essential(blank).tensors)
        self.carry = _spec(agent.initial_carry(1))
        self.state_limits = dict(model.state_limits)
        possible = {"obs": model.decodes_obs, "reward": model.decodes_reward}
        self.heads = tuple(head for head in HEADS if possible.get(head, True))
        self._head_bytes = {
            "features": 4 * model.feature_dim,
            "obs": sum(map(_row_bytes, self.obs.values())),
            "action": 4 * spaces.action_dim,
        }

    # ------------------------------------------------------------------------------ the requests

    def encode(self, request: Any) -> Encode:
        obs = self._observations(request.observations, "observations", sequences=None)
        lead = next(iter(obs.values())).shape[: self._axes(obs)]
        num, length = (*lead, 1)[:2]
        self._at_most("observations rows", num, "lanes")
        self._at_most("observations steps", length, "steps")
        if len(lead) == 1:
            obs = {name: value[:, None] for name, value in obs.items()}
        action = np.zeros((num, length, self.spaces.action_dim), np.float32)
        first = np.zeros((num, length), bool)
        goes_on = bool(request.state.tensors)
        if request.HasField("action"):
            action = self._action(request.action, (num, length))
        elif goes_on or length > 1:
            raise ValueError("action is missing: give (N, T, A), what led to each observation")
        if request.HasField("is_first"):
            first = _held(wire.array(request.is_first, "is_first"), "is_first", bool, first.shape)
        elif not goes_on:
            first[:, 0] = True
        state = self._state(request.state, "state", self.state, num) if goes_on else None
        return Encode(obs, action, first, state, request.seed)

    def imagine(self, request: Any) -> Imagine:
        kind = request.WhichOneof("start")
        given: dict[str, Any] = {}
        if kind is None:
            raise ValueError("start is missing: give state, observations or from_replay")
        if kind == "state":
            given["state"] = self._state(request.state, "state", self.essential)
        elif kind == "observations":
            given["obs"] = self._observations(request.observations, "observations", False)
        else:
            given["from_replay"] = self._from_replay(request.from_replay)
        samples = request.samples or 1
        self._at_most("samples", samples, "samples")
        call = Imagine(0, **given, samples=samples, seed=request.seed)
        self._at_most("rows times samples", call.rows, "lanes")
        heads = tuple(dict.fromkeys(request.heads)) or ("reward", "continue")
        for head in heads:
            if head not in self.heads:
                known = ", ".join(self.heads)
                raise ValueError(f"heads has {head!r:.40}, which this model does not give: {known}")
        horizon, action = request.horizon, None
        if request.HasField("action"):
            shape = tuple(request.action.shape)
            given_steps = shape[0] if len(shape) == 3 else 0
            if horizon not in (0, given_steps):
                raise ValueError(f"horizon is {horizon} and action has {given_steps} steps")
            horizon = given_steps
        self._at_most("horizon", horizon, "horizon")
        if request.HasField("action"):
            action = self._action(request.action, (horizon, call.starts))
        how: dict[str, Any] = {"heads": heads, "by_step": request.by_step}
        how |= {"greedy": request.greedy, "action": action}
        call = replace(call, horizon=horizon, **how)
        if (size := self.size(call)) > self.limits.answer_bytes:
            raise ValueError(
                f"the answer takes {size} bytes, more than limits.answer_bytes "
                f"{self.limits.answer_bytes}: ask for fewer rows, steps or heads"
            )
        return call

    def act(self, request: Any) -> ActOn:
        obs = self._observations(request.observations, "observations", False)
        num = len(next(iter(obs.values())))
        self._at_most("observations rows", num, "lanes")
        remembers = bool(request.carry.tensors)
        carry = self._state(request.carry, "carry", self.carry, num) if remembers else None
        first = np.full(num, not remembers)
        if request.HasField("is_first"):
            given = wire.array(request.is_first, "is_first")
            first = first | _held(given, "is_first", bool, first.shape)
        return ActOn(obs, first, carry, request.greedy, request.seed)

    def size(self, call: Encode | Imagine | ActOn) -> int:
        """Bytes of the answer to a call."""
        if not isinstance(call, Imagine):
            spec = self.state if isinstance(call, Encode) else self.carry
            return call.rows * sum(map(_row_bytes, spec.values()))
        steps = sum(self._head_bytes.get(head, 4) for head in call.heads)
        state = sum(map(_row_bytes, self.essential.values())) * ("state" in call.heads)
        return call.rows * ((call.horizon + 1) * steps + state)

    # -------------------------------------------------------------------------------- their parts

    def _at_most(self, name: str, value: int, limit: str) -> None:
        most = getattr(self.limits, limit)
        if value > most:
            raise ValueError(f"{name}: {value} are more than the {most} of limits.{limit}")

    def _from_replay(self, num: int) -> int:
        if not self.num_starts:
            raise ValueError("from_replay: there is no replay here: give state or observations")
        if num < 1:
            raise ValueError("from_replay is 0: ask for one start at least")
        return num

    def _axes(self, obs: Arrays) -> int:
        """How many axes of observations lead: rows, or rows and steps."""
        name, value = next(iter(obs.items()))
        return value.ndim - len(self.obs[name][1])

    def _observations(self, message: Any, where: str, sequences: bool | None) -> Arrays:
        """Of rows (N), or of sequences (N, T); None takes both."""
        found = wire.arrays(message.tensors, where)
        _named(found, self.obs, where)
        axes = self._axes(found)
        allowed = (1, 2) if sequences is None else (1 + sequences,)
        if axes not in allowed:
            raise ValueError(f"{where} has {axes} axes before the shape of an observation")
        lead = next(iter(found.values())).shape[:axes]
        if min(lead) < 1:
            raise ValueError(f"{where} is empty: give one row at least")
        return {
            name: _held(value, f"{where}.{name}", self.obs[name][0], (*lead, *self.obs[name][1]))
            for name, value in found.items()
        }

    def _action(self, message: Any, lead: tuple[int, ...]) -> np.ndarray:
        value = wire.array(message, "action")
        return _held(value, "action", np.float32, (*lead, self.spaces.action_dim))

    def _state(self, message: Any, where: str, spec: Spec, num: int | None = None) -> Arrays:
        """Tensors of these names, for `num` rows where that is known; others are left out."""
        found = wire.arrays(message.tensors, where)
        missing = spec.keys() - found.keys()
        if missing:
            raise ValueError(f"{where} lacks {', '.join(sorted(missing))}: send it as it came back")
        rows = num if num is not None else (found[next(iter(spec))].shape or (0,))[0]
        if rows < 1:
            raise ValueError(f"{where} is empty: give one row at least")
        state = {}
        for name, (dtype, shape) in spec.items():
            value = _held(found[name], f"{where}.{name}", dtype, (rows, *shape))
            limit = self.state_limits.get(name.removeprefix("state/"))
            if limit is not None and ((value < 0) | (value >= np.asarray(limit))).any():
                raise ValueError(f"{where}.{name} has a number that none of its states has")
            state[name] = value
        return state


def _spec(tensors: Mapping[str, Any]) -> Spec:
    rows = {name: value[:1].cpu().numpy() for name, value in tensors.items()}
    return {name: (value.dtype, value.shape[1:]) for name, value in rows.items()}


def _row_bytes(spec: tuple[np.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * int(np.prod(spec[1], dtype=np.int64))


def _named(found: Arrays, spec: Spec, where: str) -> None:
    if found.keys() != spec.keys():
        names, wanted = (", ".join(sorted(x)) or "none" for x in (found, spec))
        raise ValueError(f"{where} are of the names {names:.200}: they must be {wanted}")


def _held(value: np.ndarray, where: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The value, once it has this type and shape and is finite."""
    wanted = f"{wire.NAMES[np.dtype(dtype).newbyteorder('<')]} {list(shape)}"
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(f"{where} is {value.dtype} {list(value.shape)}: it must be {wanted}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ValueError(f"{where} has numbers that are not finite")
    return value


def describe(dreams: Dreams, requests: Requests) -> Any:
    """What GetModel says."""
    agent, limits = dreams.agent, requests.limits
    told = wire.messages.Limits.DESCRIPTOR.fields_by_name
    family, _, preset = agent.recipe["model"].partition(":")
    return wire.messages.Model(
        family=family,
        preset=preset,
        version=wire.as_version(dreams.version),
        observations=_specs(requests.obs),
        action=[{"kind": part.kind, "size": part.size} for part in agent.spaces.action_parts],
        state=_specs(requests.state),
        carry=_specs(requests.carry),
        heads=requests.heads,
        discount=dreams.model.discount,
        feature_dim=dreams.model.feature_dim,
        plans=agent.planner is not None,
        starts=requests.num_starts,
        limits={name: getattr(limits, name) for name in told},
        spaces_json=json.dumps(agent.spaces.to_json()),
    )


def _specs(spec: Spec) -> list[Any]:
    make = wire.messages.TensorSpec
    return [
        make(name=name, datatype=wire.NAMES[dtype.newbyteorder("<")], shape=shape)
        for name, (dtype, shape) in spec.items()
    ]

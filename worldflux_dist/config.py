"""One configuration, from YAML overlays and dotted overrides, parsed strictly.

The parts are frozen dataclasses beside the code that reads them; this file joins them, merges
overlays from left to right and turns every mistake into one clear sentence. A saved config loads
back equal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_type_hints

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

from worldflux_dist.agent import Agent
from worldflux_dist.data import Spaces
from worldflux_dist.envs import EnvConfig
from worldflux_dist.learner import LearnerConfig
from worldflux_dist.models.base import nearest
from worldflux_dist.replay.buffer import ReplayConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long, at which ratio, and how often to look.

    Units are env steps (resets included) except `checkpoint_every`, seconds. `threshold` is the
    mean evaluation return that counts as passed; without one no verdict is given.
    """

    env_steps: int = 1_000_000
    train_ratio: float = 32.0
    prefill: int = 1024
    eval_every: int = 50_000
    eval_episodes: int = 10
    checkpoint_every: float = 600.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        _check_least("train", self, env_steps=1, train_ratio=0, prefill=0, checkpoint_every=0)
        _check_least("train", self, eval_every=1, eval_episodes=1)
        if self.prefill >= self.env_steps:
            raise ValueError(
                f"train.prefill is {self.prefill}: nothing would be learned in env_steps "
                f"{self.env_steps}, so it must be less"
            )


LEAST_STALENESS = 32  # weights are published every 16 gradient steps, and two rounds overlap


@dataclass(frozen=True)
class ScaleConfig:
    """How many processes of each role, and how many steps a chunk holds.

    `num_learners` processes share every batch. `acting` actor: one more process, with the GPU where
    there is one, acts for all runners. `storage` keeps checkpoints and replay, each run in a folder
    of its name: a path or URL that all nodes see; empty is the run directory. Whoever is silent
    for `patience` seconds is started again; each time that is doubled, up to ten minutes. Weights
    that act are at most `max_staleness` gradient steps old.
    """

    num_runners: int = 2
    num_shards: int = 2
    num_learners: int = 1
    chunk_length: int = 64
    runner_threads: int = 1
    acting: Literal["runner", "actor"] = "runner"
    storage: str = ""
    patience: float = 300.0
    max_staleness: int = 32

    def __post_init__(self) -> None:
        _check_least("scale", self, num_runners=1, num_shards=1, num_learners=1)
        _check_least("scale", self, chunk_length=1, runner_threads=1, patience=1)
        _check_least("scale", self, max_staleness=4)


@dataclass(frozen=True)
class ImaginationConfig:
    """Where the policy learns: with the model (`fused`), or in processes of its own (`actors`) on
    what `num_imaginers` imagine for `num_policy_learners`.

    `queue_size` imagined batches at most wait for the policy learners. One that is more than
    `max_staleness` gradient steps behind, of the model or of the policy, is thrown away.
    """

    mode: Literal["fused", "actors"] = "fused"
    num_imaginers: int = 1
    num_policy_learners: int = 1
    queue_size: int = 4
    max_staleness: int = 64

    def __post_init__(self) -> None:
        _check_least("imagination", self, num_imaginers=1, num_policy_learners=1)
        _check_least("imagination", self, queue_size=1, max_staleness=LEAST_STALENESS)


@dataclass(frozen=True)
class Config:
    """Everything a run needs; saved as config.yaml in its run directory.

    `model_options` replace single fields of the preset; `behavior` (its `kind` and fields) and
    `planner` those of the ones the family was published with.
    """

    seed: int = 0
    model: str = "dreamerv3:size12m"
    model_options: dict[str, Any] = field(default_factory=dict)
    behavior: dict[str, Any] = field(default_factory=dict)
    planner: dict[str, Any] = field(default_factory=dict)
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it must be at least 0")
        if self.replay.batch_size % self.scale.num_learners:
            raise ValueError(
                f"replay.batch_size {self.replay.batch_size} cannot be shared by "
                f"scale.num_learners {self.scale.num_learners}: make it a multiple of them"
            )
        rows = self.replay.batch_size // self.scale.num_learners
        if rows % self.learner.accumulate:
            raise ValueError(
                f"learner.accumulate {self.learner.accumulate} must divide a learner's {rows} rows"
            )
        apart = self.imagination.mode == "actors"
        if apart and self.replay.batch_size % self.imagination.num_policy_learners:
            raise ValueError(
                f"replay.batch_size {self.replay.batch_size} cannot be shared by "
                f"imagination.num_policy_learners {self.imagination.num_policy_learners}: make it "
                "a multiple of them"
            )
        if self.imagination.queue_size < self.imagination.num_policy_learners:
            raise ValueError(
                f"imagination.queue_size is {self.imagination.queue_size}: it must be at least "
                f"imagination.num_policy_learners, {self.imagination.num_policy_learners}"
            )

    def make_agent(self, spaces: Spaces) -> Agent:
        """A fresh agent. Raises ValueError for options that do not exist or do not fit."""
        return Agent(self.model, spaces, self.model_options, self.behavior, self.planner)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what to change."""


_PARSER: TypeAdapter[Config] = TypeAdapter(Config)


def load(overlays: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Config:
    """Merge YAML files from left to right, then overrides like `env.id=Pendulum-v1`.

    Raises ConfigError for a missing file, an unknown key (naming the nearest) or a wrong type.
    """
    merged: dict[str, Any] = {}
    for path in overlays:
        _merge(merged, _read(Path(path)))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} is not of the form key.subkey=value")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: {value!r} is not valid YAML") from None
        for key in reversed(name.split(".")):
            nested = {key: nested}
        _merge(merged, nested)
    return from_dict(_numbers(merged))


def from_dict(values: dict[str, Any]) -> Config:
    """Parse plain values. Raises ConfigError naming the key."""
    _check_keys(Config, values, "")
    try:
        # JSON's strictness is the wanted one: lists for tuples and 1 for 1.0, but no "1" for 1.
        return _PARSER.validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # a part's own check, which names its key
            raise ConfigError(str(first["ctx"]["error"])) from None
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}") from None


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays as Python's, paths as text."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    raise ConfigError(
        f"{value!r} is of type {type(value).__name__}, which no config can hold: write a number, a "
        "text, a list or a mapping"
    )


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def to_dict(config: Config) -> dict[str, Any]:
    return asdict(config)


def _check_least(section: str, part: Any, **least: int) -> None:
    for name, low in least.items():
        value = getattr(part, name)
        if not low <= value < math.inf:
            raise ValueError(f"{section}.{name} is {value}: it must be at least {low} and finite")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        names = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
        raise ConfigError(f"no config file {path}: {nearest(str(path), names or ['(none there)'])}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not a {type(values).__name__}")
    return values


def _numbers(value: Any) -> Any:
    """Numbers like 1e6, which YAML takes for text, as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9.]+e[+-]?[0-9]+", value):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _merge(base: dict[str, Any], overlay: dict[str, Any]) -> None:
    for key, value in overlay.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _check_keys(kind: type, values: dict[str, Any], prefix: str) -> None:
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"unknown config key {prefix + str(key)!r}: {nearest(str(key), known)}"
            )
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is a section: set {prefix}{key}.<name>")
            assert isinstance(hints[key], type)
            _check_keys(hints[key], value, f"{prefix}{key}.")

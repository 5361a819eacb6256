"""One configuration, from YAML overlays and dotted overrides, parsed strictly.

The parts are frozen dataclasses beside the code that reads them; this file joins them, merges
overlays from left to right and turns every mistake into one clear sentence. A saved config loads
back equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import yaml
from annotated_types import Ge, Le

from worldflux_dist.agent import Agent
from worldflux_dist.envs import EnvConfig
from worldflux_dist.learner import LearnerConfig
from worldflux_dist.replay import ReplayConfig
from worldflux_dist.settings import Count, Scale, Settings, Text, Whole, free, nearest, parse
from worldflux_dist.spaces import Spaces

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**16, 10_000, 32  # of a YAML file
Processes = Annotated[int, Ge(1), Le(10_000)]  # or threads


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How long, at which ratio, and how often to look.

    Units are env steps (resets included) except `checkpoint_every`, seconds. `eval_every` 0
    evaluates only at the end. `threshold` is the mean evaluation return that counts as passed;
    without one no verdict is given.
    """

    section: ClassVar[str] = "train"

    env_steps: Annotated[int, Ge(1), Le(2**62)] = free(1_000_000)
    train_ratio: Scale = free(32.0)
    prefill: Whole = 1024
    eval_every: Whole = free(50_000)
    eval_episodes: Count = free(10)
    checkpoint_every: Scale = free(600.0)
    threshold: Annotated[float, Ge(-1e12), Le(1e12)] | None = free(None)

    def check(self) -> None:
        if self.prefill >= self.env_steps:
            raise ValueError(
                f"train.prefill is {self.prefill}: nothing would be learned in env_steps "
                f"{self.env_steps}, so it must be less"
            )


LEAST_STALENESS = 32  # weights are published every 16 gradient steps, and two rounds overlap


@dataclass(frozen=True)
class ScaleConfig(Settings):
    """How many processes of each role, and how many steps a chunk holds.

    `num_learners` processes share every batch. `acting` actor: one more process, with the GPU where
    there is one, acts for all runners. `storage` keeps checkpoints and replay, each run in a folder
    of its name: a path or URL that all nodes see; empty is the run directory. A process that is
    silent for `patience` seconds is restarted; each time that is doubled, up to ten minutes.
    Weights that act are at most `max_staleness` gradient steps old.
    """

    section: ClassVar[str] = "scale"

    num_runners: Processes = free(2)
    num_shards: Processes = free(2)
    num_learners: Processes = free(1)
    chunk_length: Count = free(64)
    runner_threads: Processes = free(1)
    acting: Literal["runner", "actor"] = free("runner")
    storage: Text = free("")
    patience: Annotated[float, Ge(1), Le(1e9)] = free(300.0)
    max_staleness: Annotated[int, Ge(4), Le(2**20)] = free(32)


@dataclass(frozen=True)
class ImaginationConfig(Settings):
    """Where the policy learns: with the model (`fused`), or in processes of its own (`actors`) on
    what `num_imaginers` imagine for `num_policy_learners`.

    `queue_size` imagined batches at most wait for the policy learners. One that is more than
    `max_staleness` gradient steps behind, of the model or of the policy, is thrown away.
    """

    section: ClassVar[str] = "imagination"

    mode: Literal["fused", "actors"] = "fused"
    num_imaginers: Processes = free(1)
    num_policy_learners: Processes = free(1)
    queue_size: Count = free(4)
    max_staleness: Annotated[int, Ge(LEAST_STALENESS), Le(2**62)] = free(64)


@dataclass(frozen=True)
class Config(Settings):
    """Everything a run needs; saved as config.yaml in its run directory.

    `model_options` replace single fields of the preset; `behavior` (its `kind` and fields) and
    `planner` those of the ones the family was published with.
    """

    seed: Whole = 0
    model: Text = "dreamerv3:size12m"
    model_options: dict[str, Any] = field(default_factory=dict)
    behavior: dict[str, Any] = field(default_factory=dict)
    planner: dict[str, Any] = field(default_factory=dict)
    env: EnvConfig = field(default_factory=EnvConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)

    def check(self) -> None:
        size, queue = self.replay.batch_size, self.imagination.queue_size
        sharing = {"scale.num_learners": self.scale.num_learners}
        if self.imagination.mode == "actors":
            sharing["imagination.num_policy_learners"] = self.imagination.num_policy_learners
        for name, num in sharing.items():
            if size % num:
                raise ValueError(
                    f"replay.batch_size {size} cannot be shared by {name} {num}: make it a "
                    "multiple of them"
                )
        rows = size // self.scale.num_learners
        if rows % self.learner.accumulate:
            raise ValueError(
                f"learner.accumulate {self.learner.accumulate} must divide a learner's {rows} rows"
            )
        if queue < self.imagination.num_policy_learners:
            raise ValueError(
                f"imagination.queue_size is {queue}: it must be at least "
                f"imagination.num_policy_learners, {self.imagination.num_policy_learners}"
            )

    def make_agent(self, spaces: Spaces) -> Agent:
        """A fresh agent. Raises ValueError for options that do not exist or do not fit."""
        return Agent(self.model, spaces, self.model_options, self.behavior, self.planner)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what to change."""


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
    try:
        plain = json.loads(json.dumps(values, default=_plain))
        parsed: Config = parse(Config(), plain, "unknown config key {}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return parsed


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


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        names = [str(p) for p in sorted(path.parent.glob("*.yaml"))]
        raise ConfigError(f"no config file {path}: {nearest(str(path), names or ['(none there)'])}")
    if not path.is_file():
        raise ConfigError(f"{path} is no file: give a YAML file, such as one of configs/")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which is no config")
    try:
        values = yaml.load(text.decode(), _Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8: give a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, not a {type(values).__name__}")
    _check_values(path, values)
    return values


class _Loader(yaml.SafeLoader):
    """Stops where a file is nested too deep: reading on takes seconds, and ends in a stack."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _check_values(path: Path, values: Any) -> None:
    """Raise ConfigError for what aliases make endless, or larger than the file."""
    left = [(values, 0)]
    for _ in range(MAX_VALUES):
        if not left:
            return
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path} is nested more than {MAX_DEPTH} deep")
        parts = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            left += [(part, depth + 1) for part in parts]
    raise ConfigError(f"{path} holds more than {MAX_VALUES} values")


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

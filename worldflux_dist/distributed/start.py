"""Starting a run's processes: who is made, with which name, resources and past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worldflux_dist.config import Config
from worldflux_dist.distributed.cluster import shard_config
from worldflux_dist.distributed.env_runner import EnvRunnerActor
from worldflux_dist.distributed.group import ActorGroup, GroupLostError
from worldflux_dist.distributed.model_actor import ACTING, ActingActor, ImaginerActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace, shard_name
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.envs import make_envs
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath


@dataclass(frozen=True)
class Task:
    """What the driver must know of the environment."""

    spaces: Spaces
    action_repeat: int


def probe(config: Config) -> Task:
    """Make one environment here, so that a wrong id or space is said before anything starts."""
    envs = make_envs(config.env, config.seed, num_envs=1)
    task = Task(envs.spaces, envs.action_repeat)
    envs.close()
    return task


@dataclass(frozen=True)
class Processes:
    """Handles of a run's processes. The last of `groups` is the policy's, where it learns apart;
    `named` ones are looked up by their names and kept alive by these handles."""

    groups: list[ActorGroup]
    imaginers: list[Any]
    shards: list[Any]
    runners: list[Any]
    named: list[Any]


def start_processes(
    config: Config,
    spaces: Spaces,
    storage: UPath,
    newest: tuple[UPath, dict[str, Any]] | None,
    options: dict[str, list[dict[str, Any]]],
) -> Processes:
    """Start every role's processes; `newest` is the checkpoint to go on from and its counters,
    `options` how Ray shall place the processes of each role.

    Names come first: runners and learners look the others up.
    """
    folder, counters = newest or (None, {})
    env_steps = counters["limiter"]["env_steps"] if newest else 0
    named = [actor(WeightStore).options(name=WEIGHTS, **options["store"][0]).remote()]
    shards = _start_shards(config, storage / "replay", counters, options["shard"])
    imaginer, runner = actor(ImaginerActor), actor(EnvRunnerActor)
    if config.scale.acting == "actor":
        make = actor(ActingActor).options(name=ACTING, **options["acting"][0])
        named.append(make.remote(config, spaces, 0, env_steps))
    if config.imagination.mode == "actors":
        parts = {"world_model": options["learner"], "behavior": options["policy"]}
        placed = options["imaginer"]
    else:
        parts, placed = {"agent": options["learner"]}, []
    processes = Processes(
        [ActorGroup(config, spaces, part, where) for part, where in parts.items()],
        [
            imaginer.options(**where).remote(config, spaces, 1 + index, env_steps)
            for index, where in enumerate(placed)
        ],
        shards,
        [
            runner.options(**where).remote(config, index, env_steps)
            for index, where in enumerate(options["runner"])
        ],
        named,
    )
    for group in processes.groups:
        if newest:
            group.lost_steps = counters["lost_steps"][group.part]
        group.start(folder, counters["gradient_steps"][group.part] if newest else 0)
    for group in processes.groups:
        _meet(group, folder)
    return processes


def _meet(group: ActorGroup, folder: UPath | None) -> None:
    """Wait for a group to start; one that dies on the way is started once more."""
    try:
        group.meet()
    except GroupLostError:
        group.start(folder, group.gradient_steps)
        group.meet()


def _start_shards(
    config: Config, root: UPath, counters: dict[str, Any], options: list[dict[str, Any]]
) -> list[Any]:
    """The shards, holding what the checkpoint names of replay."""
    saved = counters.get("shards", [])
    life = next_life(root)
    make = actor(ReplayShardActor, concurrency_groups={"disk": 1})
    share, num = shard_config(config), config.scale.num_shards
    return [
        make.options(name=shard_name(i), **where).remote(
            share, config.seed * 1000 + i, ShardPlace(str(root), life, i, num), saved
        )
        for i, where in enumerate(options)
    ]


def next_life(root: UPath) -> str:
    """A name for this life of the driver: segments written by an earlier one stay apart."""
    lives = [path.name for path in root.iterdir() if path.name.isdigit()] if root.exists() else []
    return f"{max(map(int, lives), default=0) + 1:04d}"

"""Starting a run's processes: who is made, with which name, resources and past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worldflux_dist.config import Config
from worldflux_dist.distributed.acting import ACTING, ActingActor
from worldflux_dist.distributed.actors import EnvRunnerActor, ImaginerActor
from worldflux_dist.distributed.cluster import shard_config
from worldflux_dist.distributed.group import GroupLostError, LearnerGroup
from worldflux_dist.distributed.ports import Roles
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


def start_roles(
    config: Config,
    task: Task,
    storage: UPath,
    found: tuple[UPath, dict[str, Any]] | None,
    options: dict[str, list[dict[str, Any]]],
) -> Roles:
    """Start every role's processes; `found` is the checkpoint to go on from and its counters,
    `options` how Ray shall place the processes of each role.

    Names come first: runners and learners look the others up.
    """
    folder: UPath | None = None
    counters: dict[str, Any] = {}
    if found:
        folder, counters = found
    env_steps = counters["limiter"]["env_steps"] if found else 0
    store = actor(WeightStore).options(name=WEIGHTS, **options["store"][0]).remote()
    shards = _start_shards(config, storage / "replay", counters, options["shard"])
    acting = None
    if config.scale.acting == "actor":
        acting = (
            actor(ActingActor)
            .options(name=ACTING, **options["acting"][0])
            .remote(config, task.spaces, env_steps)
        )
    apart = config.imagination.mode == "actors"
    model = LearnerGroup(
        config, task.spaces, "world_model" if apart else "agent", options["learner"]
    )
    policy = None
    if apart:
        policy = LearnerGroup(config, task.spaces, "behavior", options["policy"])
    runner, imaginer = actor(EnvRunnerActor), actor(ImaginerActor)
    roles = Roles(
        model,
        policy,
        [
            imaginer.options(**where).remote(config, task.spaces, index)
            for index, where in enumerate(options["imaginer"] if apart else [])
        ],
        shards,
        [
            runner.options(**where).remote(config, index, env_steps)
            for index, where in enumerate(options["runner"])
        ],
        storage / "checkpoints",
        [store, acting],
    )
    for group in roles.groups:
        if found:
            group.lost_steps = counters["lost_steps"][group.part]
        group.start(folder, counters["gradient_steps"][group.part] if found else 0)
    for group in roles.groups:
        _meet(group, folder)
    return roles


def _meet(group: LearnerGroup, folder: UPath | None) -> None:
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

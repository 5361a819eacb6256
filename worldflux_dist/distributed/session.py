"""What a run needs around its loop: its plan, its directory, Ray, room for its processes, and
errors that say what to do. All of it is given back however the run ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from worldflux_dist.config import Config
from worldflux_dist.distributed.auth import check_auth, explained
from worldflux_dist.distributed.cluster import Plan, join_cluster, make_plan, quiet, ray_for
from worldflux_dist.distributed.ending import RoleLostError, StopSignals, is_loss
from worldflux_dist.distributed.group import GroupLostError
from worldflux_dist.distributed.placement import place
from worldflux_dist.distributed.run import RunDirectory, storage_of
from worldflux_dist.distributed.start import Task, probe
from worldflux_dist.distributed.threads import settled
from worldflux_dist.progress import Progress


@dataclass(frozen=True)
class Session:
    """An opened run. `options` place its processes, by role."""

    config: Config
    run: RunDirectory
    progress: Progress
    task: Task
    stop: StopSignals
    options: dict[str, list[dict[str, Any]]]


@contextmanager
def opened(config: Config, run_dir: Path, plain: bool | None = None) -> Iterator[Session]:
    """Open the run in `run_dir`, with Ray started or joined and room for every process.

    Raises ConfigError before anything starts. What Ray says of a lost process becomes
    RoleLostError, a full disk CheckpointError.
    """
    run_dir = run_dir.resolve()  # other processes write there too
    task = probe(config)
    try:
        plan, settings = _plan(config, task)
        with (
            quiet(),
            RunDirectory(run_dir, config) as run,
            Progress(config.train.env_steps, plain) as progress,
        ):
            progress.phase("start")
            try:
                with (
                    ray_for(plan),
                    StopSignals(progress.print) as stop,  # Ray's start sets handlers of its own
                    closing(place(plan, stopping=lambda: stop.stopping)) as placement,
                ):
                    yield Session(settings, run, progress, task, stop, placement.options)
            except OSError as error:
                raise run.explain(error) from error
            except (RayError, GroupLostError) as error:
                if isinstance(error, RayError) and not is_loss(error):
                    raise  # an error of ours, from another process
                raise RoleLostError(error) from error
    finally:
        ray.shutdown()


def show_plan(config: Config) -> None:
    """Print what a run asks for and what there is, here or in the cluster RAY_ADDRESS names.

    Raises ConfigError where it cannot fit.
    """
    storage_of(config, Path())  # refuses what is no storage
    try:
        _plan(config, probe(config))
    finally:
        ray.shutdown()


def _plan(config: Config, task: Task) -> tuple[Plan, Config]:
    """The plan, and the config with what it settles."""
    with explained(os.environ.get("RAY_ADDRESS", "")):
        nodes = join_cluster()
    if nodes:
        check_auth()
    plan = make_plan(config, task.spaces, nodes)
    print("\n".join(plan.lines()), flush=True)
    plan.check()
    return plan, settled(config, nodes)

"""What a run asks for, said before it starts: of this machine, or of the cluster it joins.

A plan that cannot fit is refused with its numbers: a run that dies of memory after a day has cost
a day. What each process asks for is told in `roles.ROLES`; placement reads it from the plan.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray._private import ray_constants, worker

from worldflux_dist.config import Config, ConfigError
from worldflux_dist.distributed.gpus import gpu_memory, shares
from worldflux_dist.distributed.roles import CUDA_BYTES, MB, ROLES, Node, Sizes
from worldflux_dist.distributed.threads import settled
from worldflux_dist.replay.buffer import ReplayConfig
from worldflux_dist.spaces import Spaces

BATCHES_IN_FLIGHT = 4
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
LONGEST_PATH = 42  # of Ray's folder: the path of a socket in it has 107 characters at most
TIDY_S = 5.0


@dataclass(frozen=True)
class Need:
    """One line of the plan: how many processes of what, with how many torch threads each.

    `nbytes` is the memory of all together, `share` the CPUs and GPUs of each.
    """

    name: str
    processes: int
    threads: int
    nbytes: int
    note: str
    share: Mapping[str, float] = field(default_factory=dict)
    on_gpu: int = 0  # bytes of each on its GPU, which Ray does not count

    @property
    def bundle(self) -> dict[str, float]:
        """What one process asks of the node it runs on."""
        asked = {kind: amount for kind, amount in self.share.items() if amount}
        return asked | {"memory": -(-self.nbytes // self.processes)}

    def room(self, nodes: tuple[Node, ...]) -> int:
        """How many of its processes the nodes could hold if they held nothing else."""
        return sum(
            min(int(node.get(kind, 0) / each + 1e-6) for kind, each in self.bundle.items())
            for node in nodes
        )


@dataclass(frozen=True)
class Plan:
    """What a run asks for and what there is; without `nodes` it runs on this machine."""

    roles: tuple[Need, ...]
    object_store: int
    available: int
    cores: float
    gpus: float = 0
    nodes: tuple[Node, ...] = ()
    gpu_bytes: tuple[int, ...] = ()  # what is free on each GPU, where that is known

    @property
    def nbytes(self) -> int:
        return sum(role.nbytes for role in self.roles) + self.object_store

    @property
    def on_gpu(self) -> int:
        """Bytes of all processes on GPUs."""
        return sum(role.processes * role.on_gpu for role in self.roles)

    @property
    def processes(self) -> int:
        return sum(role.processes for role in self.roles)

    def asked(self, kind: str) -> float:
        """CPU or GPU of all processes together."""
        return round(sum(role.processes * role.share.get(kind, 0) for role in self.roles), 3)

    def lines(self) -> list[str]:
        """The plan as a table of plain lines: every role, then what is asked and what there is."""
        where = f"on {len(self.nodes)} nodes" if self.nodes else "here, where processes share cores"
        rows: list[tuple[Any, ...]] = [
            (
                *(role.name, role.processes, role.threads),
                *(role.processes * role.share[kind] for kind in ("CPU", "GPU")),
                *(role.nbytes, role.note + _on_gpu(role.on_gpu)),
            )
            for role in self.roles
        ]
        rows += [
            ("object store", "", "", 0, 0, self.object_store, "batches and weights in flight"),
            (
                *("asked", self.processes, "", self.asked("CPU"), self.asked("GPU")),
                *(self.nbytes, _on_gpu(self.on_gpu, "")),
            ),
            (
                *("there is", "", "", self.cores, self.gpus, self.available),
                where + _on_gpu(sum(self.gpu_bytes)),
            ),
        ]
        form = "{:<13}{:>9}{:>13}{:>7.4g}{:>7.3g}{:>11,.0f} MB   {}"
        table = ["role         processes threads each   CPUs   GPUs        memory   what"]
        for *start, nbytes, what in rows:
            table.append(form.format(*start, nbytes / MB, what).rstrip())
        return table

    def check(self) -> None:
        """Raise ConfigError where the plan needs more than there is.

        Of this machine only memory can run out: processes share its cores.
        """
        if self.nbytes > self.available:
            replay = next(role for role in self.roles if role.name == "shard")
            raise ConfigError(
                f"this run needs {self.nbytes / MB:,.0f} MB and {self.available / MB:,.0f} MB are "
                f"available (replay alone {replay.nbytes / MB:,.0f} MB): lower replay.capacity or "
                "set replay.capacity_bytes, or take a smaller model or fewer processes"
            )
        if self.asked("GPU") > self.gpus:
            raise ConfigError(
                f"this run asks for {self.asked('GPU'):g} GPUs and there are {self.gpus:g}: add "
                "some or set learner.device=cpu"
            )
        self._check_gpu_memory()
        if self.nodes:
            self._check_nodes()

    def _check_gpu_memory(self) -> None:
        largest = max(self.roles, key=lambda role: role.on_gpu)
        if self.gpu_bytes and (
            self.on_gpu > sum(self.gpu_bytes) or largest.on_gpu > max(self.gpu_bytes)
        ):
            raise ConfigError(
                f"this run needs{_on_gpu(self.on_gpu, '')} ({largest.name} alone "
                f"{largest.on_gpu / MB:,.0f} MB) and {sum(self.gpu_bytes) / MB:,.0f} MB are free: "
                "raise learner.accumulate, lower replay.batch_size or take a smaller model, or set "
                "learner.device=cpu"
            )

    def _check_nodes(self) -> None:
        if self.asked("CPU") > self.cores:
            raise ConfigError(
                f"this run asks for {self.asked('CPU'):g} CPUs and the cluster has {self.cores:g}: "
                "add nodes or lower scale.num_runners"
            )
        for role in self.roles:
            if role.room(self.nodes) < role.processes:
                raise ConfigError(
                    f"the nodes of the cluster have room for {role.room(self.nodes)} of "
                    f"{role.processes} processes of the role {role.name}, each of which asks one "
                    f"node for {spell(role.bundle)}: add nodes of that size"
                )
        store = sum(node.get("object_store_memory", 0) for node in self.nodes)
        if self.object_store > store:
            raise ConfigError(
                f"this run keeps {self.object_store / MB:,.0f} MB in flight and the object stores "
                f"of the cluster hold {store / MB:,.0f} MB: start Ray with a larger "
                "--object-store-memory"
            )


def _on_gpu(nbytes: int, comma: str = ",") -> str:
    return f"{comma} {nbytes / MB:,.0f} MB of GPU memory" if nbytes else ""


def spell(bundle: Mapping[str, float]) -> str:
    """Resources in words, such as 1 CPU, 0.5 GPU, 900 MB."""
    return ", ".join(
        f"{amount / MB:,.0f} MB" if kind == "memory" else f"{amount:g} {kind}"
        for kind, amount in bundle.items()
    )


def make_plan(config: Config, spaces: Spaces, nodes: tuple[Node, ...] = ()) -> Plan:
    """Count what the roles of `config` need, on these nodes or else here; nothing is allocated."""
    config = settled(config, nodes)
    shard_config(config)  # refuses a share that is too small
    with torch.device("meta"):
        agent = config.make_agent(spaces)
    if agent.needs_goal:
        raise ConfigError("planner.objective is goal: set planner.goal to one flat observation")
    if config.imagination.mode == "actors":
        agent.imagining()  # refuses a behavior that does not learn so
    here = {
        "CPU": os.cpu_count() or 1,
        "GPU": torch.cuda.device_count(),
        "memory": psutil.virtual_memory().available,
        "object_store_memory": 0,  # here it is part of the memory
    }
    has = {kind: sum(node.get(kind, 0) for node in nodes or (here,)) for kind in here}
    share = shares(config, has)
    sizes = Sizes(config, agent, here=not share["learner"]["GPU"])
    return Plan(
        tuple(_need(name, sizes, share[name]) for name in share),
        _object_store(sizes),
        available=int(has["memory"] + has["object_store_memory"]),
        cores=has["CPU"],
        gpus=has["GPU"],
        nodes=nodes,
        gpu_bytes=() if nodes or sizes.here else gpu_memory(),
    )


def _need(name: str, sizes: Sizes, share: dict[str, float]) -> Need:
    role, config = ROLES[name], sizes.config
    num = role.count(config)
    nbytes = num * role.nbytes(sizes) + role.shared(sizes)
    on_gpu = CUDA_BYTES + role.on_gpu(sizes) if share["GPU"] else 0
    return Need(name, num, role.threads(config), nbytes, role.note(sizes), share, on_gpu)


def _object_store(sizes: Sizes) -> int:
    """Bytes in flight: batches, weights, and the queue of what is imagined."""
    config = sizes.config
    batch = config.replay.batch_size * config.replay.batch_length * sizes.step
    nbytes = BATCHES_IN_FLIGHT * (batch + sizes.weights)
    if config.imagination.mode == "actors":
        nbytes += config.imagination.queue_size * sizes.sent
    return max(128 * MB, nbytes)


def shard_config(config: Config) -> ReplayConfig:
    """The config of one shard: its share of the capacity, which is meant for all together."""
    num, r = config.scale.num_shards, config.replay
    return replace(r, capacity=r.capacity // num, capacity_bytes=-(-r.capacity_bytes // num))


def join_cluster() -> tuple[Node, ...]:
    """The living nodes of the cluster that RAY_ADDRESS names, joined first where it is not yet.

    Nothing where there is none: then Ray is started on this machine, by `ray_for`.
    """
    if not ray.is_initialized():
        if "RAY_ADDRESS" not in os.environ:
            return ()
        ray.init(**QUIET)
    return tuple(node["Resources"] for node in ray.nodes() if node["Alive"])


@contextmanager
def ray_for(plan: Plan) -> Iterator[None]:
    """Ray for a run: the cluster that has been joined, or one of its own on this machine, with so
    many CPUs that every process finds its share."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with local_ray(math.ceil(max(plan.cores, plan.asked("CPU"))), plan.object_store):
        yield


@contextmanager
def local_ray(num_cpus: int, object_store: int) -> Iterator[None]:
    """Ray on this machine alone, with a token of its own unless there is one.

    It listens on loopback only. Its files, and the temporary ones of its processes, are in a
    private folder that is gone afterwards; where RAY_TMPDIR is set, Ray's stay there.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    kept = os.environ.get("RAY_TMPDIR")
    with _private_folder() as folder:
        files = str(Path(kept or folder) / "ray")
        if len(files) > LONGEST_PATH:
            raise ConfigError(
                f"RAY_TMPDIR is too long for the sockets that Ray keeps there ({kept}): choose a "
                f"path of at most {LONGEST_PATH - len('/ray')} characters"
            )
        try:
            with _variable("TMPDIR", folder), _loopback():
                ray.init(
                    address="local",
                    include_dashboard=False,
                    num_cpus=num_cpus,
                    object_store_memory=object_store,
                    _temp_dir=files,
                    **QUIET,
                )
            yield
        finally:
            ray.shutdown()


@contextmanager
def _private_folder() -> Iterator[str]:
    """A folder of this user alone, below TMPDIR, or /tmp where Ray's sockets would not fit."""
    below = tempfile.gettempdir()
    if len(below) + len("/wf-12345678/ray") > LONGEST_PATH:
        below = "/tmp"
    folder = tempfile.mkdtemp(prefix="wf-", dir=below)
    try:
        yield folder
    finally:
        deadline = time.monotonic() + TIDY_S
        while os.path.exists(folder) and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)  # processes that are ending write there, too
            time.sleep(0.05)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Processes that are started meanwhile see `value`, later ones what was there before."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def quiet() -> AbstractContextManager[None]:
    """Ray meanwhile prints nothing on the terminal of processes that died: the run says it. Without
    `log_to_driver`, such errors are all that still comes this way."""
    return _replaced(worker, "print_to_stdstream", lambda *_, **__: None)


def _loopback() -> AbstractContextManager[None]:
    """Ray that is started meanwhile listens on loopback alone, as it does by itself on systems for
    which it has no clusters: `_node_ip_address` does not help, it takes loopback for a mistake."""
    return _replaced(ray_constants, "ENABLE_RAY_CLUSTER", False)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)  # fails where another Ray has it no more
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)

"""The same server as Ray actors: replicas of a run's model on the nodes of a cluster.

They are detached: they outlive whoever started them, and Ray starts one again whose process or node
died. Each serves on its node's address and writes it below the run's storage, where clients find
all of them (places.py). What must stay true: on an address that others see there are TLS and a
token; and a replica that is told to stop answers what is under way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from worldflux_dist import storage
from worldflux_dist.nn.memory import keep_freed_memory
from worldflux_dist.serve import places
from worldflux_dist.serve.requests import Limits
from worldflux_dist.serve.run import ServedRun
from worldflux_dist.serve.server import ImaginationServer, Security

NAMESPACE = "worldflux-imagination"
START_S = 300.0  # for a replica to load its model and serve
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Serving:
    """How every replica serves: on its node's address, unless `host` is given. Files of `security`
    must be on every node."""

    folder: str
    device: str = "cpu"
    threads: int = 1
    follow: bool = True
    host: str = ""
    port: int = 50051
    security: Security = field(default_factory=Security)
    limits: Limits = field(default_factory=Limits)


class Replica:
    """One replica: a server in a thread of its own, on this node's address."""

    def __init__(self, serving: Serving, index: int) -> None:
        torch.set_num_threads(serving.threads)
        keep_freed_memory()
        folder = storage.as_path(serving.folder)
        run, self._place = ServedRun(folder, serving.device), places.place(folder, index)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="serve", daemon=True).start()
        newer = run.newer if serving.follow else None
        host = serving.host or ray.util.get_node_ip_address()
        make = (run.dreams(), serving.limits, serving.security, host)
        # Others of this node have the port already: the next one.
        for port in range(serving.port, serving.port + 100 if serving.port else 1):
            self._server = ImaginationServer(*make, port, newer)
            try:
                self._run(self._server.start())
            except RuntimeError:
                continue
            break
        else:
            raise RuntimeError(f"{host} has no free port from {serving.port} on: set --port")
        self._address = f"{host}:{self._server.port}"
        places.write(self._place, self._address)

    def status(self) -> tuple[str, tuple[int, int]]:
        """Where it serves, and which version."""
        return self._address, self._server.answers.dreams.version

    def stop(self) -> None:
        """Answer what is under way and take nothing new."""
        self._place.unlink(missing_ok=True)
        self._run(self._server.stop())

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()


def start(run: str, serving: Serving, num: int) -> list[str]:
    """Have `num` replicas of the run of this name, in the cluster that was joined: those that are
    missing are started, those that are too many stopped. Gives their addresses, as they are named.

    Raises ValueError where strangers would be served, RuntimeError where one cannot start.
    """
    for node in ray.nodes():
        serving.security.check(serving.host or node["NodeManagerAddress"])
    have = _named(run)
    stop(run, [index for index in have if index >= num])
    gpus = 1 if serving.device == "cuda" else 0
    remote: Any = ray.remote
    made = remote(
        num_cpus=serving.threads,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy="SPREAD",
        lifetime="detached",
        namespace=NAMESPACE,
    )(Replica)
    replicas = [
        made.options(name=f"{run}/{index}", get_if_exists=True).remote(serving, index)
        for index in range(num)
    ]
    try:
        return [ray.get(replica.status.remote(), timeout=START_S)[0] for replica in replicas]
    except GetTimeoutError:
        raise RuntimeError(
            f"not all replicas serve after {START_S:.0f} s: is there room for {num} of "
            f"{serving.threads} CPUs{' and a GPU' * gpus}? `serve --status` tells"
        ) from None
    except RayActorError as error:
        why = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"a replica could not start: {why}") from None


def status(run: str) -> dict[int, str]:
    """A line for each replica, by its number."""
    lines = {}
    for index, replica in _named(run).items():
        try:
            address, version = ray.get(replica.status.remote(), timeout=10)
            lines[index] = f"{address}, version {version[1]}"
        except RayError as error:
            lines[index] = f"does not answer: {type(error).__name__}"
    return lines


def stop(run: str, indices: Sequence[int] | None = None) -> list[int]:
    """Stop these replicas, or all, after what they are answering. Gives their numbers."""
    have = _named(run)
    stopped = [index for index in have if indices is None or index in indices]
    ending = {have[index].stop.remote(): have[index] for index in stopped}
    for call, replica in ending.items():
        try:
            ray.get(call, timeout=30)
        except RayError as error:
            if not isinstance(error, RayActorError):
                logger.warning("a replica did not stop by itself: %s", error)
        ray.kill(replica)
    return stopped


def _named(run: str) -> dict[int, Any]:
    """The replicas of a run that there are, by their numbers."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [each["name"] for each in named if each["namespace"] == NAMESPACE]
    indices = [int(n.rpartition("/")[2]) for n in names if n.rpartition("/")[0] == run]
    return {index: ray.get_actor(f"{run}/{index}", NAMESPACE) for index in sorted(indices)}

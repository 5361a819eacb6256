"""One rank of a group of learners, in its own process; the driver's side is group.py."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
import ray
import torch
from torch import Tensor
from torch.distributed import FileStore, Store, TCPStore

from worldflux_dist.behaviors.base import Imagined
from worldflux_dist.config import Config
from worldflux_dist.data import Batch
from worldflux_dist.distributed.compiling import Auto
from worldflux_dist.distributed.shard import shard_name
from worldflux_dist.distributed.weights import COMPILE_S, WEIGHTS, Version
from worldflux_dist.learner import Learner, Ready
from worldflux_dist.nn.memory import arrays
from worldflux_dist.spaces import Spaces

if TYPE_CHECKING:
    from upath import UPath


Meeting = tuple[str, int]  # a host and its port, or a file and 0
T = TypeVar("T")
BESIDE = {"publishing": 1, "saving": 1}  # threads of a rank's process, beside that of Ray's calls


def _thread(name: str) -> Any:
    """Has Ray run a method in a thread of BESIDE."""
    return ray.method(concurrency_group=name)


class Rank:
    """A learner among others. Batches come as references and are fetched before a step begins.

    `shards` get the losses of prioritized windows; `generation` counts the group's restarts;
    `steps` is how many gradient steps the run takes, infinite where nobody knows.
    """

    def __init__(
        self,
        learner: Learner,
        store: Any,
        shards: Sequence[Any],
        generation: int,
        steps: float = math.inf,
    ) -> None:
        self.learner, self.store, self.generation = learner, store, generation
        self._shards = shards
        self._stepped = self._idle_since = time.monotonic()
        self._waited = 0.0  # seconds without a batch since the last step
        auto = learner.config.compile == "auto"
        self._auto = Auto(learner, steps, self._tell_compiling) if auto else None
        one_arena()
        self._steps = ThreadPoolExecutor(1)  # takes all gradient steps, one after the other
        self._begun: Future[dict[str, Any]] | None = None
        if learner.config.compiles_first:
            self._tell_compiling()

    def begin(
        self, shard: int, given: tuple[Batch, np.ndarray] | Imagined
    ) -> dict[str, Any] | None:
        """Begin a step once the one before it is done; gives that one's metrics, if there is one.

        The next batch is in this process by then: what lies between two calls of an actor, some
        milliseconds, is no time without work. All but `weights` is called between rounds, when no
        step is under way.
        """
        batch, ids = given if isinstance(given, tuple) else (given, None)
        ready = self.learner.ahead(batch)  # copied beside the step that is under way
        begun, self._begun = self._begun, self._steps.submit(self.step, shard, ready, ids)
        return begun.result() if begun else None

    def finish(self) -> dict[str, Any] | None:
        """The metrics of the step that `begin` has begun last, once it is done."""
        begun, self._begun = self._begun, None
        return begun.result() if begun else None

    def step(self, shard: int, ready: Ready, ids: np.ndarray | None) -> dict[str, Any]:
        """One gradient step, on windows `ids` of a shard or on what was imagined; metrics, with the
        seconds that it took, those without a batch before it, and those since the last step in all.
        "said" is a sentence for the user."""
        start = time.monotonic()
        with self._busy():
            metrics = self.learner.step(ready)
            if self.learner.rows and ids is not None:
                self._shards[shard].prioritize.remote(ids, self.learner.row_losses)
        end = self._idle_since
        metrics["time/learner_step"] = end - start
        metrics["time/learner_wait"] = self._waited
        metrics["time/learner_wall"] = end - self._stepped
        self._waited, self._stepped = 0.0, end
        said = self._auto.look(ready.arrays, end - start) if self._auto else ""
        return metrics | ({"said": said} if said else {})

    @_thread("publishing")
    def weights(self) -> tuple[Version, dict[str, np.ndarray]]:
        """The inference weights, to be published; apart from them their version, whose second part
        is the gradient steps. The next step waits only for the copies to be made."""
        version, state = self._between_steps(self._weights).result()
        return version, arrays(state)

    def _weights(self) -> tuple[Version, dict[str, Tensor]]:
        version = (self.generation, self.learner.gradient_steps)
        return version, self.learner.agent.inference_state(self.learner.part)

    def _between_steps(self, work: Callable[[], T]) -> Future[T]:
        """Have the thread of the steps do something after those that were begun."""

        def busy() -> T:
            with self._busy():
                return work()

        return self._steps.submit(busy)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """What happens in here is no waiting for a batch."""
        self._waited += time.monotonic() - self._idle_since
        try:
            yield
        finally:
            self._idle_since = time.monotonic()

    def _tell_compiling(self) -> None:
        """From now on, tell the store when torch.compile is at work: it may take minutes."""
        from torch._dynamo import callback  # takes seconds

        def note(begins: bool) -> None:
            who = self.learner.part, self.generation, self.learner.rank
            self.store.note_compiling.remote(*who, begins)

        callback.on_compile_start(lambda _: note(True))
        callback.on_compile_end(lambda _: note(False))


def one_arena() -> None:
    """Ask glibc, where it is the allocator, for one heap for all threads that are still to start:
    of any other heap it gives freed memory back to the system (see nn.memory)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX


def interface_of(address: str) -> str:
    """The network interface that has an address. Raises RuntimeError where this node has none."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in (each.address for each in addresses):
            return name
    raise RuntimeError(
        f"this node has no network interface with the address {address}, by which Ray knows it: "
        "start Ray with --node-ip-address and an address of its own"
    )


def trains_on_rows(config: Config, part: str) -> bool:
    """Whether shards want to know the losses of the windows that `part` is trained on."""
    return config.replay.prioritized > 0 and part != "behavior"


class LearnerActor(Rank):
    """One rank in a process of its own, which finds the others by their names."""

    def __init__(
        self, config: Config, spaces: Spaces, part: str, rank: int, generation: int
    ) -> None:
        torch.manual_seed(config.seed * 1000 + rank + 17 * generation)
        agent, rows = config.make_agent(spaces), trains_on_rows(config, part)
        num = config.scale.num_shards if rows else 0
        shards = [ray.get_actor(shard_name(i)) for i in range(num)]
        learner = Learner(agent, config.learner, part, rows)
        batch = config.replay.batch_size * config.replay.batch_length
        steps = config.train.env_steps * config.train.train_ratio / batch
        super().__init__(learner, ray.get_actor(WEIGHTS), shards, generation, steps)
        self.rank = rank
        self.learner.rank = rank  # each has its own random state, in a checkpoint too

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def open(self, one_node: bool) -> Meeting:
        """Where the ranks meet: a file that only this user can open, or a free port of this node's
        address where they are on several nodes."""
        if one_node:
            ray_files = ray.get_runtime_context().get_temp_dir()
            return os.path.join(tempfile.mkdtemp(prefix="ranks-", dir=ray_files), "store"), 0
        host = ray.util.get_node_ip_address()
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        fd = listening.detach()  # TCPStore's own socket would listen on all addresses
        self._meeting = TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=fd
        )
        return host, port

    def join(self, meeting: Meeting, num_ranks: int, timeout_s: float) -> None:
        """Meet the other ranks; afterwards all have rank 0's weights. They wait for each other for
        `timeout_s` at most, and longer where one of them may compile."""
        where, port = meeting
        store: Store
        if not port:
            store = FileStore(where, num_ranks)
        else:
            store = self._meeting if self.rank == 0 else TCPStore(where, port, is_master=False)
        own = ray.util.get_node_ip_address() if port else "127.0.0.1"
        for library in ("GLOO", "NCCL"):  # would listen on the address of the host's name, or all
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface_of(own))
        store.set_timeout(timedelta(seconds=timeout_s))
        if self.learner.config.compiles_first:
            timeout_s = max(timeout_s, COMPILE_S)
        self.learner.join(store, self.rank, num_ranks, timeout_s)

    def load(self, folder: UPath, gradient_steps: int) -> None:
        """Go on from a checkpoint, counting on from `gradient_steps`."""
        self.learner.load(folder, gradient_steps)

    def count_from(self, gradient_steps: int) -> None:
        self.learner.gradient_steps = gradient_steps

    def agent_arrays(self) -> dict[str, np.ndarray]:
        """All weights of the group's part, for evaluation elsewhere."""
        agent, part = self.learner.agent, self.learner.part
        return self._between_steps(partial(agent.part_arrays, part)).result()

    def note(self) -> None:
        """Begin a checkpoint: what `write` writes is of this moment, before the next step."""
        self._noted = [self._between_steps(self.learner.files)]

    @_thread("saving")
    def write(self, noted: None, folder: UPath) -> None:
        """Write what was noted. Raises NonFiniteLossError where a weight is broken."""
        self.learner.write(self._noted.pop().result(), folder)

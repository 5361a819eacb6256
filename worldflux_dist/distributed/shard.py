"""A replay shard as a Ray actor. Its process loads neither torch nor an environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from worldflux_dist import storage
from worldflux_dist.data import Batch, Chunk
from worldflux_dist.replay import FencedError, ReplayConfig, ReplayShard, ShardReport


def shard_name(index: int) -> str:
    """The name by which runners find a shard, in the namespace of their run."""
    return f"replay-{index}"


@dataclass(frozen=True)
class ShardPlace:
    """Where a shard belongs: in the run's replay folder, in the driver's life, among the shards."""

    root: str
    life: str
    index: int
    num_shards: int


@contextmanager
def _unless_fenced() -> Iterator[None]:
    """End this process where another one has taken over its shard.

    A process of the past is not missed; another one is restarted by Ray and then is the newest.
    """
    try:
        yield
    except FencedError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


class ReplayShardActor:
    """One shard. Waiting for the disk has a thread of its own, so that it never delays a sample."""

    def __init__(
        self, config: ReplayConfig, seed: int, place: ShardPlace, saved: Sequence[dict[str, Any]]
    ) -> None:
        root = storage.as_path(place.root)
        self.shard = ReplayShard(
            config, seed, root, place.life, place.index, place.num_shards, saved
        )
        self._sealing: Future[dict[str, Any]] | None = None

    def add(self, chunk: Chunk) -> ShardReport:
        """Store a chunk, once: a re-sent one is acknowledged and not stored again."""
        with _unless_fenced():
            self.shard.add(chunk)
        return self.report()

    @ray.method(num_returns=2)
    def sample(
        self, batch_size: int, online: bool = True
    ) -> tuple[bool, tuple[Batch, np.ndarray] | None]:
        """Whether there is anything, apart from the batch itself and the ids of its windows.

        Without `online`, fresh segments are for those who train on each once.
        """
        buffer = self.shard.buffer
        if not buffer.ready:
            return False, None  # a restart has left too little
        return True, buffer.sample_with_ids(batch_size, online=online)

    def prioritize(self, ids: np.ndarray, values: np.ndarray) -> None:
        self.shard.buffer.prioritize(ids, values)

    def report(self) -> ShardReport:
        return self.shard.report()

    def seal(self) -> int:
        """Note the state that a checkpoint is to have; `sealed` waits until it is on disk.

        Gives the number of steps that were ever stored.
        """
        self._sealing = self.shard.seal()
        return self.report().total_steps

    @ray.method(concurrency_group="disk")
    def sealed(self) -> dict[str, Any]:
        """The state noted by `seal`, once all of it is on disk."""
        if self._sealing is None:
            raise storage.CheckpointError("the shard was restarted before its state was on disk")
        with _unless_fenced():
            return self._sealing.result()

    def retain(self, names: set[str]) -> None:
        """Delete segments that are evicted and not among `names`."""
        with _unless_fenced():
            self.shard.retain(names)

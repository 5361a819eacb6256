"""Replay in a process of its own, with a writer and a reader beside it: ours, bare and RLlib's.

Pictures are of Pong, so that packing them costs what it costs; numbers are noise.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import ObjectRef

from peers.rllib_replay import RllibReplay, episodes_of, renamed
from replay import KINDS, random_chunk
from setting.local_ray import ONCE
from worldflux_dist.data import Batch, Chunk
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.saving import segments_of
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace
from worldflux_dist.envs import EnvConfig, make_envs
from worldflux_dist.envs.base import random_act
from worldflux_dist.replay import ReplayBuffer, ReplayConfig
from worldflux_dist.runner import EnvRunner

ROWS, LENGTH = 16, 64


def pong_chunk() -> Chunk:
    envs = make_envs(EnvConfig(id="ALE/Pong-v5"), 0)
    runner = EnvRunner(envs, random_act(envs.spaces, 0))
    runner.collect(LENGTH)
    chunk = runner.collect(LENGTH)
    envs.close()
    return chunk


def vector_chunk() -> Chunk:
    return random_chunk(np.random.default_rng(0), KINDS["vector 24"], 1)


CHUNKS: dict[str, Callable[[], Chunk]] = {"image 64x64x3": pong_chunk, "vector 24": vector_chunk}


class BareReplay:
    """The buffer in a process of its own, without a journal."""

    def __init__(self, config: ReplayConfig) -> None:
        self.buffer = ReplayBuffer(config)

    def add(self, chunk: Chunk) -> None:
        self.buffer.add(chunk)

    @ray.method(num_returns=2)
    def sample(self, batch_size: int) -> tuple[bool, Any]:
        return True, self.buffer.sample_with_ids(batch_size)


class Writer:
    """Sends the same steps over and over, each time as a new chunk (or as new episodes)."""

    def __init__(self, replay: Any, chunk: Chunk, as_episodes: bool = False) -> None:
        self.replay, self.chunk, self.seq = replay, chunk, 0
        self.episodes = episodes_of(chunk) if as_episodes else None

    def send(self, num: int, per_second: float = 0.0) -> None:
        """Returns when all are stored; as fast as it goes, or `per_second`."""
        under_way: deque[ObjectRef] = deque()
        for _ in range(num):
            self.seq += 1
            self.chunk.key = ("writer", "life", self.seq)
            given = self.chunk if self.episodes is None else renamed(self.episodes)
            under_way.append(self.replay.add.remote(given))
            if len(under_way) == 2:
                ray.get(under_way.popleft())
            if per_second:
                time.sleep(1 / per_second)
        ray.get(list(under_way))


class Reader:
    """Takes batches as a learner does: out of shared memory, into its own."""

    def take(self, given: Any) -> None:
        batch = given[0] if isinstance(given, tuple) else given
        if isinstance(batch, Batch):
            batch = batch.columns()
        for value in batch.values():
            value.copy()


@dataclass
class Side:
    """One kind of replay in its process, with its writer and its reader."""

    replay: Any
    writer: Any
    reader: Any

    def insert(self, num: int) -> float:
        """Seconds until `num` chunks are stored."""
        start = time.perf_counter()
        ray.get(self.writer.send.remote(num))
        return time.perf_counter() - start

    def sample(self, num: int) -> float:
        """Seconds until the reader has copied `num` batches, two being gathered ahead."""
        under_way: deque[ObjectRef] = deque()
        start = time.perf_counter()
        for _ in range(num):
            _, ref = self.replay.sample.remote(ROWS)
            under_way.append(self.reader.take.remote(ref))
            if len(under_way) == 3:
                ray.get(under_way.popleft())
        ray.get(list(under_way))
        return time.perf_counter() - start

    def save(self) -> dict[str, Any]:
        """What a checkpoint asks of a shard; gives its state."""
        ray.get(self.replay.seal.remote())
        state: dict[str, Any] = ray.get(self.replay.sealed.remote())
        self.replay.retain.remote(segments_of([{"counters": {"shards": [state]}}]))
        return state


def make_side(kind: type, given: tuple[Any, ...], chunk: Chunk) -> Side:
    groups = {"concurrency_groups": {"disk": 1}} if kind is ReplayShardActor else {}
    replay = actor(kind, **ONCE, **groups).remote(*given)
    writer = actor(Writer, **ONCE).remote(replay, chunk, kind is RllibReplay)
    return Side(replay, writer, actor(Reader, **ONCE).remote())


@contextmanager
def shard_side(config: ReplayConfig, chunk: Chunk) -> Iterator[Side]:
    """A shard that writes its journal below the folder for temporary files."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = ShardPlace(folder, "0001", 0, 1)
        side = make_side(ReplayShardActor, (config, 0, place, []), chunk)
        try:
            yield side
        finally:
            ray.kill(side.replay)


class InProcess:
    """The limit: the buffer without Ray."""

    def __init__(self, config: ReplayConfig, chunk: Chunk) -> None:
        self.buffer, self.chunk, self.seq = ReplayBuffer(config), chunk, 0
        self.out: Batch | None = None

    def insert(self, num: int) -> float:
        start = time.perf_counter()
        for _ in range(num):
            self.seq += 1
            self.chunk.key = ("writer", "life", self.seq)
            self.buffer.add(self.chunk)
        return time.perf_counter() - start

    def sample(self, num: int) -> float:
        start = time.perf_counter()
        for _ in range(num):
            self.out = self.buffer.sample(ROWS, self.out)
        return time.perf_counter() - start

"""What tests of injected faults share: a shard, a writer of numbered chunks, and waiting."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import ray
from test_replay import make_chunk

from worldflux_dist.data import Chunk
from worldflux_dist.distributed import env_runner
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace, shard_name
from worldflux_dist.replay import ReplayConfig
from worldflux_dist.replay.segment import read_segment

PATIENCE_S = 120.0
MB = 2**20
STORE_BYTES = 80 * MB
PUSH = "CoreWorkerService.grpc_client.PushTask"
NUM_CHUNKS = 60


def failing(**failures: int) -> dict[str, Any]:
    """Options of an actor whose calls of others fail so; see Ray's rpc_chaos.cc."""
    variables = {
        "RAY_testing_rpc_failure": json.dumps({PUSH: failures}),
        "RAY_testing_rpc_failure_avoid_intra_node_failures": "0",
        "RAY_timeout_ms_task_wait_for_death_info": "100",
    }
    return {"runtime_env": {"env_vars": variables}}


def start_shard(
    started: list[Any], folder: Path, kind: type = ReplayShardActor, name: str = "", **options: Any
) -> Any:
    """The process of shard 0 of 1 in `folder`."""
    make = actor(kind, concurrency_groups={"disk": 1}, num_cpus=0, **options)
    replay = ReplayConfig(4, 4, capacity=10_000, flush_every=0.2)
    named = {"name": name} if name else {}
    shard = make.options(**named).remote(replay, 0, ShardPlace(str(folder), "0001", 0, 1), [])
    started.append(shard)
    return shard


class Writer(env_runner.EnvRunnerActor):
    """A runner with numbered chunks instead of environments; `wait_s` as shard_wait_s."""

    def __init__(self, wait_s: float = 60.0) -> None:
        self.shard_wait_s = wait_s
        self.shards = [ray.get_actor(shard_name(0))]

    def write(self, start: int, stop: int) -> int:
        """Send the chunks of a range, one after the other; how many shards answered in the end."""
        return sum(
            len(env_runner.send(numbered(seq), self.shards, self.shard_wait_s))
            for seq in range(start, stop)
        )


def numbered(seq: int) -> Chunk:
    return make_chunk((0, 1), seq * 7, 7, seq)


def start_writer(started: list[Any], **options: Any) -> Any:
    wait_s = options.pop("wait_s", 60.0)
    writer = actor(Writer, num_cpus=0).options(**options).remote(wait_s)
    started.append(writer)
    return writer


def stored(shard: Any, folder: Path) -> list[int]:
    """Numbers of the chunks that the shard's next state names, in the order they came."""
    ray.get(shard.seal.remote())
    state = ray.get(shard.sealed.remote())
    return [
        chunk.key[2]
        for segment in state["segments"]
        for chunk in read_segment((folder / segment["name"]).read_bytes())[1]
    ]


def pid_of(handle: Any) -> int:
    return ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=PATIENCE_S)


def wait_until(condition: Any, what: str) -> float:
    """Seconds until `condition()` holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE_S, what
        time.sleep(0.05)
    return time.monotonic() - began

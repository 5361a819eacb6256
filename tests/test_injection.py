"""Faults injected below the actors: replies that get lost, and shards that are of the past or away.

Recovery times are printed, and added to the file that WORLDFLUX_RECOVERY_LOG names.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from fault_runs import note_recovery
from injected import (
    NUM_CHUNKS,
    PATIENCE_S,
    failing,
    numbered,
    pid_of,
    start_shard,
    start_writer,
    stored,
    wait_until,
)
from ray.exceptions import ActorUnavailableError

from worldflux_dist.distributed.shard import ReplayShardActor, ShardPlace, shard_name
from worldflux_dist.replay import ReplayConfig

# ------------------------------------------------------------------------------ lost replies


@pytest.mark.ray
@pytest.mark.parametrize(
    ("retries", "failures"),
    [
        (-1, {"num_failures": 8, "resp_failure_prob": 50}),
        (0, {"num_failures": 8, "resp_failure_prob": 50}),
        (
            0,
            {"num_failures": 9, "req_failure_prob": 20, "resp_failure_prob": 20}
            | {"in_flight_failure_prob": 20},
        ),
    ],
    ids=["ray-sends-again", "the-runner-sends-again", "requests-and-replies"],
)
def test_chunks_whose_replies_are_lost_count_once(
    started: list[Any], tmp_path: Path, retries: int, failures: dict[str, int]
) -> None:
    shard = start_shard(started, tmp_path, name=shard_name(0), max_task_retries=retries)
    writer = start_writer(started, **failing(**failures))
    assert ray.get(writer.write.remote(0, NUM_CHUNKS), timeout=PATIENCE_S) == NUM_CHUNKS
    report = ray.get(shard.report.remote())
    if failures.get("req_failure_prob"):
        assert 0 < report.duplicates <= failures["num_failures"]  # all but the lost requests
    else:
        assert report.duplicates == failures["num_failures"]
    assert stored(shard, tmp_path) == list(range(NUM_CHUNKS))  # each once, in order
    assert report.total_steps == NUM_CHUNKS * numbered(0).num_steps


# ------------------------------------------------------------------------------ shards that went


@pytest.mark.ray
def test_of_two_processes_of_a_shard_the_older_one_gives_way(
    started: list[Any], tmp_path: Path
) -> None:
    """What either has acknowledged and put on disk stays, once."""
    older = start_shard(started, tmp_path, name=shard_name(0))
    writer = start_writer(started)
    ray.get(writer.write.remote(0, 5), timeout=PATIENCE_S)
    wait_until(lambda: ray.get(older.report.remote()).durable_steps == 5 * 14, "never durable")
    victim = pid_of(older)
    newer = start_shard(started, tmp_path)
    for seq in range(3, 8):
        chunk = numbered(seq)
        chunk.key = ("w/0", *chunk.key[1:])  # as the runner's part for shard 0
        ray.get(newer.add.remote(chunk))
    assert ray.get(newer.report.remote()).duplicates == 2  # it knows what the older one had
    wait_until(lambda: ray.get(newer.report.remote()).durable_steps == 8 * 14, "never durable")
    # The older one notices when it next writes. It ends then, and Ray starts it anew: the newest.
    began = time.monotonic()
    seq = 8
    while pid_of_living(older) in (victim, None):
        ray.get(writer.write.remote(seq, seq + 1), timeout=PATIENCE_S)
        seq += 1
        assert time.monotonic() - began < PATIENCE_S
    note_recovery("shard fenced off by another process of its life", time.monotonic() - began)
    ray.get(writer.write.remote(seq, seq + 1), timeout=PATIENCE_S)
    found = stored(older, tmp_path)
    assert sorted(set(found)) == sorted(found)
    # What the older process took in after it had been replaced was never on disk.
    assert set(range(8)) | {seq} <= set(found) <= set(range(seq + 1))


def pid_of_living(handle: Any) -> int | None:
    try:
        return pid_of(handle)
    except ActorUnavailableError:
        return None


class LateShard(ReplayShardActor):
    """Takes as long to start as a file `wait` is beside its folder."""

    def __init__(self, config: ReplayConfig, seed: int, place: ShardPlace, saved: Any) -> None:
        while (Path(place.root) / "wait").exists():
            time.sleep(0.05)
        super().__init__(config, seed, place, saved)


@pytest.mark.ray
def test_a_shard_that_stays_away_costs_a_chunk_and_no_window_spans_it(
    started: list[Any], tmp_path: Path
) -> None:
    shard = start_shard(started, tmp_path, LateShard, name=shard_name(0))
    writer = start_writer(started, wait_s=1.0)
    ray.get(writer.write.remote(0, 2), timeout=PATIENCE_S)
    wait_until(lambda: ray.get(shard.report.remote()).durable_steps == 2 * 14, "never durable")
    (tmp_path / "wait").touch()
    psutil.Process(pid_of(shard)).kill()
    with pytest.raises(ActorUnavailableError):  # as the driver sees it: the runner goes on
        ray.get(writer.write.remote(2, 3), timeout=PATIENCE_S)
    (tmp_path / "wait").unlink()
    began = time.monotonic()
    wait_until(lambda: pid_of_living(shard) is not None, "never came back")
    note_recovery("shard killed", time.monotonic() - began)
    ray.get(writer.write.remote(3, 5), timeout=PATIENCE_S)
    assert stored(shard, tmp_path) == [0, 1, 3, 4]
    batch, _ = ray.get(shard.sample.remote(64)[1])
    steps = batch.obs["obs"][..., 1]
    assert ((np.diff(steps) == 1) | batch.is_first[:, 1:]).all()

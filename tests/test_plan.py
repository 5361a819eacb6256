"""The plan of a run: what it counts, and what it refuses before anything starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces

from worldflux_dist import config
from worldflux_dist.data import Spaces
from worldflux_dist.distributed import cluster

VECTOR = Spaces(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
IMAGE = Spaces(spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Discrete(6))
TINY = ["model=dreamerv3:tiny", "replay.capacity=10000", "learner.device=cpu"]


def memory(plan: cluster.Plan, name: str) -> int:
    return next(role.nbytes for role in plan.roles if role.name == name)


@pytest.mark.slow
def test_replay_is_counted_to_the_byte() -> None:
    assert cluster.step_bytes(VECTOR) == 4 * 4 + 4 * 2 + 4 + 3
    assert cluster.step_bytes(IMAGE) == 64 * 64 * 3 + 4 * 6 + 4 + 3
    settings = config.load([], TINY)
    shards = [memory(cluster.make_plan(settings, s), "replay shard") for s in (VECTOR, IMAGE)]
    assert shards[1] - shards[0] == 10_000 * (12_319 - 31)


@pytest.mark.slow
def test_the_learner_counts_what_backward_needs() -> None:
    settings = config.load([], TINY)
    doubled = config.load([], [*TINY, "replay.batch_size=32"])
    small, large = (memory(cluster.make_plan(s, IMAGE), "learner") for s in (settings, doubled))
    vector = memory(cluster.make_plan(settings, VECTOR), "learner")
    # 1,024 images of 12 kB, at full resolution with 8 channels of 4 bytes in the first layer alone.
    assert small - vector > 1024 * 64 * 64 * 8 * 4
    assert large - small > 1024 * 64 * 64 * 8 * 4


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    plan = cluster.make_plan(config.load([], TINY), VECTOR)
    plan.check()
    with pytest.raises(config.ConfigError, match=r"needs [\d,]+ MB and 1,000 MB are available"):
        replace(plan, available=1000 * cluster.MB).check()


def test_a_shards_share_is_checked_and_never_becomes_no_limit() -> None:
    with pytest.raises(ValueError, match="capacity 100 is too small"):
        cluster.make_plan(config.load([], [*TINY, "replay.capacity=200"]), VECTOR)
    share = cluster.shard_config(config.load([], ["replay.capacity_bytes=1"]))
    assert share.capacity_bytes == 1

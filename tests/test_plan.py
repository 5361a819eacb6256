"""The plan of a run: what it counts, what each process gets, and what is refused beforehand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from worldflux_dist import config
from worldflux_dist.distributed import cluster, roles
from worldflux_dist.spaces import Spaces

VECTOR = Spaces(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
IMAGE = Spaces(spaces.Box(0, 255, (64, 64, 3), np.uint8), spaces.Discrete(6))
TINY = ["model=dreamerv3:tiny", "replay.capacity=10000", "learner.device=cpu"]
ACTORS = ["imagination.mode=actors", "imagination.num_imaginers=2"]
NODE = {"CPU": 4.0, "memory": 4000 * roles.MB, "object_store_memory": 200 * roles.MB}


def role(plan: cluster.Plan, name: str) -> cluster.Need:
    return next(role for role in plan.roles if role.name == name)


def memory(plan: cluster.Plan, name: str) -> int:
    return role(plan, name).nbytes


def make_plan(*overrides: str, nodes: Sequence[cluster.Node] = ()) -> cluster.Plan:
    settings = config.load([], [*TINY, "replay.batch_length=8", *overrides])
    return cluster.make_plan(settings, VECTOR, tuple(nodes))


@pytest.mark.slow
def test_replay_is_counted_to_the_byte() -> None:
    assert roles.step_bytes(VECTOR) == 4 * 4 + 4 * 2 + 4 + 3
    assert roles.step_bytes(IMAGE) == 64 * 64 * 3 + 4 * 6 + 4 + 3
    settings = config.load([], TINY)
    shards = [memory(cluster.make_plan(settings, s), "shard") for s in (VECTOR, IMAGE)]
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
    halves = config.load([], [*TINY, "replay.batch_size=32", "scale.num_learners=2"])
    assert memory(cluster.make_plan(halves, IMAGE), "learner") == 2 * small


def test_every_role_of_imagination_apart_is_counted() -> None:
    fused, apart = make_plan(), make_plan(*ACTORS, "imagination.num_policy_learners=2")
    assert {r.name for r in apart.roles} - {r.name for r in fused.roles} == {"imaginer", "policy"}
    assert apart.processes == fused.processes + 4
    large = make_plan(*ACTORS, "imagination.queue_size=4000")
    settings = config.load([], TINY)
    agent = settings.make_agent(VECTOR)
    state = sum(part.nbytes for part in agent.world_model.feature_parts)  # as it travels
    assert state < agent.world_model.feature_dim
    imagined = 16 * settings.replay.batch_size * 8 * state
    assert large.object_store - make_plan(*ACTORS, "imagination.queue_size=3000").object_store == (
        1000 * imagined
    )
    for name in ("runner", "learner", "imaginer", "policy", "asked", "there is"):
        assert any(line.startswith(name) for line in apart.lines())


def test_a_behavior_that_cannot_learn_apart_is_refused() -> None:
    settings = config.load([], ["model=tdmpc2:tiny", "learner.device=cpu", *ACTORS])
    with pytest.raises(ValueError, match="does not learn in imagination"):
        cluster.make_plan(settings, VECTOR)


def test_what_does_not_fit_is_refused_with_its_numbers() -> None:
    plan = make_plan()
    plan.check()
    with pytest.raises(config.ConfigError, match=r"needs [\d,]+ MB and 1,000 MB are available"):
        replace(plan, available=1000 * roles.MB).check()


def test_a_cluster_is_refused_where_its_sum_is_too_small() -> None:
    make_plan(nodes=[NODE] * 3).check()
    with pytest.raises(config.ConfigError, match=r"asks for 17\.5 CPUs and the cluster has 12"):
        make_plan("scale.num_runners=15", nodes=[NODE] * 3).check()
    with pytest.raises(config.ConfigError, match=r"needs [\d,]+ MB and 900 MB are available"):
        make_plan(nodes=[NODE | {"memory": 700 * roles.MB}]).check()
    small = NODE | {"object_store_memory": 20 * roles.MB}
    with pytest.raises(config.ConfigError, match="object stores of the cluster hold 60 MB"):
        make_plan(nodes=[small] * 3).check()


def test_a_cluster_is_refused_where_a_process_fits_no_node() -> None:
    whole = make_plan("learner.threads=3", nodes=[NODE] * 3)
    whole.check()
    with pytest.raises(config.ConfigError, match="room for 0 of 1 processes of the role learner"):
        make_plan("learner.threads=6", nodes=[NODE] * 3).check()
    # Enough in sum, and every rank fits a node, but only one of them does at a time.
    settings = ("learner.threads=3", "scale.num_learners=4")
    make_plan(*settings, nodes=[NODE] * 5).check()
    with pytest.raises(config.ConfigError, match="room for 3 of 4 processes of the role learner"):
        make_plan(*settings, nodes=[*[NODE] * 3, *[NODE | {"CPU": 2.0}] * 4]).check()


@pytest.mark.parametrize(
    ("cores", "allowed", "settings", "threads"),
    [
        (2, "", "train.train_ratio=64", 1),
        (4, "", "train.train_ratio=64", 3),  # runners hardly work
        (4, "1", "train.train_ratio=64", 1),
        (2, "", "train.train_ratio=1", 1),
        (8, "", "train.train_ratio=2", 5),  # two runners and two shards all the time
        (8, "", "scale.num_learners=2", 3),
        (1, "", "train.train_ratio=64", 1),
        (64, "", "train.train_ratio=64", 8),
        (8, "", "learner.threads=3", 3),
    ],
)
def test_the_learner_gets_the_cores_that_are_left(
    cores: int, allowed: str, settings: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert role(make_plan(settings), "learner").threads == threads


def test_on_a_cluster_the_learner_gets_what_fits_beside_the_others() -> None:
    # 3.5 CPUs of runners, shards, store and evaluator, on nodes of 4 and 2.
    assert role(make_plan(nodes=[NODE, NODE | {"CPU": 2.0}]), "learner").threads == 2
    assert role(make_plan(nodes=[NODE] * 2), "learner").threads == 4
    assert role(make_plan(nodes=[NODE]), "learner").threads == 1
    gpu = NODE | {"GPU": 1.0}
    assert role(make_plan("learner.device=auto", nodes=[gpu] * 3), "learner").threads == 1


def test_gpus_that_are_asked_for_must_be_there() -> None:
    with pytest.raises(config.ConfigError, match="asks for 1 GPUs and there are 0"):
        make_plan("learner.device=cuda", nodes=[NODE] * 3).check()
    make_plan("learner.device=cuda", nodes=[*[NODE] * 3, NODE | {"GPU": 1.0}]).check()


@pytest.mark.parametrize(
    ("gpus", "learners", "policies", "imaginers", "expected"),
    [
        (0, 1, 1, 1, (0, 0, 0)),
        (1, 1, 0, 0, (1, 0, 0)),
        (1, 1, 1, 2, (0.25, 0.25, 0.25)),
        (2, 1, 1, 1, (0.5, 0.5, 0.5)),
        (3, 1, 1, 2, (1, 1, 0.5)),
        (8, 2, 2, 4, (1, 1, 1)),
        (4, 2, 2, 4, (0.6, 0.6, 0.4)),
        (2, 2, 0, 0, (1, 0, 0)),
    ],
)
def test_gpus_are_shared_sensibly(
    gpus: int, learners: int, policies: int, imaginers: int, expected: tuple[float, ...]
) -> None:
    overrides = [f"scale.num_learners={learners}", "learner.threads=1"]
    if policies:
        overrides += ["imagination.mode=actors", f"imagination.num_policy_learners={policies}"]
        overrides += [f"imagination.num_imaginers={imaginers}"]
    found = cluster.shares(config.load([], overrides), {"GPU": gpus})
    roles = ("learner", "policy", "imaginer")
    shares = [found.get(name, {"GPU": 0})["GPU"] for name in roles]
    assert shares == pytest.approx([0.9 * share for share in expected])
    # The rest, a tenth of each, is for evaluation.
    assert found["evaluator"]["GPU"] == (0.1 if gpus else 0)
    assert np.dot(expected, (learners, policies, imaginers)) <= gpus


def test_memory_on_gpus_is_counted_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nvidia-smi's answers, as of a machine with such GPUs."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    told = tmp_path / "nvidia-smi"
    told.write_text('#!/bin/sh\ncase "$*" in *"-i 1") echo 900;; *) echo 1200; echo 900;; esac\n')
    told.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = ["learner.device=auto", "model=dreamerv3:size12m", "replay.batch_size=4"]
    plan = make_plan(*settings)
    learner, evaluator = role(plan, "learner"), role(plan, "evaluator")
    # Weights, gradients, two moments and copies to save, and a context beside activations.
    weights = evaluator.on_gpu - roles.CUDA_BYTES
    assert weights > 4 * 10e6
    assert learner.on_gpu > roles.CUDA_BYTES + 7 * weights
    assert role(plan, "runner").on_gpu == 0
    assert plan.gpu_bytes == (1200 * roles.MB, 900 * roles.MB)
    plan.check()
    assert any("2,100 MB of GPU memory" in line for line in plan.lines())
    with pytest.raises(
        config.ConfigError, match=r"of GPU memory \(learner alone .* are free: raise"
    ):
        make_plan(*settings, "replay.batch_size=64").check()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(config.ConfigError, match="900 MB are free"):
        make_plan(*settings).check()
    told.write_text("#!/bin/sh\nexit 9\n")
    assert make_plan(*settings).gpu_bytes == ()
    assert make_plan(*settings, nodes=[NODE | {"GPU": 1.0}]).gpu_bytes == ()


def test_ranks_that_would_share_a_gpu_are_refused() -> None:
    settings = config.load([], ["scale.num_learners=2", "learner.threads=1"])
    with pytest.raises(config.ConfigError, match="2 ranks of learners need a GPU each"):
        cluster.shares(settings, {"GPU": 1})


def test_a_shards_share_is_checked_and_never_becomes_no_limit() -> None:
    with pytest.raises(ValueError, match="capacity 100 is too small"):
        make_plan("replay.capacity=200", "replay.batch_length=64")
    share = cluster.shard_config(config.load([], ["replay.capacity_bytes=1"]))
    assert share.capacity_bytes == 1

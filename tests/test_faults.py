"""Processes of real runs are killed: training goes on, and no step on disk is lost or doubled.

Recovery times are printed, and written where WORLDFLUX_RECOVERY_LOG says; nothing is asserted about
them. The run in the fused mode ends with the death of its driver, so those tests come in order.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import fault_runs as f
import numpy as np
import psutil
import pytest
import ray
import toy_task
from fault_runs import FaultRun
from ray.exceptions import ObjectLostError, RayTaskError
from small import random_batch
from toy_run import PATIENCE_S

from worldflux_dist import config
from worldflux_dist.distributed.group import GroupLostError, LearnerActor, LearnerGroup
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.weights import (
    WEIGHTS,
    StaleGenerationError,
    WeightReader,
    WeightStore,
)
from worldflux_dist.envs import make_envs

pytestmark = pytest.mark.ray

FUSED: tuple[str, ...] = ("scale.num_learners=2",)
ACTORS: tuple[str, ...] = ("imagination.mode=actors", "scale.num_runners=1", "scale.num_shards=1")
ACTORS += ("scale.acting=actor",)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultRun]:
    """A run of two runners, two shards and two group."""
    with FaultRun(tmp_path_factory.mktemp("fused"), *FUSED) as run:
        run.wait_for_training()
        yield run


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultRun]:
    """A run whose policy learns apart and whose runner has another process act."""
    with FaultRun(tmp_path_factory.mktemp("actors"), *ACTORS) as run:
        run.wait_for_line("training", lambda x: x["weights_version"] > 0)
        yield run
        run.interrupt()
        assert run.wait() == 130, run.output
    f.check_counters(run.lines())
    shards = f.live_shards(run.run_dir)
    f.check_shards(shards)
    assert not f.missing(shards)


# -------------------------------------------------------------------------- the model's own run


def test_a_killed_runner_begins_a_new_life(fused: FaultRun, tmp_path: Path) -> None:
    before, restarts = f.live_shards(fused.run_dir), fused.last()["restarts/runner"]
    collecting = "ray::EnvRunnerActor.collect"
    victims = fused.wait_until(lambda: fused.processes(collecting), "a runner that collects")
    since = f.kill(victims[0])
    f.note_recovery("runner", f.runner_back(fused, since, before))
    line = fused.wait_for_training(after=time.time())
    assert line["restarts/runner"] > restarts
    manifest = fused.next_manifest()
    saved = f.saved_shards(fused.run_dir, manifest)
    settings = config.load([fused.run_dir / "config.yaml"]).replay
    ends = [
        f.check_windows(shard)
        for shard in f.restored(fused.run_dir, manifest, tmp_path, "9001", settings)
    ]
    # Where the killed runner's episodes were abandoned; one time in five they had just ended.
    assert (sum(ends) > 0) == _unfinished(before, saved)
    f.check_shards(saved)
    assert f.keys(before) <= f.keys(saved)
    assert not f.missing(saved)


def _unfinished(before: f.Shards, saved: f.Shards) -> bool:
    """Whether the one writer that began a second life was in mid-episode when it lost the first."""
    lives = Counter(writer for writer, _ in f.lives(saved))
    (writer,) = (name for name, num in lives.items() if num == 2)
    (old,) = (life for name, life in f.lives(before) if name == writer)
    parts = {(f"{writer}/{index}", old) for index in range(len(saved))}
    found = [chunk for shard in saved for chunk in shard if chunk.key[:2] in parts]
    end = max(c.key[2] for c in found)
    return any(not c.is_last[:, -1].all() for c in found if c.key[2] == end)


def test_a_killed_shard_keeps_what_is_on_disk(fused: FaultRun) -> None:
    was, owners = fused.last(), f.shard_owners(fused.run_dir)
    gaps = f.missing(f.live_shards(fused.run_dir))
    victim = fused.processes("ray::ReplayShardActor")[0]
    on_disk = f.live_shards(fused.run_dir)
    since = f.kill(victim)
    f.note_recovery("shard", f.shard_back(fused, since, owners))
    line = fused.wait_for_training(after=time.time())
    shards = f.live_shards(fused.run_dir)
    f.check_shards(shards)
    assert f.keys(on_disk) <= f.keys(shards)
    (killed,) = (i for i, (a, b) in enumerate(_owners(fused, owners)) if a != b)
    lost = f.missing(shards) - gaps
    print(f"{len(lost)} chunks were not on disk yet")
    assert all(key[0].endswith(f"/{killed}") for key in lost), lost
    assert line["restarts/learner"] == was["restarts/learner"]
    assert "Traceback" not in fused.output
    f.check_ratio(line, runners=2)


def _owners(run: FaultRun, before: dict[Path, str]) -> list[tuple[str, str]]:
    now = f.shard_owners(run.run_dir)
    return [(before[folder], now[folder]) for folder in sorted(now)]


def test_a_killed_weight_store_is_filled_again(fused: FaultRun) -> None:
    (store,) = fused.processes("ray::WeightStore")
    since = f.kill(store)
    f.note_recovery("weight store", f.store_back(fused, since))
    fused.wait_for_training(after=time.time())
    f.check_shards(f.live_shards(fused.run_dir))


def test_a_killed_rank_takes_the_other_with_it(fused: FaultRun) -> None:
    was, ranks = fused.last(), {p.pid for p in fused.processes("ray::LearnerActor")}
    since = f.kill(psutil.Process(max(ranks)))
    seconds = f.learner_back(fused, since, was["restarts/learner"])
    line = fused.last()
    redone = line["gradient_steps/redone"] - was["gradient_steps/redone"]
    f.note_recovery("learner rank", seconds, gradient_steps_redone=redone)
    assert line["restarts/learner"] == was["restarts/learner"] + 1
    assert not ranks & {p.pid for p in fused.processes("ray::LearnerActor")}
    fused.wait_for_checkpoint(int(line["gradient_steps"]))
    found = f.newest(fused.run_dir)
    counters = found[1]["counters"]
    assert counters["lost_steps"]["agent"] == counters["limiter"]["redone"] >= redone
    assert counters["effective_steps"]["agent"] + counters["limiter"]["redone"] == found[1]["step"]
    assert {"rng-agent-0.safetensors", "rng-agent-1.safetensors"} <= found[1]["files"].keys()
    f.check_ratio(fused.last(), runners=2)


def test_after_the_drivers_death_the_same_command_goes_on(fused: FaultRun, tmp_path: Path) -> None:
    run_dir, agents = fused.run_dir, ("ray::RuntimeEnvAgent", "ray::DashboardAgent")
    slow = {process for title in agents for process in fused.processes(title)}  # Ray's own: 60 s
    family = set(fused.processes("ray::")) - slow
    assert len(family) >= 7  # two of each role, and the store
    since = time.time()
    fused.kill()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive
    f.note_recovery("actors of a dead driver gone", time.time() - since)
    found = f.newest(run_dir)
    saved = f.saved_shards(run_dir, found[1])
    f.check_shards(saved)
    settings = config.load([run_dir / "config.yaml"]).replay
    once, twice = (
        list(f.next_ids(run_dir, found[1], tmp_path, life, settings)) for life in ("9001", "9002")
    )
    assert len(once) == 2
    np.testing.assert_array_equal(once, twice)

    since = time.time()
    with FaultRun(run_dir.parent, *FUSED) as run:
        run.wait_for(f"resumed from {found[0]}")
        line = run.wait_for_training(after=since)
        f.note_recovery("driver", line["time"] - since)
        _stop(run)
    after = f.live_shards(run_dir)
    f.check_shards(after)
    _check_kept(saved, after)
    f.check_counters(run.lines())
    f.check_ratio(run.last(), runners=2)


def _stop(run: FaultRun) -> None:
    run.interrupt()
    assert run.wait() == 130, run.output
    assert "Traceback" not in run.output


def _check_kept(saved: f.Shards, after: f.Shards) -> None:
    """All that was saved is there, and nothing else of the lives that had saved it."""
    old = {row[:2] for row in f.rows(saved)}
    assert {row for row in f.rows(after) if row[:2] in old} == f.rows(saved)
    assert len(f.rows(after)) > len(f.rows(saved))


@pytest.mark.parametrize("num_shards", [3, 1])
def test_a_run_goes_on_with_other_shards_and_another_ratio(
    fused: FaultRun, num_shards: int
) -> None:
    """Ten times the debt that a run can have is not worked off at once, but forgiven."""
    if fused.running:
        fused.interrupt()
        assert fused.wait() == 130
    run_dir, debt = fused.run_dir, 300
    found = f.newest(run_dir)
    saved, before = f.saved_shards(run_dir, found[1]), found[1]["counters"]["limiter"]
    f.owe(run_dir, debt)
    ratio = f.RATIO * (2 if num_shards == 3 else 1)
    changed = (f"train.train_ratio={ratio}", f"scale.num_shards={num_shards}")
    began = time.time()
    with FaultRun(run_dir.parent, *FUSED, *changed) as run:
        run.wait_for_training(after=began)
        _stop(run)
    after = f.live_shards(run_dir)
    assert len(after) == num_shards
    f.check_shards(after)
    _check_kept(saved, after)
    f.check_counters(run.lines())
    found = f.newest(run_dir)
    limiter = found[1]["counters"]["limiter"]
    per_step, request = Fraction(ratio, f.BATCH_STEPS), 2 * 2 * f.LENGTH
    allowed = 16 + (128 + 2 * request) * per_step + 1
    assert debt - allowed <= limiter["forgiven"] - before["forgiven"] <= debt
    steps, owed = limiter["env_steps"] - before["env_steps"], Fraction(limiter["debt"])
    assert 0 <= owed <= allowed
    taken = limiter["gradient_steps"] - before["gradient_steps"]
    forgiven = limiter["forgiven"] - before["forgiven"]
    assert debt - forgiven + steps * per_step == taken + owed  # to the last fraction


# ---------------------------------------------------------------------- a policy that learns apart


def test_a_killed_imaginer_is_started_again(actors: FaultRun) -> None:
    (victim,) = actors.processes("ray::ImaginerActor")
    restarts = actors.last()["restarts/imaginer"]
    since = f.kill(victim)
    again = actors.wait_for_line("a loss", lambda x: x["restarts/imaginer"] > restarts, since)
    learned = actors.wait_for_line(
        "policy steps", lambda x: x["weights_version"] > again["weights_version"] + 8, since
    )
    f.note_recovery("imaginer", learned["time"] - since)
    assert learned["restarts/learner"] == again["restarts/learner"]


def test_a_killed_actor_that_acts_is_started_again(actors: FaultRun) -> None:
    (victim,) = actors.processes("ray::ActingActor")
    restarts = actors.last()["restarts/acting"]
    since = f.kill(victim)
    again = actors.wait_for_line("a loss", lambda x: x["restarts/acting"] > restarts, since)
    f.note_recovery("acting", again["time"] - since)
    actors.wait_for_line("steps", lambda x: x["env_steps"] > again["env_steps"], since)


def test_killed_learners_of_model_and_policy_are_started_again(actors: FaultRun) -> None:
    """Which of the two is which is not to be seen from outside, so both are killed."""
    victims = actors.processes("ray::LearnerActor")
    assert len(victims) == 2
    for victim in victims:
        was = actors.last()
        since = f.kill(victim)
        seconds = f.learner_back(actors, since, was["restarts/learner"])
        f.note_recovery("learner of one part", seconds)
        assert actors.last()["restarts/learner"] == was["restarts/learner"] + 1
        assert victim.pid not in {p.pid for p in actors.processes("ray::LearnerActor")}
    line = actors.wait_for_training(after=time.time())
    actors.wait_for_checkpoint(int(line["gradient_steps"]))
    found = f.newest(actors.run_dir)
    counters = found[1]["counters"]
    taken, kept, lost = (
        counters[name] for name in ("gradient_steps", "effective_steps", "lost_steps")
    )
    assert kept == {part: taken[part] - lost[part] for part in ("world_model", "behavior")}
    assert lost["world_model"] == counters["limiter"]["redone"]


# ------------------------------------------------------------------- a group of learners by itself


@pytest.fixture(scope="module")
def group(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerGroup]:
    """Two ranks that have met, and a store to publish to."""
    settings = toy_task.make_config(
        tmp_path_factory.mktemp("group"), "scale.num_learners=2", "learner.device=cpu"
    )
    store = actor(WeightStore).options(name=WEIGHTS, num_cpus=0).remote()
    spaces = make_envs(settings.env, 0, num_envs=1).spaces
    found = LearnerGroup(settings, spaces, "agent", [{"num_cpus": 1}] * 2)
    found.start(None, 0)
    found.meet()
    yield found
    found.kill()
    ray.kill(store)


def process_of(handle: Any) -> psutil.Process:
    return psutil.Process(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())))


def train(group: LearnerGroup, batches: list[list[Any]]) -> list[dict[str, float]]:
    history = [group.result(group.step([0, 0], batch)) for batch in batches]
    return [{n: v for n, v in step.items() if not n.startswith("time/")} for step in history]


def test_a_group_goes_on_as_if_nothing_had_happened(group: LearnerGroup, tmp_path: Path) -> None:
    """Weights, optimizers and random state of every rank come back: the same batches then give the
    same losses, to the last bit."""
    batches = [
        [ray.put(random_batch(group.spaces, 16, 6, 2 * step + rank)) for rank in range(2)]
        for step in range(10)
    ]
    train(group, batches[:5])
    ray.get(group.save(tmp_path))
    want = train(group, batches[5:])
    pids = [process_of(rank).pid for rank in group.ranks]
    os.kill(pids[1], 9)
    refs = group.step([0, 0], batches[0])
    with pytest.raises(GroupLostError):
        group.result(refs)
    taken = group.gradient_steps
    group.start(tmp_path, taken)
    group.meet()
    assert (group.generation, group.gradient_steps) == (2, taken)
    assert train(group, batches[5:]) == want
    first, second = ray.get([rank.agent_arrays.remote() for rank in group.ranks])
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_learners_that_were_replaced_cannot_publish(group: LearnerGroup) -> None:
    reader = WeightReader()
    ray.get(group.ranks[0].publish.remote())
    assert reader.pull(None)
    had = dict(reader.versions)
    assert had["agent"] == (group.generation, group.gradient_steps)
    stale = _stale(group)
    ray.get(stale.count_from.remote(10**6))
    with pytest.raises(RayTaskError, match="had replaced them") as refused:
        ray.get(stale.publish.remote())
    assert isinstance(refused.value.as_instanceof_cause(), StaleGenerationError)
    ray.kill(stale)
    assert not reader.pull(None)
    assert reader.versions == had


def _stale(group: LearnerGroup) -> Any:
    make: Any = ray.remote(LearnerActor)
    where = {"num_cpus": 0}
    return make.options(**where).remote(group.config, group.spaces, "agent", 0, 0)


class DiesAfterAnswering:
    """A store whose process dies when it has answered. Takes the place of a reader's handle."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @property
    def newer_than(self) -> Any:
        return self

    def remote(self, versions: Any) -> Any:
        victim, found = process_of(self._store), ray.get(self._store.newer_than.remote(versions))
        victim.kill()
        ((_, (ref,)),) = found.values()
        deadline = time.time() + PATIENCE_S
        while _there(ref):  # for a while it is still in this node's memory
            assert time.time() < deadline
            time.sleep(0.1)
        return ray.put(found)


def _there(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ObjectLostError:
        return False
    return True


def test_readers_survive_the_owner_of_their_weights(group: LearnerGroup) -> None:
    """The store is the owner. Readers keep what they have, also when it dies between naming the
    weights and handing them out, and the next publication brings them up to date."""
    agent = group.config.make_agent(group.spaces)
    reader = WeightReader()
    ray.get(group.ranks[0].publish.remote())
    assert reader.pull(agent)
    had = dict(reader.versions)
    train(group, [[ray.put(random_batch(group.spaces, 16, 6, 0))] * 2])
    ray.get(group.ranks[0].publish.remote())
    direct: Any = reader.store
    reader.store = DiesAfterAnswering(direct)  # type: ignore[assignment]
    assert reader.pull(agent)
    assert (reader.missed, reader.versions) == (1, had)
    began = time.time()
    reader.store = direct
    while True:  # publishing to a store that is away is nobody's error
        ray.get(group.ranks[0].publish.remote())
        if reader.pull(agent):
            break
        assert time.time() - began < PATIENCE_S
        time.sleep(0.1)
    f.note_recovery("weight store, seen by a reader", time.time() - began)
    assert reader.versions["agent"] == (group.generation, group.gradient_steps) > had["agent"]
    want = ray.get(group.agent_arrays())
    for name, value in agent.inference_state().items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)

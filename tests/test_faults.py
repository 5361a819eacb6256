"""Processes of real runs are killed: training goes on, and no step on disk is lost or doubled.

Recovery times are printed, and written where WORLDFLUX_RECOVERY_LOG says; nothing is asserted about
them. The run in the fused mode ends with the death of its driver, so those tests come in order.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import fault_runs as f
import numpy as np
import psutil
import pytest
from fault_runs import FaultRun
from toy_run import PATIENCE_S

from worldflux_dist import config

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


def test_a_run_goes_on_with_other_shards_and_another_ratio(fused: FaultRun) -> None:
    """Ten times the debt that a run can have is not worked off at once, but forgiven. (Shards that
    become fewer are in test_shard.py.)"""
    if fused.running:
        fused.interrupt()
        assert fused.wait() == 130
    run_dir, debt = fused.run_dir, 300
    found = f.newest(run_dir)
    saved, before = f.saved_shards(run_dir, found[1]), found[1]["counters"]["limiter"]
    f.owe(run_dir, debt)
    ratio = f.RATIO * 2
    changed = (f"train.train_ratio={ratio}", "scale.num_shards=3")
    began = time.time()
    with FaultRun(run_dir.parent, *FUSED, *changed) as run:
        run.wait_for_training(after=began)
        _stop(run)
    after = f.live_shards(run_dir)
    assert len(after) == 3
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

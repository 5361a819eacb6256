"""A group of learners by itself, whose processes are killed: nothing is lost, doubled or outdated.

Recovery times are printed, and written where WORLDFLUX_RECOVERY_LOG says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fault_runs as f
import numpy as np
import psutil
import pytest
import ray
import toy_task
from injected import start_shard
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from small import random_batch
from toy_run import PATIENCE_S

from worldflux_dist.distributed.feed import Fed, Shards, done_of
from worldflux_dist.distributed.group import ActorGroup, GroupLostError, call
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.rank import BESIDE, LearnerActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.saving import Saver
from worldflux_dist.distributed.shard import shard_name
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.distributed.weights import (
    WEIGHTS,
    StaleGenerationError,
    WeightReader,
    WeightStore,
)
from worldflux_dist.envs import make_envs
from worldflux_dist.replay.limiter import Limiter

pytestmark = pytest.mark.ray


class HeldUp(LearnerActor):
    """Writes into a folder only once there is no file `hold` in it."""

    @ray.method(concurrency_group="saving")
    def write(self, noted: None, folder: Path) -> None:
        while (folder / "hold").exists():
            time.sleep(0.01)
        super().write(noted, folder)


@pytest.fixture(scope="module")
def group(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ActorGroup]:
    """Two ranks that have met, and a store to publish to."""
    settings = toy_task.make_config(
        tmp_path_factory.mktemp("group"), "scale.num_learners=2", "learner.device=cpu"
    )
    store = actor(WeightStore).options(name=WEIGHTS, num_cpus=0).remote()
    spaces = make_envs(settings.env, 0, num_envs=1).spaces
    found = ActorGroup(settings, spaces, "agent", [{"num_cpus": 1}] * 2)
    found.kind = HeldUp
    found.start(None, 0)
    found.meet()
    yield found
    found.kill()
    ray.kill(store)


def process_of(handle: Any) -> psutil.Process:
    return psutil.Process(ray.get(handle.__ray_call__.remote(lambda self: os.getpid())))


class Given:
    """A source of batches that are there, one for each rank and step."""

    def __init__(self, batches: list[list[Any]]) -> None:
        self.batches = list(batches)

    def pump(self, needed: int) -> None:
        pass

    def take(self, num: int) -> list[Fed] | None:
        return [(0, ref) for ref in self.batches.pop(0)]

    def waiting(self) -> list[Any]:
        return []

    def restart_stuck(self) -> None:
        pass


def train(group: ActorGroup, batches: list[list[Any]]) -> list[dict[str, float]]:
    group.source = Given(batches)
    group.begin(len(batches))
    deadline = time.time() + PATIENCE_S
    while not group.done:
        assert time.time() < deadline
        group.pump()
        if waiting := group.waiting():
            ray.wait(waiting, num_returns=1, timeout=1.0)
    return [{n: v for n, v in step.items() if not n.startswith("time/")} for step in group.taken]


def test_a_group_goes_on_as_if_nothing_had_happened(group: ActorGroup, tmp_path: Path) -> None:
    """Weights, optimizers and random state of every rank come back: the same batches then give the
    same losses, to the last bit. What is saved is of the moment, and steps go on while it is
    written."""
    batches = [
        [ray.put(random_batch(group.spaces, 16, 6, 2 * step + rank)) for rank in range(2)]
        for step in range(10)
    ]
    train(group, batches[:5])
    (tmp_path / "hold").touch()
    writing = group.save(tmp_path)
    want = train(group, batches[5:])
    publish(group)
    assert not done_of(writing)
    (tmp_path / "hold").unlink()
    ray.get(writing)
    pids = [process_of(rank).pid for rank in group.ranks]
    os.kill(pids[1], 9)
    with pytest.raises(GroupLostError):
        train(group, batches[:1])
    taken = group.gradient_steps
    group.start(tmp_path, taken)
    group.meet()
    assert (group.generation, group.gradient_steps) == (2, taken)
    assert train(group, batches[5:]) == want
    first, second = ray.get([rank.agent_arrays.remote() for rank in group.ranks])
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def publish(group: ActorGroup) -> None:
    """Raises RayError where the store did not get the weights."""
    group.publish()
    ray.get(group.published)


def test_learners_that_were_replaced_cannot_publish(group: ActorGroup) -> None:
    reader = WeightReader()
    publish(group)
    assert reader.pull(None)
    had = dict(reader.versions)
    assert had["agent"] == (group.generation, group.gradient_steps)
    stale = _stale(group)
    ray.get(stale.count_from.remote(10**6))
    version, weights = call(stale, "weights", num_returns=2)
    with pytest.raises(RayTaskError, match="had replaced them") as refused:
        ray.get(group.store.publish.remote("agent", version, [weights]))
    assert isinstance(refused.value.as_instanceof_cause(), StaleGenerationError)
    ray.kill(stale)
    assert not reader.pull(None)
    assert reader.versions == had


def _stale(group: ActorGroup) -> Any:
    make: Any = ray.remote(concurrency_groups=BESIDE)(LearnerActor)
    where = {"num_cpus": 0}
    return make.options(**where).remote(group.config, group.spaces, "agent", 0, 0)


class Owner:
    """Owns a copy of an object, until it dies."""

    def copy(self, value: Any) -> list[Any]:
        return [ray.put(value)]


class LosesWhatItNames:
    """A store whose weights are lost when it has named them; in place of a reader's handle."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @property
    def newer_than(self) -> Any:
        return self

    def remote(self, versions: Any) -> Any:
        found = ray.get(self._store.newer_than.remote(versions))
        ((part, (version, (whole,))),) = found.items()
        owner = actor(Owner).options(num_cpus=0).remote()
        (ref,) = ray.get(owner.copy.remote(whole))
        process_of(owner).kill()
        deadline = time.time() + PATIENCE_S
        while _there(ref):
            assert time.time() < deadline
            time.sleep(0.1)
        return ray.put({part: (version, [ref])})


def _there(ref: Any) -> bool:
    try:
        ray.get(ref)
    except ObjectLostError:
        return False
    return True


def test_weights_outlive_the_learner_that_made_them(group: ActorGroup) -> None:
    """A reader that starts when all learners are dead gets what was published last."""
    publish(group)
    want = ray.get(group.ranks[0].agent_arrays.remote())
    victims = [process_of(rank) for rank in group.ranks]
    for victim in victims:
        victim.kill()
    for rank in group.ranks:
        with pytest.raises(RayActorError):
            ray.get(rank.node.remote())
    agent, reader = group.config.make_agent(group.spaces), WeightReader()
    assert reader.pull(agent)
    assert (reader.missed, reader.versions["agent"][0]) == (0, group.generation)
    for name, value in agent.inference_state().items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)
    group.start(None, group.gradient_steps)
    group.meet()


def test_readers_survive_the_loss_of_their_weights(group: ActorGroup) -> None:
    """Readers keep what they have, also when weights are lost between being named and handed out,
    or with the store, and the next publication brings them up to date."""
    agent = group.config.make_agent(group.spaces)
    reader = WeightReader()
    publish(group)
    assert reader.pull(agent)
    had = dict(reader.versions)
    train(group, [[ray.put(random_batch(group.spaces, 16, 6, 0))] * 2])
    publish(group)
    direct: Any = reader.store
    reader.store = LosesWhatItNames(direct)  # type: ignore[assignment]
    assert reader.pull(agent)
    assert (reader.missed, reader.versions) == (1, had)
    reader.store = direct
    process_of(direct).kill()
    began = time.time()
    while True:
        with suppress(RayError):  # the store is away
            publish(group)
        if reader.versions != had or reader.pull(agent):
            break
        assert time.time() - began < PATIENCE_S
        time.sleep(0.1)
    f.note_recovery("weight store, seen by a reader", time.time() - began)
    assert reader.versions["agent"] == (group.generation, group.gradient_steps) > had["agent"]
    want = ray.get(group.ranks[0].agent_arrays.remote())
    for name, value in agent.inference_state().items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


def test_a_checkpoint_that_all_have_written_is_what_learners_go_on_from(
    group: ActorGroup, tmp_path: Path
) -> None:
    """Not the one before it: they would be behind what is newest when one dies again."""
    started: list[Any] = []
    shard = start_shard(started, tmp_path / "replay", name=shard_name(0))
    root, driver = tmp_path / "checkpoints", Driver()
    shards = Shards([shard])
    learners = Learners(group.config, [group], shards, [], root, driver)
    saver = Saver([group], shards, Limiter(1, 1, 0), root, driver)
    taken, lost = group.gradient_steps, group.lost_steps
    saver.begin(episodes=0)
    assert saver.writing is not None
    refs = saver.writing.refs
    assert len(ray.wait(refs, num_returns=len(refs), timeout=PATIENCE_S)[0]) == 3
    batch = [ray.put(random_batch(group.spaces, 16, 6, rank)) for rank in range(2)]
    train(group, [batch, batch])
    process_of(group.ranks[1]).kill()
    learners._restart(group, GroupLostError("a rank was killed"))
    _, saved = f.newest(tmp_path)
    assert saved["step"] == taken
    assert learners.take_redo() == 2
    assert (group.gradient_steps, group.lost_steps) == (taken + 2, lost + 2)
    assert saver.finish(wait=False)  # nothing is being written any more
    for handle in started:
        ray.kill(handle)

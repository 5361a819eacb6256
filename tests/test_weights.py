"""Weights on their way from learners to whoever acts, and batches on theirs to learners: how old
the ones may be, and how long the others are waited for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from injected import PATIENCE_S, pid_of, start_shard
from test_waiting import CountEnv, set_patience

from worldflux_dist import config
from worldflux_dist.distributed.collect import RayCollector
from worldflux_dist.distributed.env_runner import EnvRunnerActor
from worldflux_dist.distributed.feed import Shards
from worldflux_dist.distributed.flow import Flow
from worldflux_dist.distributed.group import ActorGroup
from worldflux_dist.distributed.learners import Learners
from worldflux_dist.distributed.rank import LearnerActor
from worldflux_dist.distributed.recording import stall
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.shard import ReplayShardActor, shard_name
from worldflux_dist.distributed.start import probe
from worldflux_dist.distributed.supervision import Driver
from worldflux_dist.distributed.weights import WEIGHTS, WeightReader, WeightStore
from worldflux_dist.replay.limiter import Limiter

pytestmark = pytest.mark.ray

MAX_STALENESS = 8
BATCH_STEPS = 16 * 4
SIZES = {"units": 16, "latent": 16, "encoder_units": 16, "channels": 4, "num_q": 2}
SIZES |= {"plan_samples": 8, "plan_proposals": 2, "plan_iterations": 1}


class PausingEnv(CountEnv):
    """Takes `pause` seconds for a step."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def step(self, action: Any) -> Any:
        time.sleep(self.pause)
        return super().step(action)


class SlowShard(ReplayShardActor):
    """Takes half a second for a batch, many times what a step does beside other work, too."""

    @ray.method(num_returns=2)
    def sample(self, batch_size: int, online: bool = True) -> Any:
        time.sleep(0.5)
        return super().sample(batch_size, online)


class SlowLearner(LearnerActor):
    """Takes 50 ms longer for a step."""

    def step(self, *given: Any) -> dict[str, Any]:
        with self._busy():
            time.sleep(0.05)
        return super().step(*given)


COMPILE_S = 15.0  # more than twice the patience, so that both would lose it


class CompilingLearner(LearnerActor):
    """Compiles nothing to speak of before its first steps, on rank 1 for `COMPILE_S`."""

    def __init__(self, *given: Any) -> None:
        rank = given[3]
        torch._dynamo.config.disable = False

        def compiler(module: Any, inputs: Any) -> Any:
            time.sleep(COMPILE_S * rank)
            return module.forward

        def after_a_trifle(function: Any, compiled: Any = torch.compile, **_: Any) -> Any:
            trifle = compiled(lambda x: x + 1, backend=compiler)

            def called(*given: Any) -> Any:
                trifle(torch.ones(1))
                return function(*given)

            return called

        torch.compile = after_a_trifle
        super().__init__(*given)


class PatientLearner(LearnerActor):
    """Takes three seconds longer for a step."""

    def step(self, *given: Any) -> dict[str, Any]:
        time.sleep(3)
        return super().step(*given)


SILENT = "learners, or what feeds them, gave no answer"
System = Callable[..., RayCollector]


@pytest.fixture
def system(started: list[Any], tmp_path: Path) -> System:
    """Builds a system of one runner, one shard and learners, with what is said in `tmp_path`."""

    def build(
        shard: type = ReplayShardActor,
        learner: type = LearnerActor,
        pause: float = 0.0,
        ranks: int = 1,
        scale: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
    ) -> RayCollector:
        settings = config.from_dict(
            {
                "model": "tdmpc2:tiny",
                "model_options": SIZES,
                "env": {"id": "test_weights:PausingEnv", "num_envs": 1, "kwargs": {"pause": pause}},
                "replay": {"batch_size": 16, "batch_length": 4},
                "scale": {"num_runners": 1, "num_shards": 1, "num_learners": ranks}
                | {"chunk_length": 64, "max_staleness": MAX_STALENESS}
                | (scale or {}),
                "learner": {"device": "cpu"} | (options or {}),
            }
        )
        store = actor(WeightStore).options(name=WEIGHTS, num_cpus=0).remote()
        place = start_shard(started, tmp_path / "replay", kind=shard, name=shard_name(0))
        runner = actor(EnvRunnerActor).options(num_cpus=0).remote(settings, 0, 0)
        spaces = probe(settings).spaces
        group = ActorGroup(settings, spaces, "agent", [{"num_cpus": 0}] * ranks)
        group.kind = learner
        group.start(None, 0)
        group.meet()
        started.extend([store, runner, *group.ranks])
        said = tmp_path / "said"
        said.touch()

        def say(text: str) -> None:
            with said.open("a") as file:
                file.write(f"{text}\n")

        driver, shards = Driver(say), Shards([place])
        learners = Learners(settings, [group], shards, [], tmp_path, driver)
        return RayCollector(settings, [runner], shards, learners, driver)

    return build


def rounds(collector: RayCollector, ratio: float, steps: int) -> list[dict[str, float]]:
    """Metrics of so many gradient steps, at `ratio` of them for an env step, once it was run in."""
    limiter = Limiter(ratio * BATCH_STEPS, BATCH_STEPS, prefill=64)
    flow = Flow(limiter, collector, collector.learners, collector.config.scale.chunk_length)
    while limiter.gradient_steps < 1:
        flow.round()
    collector.learners.staleness.take()
    taken: list[dict[str, float]] = []
    while len(taken) < steps:
        taken += flow.round().updates
    return taken


def fill(collector: RayCollector) -> None:
    """Collect until there is something to learn from; with patience, for processes must start."""
    asked = collector.config.scale.patience
    set_patience(collector, PATIENCE_S)
    while not collector.shards.ready:
        collector.start()
        collector.finished(wait=True)
    set_patience(collector, asked)


def means(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}


def test_a_slow_learner_has_its_weights_taken_and_its_batches_ready(system: System) -> None:
    """Runners take newer weights within a chunk, which takes as long as dozens of steps."""
    collector = system(learner=SlowLearner, pause=0.05)
    rounds(collector, 1, 130)
    lags = collector.learners.staleness.take()
    assert len(lags) >= 64
    assert 0 < np.percentile(lags, 95) <= MAX_STALENESS, lags
    found = means(rounds(collector, 64, 40))
    assert 0 <= stall(found) < 0.5, found


@pytest.mark.parametrize("slow", ["runner", "shard"])
def test_the_stall_is_the_share_of_time_without_a_batch(slow: str, system: System) -> None:
    if slow == "runner":  # a gradient step a round, so that it waits for nothing but its data
        found = means(rounds(system(pause=0.02), 1 / 64, 3))
    else:
        found = means(rounds(system(shard=SlowShard), 4, 20))
    assert 0.5 < stall(found) <= 1, found


def test_the_store_loads_no_torch(started: list[Any]) -> None:
    """Its process is as small as the plan says, and starts quickly."""
    store = actor(WeightStore).options(num_cpus=0).remote()
    started.append(store)
    assert not ray.get(store.__ray_call__.remote(lambda self: "torch" in sys.modules))


def test_a_learner_without_any_step_has_no_batch() -> None:
    assert stall({}) == 1


def test_a_publication_that_fails_is_counted_said_and_tried_again(
    system: System, tmp_path: Path
) -> None:
    """No further gradient step is needed for it."""
    collector = system()
    rounds(collector, 1, 4)
    (group,), reader = collector.learners.groups, WeightReader()
    ray.get(group.published)
    group.gradient_steps += 1  # as if it had taken one more
    ray.get(group.ranks[0].count_from.remote(group.gradient_steps))
    psutil.Process(pid_of(reader.store)).kill()
    collector.learners.publish()
    deadline = time.monotonic() + PATIENCE_S
    while not (reader.pull(None) and reader.oldest == group.gradient_steps):
        assert collector.learners.update(0) == []
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert collector.learners.failed_publications >= 1
    assert "the newest weights of agent are not published, trying again" in (
        (tmp_path / "said").read_text()
    )


def test_ranks_that_compile_are_not_silent(system: System, tmp_path: Path) -> None:
    """Neither the driver nor the rank that waits for the one that compiles loses its patience."""
    collector = system(
        learner=CompilingLearner, ranks=2, options={"compile": True}, scale={"patience": 6}
    )
    fill(collector)
    assert len(rounds(collector, 1 / 64, 1)) >= 1
    assert collector.learners.model.generation == 1
    assert SILENT not in (tmp_path / "said").read_text()


def test_patience_grows_with_each_restart(system: System, tmp_path: Path) -> None:
    """Learners that are slow but alive get there: their third life has time enough, a later one on
    a busy machine."""
    collector = system(learner=PatientLearner, scale={"patience": 1})
    fill(collector)
    assert len(rounds(collector, 1 / 64, 1)) >= 1
    said = (tmp_path / "said").read_text()
    lost = said.count(SILENT)
    assert lost >= 1
    assert collector.learners.restarts["learner"] == lost == collector.learners.model.generation - 1
    for number in range(lost):
        assert (
            f"{SILENT} for {2**number} s, see scale.patience; from now on it may take "
            f"{2 ** (number + 1)} s"
        ) in said

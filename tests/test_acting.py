"""Acting in one place: one batch for all who wait, and a death that costs nothing."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from toy_run import PATIENCE_S, ToyRun, read_metrics

from worldflux_dist import config
from worldflux_dist.distributed.model_actor import ModelActor
from worldflux_dist.distributed.roles import actor
from worldflux_dist.distributed.weights import WEIGHTS, WeightStore
from worldflux_dist.envs import make_envs
from worldflux_dist.spaces import Spaces

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

SETTINGS = config.from_dict(
    {
        "model": "tdmpc2:tiny",
        "model_options": {"units": 16, "latent": 16, "encoder_units": 16, "plan_samples": 40},
        "env": {"id": "Pendulum-v1", "num_envs": 2},
    }
)


PIXELS = config.from_dict(
    {
        "model": "tdmpc2:tiny",
        "model_options": {"units": 16, "latent": 16, "channels": 4, "plan_samples": 40},
    }
)


@pytest.fixture
def store(ray_local: None) -> Iterator[Any]:
    actor = ray.remote(num_cpus=0)(WeightStore).options(name=WEIGHTS).remote()
    yield actor
    ray.kill(actor)


def make_obs(num: int, seed: int) -> dict[str, np.ndarray]:
    return {"obs": np.random.default_rng(seed).normal(size=(num, 3)).astype(np.float32)}


def test_calls_that_wait_share_a_batch_and_get_their_own_rows(store: Any) -> None:
    envs = make_envs(SETTINGS.env, 0)
    learned = SETTINGS.make_agent(envs.spaces)
    ray.get(store.publish.remote("agent", (1, 7), [ray.put(learned.inference_state())]))
    acting = ModelActor(SETTINGS, envs.spaces, 0)
    sizes: list[int] = []
    act_batch = acting.agent.act_batch

    def counted(obs: Any, is_first: Any, carry: Any) -> Any:
        sizes.append(len(is_first))
        return act_batch(obs, is_first, carry)

    acting.agent.act_batch = counted  # type: ignore[method-assign]

    async def ask(carries: list[Any]) -> list[Any]:
        calls = [
            acting.act(make_obs(num, seed=num), np.array([carry is None] * num), carry)
            for num, carry in zip((1, 2, 3), carries, strict=True)
        ]
        return await asyncio.gather(*calls)

    first = asyncio.run(ask([None, None, None]))
    again = asyncio.run(ask([carry for _, carry, _ in first]))
    assert sum(sizes) == 12 and len(sizes) < 6
    for num, (action, carry, version), (_, later, _) in zip((1, 2, 3), first, again, strict=True):
        assert action.shape == (num, 1) and version == 7
        with torch.no_grad():
            want = learned.world_model.encode(make_obs(num, seed=num)).tensors["latent"]
        np.testing.assert_allclose(carry["state/latent"], want.numpy(), atol=1e-6)
        remembered = later["state/origin"][:, 16:]  # it came along
        np.testing.assert_array_equal(remembered, action)


def test_callers_that_are_out_of_step_come_to_share_batches(store: Any) -> None:
    acting = ModelActor(SETTINGS, make_envs(SETTINGS.env, 0).spaces, 0)
    sizes: list[int] = []

    def slow(obs: Any, is_first: Any, carry: Any) -> Any:
        sizes.append(len(is_first))
        time.sleep(0.05)
        return np.zeros((len(is_first), 1), np.float32), carry

    acting.agent.act_batch = slow  # type: ignore[method-assign]

    async def runner(delay: float) -> None:
        await asyncio.sleep(delay)
        for _ in range(10):
            await acting.act(make_obs(1, 0), np.array([False]), None)
            await asyncio.sleep(0.003)  # its environments

    async def both() -> None:
        await asyncio.gather(runner(0), runner(0.03))

    asyncio.run(both())
    assert sizes.count(2) >= 8, sizes


def test_an_error_reaches_everybody_who_waits(store: Any) -> None:
    acting = ModelActor(SETTINGS, make_envs(SETTINGS.env, 0).spaces, 0)

    async def ask() -> list[Any]:
        bad = {"obs": np.zeros((1, 5), np.float32)}
        calls = [acting.act(bad, np.array([True]), None) for _ in range(2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert all(isinstance(found, RuntimeError) for found in asyncio.run(ask()))


def test_who_comes_without_a_carry_sees_no_frames_of_before(store: Any) -> None:
    """Pixel TD-MPC2 sees three frames. Where a runner begins to act in the middle of an episode,
    all three are the one it sees, and not black ones."""
    space = gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    spaces = Spaces(space, gymnasium.spaces.Box(-1, 1, (1,)))
    acting = ModelActor(PIXELS, spaces, 0)
    frame = {"obs": np.full((2, 64, 64, 3), 200, np.uint8)}
    middle = np.zeros(2, bool)
    _, carry, _ = asyncio.run(acting.act(frame, middle, None))
    _, want = acting.agent.act_batch(frame, ~middle)
    for name, value in want.items():
        if name.startswith("state/"):
            np.testing.assert_array_equal(carry[name], value.cpu().numpy(), err_msg=name)


def test_a_process_that_acts_draws_other_numbers_in_its_next_life(store: Any) -> None:
    spaces = make_envs(SETTINGS.env, 0).spaces
    started = actor(ModelActor).options(num_cpus=0).remote(SETTINGS, spaces, 0)

    def drawn() -> tuple[int, list[float]]:
        look = started.__ray_call__.remote(lambda _: (os.getpid(), torch.rand(4).tolist()))
        return ray.get(look, timeout=PATIENCE_S)

    pid, before = drawn()
    os.kill(pid, 9)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            again, after = drawn()
            break
        except RayActorError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    ray.kill(started)
    assert again != pid and after != before


@pytest.mark.chaos
def test_a_run_goes_on_after_the_process_that_acts_was_killed(tmp_path: Path) -> None:
    settings = ("scale.acting=actor", "train.threshold=null", "train.prefill=100")
    with ToyRun(tmp_path, *settings) as run:
        run.wait_for("evaluation at")  # by now it acts, and the run has far to go
        (process,) = run.processes("ray::ActingActor")
        process.kill()
        assert run.wait() == 0, run.output
    lines = read_metrics(run.run_dir)
    assert "the process that acts died; it is started again" in run.output
    assert lines[-1]["env_steps"] >= 4096
    assert lines[-1]["restarts/acting"] >= 1
    assert max(line.get("staleness", 0) for line in lines) > 0

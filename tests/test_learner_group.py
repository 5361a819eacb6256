"""Ranks of a learner group: two processes with half of each batch are one with the whole of it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fixed_draws import fix_draws
from small import make_small, perturbed, random_batch

from worldflux_dist.imaginer import Imaginer
from worldflux_dist.learner import Learner, LearnerConfig, NonFiniteLossError
from worldflux_dist.nn.layers import BinOutput

pytestmark = pytest.mark.slow
STEPS, ROWS, LENGTH = 3, 4, 12
CRITIC = {"kind": "actor_critic", "horizon": 3, "return_rate": 0.5}
# Name: family, part, the behavior, and in how many parts each rank takes its rows.
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "dreamerv3": ("dreamerv3", "agent", CRITIC, 1),
    "dreamerv3 model": ("dreamerv3", "world_model", CRITIC, 2),
    "dreamerv3 behavior": ("dreamerv3", "behavior", CRITIC, 1),
    "diffusion model": ("diffusion", "world_model", CRITIC, 2),
    "token": ("token", "agent", CRITIC, 1),
    "tdmpc2": ("tdmpc2", "agent", {"scale_rate": 0.5}, 1),
    "tdmpc2 model": ("tdmpc2", "world_model", {}, 1),
    "tdmpc2 behavior": ("tdmpc2", "behavior", CRITIC, 1),
}


def make_learner(case: str, seed: int) -> Learner:
    """A learner whose weights and buffers depend on the seed; its Qs and returns are far apart, so
    that their scale counts, but read off bins about 0: of random ones, which reach 5e8, a sum keeps
    four digits or fewer."""
    family, part, behavior, accumulate = CASES[case]
    torch.manual_seed(seed)
    rates = {"learning_rate": 4e-5, "denoiser_rate": 4e-5} if family == "diffusion" else {}
    agent = perturbed(make_small(family, "dict", "continuous", behavior, **rates), seed, 0.5)
    for module in agent.modules():
        if isinstance(module, BinOutput):
            num = module.out_features
            module.bias.data -= 0.003 * (torch.arange(num) - num // 2) ** 2
    for name, buffer in agent.behavior.named_buffers():
        if name != "bins":
            buffer += seed
    return Learner(agent, LearnerConfig(device="cpu", accumulate=accumulate), part, rows=True)


def batches(case: str, agent: Any, rank: int, num_ranks: int) -> list[Any]:
    """A rank's rows of each step's batch, imagined where it is the behavior that learns."""
    rows = slice(rank * ROWS // num_ranks, (rank + 1) * ROWS // num_ranks)
    whole = [random_batch(agent.spaces, ROWS, LENGTH, seed) for seed in range(STEPS)]
    if CASES[case][1] != "behavior":
        return [batch.map(lambda value: value[rows]) for batch in whole]
    imaginer = Imaginer(make_learner(case, 0).agent, packed=True)
    return [imaginer.imagine(batch).rows(rows) for batch in whole]


def train(case: str, learner: Learner, rank: int, num_ranks: int) -> dict[str, np.ndarray]:
    """Weights, last gradients, metrics and row losses after all steps."""
    given = batches(case, learner.agent, rank, num_ranks)
    with pytest.MonkeyPatch.context() as patch:
        fix_draws(patch)
        history = [learner.step(batch) for batch in given]
    found = {f"weight/{name}": value.numpy() for name, value in learner.agent.state_dict().items()}
    for name, param in learner.agent.named_parameters():
        if param.grad is not None:
            found[f"grad/{name}"] = param.grad.numpy()
    found |= {f"metric/{n}": np.array([step[n] for step in history]) for n in history[0]}
    return found | {"rows": learner.row_losses}


def run_rank(rank: int, folder: Path) -> None:
    """A process: all cases, then a loss that is broken on rank 1 alone, then that rank's death."""
    torch.set_num_threads(1)

    def join(learner: Learner, name: str) -> None:
        learner.join(dist.FileStore(str(folder / f"{name}.store"), 2), rank, 2, timeout_s=120)

    for case in CASES:
        learner = make_learner(case, rank)
        join(learner, case)
        np.savez(folder / f"{case}.{rank}.npz", **train(case, learner, rank, 2))  # type: ignore[arg-type]
        dist.destroy_process_group()
    learner = make_learner("tdmpc2", rank)
    join(learner, "broken")
    fine, broken, _ = batches("tdmpc2", learner.agent, rank, 2)
    learner.step(fine)
    broken.reward[1, 3] = np.nan if rank == 1 else 1.0
    try:
        learner.step(broken)
    except NonFiniteLossError as error:
        (folder / f"broken.{rank}").write_text(f"{learner.gradient_steps}: {error}")
    if rank == 1:
        os._exit(0)
    try:
        learner.step(fine)
    except RuntimeError:
        (folder / "lost").touch()
    os._exit(0)  # without waiting for the rank that is gone


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which two ranks wrote what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_with_the_whole_batch(case: str, ranks: Path) -> None:
    """Rank 1 began with other weights and buffers; both end with the same ones, bit for bit."""
    first, second = (dict(np.load(ranks / f"{case}.{rank}.npz")) for rank in range(2))
    rows = np.concatenate([first.pop("rows"), second.pop("rows")])
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert np.array_equal(value, second[name]), name
    learner = make_learner(case, 0)
    before = [param.detach().clone() for param in learner.agent.parameters()]
    want = train(case, learner, 0, 1)
    after = learner.agent.parameters()
    moved = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    assert moved > 5e-5
    np.testing.assert_allclose(rows, want.pop("rows"), rtol=1e-4)
    assert first.keys() == want.keys()
    for name, value in want.items():
        if name.startswith("metric/perplexity"):  # of each rank's own tokens
            continue
        np.testing.assert_allclose(first[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert want.get("metric/return_scale", np.array([2.0]))[-1] > 1  # else it would not count


def test_a_broken_loss_of_one_rank_stops_both(ranks: Path) -> None:
    for rank in range(2):
        found = (ranks / f"broken.{rank}").read_text()
        assert found.startswith("1: loss/reward, loss/value became nan at gradient step 2")


def test_a_lost_rank_is_an_error_of_the_others(ranks: Path) -> None:
    assert (ranks / "lost").exists()

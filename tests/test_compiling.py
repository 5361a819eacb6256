"""Pieces that are compiled beside training: begun where it pays, taken up, and done without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch._inductor.runtime.cache_dir_utils as cache_dir_utils
from small import FAMILY, family_batch, make_small, perturbed, same_sums

from worldflux_dist.compiled import Pieces, cache_folder
from worldflux_dist.distributed import compiling
from worldflux_dist.distributed.compiling import Auto
from worldflux_dist.learner import Learner, LearnerConfig

WAIT_S = 1200.0
SMALL = {"horizon": 1, "termination": "none"}


def a_learner(family: str = "tdmpc2", part: str = "world_model") -> Learner:
    """By itself one with a single piece, which takes half a minute."""
    torch.manual_seed(0)
    behavior = {"dropout": 0.0} if family == "tdmpc2" else {"horizon": 2}
    more = SMALL if family == "tdmpc2" else {}
    agent = perturbed(make_small(family, "vector", "continuous", behavior, **more))
    return Learner(agent, LearnerConfig(device="cpu"), part)


def until_news(auto: Auto, learner: Learner) -> str:
    """Steps until there is a sentence."""
    batch, deadline = family_batch(learner.agent), time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        learner.step(batch)
        if said := auto.look(batch, 1.0):
            return said
        time.sleep(0.2)  # leaves the core to the other process
    raise TimeoutError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiling: None) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_the_users_although_torch_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch sets the variable where it is not, and later processes inherit that."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    own = tmp_path / "worldflux_dist" / "compiled"
    assert cache_folder() == own
    torch_names = cache_dir_utils.cache_dir()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == torch_names != str(own)
    assert cache_folder() == own
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"


@pytest.mark.slow
def test_pieces_are_compiled_beside_training_and_taken_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: a later run takes them up at once, without another process."""
    learner, plain, told = a_learner(), a_learner(), []
    said = until_news(Auto(learner, 1000, lambda: told.append(1)), learner)
    assert said.startswith("the learner's steps are compiled from here on")
    assert told and learner.pieces is not None and any(cache.iterdir())
    monkeypatch.setattr(compiling, "Ahead", None)
    later = a_learner()
    assert "an earlier run has compiled them" in until_news(Auto(later, 1000, lambda: None), later)
    assert later.pieces is not None
    plain.agent.load_state_dict(learner.agent.state_dict())
    batch, losses = family_batch(learner.agent), []
    for each in (learner, plain):
        torch.manual_seed(1)
        losses.append(each.step(batch)["loss"])
    same_sums(losses[0], losses[1], 1000)


@pytest.mark.slow
def test_a_run_goes_on_where_nothing_can_be_compiled(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of its threads, of which it has one less while another process is at work."""
    monkeypatch.setenv("CXX", "/bin/false")
    learner, seen = a_learner(), []
    step = learner.step
    monkeypatch.setattr(learner, "step", lambda x: (seen.append(torch.get_num_threads()), step(x)))
    torch.set_num_threads(2)
    try:
        said = until_news(Auto(learner, 1000, lambda: None), learner)
        assert set(seen) == {1, 2} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert said.startswith("learner.compile auto: nothing is compiled, since that failed (")
    assert learner.pieces is None
    learner.step(family_batch(learner.agent))


@pytest.mark.parametrize(
    ("steps", "taken", "seconds"), [(50, 40, 1.0), (1000, 40, 0.01), (float("inf"), 40, 1.0)]
)
def test_short_runs_are_not_compiled(
    steps: float, taken: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of which nobody knows how long they are, until they are long."""
    monkeypatch.delenv("TORCH_COMPILE_DISABLE")
    monkeypatch.setattr(subprocess, "Popen", None)  # what would be called
    learner = a_learner()
    batch = family_batch(learner.agent)
    auto = Auto(learner, steps, lambda: None)
    assert not any(auto.look(batch, seconds) for _ in range(taken))
    monkeypatch.setattr(compiling, "COLD_S", 0.0)
    monkeypatch.setattr(compiling, "WARM_S", 0.0)
    with pytest.raises(TypeError, match="not callable"):
        auto.look(batch, seconds)


def test_nothing_is_compiled_where_torch_is_told_so_or_a_gpu_computes() -> None:
    assert os.environ["TORCH_COMPILE_DISABLE"] == "1"
    auto = Auto(a_learner(), 10**9, lambda: None)
    assert not any(auto.look(None, 1.0) for _ in range(10))


BESIDE = """
import sys, time
sys.path[:0] = {paths!r}
from test_compiling import a_learner, family_batch
from worldflux_dist.distributed.compiling import Ahead, order_of
learner = a_learner()
ahead = Ahead(order_of(learner, family_batch(learner.agent)))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_the_process_beside_a_learner_ends_with_it(cache: Path) -> None:
    code = BESIDE.format(paths=os.environ["PYTHONPATH"].split(os.pathsep))
    learner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert learner.stdout is not None and learner.stdout.readline() == b"begun\n"
    (beside,) = psutil.Process(learner.pid).children()
    learner.send_signal(signal.SIGKILL)
    learner.wait()
    assert psutil.wait_procs([beside], timeout=WAIT_S)[0] == [beside]


@pytest.mark.nightly
@FAMILY
def test_compiled_steps_teach_what_plain_ones_do(family: str, cache: Path) -> None:
    """Five steps of all pieces, truly compiled."""
    ends = []
    for on in (True, False):
        learner = a_learner(family, "agent")
        learner.pieces = Pieces(learner.agent) if on else None
        batch, losses = family_batch(learner.agent), []
        for number in range(5):
            torch.manual_seed(number)
            losses.append(learner.step(batch)["loss"])
        ends.append(losses)
    same_sums(ends[0], ends[1], 10_000)

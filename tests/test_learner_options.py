"""What a learner can be asked for: parts of an agent, row losses, and options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixed_draws import fix_draws
from small import (
    ARCHITECTURE,
    FAMILIES,
    FAMILY,
    VARIANTS,
    family_batch,
    make_small,
    perturbed,
    random_batch,
    same_sums,
)

from worldflux_dist.compiled import Pieces
from worldflux_dist.imaginer import Imaginer
from worldflux_dist.learner import Learner, LearnerConfig
from worldflux_dist.storage import CheckpointError

CRITIC = {"kind": "actor_critic", "horizon": 3}
# What enters the losses as a statistic of the whole batch stands still.
CRITIC_STILL = {"horizon": 3, "return_rate": 0.0}
STILL = {"tdmpc2": {"scale_rate": 0.0}}
APART: dict[str, dict[str, Any]] = {"jepa": {"regularizer": "none"}}
APART |= {variant: {"regularizer_scale": 0.0} for variant in VARIANTS}


def make_learner(
    family: str,
    part: str = "agent",
    behavior: Any = None,
    rows: bool = False,
    model: dict[str, Any] | None = None,
    obs: str = "dict",
    **options: Any,
) -> Learner:
    torch.manual_seed(0)
    native = FAMILIES[VARIANTS.get(family, (family,))[0]][2]
    behavior = native if behavior is None else behavior
    agent = perturbed(make_small(family, obs, "continuous", behavior, **(model or {})))
    return Learner(agent, LearnerConfig(device="cpu", **options), part, rows)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.agent.state_dict().items()}


# ----------------------------------------------------------------------------- parts


@pytest.mark.parametrize("part", ["agent", "world_model", "behavior"])
@FAMILY
def test_a_part_learns_alone_and_goes_on_bit_for_bit(
    family: str, part: str, tmp_path: Path
) -> None:
    first = make_learner(family, part, CRITIC)
    before, own = weights(first), first.agent.part_state(part)
    given: list[Any] = [family_batch(first.agent, seed) for seed in range(4)]
    if part == "behavior":
        given = [Imaginer(first.agent).imagine(batch) for batch in given]
    for batch in given[:3]:
        first.step(batch)
    moved = {n for n, value in first.agent.state_dict().items() if not value.equal(before[n])}
    assert moved and moved <= own.keys()
    first.save(tmp_path)
    names = {"world_model", "behavior"} if part == "agent" else {part}
    files = {f"{name}.safetensors" for name in names} | {f"rng-{part}-0.safetensors"}
    files |= {f"learner-{part}.safetensors", f"learner-{part}.json"}
    files |= set() if part == "behavior" else {"agent.json"}
    assert {path.name for path in tmp_path.iterdir()} == files
    second = make_learner(family, part, CRITIC)
    second.load(tmp_path, gradient_steps=40)
    assert second.gradient_steps == 40
    second.load(tmp_path)
    assert second.gradient_steps == 3
    want = first.step(given[3])
    second.load(tmp_path)  # the random state, too
    assert second.step(given[3]) == want
    for name, value in first.agent.state_dict().items():
        assert value.equal(second.agent.state_dict()[name]), name


def test_other_ranks_save_and_take_only_their_random_state(tmp_path: Path) -> None:
    learner = make_learner("tdmpc2")
    torch.manual_seed(5)
    learner.rank = 1
    learner.save(tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["rng-agent-1.safetensors"]
    learner.rank = 0
    torch.manual_seed(6)
    learner.save(tmp_path / "one")
    draws = []
    for rank in (0, 1, 2):
        learner.rank = rank
        torch.manual_seed(7)
        learner.load(tmp_path / "one")
        draws.append(torch.get_rng_state())
    for state, seed in zip(draws, (6, 5, 7), strict=True):  # rank 2 was not there
        torch.manual_seed(seed)
        assert state.equal(torch.get_rng_state())


def test_parts_are_sent_and_refused_by_name(tmp_path: Path) -> None:
    agent = make_learner("dreamerv3").agent
    sent = {part: agent.inference_state(part) for part in ("agent", "world_model", "behavior")}
    # A model that is sent alone goes to imaginers, too, who roll it forward.
    assert sent["world_model"].keys() | sent["behavior"].keys() > sent["agent"].keys()
    for part in ("world_model", "behavior"):
        assert sent[part] and all(name.startswith(f"{part}.") for name in sent[part])
    make_small("dreamerv3", hidden=32).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"world_model.safetensors holds another agent's"):
        agent.load_files(tmp_path, "world_model")
    (tmp_path / "behavior.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"behavior.safetensors is missing"):
        agent.load_files(tmp_path, "behavior")


# -------------------------------------------------------------------------- row losses


@pytest.mark.parametrize("part", ["agent", "world_model"])
@FAMILY
def test_every_row_has_the_loss_of_its_own_steps(
    family: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_draws(monkeypatch)
    learner = make_learner(family, part, rows=True, model=APART.get(family))
    model, batch = learner.agent.world_model, random_batch(learner.agent.spaces, 4, 12)
    metrics = learner.step(batch)
    found = learner.row_losses
    assert found.shape == (4,) and found.dtype == np.float32
    names = {"loss/reward", "loss/dyn", "loss/rep", "loss/continue", "loss/consistency"}
    names |= {"loss/termination", "loss/rec/image", "loss/rec/vector"}
    names |= {"loss/prediction", "loss/regularizer"}
    names |= {"loss/tokens/image", "loss/tokens/vector"}
    names |= {"loss/denoise", "loss/denoise/image"}
    scales = model.loss_scales
    want = sum(scales.get(n[5:], 1.0) * v for n, v in metrics.items() if n in names)
    same_sums(found.mean(), want)
    batch.reward[2, 3] += 50
    other = make_learner(family, part, rows=True, model=APART.get(family), accumulate=2)
    other.step(batch)
    changed = np.abs(other.row_losses - found) > 1e-3
    assert changed.tolist() == [False, False, True, False]
    plain = make_learner(family, part)
    plain.step(batch)
    assert not plain.row_losses.size


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize("part", ["agent", "world_model", "behavior"])
@FAMILY
def test_a_batch_in_parts_teaches_the_same(
    family: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_draws(monkeypatch)
    still = STILL.get(family, CRITIC_STILL)
    behavior = CRITIC | {"return_rate": 0.0} if part == "behavior" else still
    # Where a level of a drawn pixel is rounded otherwise, what is learned in imagination differs.
    obs = "vector" if (family, part) == ("diffusion", "agent") else "dict"
    given_options: dict[str, Any] = {"obs": obs, "model": APART.get(family)}
    ends = []
    for accumulate in (1, 2, 4):
        learner = make_learner(family, part, behavior, accumulate=accumulate, **given_options)
        given: Any = [random_batch(learner.agent.spaces, 4, 12, seed) for seed in range(3)]
        if part == "behavior":
            given = [Imaginer(learner.agent, packed=True).imagine(batch) for batch in given]
        ends.append(([learner.step(batch) for batch in given], weights(learner)))
    for metrics, after in ends[1:]:
        for name, value in ends[0][1].items():
            torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-5, msg=name)
        for got, want in zip(metrics, ends[0][0], strict=True):
            losses = {name: got[name] for name in got if name.startswith("loss")}
            assert losses == pytest.approx({name: want[name] for name in losses}, rel=1e-4)


def test_wrong_options_are_refused_in_a_sentence() -> None:
    learner = make_learner("dreamerv3", accumulate=2)
    with pytest.raises(ValueError, match=r"3 rows at a time.* make replay.batch_size a multiple"):
        learner.step(family_batch(learner.agent))
    with pytest.raises(ValueError, match=r"learner.accumulate is 0: it must be at least 1"):
        LearnerConfig(accumulate=0)


def test_what_a_machine_does_not_have_is_left_out_with_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    plain, batch = make_learner("tdmpc2"), family_batch(make_learner("tdmpc2").agent)
    want = [plain.step(batch) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        learner = make_learner("tdmpc2", compile=True, precision="float32")
        assert [learner.step(batch) for _ in range(2)] == want
    assert [record.getMessage() for record in caplog.records] == [
        "learner.compile is left out: torch.compile needs a C++ compiler and there is no g++: "
        "install one, or name one in the environment variable CXX",
    ]


@pytest.mark.usefixtures("compiling")
def test_what_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("no code for this processor")

    compile_with(fails, monkeypatch)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    learner = make_learner("tdmpc2", compile=True)
    with pytest.raises(RuntimeError, match=r"^learner.compile: torch.compile failed .*=false$"):
        learner.step(family_batch(learner.agent))


def test_a_cache_that_cannot_be_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"file.cache, which cannot be made .* name another"):
        make_learner("tdmpc2", compile=True)


def compile_with(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch.compile take `backend` instead of its own, which takes minutes."""
    real = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, fullgraph, dynamic=None, **_: real(
            function, fullgraph=fullgraph, dynamic=dynamic, backend=backend
        ),
    )


SHORT: dict[str, Any] = {"tdmpc2": {"horizon": 2, "termination": "none"}}
SHORT["diffusion"] = {"history": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("action", ["continuous", "discrete"])
@pytest.mark.parametrize("form", ["pieces", "whole"])
@ARCHITECTURE
def test_what_is_compiled_is_one_graph_each_and_teaches_the_same(
    family: str, action: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced, without the minutes of generating code for it: whatever is drawn, nothing is
    traced again, and a graph that breaks is an error. `whole` is what a GPU gets."""
    compile_with("eager", monkeypatch)
    behavior = {"tdmpc2": {"dropout": 0.0}}.get(family, {"horizon": 1})
    ends = []
    for on in (True, False):
        torch.manual_seed(0)
        agent = perturbed(make_small(family, "vector", action, behavior, **SHORT.get(family, {})))
        learner = Learner(agent, LearnerConfig(device="cpu", compile=False), rows=True)
        if on and form == "pieces":
            learner.pieces = Pieces(agent)
        elif on:
            for stage in learner.stages.values():
                stage.loss = torch.compile(stage.loss, fullgraph=True)
        batch, losses = random_batch(agent.spaces, 2, 3), []
        for number in range(4):
            torch.manual_seed(number)  # other Qs are asked
            losses.append(learner.step(batch)["loss"])
            if on and number == 0:
                traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                torch._dynamo.utils.counters.clear()
        ends.append((losses, learner.row_losses))
    assert traced >= 1
    assert not torch._dynamo.utils.counters["stats"] and not torch._dynamo.utils.counters["frames"]
    same_sums(ends[0][0], ends[1][0], 1000)
    same_sums(ends[0][1], ends[1][1], 1000)


def test_pieces_are_in_use_within_a_step_only() -> None:
    """Acting in the same process, with other sizes, must not have them compiled again."""
    learner = make_learner("dreamerv3")
    model, pieces = learner.agent.world_model, Pieces(learner.agent)
    plain = model.advance
    with pieces.applied():
        assert model.advance is not plain
    assert model.advance == plain and "advance" not in vars(model)

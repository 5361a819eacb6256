"""Graphs for programs without torch: what they give is what torch gives, and dream.json says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import make_small, perturbed, random_batch
from torch import Tensor

from worldflux_dist.cli import export_run
from worldflux_dist.models.base import State

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

from worldflux_dist.serve import export, graphs  # noqa: E402

pytestmark = pytest.mark.slow
ALL = ("encode", "update", "transition", "decode", "act")
SIZES = (1, 2, 7)  # of batches


@dataclass(frozen=True)
class Case:
    """An agent and the graphs of it that are tried; each takes seconds to write."""

    family: str
    obs: str
    action: str
    parts: tuple[str, ...] = ALL
    options: tuple[tuple[str, Any], ...] = ()

    def agent(self) -> Any:
        torch.manual_seed(0)
        return perturbed(make_small(self.family, self.obs, self.action, **dict(self.options)))

    def __str__(self) -> str:
        return "-".join([self.family, self.obs, self.action, *(str(v) for _, v in self.options)])


SEEN = ("update", "transition", "decode")
DAY = [
    Case("dreamerv3", "dict", "discrete"),
    Case("tdmpc2", "image", "continuous", ("update",)),
    Case("jepa", "vector", "continuous", ("update",), (("memory", "gru"),)),
    Case("token", "dict", "continuous", ("transition",)),
    Case("diffusion", "vector", "discrete", ("transition",), (("steps", 1),)),
]
NIGHT = [
    Case("dreamerv3", "vector", "mixed", ("transition", "act")),
    Case("tdmpc2", "vector", "continuous", ("transition", "decode", "act")),
    Case("tdmpc2", "dict", "discrete", ("update", "act")),
    Case("jepa", "dict", "mixed", SEEN),
    Case("jepa", "image", "discrete", SEEN, (("memory", "gru"),)),
    Case("token", "dict", "mixed", SEEN),
    Case("token", "image", "continuous", SEEN, (("tokenizer", "vq"),)),
    Case("token", "vector", "discrete", SEEN, (("tokenizer", "categorical"),)),
    Case("diffusion", "vector", "continuous", SEEN),
    Case("diffusion", "image", "mixed", SEEN),
    Case("diffusion", "vector", "discrete", ("transition",), (("objective", "edm"),)),
    Case("latent", "dict", "continuous", SEEN),
    Case("dreamer4", "dict", "continuous", SEEN),
    Case("dreamer4", "vector", "discrete", ("update", "transition")),
]
CASES = [*DAY, *(pytest.param(case, marks=pytest.mark.nightly, id=str(case)) for case in NIGHT)]


class Runtime:
    """Graphs of a folder, run by onnxruntime alone."""

    def __init__(self, folder: Path) -> None:
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            for path in folder.glob("*.onnx")
        }

    def __call__(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        session = self.sessions[name]
        known = {port.name for port in session.get_inputs()}
        flat = {key: value for key, value in _flat(inputs).items() if key in known}
        assert flat.keys() == known
        outputs = [port.name for port in session.get_outputs()]
        return dict(zip(outputs, session.run(outputs, flat), strict=True))


def _flat(inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays by the names of a graph's inputs, of States, dicts and tensors."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        value = value.tensors if isinstance(value, State) else value
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": part for key, part in value.items()}
        elif value is not None:
            flat[name] = value
    return {name: np.asarray(value) for name, value in flat.items()}


def _state(new: dict[str, np.ndarray]) -> State:
    return State({name.removeprefix("new/"): torch.as_tensor(x) for name, x in new.items()})


def _same(got: dict[str, np.ndarray], want: dict[str, Tensor], allowed: float = 1e-4) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        expected = value.numpy()
        assert got[name].shape == expected.shape and got[name].dtype == expected.dtype, name
        size = max(1.0, float(np.abs(expected.astype(np.float64)).max()))
        error = np.abs(got[name].astype(np.float64) - expected.astype(np.float64)).max()
        assert error <= allowed * size, (name, error, size)


def _new(state: State) -> dict[str, Tensor]:
    return {f"new/{name}": value for name, value in state.tensors.items()}


def _uniform(num: int, shape: tuple[int, ...] | None) -> Tensor | None:
    return None if shape is None else torch.rand(num, *shape)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a case's graphs, written once."""
    folders: dict[str, Path] = {}

    def written(case: Case) -> Path:
        if str(case) not in folders:
            folder, agent = tmp_path_factory.mktemp(str(case)), case.agent()
            if case.parts == ALL:
                export.write_graphs(agent, folder)
            else:
                for part in graphs.parts(agent):
                    if part.name in case.parts:
                        graphs.write(agent, part, folder / f"{part.name}.onnx")
            folders[str(case)] = folder
        return folders[str(case)]

    return written


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_graphs_give_what_torch_gives(case: Case, folder_of: Any) -> None:
    agent, run = case.agent(), Runtime(folder_of(case))
    model = agent.world_model
    assert set(run.sessions) == set(case.parts)
    for num in SIZES:
        torch.manual_seed(num)
        batch = random_batch(agent.spaces, num, 3, seed=num).map(torch.from_numpy)
        looks = [{key: value[:, t] for key, value in batch.obs.items()} for t in range(3)]
        draws = [_uniform(num, model.update_noise_shape) for _ in range(2)]
        first, action = torch.arange(num) % 3 == 1, batch.action[:, 1]
        start = model.encode(looks[0], draws[0])
        if "encode" in case.parts:
            _same(run("encode", obs=looks[0], noise=draws[0]), _new(start))
        inputs = {"action": action, "obs": looks[1], "is_first": first, "noise": draws[1]}
        state = model.update(start, **inputs)
        if "update" in case.parts:
            _same(run("update", state=start, **inputs), _new(state))
        state, noise = model.essential(state), _uniform(num, model.noise_shape)
        after = model.transition(state, action, noise)
        if "transition" in case.parts:
            _same(run("transition", state=state, action=action, noise=noise), _new(after))
        seen = model.visible(after)
        if "decode" in case.parts:
            preds = model.decode(seen).preds
            obs = preds.pop("obs", {})
            named = obs if isinstance(obs, dict) else {"obs": obs}
            got = run("decode", state=seen)
            value = got.pop("value")
            assert value.shape == (num,) and np.isfinite(value).all()
            if case.family != "tdmpc2":
                wanted = agent.behavior.value(model.features(seen))
                _same({"value": value}, {"value": wanted})
            _same(got, {f"obs/{key}": x for key, x in named.items()} | preds)
        if "act" in case.parts:
            features, uniform = model.features(seen), torch.rand(num, agent.spaces.action_dim)
            normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
            kinds = [p.kind == "discrete" for p in agent.spaces.action_parts for _ in range(p.size)]
            noise = torch.where(torch.tensor(kinds), uniform, normal)
            wanted = {"action": agent.behavior.act(features, noise=noise)}
            wanted["greedy"] = agent.behavior.act(features, greedy=True)
            _same(run("act", state=seen, noise=uniform), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_a_chain_of_graphs_is_the_models_rollout(case: Case, folder_of: Any) -> None:
    if "transition" not in case.parts:
        pytest.skip("no graph of transition is written here")
    agent, run, steps = case.agent(), Runtime(folder_of(case)), 15
    model = agent.world_model
    batch = random_batch(agent.spaces, 2, steps + 1).map(torch.from_numpy)
    start = model.essential(model.encode({key: value[:, 0] for key, value in batch.obs.items()}))
    noise = None if model.noise_shape is None else torch.rand(steps, 2, *model.noise_shape)
    rollout = model.rollout(start, batch.action[:, 1:].transpose(0, 1), noise=noise)
    state = start
    for t in range(steps):
        draws = None if noise is None else noise[t]
        new = run("transition", state=state, action=batch.action[:, t + 1], noise=draws)
        state = _state(new)
        seen = {name: new[f"new/{name}"] for name in rollout.states.tensors}
        _same(seen, rollout.states[t + 1].tensors, 1e-3)
        if "decode" in case.parts:
            told = run("decode", state=model.visible(state))
            want = {"reward": rollout.rewards[t], "continue": rollout.continues[t]}
            _same({name: told[name] for name in want}, want, 1e-3)


def _ports(values: Any) -> dict[str, tuple[str, list[Any]]]:
    """Types and shapes by name, as an ONNX file says them."""
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
        found[value.name] = (np.dtype(dtype).name, shape)
    return found


def test_dream_json_says_what_the_files_have(folder_of: Any) -> None:
    case = DAY[0]
    agent, folder = case.agent(), folder_of(case)
    told = json.loads((folder / "dream.json").read_text())
    assert (told["format"], told["family"], told["preset"]) == (1, "dreamerv3", "size1m")
    assert told["discount"] == agent.world_model.discount and told["missing"] == {}
    assert [part["kind"] for part in told["action_parts"]] == ["discrete"]
    assert set(told["graphs"]) == set(ALL)
    for name, graph in told["graphs"].items():
        file = onnx.load(folder / graph["file"])
        assert graph["file"] == f"{name}.onnx"
        for side, values in (("inputs", file.graph.input), ("outputs", file.graph.output)):
            said = {port["name"]: (port["dtype"], port["shape"]) for port in graph[side]}
            assert said == _ports(values), (name, side)
            assert all(
                shape[0] == "batch" and port["meaning"]
                for _, shape in said.values()
                for port in graph[side]
            )
        assert not any("Random" in node.op_type for node in file.graph.node)
        assert not any(node.metadata_props for node in file.graph.node)  # paths of this machine


def test_what_an_agent_cannot_give_is_named() -> None:
    told = export.describe(make_small("tdmpc2", "vector"), {})["missing"]
    assert set(told) == {"obs", "planner", "value"}
    assert "mppi" in told["planner"] and "tdmpc2:5m" in told["obs"]
    assert export.describe(make_small("token"), {})["missing"] == {}


def test_a_part_that_draws_is_refused(tmp_path: Path) -> None:
    agent = make_small("dreamerv3")
    agent.world_model.update_noise_shape = None  # as in a family that does not say that it draws
    part = graphs.parts(agent)[0]
    with pytest.raises(ValueError, match=r"encode.onnx of dreamerv3:size1m draws random numbers"):
        graphs.write(agent, part, tmp_path / "encode.onnx")


def test_a_part_that_torch_cannot_follow_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_small("jepa")
    decode = type(agent.world_model).decode

    def by_value(self: Any, state: State, *heads: Any) -> Any:
        return (
            decode(self, state, *heads) if state.tensors["emb"].sum() > 0 else decode(self, state)
        )

    monkeypatch.setattr(type(agent.world_model), "decode", by_value)
    with pytest.raises(ValueError, match=r"decode.onnx of jepa:tiny cannot be written") as raised:
        graphs.write(agent, graphs.parts(agent)[3], tmp_path / "decode.onnx")
    assert "\n" not in str(raised.value) and "Agent.load" in str(raised.value)


def test_a_graph_that_gives_something_else_is_refused(folder_of: Any) -> None:
    case = DAY[0]
    path, agent = folder_of(case) / "act.onnx", case.agent()
    part = graphs.parts(agent)[4]
    graphs.check(agent, part, path, 3)
    with torch.no_grad():
        agent.behavior.actor.heads[0].bias[0] += 100
    with pytest.raises(ValueError, match=r"act.onnx of dreamerv3:size1m gives another (action|gr)"):
        graphs.check(agent, part, path, 3)


def test_normal_draws_are_the_inverse_distribution() -> None:
    uniform = torch.cat([torch.linspace(0, 1, 10_001), torch.rand(10_000)])
    want = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6).double())
    assert (graphs.normal(uniform).double() - want).abs().max() < 1e-5


def test_the_command_without_a_place_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"say where to with --onnx DIR or --html FILE"):
        export_run(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no run directory"):
        export_run(tmp_path, onnx=tmp_path / "graphs")

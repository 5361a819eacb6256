"""World model and policy as ONNX graphs, so that an agent acts and dreams where there is no torch.

    encode      obs [, noise] -> new state                     a first look
    update      state, action, obs, is_first [, noise] -> new  acted and looked
    transition  state, action [, noise] -> new                 acted, eyes closed
    decode      state -> obs, reward, continue, value          those of them that the agent has
    act         state, noise -> action, greedy                 the policy, never a planner

What must stay true: the rows of a batch may be any number; nothing is drawn in a graph, every
random number is an input, uniform in [0, 1); and a graph is kept only after onnxruntime has given
what torch gives.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldflux_dist.agent import Agent
from worldflux_dist.models.base import State

Named = dict[str, Tensor]
NAMES = ("encode", "update", "transition", "decode", "act")
ROWS = 5  # of the inputs that a graph is checked with
TRACED = 2  # of them, those that it is made with
TOLERANCE = 1e-4  # of the largest number of an output, or of 1
OPSET = 18  # understood by onnxruntime 1.20 and by browsers
LARGEST = 2**31 - 2**26  # bytes of weights in one file; protobuf ends at 2 GiB


@dataclass(frozen=True)
class Part:
    """One graph to be: what it computes of named inputs, of which it has ROWS rows to try."""

    name: str
    inputs: Named
    compute: Callable[[Agent, Named], Named]

    def rows(self, num: int) -> Named:
        """The last `num` rows of the inputs."""
        return {name: value[ROWS - num :] for name, value in self.inputs.items()}


# ------------------------------------------------------------------------- what graphs compute


def _encode(agent: Agent, named: Named) -> Named:
    return _after(agent.world_model.encode(_obs(named), named.get("noise")))


def _update(agent: Agent, named: Named) -> Named:
    came = (named["action"], _obs(named), named["is_first"], named.get("noise"))
    return _after(agent.world_model.update(_state(named), *came))


def _transition(agent: Agent, named: Named) -> Named:
    model = agent.world_model
    return _after(model.transition(_state(named), named["action"], named.get("noise")))


def _decode(agent: Agent, named: Named) -> Named:
    state = _state(named)
    preds = agent.world_model.decode(state).preds
    obs = preds.get("obs", {})
    told = {f"obs/{key}": x for key, x in (obs if isinstance(obs, dict) else {"obs": obs}).items()}
    told |= {name: preds[name] for name in ("reward", "continue") if name in preds}
    return told | {"value": agent.behavior.expected_value(agent.world_model.features(state))}


def _act(agent: Agent, named: Named) -> Named:
    features = agent.world_model.features(_state(named))
    noise = action_noise(agent, named["noise"])
    action = agent.behavior.act(features, noise=noise)
    return {"action": action, "greedy": agent.behavior.act(features, greedy=True)}


def action_noise(agent: Agent, uniform: Tensor) -> Tensor:
    """Draws (..., A) as behaviors take them, normal for continuous parts, of uniform ones."""
    parts = agent.spaces.action_parts
    draws = uniform.split([part.size for part in parts], -1)
    pairs = zip(parts, draws, strict=True)
    return torch.cat([x if p.kind == "discrete" else normal(x) for p, x in pairs], -1)


def normal(uniform: Tensor) -> Tensor:
    """Normal draws of uniform ones, by Wichura's AS 241: to seven digits the inverse of the normal
    distribution, which ONNX does not have. The outer 1e-6 on either side are cut, as in models."""
    p = uniform.clamp(1e-6, 1 - 1e-6)
    q = p - 0.5
    r = 0.180625 - q * q
    over = ((59.109374720 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    under = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1
    t = torch.sqrt(-torch.log(torch.minimum(p, 1 - p))) - 1.6
    tail = ((0.17023821103 * t + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777
    tail = tail / ((0.12021132975 * t + 0.73700164250) * t + 1)
    return torch.where(q.abs() <= 0.425, q * over / under, torch.sign(q) * tail)


def _state(named: Named) -> State:
    return State({n.removeprefix("state/"): x for n, x in named.items() if n.startswith("state/")})


def _obs(named: Named) -> Named:
    return {n.removeprefix("obs/"): x for n, x in named.items() if n.startswith("obs/")}


def _after(state: State) -> Named:
    return {f"new/{name}": value for name, value in state.tensors.items()}


def before(state: State) -> Named:
    """A state's tensors as a graph's inputs."""
    return {f"state/{name}": value for name, value in state.tensors.items()}


# ----------------------------------------------------------------------------- what is exported


@torch.no_grad()
def parts(agent: Agent) -> list[Part]:
    """All graphs of an agent, with inputs made up of random looks and what the model makes of
    them."""
    model, rng, generator = agent.world_model, np.random.default_rng(0), torch.Generator()

    def uniform(shape: tuple[int, ...] | None) -> Named:
        return {} if shape is None else {"noise": torch.rand(ROWS, *shape, generator=generator)}

    def look() -> Named:
        return {
            f"obs/{key}": torch.from_numpy(
                rng.integers(0, 256, (ROWS, *spec.shape)).astype(np.uint8)
                if spec.kind == "image"
                else rng.normal(0, 1, (ROWS, *spec.shape)).astype(np.float32)
            )
            for key, spec in agent.spaces.obs.items()
        }

    action = {"action": torch.from_numpy(agent.spaces.random_action(rng, ROWS))}
    first = {"is_first": torch.arange(ROWS) % 3 == 1}
    seen = look() | uniform(model.update_noise_shape)
    start = model.encode(_obs(seen), seen.get("noise"))
    came = before(start) | action | look() | first | uniform(model.update_noise_shape)
    state = model.essential(following(_update(agent, came)))
    acted = before(state) | action | uniform(model.noise_shape)
    visible = before(model.visible(following(_transition(agent, acted))))
    return [
        Part("encode", seen, _encode),
        Part("update", came, _update),
        Part("transition", acted, _transition),
        Part("decode", visible, _decode),
        Part("act", visible | uniform((agent.spaces.action_dim,)), _act),
    ]


def following(new: Named) -> State:
    """The state that a graph gave, of its outputs."""
    return State({name.removeprefix("new/"): value for name, value in new.items()})


class _Graph(nn.Module):
    """A part as a module of tensors in order, which is what is traced."""

    def __init__(self, agent: Agent, part: Part) -> None:
        super().__init__()
        self.agent, self.names, self.compute = agent, list(part.inputs), part.compute

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.compute(self.agent, dict(zip(self.names, values, strict=True))).values())


@torch.no_grad()
def write(agent: Agent, part: Part, path: Path) -> list[str]:
    """Write a part as an ONNX file and check it; gives the names of its outputs. What fails leaves
    no file.

    Raises ValueError, in one sentence, for a part that torch cannot follow or that draws numbers
    of its own, and for one that onnxruntime computes otherwise than torch.
    """
    what, traced = f"{part.name}.onnx of {agent.recipe['model']}", part.rows(TRACED)
    outputs = list(part.compute(agent, traced))
    size = sum(x.nbytes for x in agent.state_dict().values())
    try:
        with _quiet():
            program = _program(_Graph(agent, part).eval(), list(traced.values()), what)
            onnx: Any = torch.onnx.export(
                *(program, ()),
                input_names=list(traced),
                output_names=outputs,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            _tidy(onnx.model)
            onnx.save(str(path), external_data=size > LARGEST)
    except _Draws:
        raise
    except Exception as error:  # of torch's exporter, whatever it is
        cause = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{what} cannot be written, since torch cannot follow what is computed "
            f"({type(error).__name__}: {cause:.200}): use the agent in Python, with Agent.load"
        ) from error
    try:
        for num in (1, ROWS):
            check(agent, part, path, num)
    except ValueError:
        path.unlink()
        raise
    return outputs


class _Draws(ValueError):
    """A part draws numbers of its own."""


def _program(graph: nn.Module, values: list[Tensor], what: str) -> Any:
    """What torch sees of a graph, for any number of rows."""
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in values),)
    program = torch.export.export(graph, tuple(values), dynamic_shapes=shapes)
    modules: Any = program.graph_module.modules()
    nodes = [node for module in modules for node in module.graph.nodes]
    called = {node.target for node in nodes if node.op == "call_function"}
    attention = torch.ops.aten.scaled_dot_product_attention.default  # draws for dropout alone
    seeded = torch.Tag.nondeterministic_seeded
    draws = {str(op) for op in called - {attention} if seeded in getattr(op, "tags", ())}
    if draws:
        raise _Draws(
            f"{what} draws random numbers of its own ({', '.join(sorted(draws))}), and a graph "
            "must not: let the model take them as noise and say how many (noise_shape, "
            "update_noise_shape)"
        )
    inverse = torch.ops.aten.special_ndtri.default
    return program.run_decompositions({inverse: normal}) if inverse in called else program


def _tidy(model: Any) -> None:
    """Without the places in the source that torch notes, which are this machine's; and with the
    name of the axis of rows."""
    for node in model.graph:
        node.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter tells of its own steps."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# -------------------------------------------------------------------------------- what is checked


def session(path: Path) -> Any:
    """An onnxruntime session of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def check(agent: Agent, part: Part, path: Path, num: int) -> None:
    """Compare a written part with torch on `num` rows. Raises ValueError where they differ."""
    inputs = part.rows(num)
    want = part.compute(agent, inputs)
    found = session(path).run(None, {name: x.numpy() for name, x in inputs.items()})
    for (name, wanted), got in zip(want.items(), found, strict=True):
        error, allowed = difference(got, wanted.numpy()), TOLERANCE
        if not error <= allowed:
            raise ValueError(
                f"{part.name}.onnx of {agent.recipe['model']} gives another {name} than torch: "
                f"off by {error:.2g} of the largest number with {num} rows, allowed is "
                f"{allowed:g}; use the agent in Python, with Agent.load"
            )


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error, as a share of the largest number or of 1; infinite for another shape or
    type."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.abs(got - want).max() / max(1.0, np.abs(want).max()))


def ready() -> None:
    """Raises RuntimeError where the packages of the extra `onnx` are missing."""
    needed = ("onnx", "onnxruntime", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise RuntimeError(f"export needs {', '.join(missing)}: pip install 'worldflux_dist[onnx]'")

"""How values recorded from reference implementations are read, and how DreamerV3's names map to
ours; parity_tdmpc2.py has TD-MPC2's.

What must stay true: every key that is read is remembered (`Values.read`), so that a test can name
those nobody looks at; and one table of names serves parameters, gradients and layer outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from worldflux_dist.nn import distributions as dist

PREDICTIONS = 5e-5  # tolerance of losses, returns and heads with large biases


class Values:
    """An npz file, or what is below a prefix in it, as tensors; remembers which keys were read."""

    def __init__(self, file: Any, prefix: str = "", read: set[str] | None = None) -> None:
        self.file, self.prefix = file, prefix
        self.read = set() if read is None else read

    def raw(self, key: str) -> Any:
        self.read.add(self.prefix + key)
        return self.file[self.prefix + key]

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.raw(key))

    def under(self, prefix: str) -> Values:
        return Values(self.file, self.prefix + prefix, self.read)

    def keys(self) -> set[str]:
        """Names of all values below the prefix, without it."""
        return {k.removeprefix(self.prefix) for k in self.file.files if k.startswith(self.prefix)}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        assert self.keys(), f"nothing is recorded under {self.prefix}"
        return ((key, self[key]) for key in sorted(self.keys()))


@cache
def open_values(path: Path) -> Values:
    """The recorded values in a file; skips where it is absent."""
    if not path.exists():
        pytest.skip(f"no recorded values at {path}")
    return Values(np.load(path))


@pytest.fixture(scope="session")
def recorded(shared: Path) -> Values:
    return open_values(shared / "parity" / "dreamerv3.npz")


def close(got: Any, want: Any, tolerance: float = 1e-5, what: str = "") -> None:
    """Assert |got - want| <= tolerance * (1 + |want|) element by element, and equal shapes."""
    got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).double()
    assert got.shape == want.shape, (what, got.shape, want.shape)
    error = (got - want).abs() / (1 + want.abs())
    assert error.max() <= tolerance, f"{what}: error {error.max():.2e} exceeds {tolerance}"


def close_to_norm(
    got: Tensor, want: Tensor, norm: Tensor | float, tolerance: float, what: str
) -> None:
    """Assert max |got - want| <= tolerance * norm."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    error = (got - want).abs().max()
    assert error <= tolerance * norm, f"{what}: error {error:.2e} against a norm of {norm:.2e}"


def noise_for(onehot: Tensor, logits: Tensor) -> Tensor:
    """Uniform noise (...) that makes a sampler draw these one-hots (..., C) from these logits:
    the middle of the class's interval of cumulated mixed probabilities."""
    probs = dist.unimix(logits)
    upper = (probs.cumsum(-1) * onehot).sum(-1)
    return upper - (probs * onehot).sum(-1) / 2


# ---------------------------------------------------------------------------------- names

# Our module -> the reference's module.
MODULES = [
    (r"world_model\.encoder", r"tokens"),
    (r"world_model\.encoder\.mlp\.(\d)\.linear", r"enc/mlp\1"),
    (r"world_model\.encoder\.mlp\.(\d)\.norm", r"enc/mlp\1norm"),
    (r"world_model\.encoder\.cnns\.0\.convs\.(\d)", r"enc/cnn\1"),
    (r"world_model\.encoder\.cnns\.0\.norms\.(\d)", r"enc/cnn\1norm"),
    (r"world_model\.core\.in_deter\.linear", r"dyn/dynin0"),
    (r"world_model\.core\.in_deter\.norm", r"dyn/dynin0norm"),
    (r"world_model\.core\.in_stoch\.linear", r"dyn/dynin1"),
    (r"world_model\.core\.in_stoch\.norm", r"dyn/dynin1norm"),
    (r"world_model\.core\.in_action\.linear", r"dyn/dynin2"),
    (r"world_model\.core\.in_action\.norm", r"dyn/dynin2norm"),
    (r"world_model\.core\.hid", r"dyn/dynhid0"),
    (r"world_model\.core\.hid_norm", r"dyn/dynhid0norm"),
    (r"world_model\.core\.gates", r"dyn/dyngru"),
    (r"world_model\.posterior\.0\.linear", r"dyn/obs0"),
    (r"world_model\.posterior\.0\.norm", r"dyn/obs0norm"),
    (r"world_model\.posterior\.1", r"dyn/obslogit"),
    (r"world_model\.prior\.([01])\.linear", r"dyn/prior\1"),
    (r"world_model\.prior\.([01])\.norm", r"dyn/prior\1norm"),
    (r"world_model\.prior\.2", r"dyn/priorlogit"),
    (r"world_model\.decoder\.mlp\.(\d)\.(linear|norm)", r"dec/mlp/\2\1"),
    (r"world_model\.decoder\.cnns\.0\.from_deter", r"dec/sp0"),
    (r"world_model\.decoder\.cnns\.0\.from_stoch\.0\.linear", r"dec/sp1"),
    (r"world_model\.decoder\.cnns\.0\.from_stoch\.0\.norm", r"dec/sp1norm"),
    (r"world_model\.decoder\.cnns\.0\.from_stoch\.1", r"dec/sp2"),
    (r"world_model\.decoder\.cnns\.0\.norm", r"dec/spnorm"),
    (r"world_model\.decoder\.cnns\.0\.out", r"dec/imgout"),
    (r"world_model\.reward\.0\.(linear|norm)", r"rew/mlp/\g<1>0"),
    (r"world_model\.reward\.1", r"rew/head/logits"),
    (r"world_model\.proceed\.0\.(linear|norm)", r"con/mlp/\g<1>0"),
    (r"world_model\.proceed\.1", r"con/head/logit"),
    (r"behavior\.actor\.mlp\.(\d)\.(linear|norm)", r"pol/mlp/\2\1"),
    (r"behavior\.critic\.([012])\.(linear|norm)", r"val/mlp/\2\1"),
    (r"behavior\.critic\.3", r"val/head/logits"),
    (r"behavior\.slow_critic\.([012])\.(linear|norm)", r"slowval/mlp/\2\1"),
    (r"behavior\.slow_critic\.3", r"slowval/head/logits"),
]
LEAVES = {"weight": "kernel", "bias": "bias", "scale": "scale"}
STATES = {
    "behavior.normalizer.low": "retnorm/lo/value",
    "behavior.normalizer.high": "retnorm/hi/value",
}


def numbered_modules(agent: Any) -> dict[str, str]:
    """The modules whose names depend on the spaces; the reference counts convolutions down."""
    decoder, discrete = agent.world_model.decoder, agent.behavior.actor.parts[0].kind == "discrete"
    names = {
        f"world_model.decoder.outs.{i}": f"dec/vec/{key}/pred"
        for i, key in enumerate(decoder.vectors)
    }
    for cnn in decoder.cnns:
        for i, stage in enumerate(reversed(range(len(cnn.convs)))):
            names[f"world_model.decoder.cnns.0.convs.{i}"] = f"dec/conv{stage}"
            names[f"world_model.decoder.cnns.0.norms.{i}"] = f"dec/conv{stage}norm"
    for i, head in enumerate(["logits"] if discrete else ["mean", "stddev"]):
        names[f"behavior.actor.heads.{i}"] = f"pol/head/action/{head}"
    return names


def reference_module(agent: Any, name: str) -> str | None:
    """The reference's name of our module, or None where it has no such layer."""
    for pattern, theirs in MODULES:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    return numbered_modules(agent).get(name)


def reference_name(agent: Any, name: str) -> str:
    """The reference's name of our parameter or buffer."""
    if name in STATES:
        return STATES[name]
    module, leaf = re.split(r"[._](?=(?:weight|bias|scale)$)", name)
    return f"{reference_module(agent, module)}/{LEAVES[leaf]}"


def converted(name: str, value: Tensor) -> Tensor:
    """A recorded parameter or gradient in the layout of our parameter of that name."""
    if name.endswith("core.hid_weight"):  # (G, in, out) -> (in, G * out)
        return value.permute(1, 0, 2).flatten(1)
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    return value.t() if value.ndim == 2 else value


def load_parameters(agent: Any, values: Values) -> None:
    """Copy all recorded parameters into the agent; ours that were not recorded stay as they are."""
    state = agent.state_dict()
    names = {reference_name(agent, name): name for name in state}
    for theirs, value in values.items():
        ours = names[theirs]
        assert state[ours].shape == converted(ours, value).shape, (ours, theirs)
        state[ours].copy_(converted(ours, value))


@contextmanager
def layer_outputs(agent: Any) -> Iterator[dict[str, Tensor]]:
    """Collect the last output of every layer under the reference's name, channels last.

    The input of a norm layer is what its linear layer gave, and is collected under that name
    too: some of our layers are computed without a call of their module.
    """
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                output = output.permute(0, 2, 3, 1)
            outputs[name] = output.detach()
            if name.startswith("dyn/") and name.endswith("norm"):
                outputs[name.removesuffix("norm")] = inputs[0].detach()

        return collect

    named = {name: reference_module(agent, name) for name, _ in agent.named_modules()}
    handles = [
        agent.get_submodule(name).register_forward_hook(hook(theirs))
        for name, theirs in named.items()
        if theirs is not None
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

"""Small agents and made-up batches that several test files use; both take milliseconds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces as gym_spaces
from torch import Tensor

from worldflux_dist.agent import Agent
from worldflux_dist.data import Batch
from worldflux_dist.models.base import families
from worldflux_dist.spaces import Spaces

SIZES: dict[str, Any] = {"deter": 64, "hidden": 16, "groups": 8, "classes": 4}
SIZES |= {"units": 16, "depth": 4}


def vector(size: int) -> gym_spaces.Box:
    return gym_spaces.Box(-np.inf, np.inf, (size,))


IMAGE = gym_spaces.Box(0, 255, (16, 16, 3), np.uint8)
OBSERVATIONS: dict[str, gym_spaces.Space] = {
    "vector": vector(5),
    "image": IMAGE,
    "dict": gym_spaces.Dict({"image": IMAGE, "vector": vector(4)}),
}
BOX = gym_spaces.Box(-1, 1, (2,))
ACTIONS: dict[str, gym_spaces.Space] = {
    "continuous": BOX,
    "discrete": gym_spaces.Discrete(3),
    "mixed": gym_spaces.Dict({"kind": gym_spaces.Discrete(3), "move": BOX}),
}
# A new family adds its preset, sizes and behavior here: every test of test_families.py is then its.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dreamerv3": ("size1m", SIZES | {"multipliers": (2, 4), "warmup": 2}, {"horizon": 5}),
    "tdmpc2": (
        "5m",
        {"encoder_units": 16, "units": 16, "latent": 16, "channels": 4, "num_q": 3}
        | {"plan_samples": 32, "plan_iterations": 2},
        {"scale_rate": 0.02},
    ),
    "jepa": (
        "tiny",
        {"emb": 16, "units": 16, "memory_size": 16, "multipliers": (2, 4), "samples": 16}
        | {"directions": 8, "probe": True, "warmup": 2, "plan_samples": 32, "plan_horizon": 3},
        {"horizon": 5},
    ),
    "token": (
        "small",
        {"width": 16, "heads": 2, "layers": 2, "context": 4, "starts": 0, "units": 16, "depth": 4}
        | {"multipliers": (2, 4), "levels": (4, 4), "warmup": 2, "tokenizer_warmup": 2}
        | {"learning_rate": 4e-5, "tokenizer_every": 2},
        {"horizon": 5},
    ),
    "diffusion": (
        "tiny",
        {"units": 16, "memory": 32, "denoiser_units": 16, "denoiser_layers": 2, "depth": 2}
        | {"multipliers": (2, 3), "channels": (4, 8), "denoise_steps": 0, "starts": 0, "warmup": 2}
        | {"history": 2, "frames": 3, "learning_rate": 8e-6, "denoiser_rate": 8e-6},
        {"horizon": 5},
    ),
}
# Other models of a family, by its small preset and options: they go through the same tests.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "latent": ("diffusion", {"latent": True, "emb": 16, "multipliers": (2, 4)}),
    "dreamer4": (
        "diffusion",
        {"backbone": "transformer", "heads": 2, "context": 4, "emb": 16, "multipliers": (2, 4)},
    ),
}


def make_small(
    family: str,
    obs: str | gym_spaces.Space = "vector",
    action: str | gym_spaces.Space = "continuous",
    behavior: dict[str, Any] | None = None,
    planner: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A fresh small agent of any family or variant; spaces are kinds of OBSERVATIONS and ACTIONS,
    or any."""
    family, more = VARIANTS.get(family, (family, {}))
    preset, sizes, native = FAMILIES[family]
    spaces = Spaces(
        OBSERVATIONS[obs] if isinstance(obs, str) else obs,
        ACTIONS[action] if isinstance(action, str) else action,
    )
    name, behavior = f"{family}:{preset}", native if behavior is None else behavior
    return Agent(name, spaces, sizes | more | options, behavior, planner)


def make_agent(kind: str, **options: Any) -> Agent:
    """A fresh agent of the sizes parity values were recorded with: "disc" (16x16 image, vector,
    3 actions), "cont" (two vectors, 2 continuous actions) or "img64" (disc with 64x64)."""
    action: gym_spaces.Space = gym_spaces.Discrete(3)
    if kind == "cont":
        obs = gym_spaces.Dict({"zpos": vector(3), "avel": vector(2)})
        action = gym_spaces.Box(-1.0, 1.0, (2,))
        options = {"blocks": 4} | options
    else:
        size = 64 if kind == "img64" else 16
        image = gym_spaces.Box(0, 255, (size, size, 3), np.uint8)
        obs = gym_spaces.Dict({"image": image, "vector": vector(5)})
        options = ({} if kind == "img64" else {"multipliers": (2, 4)}) | options
    return Agent("dreamerv3:size1m", Spaces(obs, action), SIZES | options, {"horizon": 5})


MODELS = [*families(), *VARIANTS]
EVERY = list(itertools.product(families(), ["vector", "image", "dict"], ["continuous", "discrete"]))
EVERY += itertools.product(VARIANTS, ["dict"], ["continuous", "discrete"])
CASES = pytest.mark.parametrize("case", EVERY, ids=["-".join(case) for case in EVERY])
FAMILY = pytest.mark.parametrize("family", MODELS)
# For tests that take long: latent is diffusion's with another encoder.
ARCHITECTURE = pytest.mark.parametrize("family", [*families(), "dreamer4"])
LENGTH = 12  # a multiple of every family's window


def make_case(case: tuple[str, str, str]) -> Any:
    """The small agent of a case, the same each time, of which no output is zero."""
    torch.manual_seed(0)
    return perturbed(make_small(*case))


def family_batch(agent: Any, seed: int = 0) -> Batch:
    """A (3, LENGTH) batch of arrays."""
    return random_batch(agent.spaces, length=LENGTH, seed=seed)


def look(agent: Any, time: int = 0) -> dict[str, np.ndarray]:
    """The observations (3, ...) of one time of `family_batch`."""
    return {key: value[:, time] for key, value in family_batch(agent).obs.items()}


def perturbed(agent: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """The agent with noise on every parameter, so that no output is zero from the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in agent.parameters():
            param += scale * torch.randn(param.shape, generator=generator)
    return agent


def random_batch(spaces: Spaces, size: int = 3, length: int = 6, seed: int = 0) -> Batch:
    """A (B, T) batch of arrays. Half-way an episode of row 0 ends in a terminal step, row 1's is
    truncated, and both begin anew; further rows go on throughout."""
    rng = np.random.default_rng(seed)
    shape = (size, length)
    obs = {
        key: rng.integers(0, 256, shape + spec.shape).astype(np.uint8)
        if spec.kind == "image"
        else rng.normal(0, 2, shape + spec.shape).astype(np.float32)
        for key, spec in spaces.obs.items()
    }
    first, last, terminal = (np.zeros(shape, bool) for _ in range(3))
    first[0, 0] = True
    if length > 1:
        cut = length // 2
        first[:2, cut] = last[:2, cut - 1] = terminal[0, cut - 1] = True
    action = spaces.random_action(rng, size * length).reshape(*shape, -1)
    reward = rng.normal(0, 1, shape).astype(np.float32)
    action[first], reward[first] = 0, 0
    return Batch(obs, action, reward, first, last, terminal)


def same_sums(
    got: Any, want: Any, terms: int = 200, size: float | None = None, msg: Any = None
) -> None:
    """Assert that two float32 results are the same sums, taken in another order or by another
    kernel: |got - want| <= 2 eps terms size.

    `terms` is how many are added up on the longest way from an input, the widths of all layers in a
    row; the small networks here have 3 or 4 layers of 16 to 64. `size` is what the absolute values
    of the terms add up to: with layers that are normalised, about the largest |want|.
    """
    got, want = (
        torch.tensor(x) if isinstance(x, np.ndarray) else torch.as_tensor(x) for x in (got, want)
    )
    got, want = got.detach().float(), want.detach().float()
    size = max(1e-3, want.abs().max().item()) if size is None else size
    bound = 2 * torch.finfo(torch.float32).eps * terms * size
    torch.testing.assert_close(got, want, rtol=0, atol=bound, msg=msg)


def tensors(batch: Batch) -> Batch:
    return batch.map(torch.from_numpy)


# --------------------------------------------------------------------------------- tdmpc2


def make_tdmpc2(obs: str = "vector", action: str = "continuous", **options: Any) -> Any:
    """The small TD-MPC2 agent, the same each time, of which no output is zero."""
    torch.manual_seed(0)
    return perturbed(make_small("tdmpc2", obs, action, **options))


def unbroken_batch(agent: Any, size: int = 3, length: int = 4, seed: int = 0) -> Batch:
    """A (B, T) batch of tensors in which no episode begins or ends."""
    return tensors(random_batch(agent.spaces, size + 2, length, seed)).map(lambda value: value[2:])


def losses_of(agent: Any, batch: Batch) -> dict[str, Tensor]:
    """The losses of model (B, H) and value (num_q, B, H), with the same draws each time."""
    torch.manual_seed(1)
    output = agent.world_model.loss(batch)
    return output.losses | agent.behavior.loss(agent.world_model, output).losses

"""Products as convolutions: the same values and gradients as plain ones, taken where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worldflux_dist.nn import products
from worldflux_dist.nn.layers import BlockLinear, Linear
from worldflux_dist.nn.products import block_linear, linear

SMALL, LARGE = (2, 24), (3, 512)  # leading shapes, below and above the threshold


@pytest.fixture(params=[True, False], ids=["avx512", "other"])
def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which convolutions pay, and one on which they do not."""
    monkeypatch.setattr(products, "CONVOLVE", request.param)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.manual_seed(len(shape)), requires_grad=True)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("lead", [SMALL, LARGE, (1025,), (0,)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_dense_product(lead: tuple[int, ...], biased: bool) -> None:
    x, weight = inputs(*lead, 96), inputs(48, 96)
    bias = inputs(48) if biased else None
    wanted = torch.einsum("...i,oi->...o", x.double(), weight.double())
    _same(linear(x, weight, bias), wanted if bias is None else wanted + bias, x, weight, bias)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("lead", [SMALL, LARGE, (1025,), (0,)])
def test_a_block_diagonal_product(lead: tuple[int, ...]) -> None:
    x, weight, bias = inputs(*lead, 96), inputs(4, 24, 48), inputs(192)
    slices = x.double().unflatten(-1, (4, 24))
    wanted = torch.einsum("...gi,gio->...go", slices, weight.double()).flatten(-2) + bias
    _same(block_linear(x, weight, bias), wanted, x, weight, bias)


@pytest.mark.usefixtures("cpu")
def test_weights_and_rows_may_be_views() -> None:
    x, weight = inputs(96, 1024), inputs(96, 48)
    wanted = x.double().t() @ weight.double()
    _same(linear(x.t(), weight.t()), wanted, x, weight)


def test_layers_take_convolutions_for_many_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "CONVOLVE", True)
    many, few = torch.zeros(1024, 64), torch.zeros(32, 64)
    for layer in (Linear(64, 64), BlockLinear(64, 512, 8)):
        assert "Convolution" in _operations(layer(many))
        assert "Convolution" not in _operations(layer(few))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(many).dtype == torch.bfloat16  # a product of its own, and faster
            assert "Convolution" not in _operations(layer(many))


def _same(found: Tensor, wanted: Tensor, *leaves: Tensor | None) -> None:
    assert found.shape == wanted.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    wish = torch.linspace(-1, 1, wanted.numel(), dtype=torch.float64).view_as(wanted)
    given = [leaf for leaf in leaves if leaf is not None]
    ours = torch.autograd.grad((found * wish).sum(), given)
    for mine, theirs in zip(ours, torch.autograd.grad((wanted * wish).sum(), given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-2)  # sums of 1,536 terms


def _operations(result: Tensor) -> str:
    """Names of the operations that `result` came from."""
    names, todo = [], [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(node.name())
            todo += [before for before, _ in node.next_functions]
    return " ".join(names)

"""What is special about geglu: the order of its halves, the tails of gelu, what it keeps, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor

from hypersd.kernels import _native, geglu, use


def test_is_diffusers_layer():
    torch.manual_seed(0)
    layer = GEGLU(6, 10).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(geglu(layer.proj(x)), layer(x), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("implementation", _native.ISA_LEVELS, indirect=True)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_relative_error_also_in_the_lower_tail(dtype, tolerance, implementation):
    """Where Phi is 1e-4 its float32 form 0.5 (1 + erf) has lost half its digits; ours has not."""
    gate = torch.linspace(-4, 8, 4001).to(dtype)
    x = torch.stack([torch.ones_like(gate), gate], -1).requires_grad_()
    y = geglu(x)
    exact = x.detach().double().requires_grad_()
    with use("reference"):
        truth = geglu(exact)
    assert ((y - truth).abs() <= tolerance * truth.abs() + 1e-7).all()
    found, expected = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(truth.sum(), exact)[0]
    assert ((found - expected).abs() <= tolerance * (1 + expected.abs())).all()


def test_far_numbers_and_nan():
    x = torch.tensor([[1.0, 1.0, 2.0, 1.0, -1e30, 1e30, 100.0, float("nan")]])
    y = geglu(x)
    assert torch.equal(y[0, :3], F.gelu(x[0, 4:7]) * x[0, :3])
    assert y[0, 3].isnan()


def test_keeps_only_its_input():
    kept: list[Tensor] = []
    x = torch.randn(4, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        geglu(x)
    assert [t.shape for t in kept] == [x.shape]


@pytest.mark.parametrize("implementation", ["auto", "reference"], ids=str)
def test_bad_input_is_named(implementation):
    with use(implementation):
        with pytest.raises(ValueError, match=r"x: got shape \(2, 3\), expected an even last dimension"):
            geglu(torch.ones(2, 3))
        with pytest.raises(TypeError, match="x: got torch.int64"):
            geglu(torch.ones(2, 4, dtype=torch.long))
        with pytest.raises(ValueError, match="x: got a 0-d tensor"):
            geglu(torch.tensor(1.0))

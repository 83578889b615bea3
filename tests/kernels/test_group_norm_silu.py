"""What is special about group_norm_silu: memory orders, statistics far from zero, shifts, what it keeps, bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import group_norm_silu, use
from hypersd.kernels._op import OPS
from tests.kernels import checks


def layer(*shape: int, last: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in (shape, shape[1], shape[1]))
    return x.contiguous(memory_format=torch.channels_last) if last else x, weight, bias


def shift_for(x: Tensor) -> Tensor:
    """A shift as large as x, and much larger in one channel."""
    shift = torch.randn(x.shape[:2], generator=torch.Generator().manual_seed(1)).to(x.dtype)
    shift[:, 1] += 20
    return shift


def test_float64_equals_torch_to_the_last_digits():
    for last in (False, True):
        x, weight, bias = layer(2, 12, 9, 7, last=last, dtype=torch.float64)
        for silu in (False, True):
            z = F.group_norm(x, 4, weight, bias, 1e-6)
            y = group_norm_silu(x, 4, weight, bias, 1e-6, silu=silu)
            torch.testing.assert_close(y, F.silu(z) if silu else z, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("implementation", ["auto", "fallback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_order_is_kept(dtype, implementation, monkeypatch):
    if implementation == "fallback":
        monkeypatch.setattr(OPS["group_norm_silu"], "raw", OPS["group_norm_silu"].fallback)
    x, weight, bias = layer(2, 8, 4, 6, dtype=dtype)
    last = x.contiguous(memory_format=torch.channels_last)
    tokens = (
        x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2)
    )  # (batch, channels, tokens) of a (b, t, c) tensor
    for t, strides in ((x, x.stride()), (last, last.stride()), (tokens, tokens.stride()), (x.mT, (192, 24, 4, 1))):
        t = t.detach().requires_grad_()
        y = group_norm_silu(t, 4, weight, bias, 1e-5)
        assert y.stride() == strides and y.dtype == dtype
        (grad,) = torch.autograd.grad(y, t, torch.ones_like(y))
        assert grad.shape == t.shape and grad.dtype == dtype


SIZES = {"three pieces a sample": (48, 40, 40), "18 pieces a sample": (160, 60, 60)}


@pytest.mark.parametrize("shifted", [False, True], ids=["alone", "shifted"])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_same_bits_on_any_number_of_threads(sizes, batch, last, shifted):
    """Few samples are cut into pieces, many are not; sums are grouped by the shape alone, not by who takes a piece."""
    x, weight, bias = layer(batch, *sizes, last=last)
    inputs = {"x": x, "num_groups": 8, "weight": weight, "bias": bias, "eps": 1e-5}
    inputs["shift"] = shift_for(x) if shifted else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 3, 2):
            torch.set_num_threads(threads)
            found.append(checks.evaluate(OPS["group_norm_silu"], inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    total = x.double() + (shift_for(x)[:, :, None, None] if shifted else 0)
    exact = F.silu(F.group_norm(total, 8, weight.double(), bias.double(), 1e-5))
    torch.testing.assert_close(next(iter(found[0].values())).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_statistics_hold_far_from_zero(last):
    """Mean 1000 and deviation 1: the mean of squares less the square of the mean would be off by several per cent."""
    x, _, _ = layer(2, 8, 32, 32, last=last)
    found = group_norm_silu(x + 1000, 2, None, None, 1e-5, silu=False)
    exact = F.group_norm((x + 1000).double(), 2, None, None, 1e-5)
    assert (found - exact).abs().max() < 2e-4  # a float32 near 1000 is known to 6e-5


@pytest.mark.parametrize("last", [False, True])
def test_an_outlier_first_does_not_spoil_the_variance(last):
    x, _, _ = layer(1, 4, 48, 48, last=last)
    x[:, :, 0, 0] = 3000.0
    found = group_norm_silu(x, 2, None, None, 1e-5, silu=False)
    exact = F.group_norm(x.double(), 2, None, None, 1e-5)
    assert ((found - exact).abs().max() / exact.abs().max()).item() < 1e-6


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_is_that_of_the_sum(silu, last):
    """Statistics, result and all gradients in float64."""
    x, weight, bias = layer(3, 12, 9, 7, last=last, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, shift_for(x))]
    x, weight, bias, shift = leaves
    total = x + shift[:, :, None, None]
    z = F.group_norm(total, 4, weight, bias, 1e-6)
    y, mean, rstd = OPS["group_norm_silu"].run(x, 4, weight, bias, 1e-6, silu, shift)
    var, center = torch.var_mean(total.reshape(3, 4, -1), -1, correction=0)
    for found, expected in ((y, F.silu(z) if silu else z), (mean, center), (rstd, (var + 1e-6).rsqrt())):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = group_norm_silu(x, 4, weight, bias, 1e-6, silu=silu, shift=shift)
    found, expected = (torch.autograd.grad(out, leaves, upstream) for out in (ours, F.silu(z) if silu else z))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("implementation", ["auto", "fallback"])
@pytest.mark.parametrize("last", [False, True])
def test_the_sum_is_not_rounded(last, implementation, monkeypatch):
    """Near 100 bfloat16 has steps of a half: x + shift in it keeps little of x."""
    if implementation == "fallback":
        monkeypatch.setattr(OPS["group_norm_silu"], "raw", OPS["group_norm_silu"].fallback)
    x, _, _ = layer(2, 8, 16, 16, last=last, dtype=torch.bfloat16)
    shift = torch.full((2, 8), 100.0, dtype=torch.bfloat16)
    exact = F.group_norm(x.double(), 4, None, None, 1e-5)
    found = group_norm_silu(x, 4, None, None, 1e-5, silu=False, shift=shift)
    eager = F.group_norm(x + shift[:, :, None, None], 4, None, None, 1e-5)
    errors = [(y.double() - exact).norm() / exact.norm() for y in (found, eager)]
    assert errors[0] < 3e-3 and errors[1] > 0.1


@pytest.mark.parametrize("last", [False, True])
def test_groups_that_the_shift_makes_constant(last):
    """Each group is one number and rstd is 10,000: its mean rounds as the sum does, so that nothing is left."""
    x, _, _ = layer(3, 6, 1, 1)
    x = x.expand(3, 6, 4, 4).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    bias = torch.arange(6.0)
    y = group_norm_silu(x, 6, None, bias, 1e-8, silu=False, shift=shift_for(x) / 3)
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_shift_of_another_dtype(dtype):
    """Its gradient has its own dtype, and where that is the wider one its precision."""
    x, weight, bias = layer(2, 8, 40, 40)
    shift = shift_for(x).to(dtype).requires_grad_()
    for own in (torch.float32, torch.bfloat16):
        given = x.to(own)
        y = group_norm_silu(given, 4, weight, bias, 1e-5, shift=shift)
        exact = shift.detach().double().requires_grad_()
        total = given.double() + exact[:, :, None, None]
        expected = F.silu(F.group_norm(total, 4, weight.double(), bias.double(), 1e-5))
        (found,), (truth,) = (torch.autograd.grad(t.square().sum(), s) for t, s in ((y, shift), (expected, exact)))
        assert y.dtype == own and found.dtype == dtype
        coarse = max(torch.finfo(own).eps, torch.finfo(dtype).eps)
        assert (found.double() - truth).norm() <= 4 * coarse * truth.norm()


def test_the_gradient_of_the_shift_is_made_only_where_it_is_wanted(monkeypatch):
    x, weight, bias = layer(2, 8, 6, 6)
    shift = shift_for(x)
    both = [t.clone().requires_grad_() for t in (x, shift)]
    dx, dshift = torch.autograd.grad(
        group_norm_silu(both[0], 4, weight, bias, 1e-5, shift=both[1]).square().sum(), both
    )
    torch.testing.assert_close(dshift, dx.sum((2, 3)), rtol=1e-5, atol=1e-5)
    alone = shift.clone().requires_grad_()  # x frozen
    y = group_norm_silu(x, 4, weight, bias, 1e-5, shift=alone)
    assert torch.equal(torch.autograd.grad(y.square().sum(), alone)[0], dshift)
    module = importlib.import_module("hypersd.kernels.group_norm_silu")
    monkeypatch.delattr(module, "_sum_of_pixels")
    leaf = x.clone().requires_grad_()
    y = group_norm_silu(leaf, 4, weight, bias, 1e-5, shift=shift)
    assert torch.equal(torch.autograd.grad(y.square().sum(), leaf)[0], dx)


def test_keeps_only_its_input_and_two_numbers_a_group():
    x, weight, bias = layer(3, 8, 10, 10)
    for shift, small in ((None, [8, 8, 12, 12]), (shift_for(x), [8, 8, 12, 12, 24])):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            group_norm_silu(x.requires_grad_(), 4, weight, bias, 1e-5, shift=shift)
        assert sorted(t.numel() for t in kept) == [*small, 2400]


def test_gradients_of_frozen_affine_are_not_made():
    x, weight, bias = layer(2, 8, 6, 6)
    out = OPS["group_norm_silu"].run(x, 4, weight, bias, 1e-5, True, None)
    backward = torch.ops.hypersd.group_norm_silu_backward
    dx, dweight, dbias = backward(x, x, out[1], out[2], weight, bias, 4, True, True, False, None)
    assert dx.shape == x.shape and dweight.numel() == dbias.numel() == 0
    dx, dweight, dbias = backward(x, x, out[1], out[2], weight, bias, 4, True, False, True, None)
    assert dx.numel() == 0 and dweight.shape == dbias.shape == (8,)


def test_constant_groups_and_numbers_out_of_range():
    x = torch.full((1, 4, 2, 2), 3.0)
    y = group_norm_silu(x, 2, None, torch.tensor([0.0, 1.0, -200.0, 200.0]), 1e-5)
    expected = F.silu(torch.tensor([0.0, 1.0, -200.0, 200.0])).reshape(1, 4, 1, 1).expand(1, 4, 2, 2)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-30)
    x[0, 0, 0, 0] = float("nan")
    y = group_norm_silu(x, 2, None, None, 1e-5)
    assert y[0, :2].isnan().all() and not y[0, 2:].isnan().any()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"num_groups": 0}, ValueError, "num_groups: got 0, expected a divisor of the 8 channels"),
        ({"num_groups": 3}, ValueError, "num_groups: got 3"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: got shape \(4,\), expected \(8,\)"),
        ({"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias: got torch.int32"),
        ({"shift": torch.ones(8)}, ValueError, r"shift: got shape \(8,\), expected \(2, 8\), one number per sample"),
        ({"shift": torch.ones(1, 8)}, ValueError, r"shift: got shape \(1, 8\), expected \(2, 8\)"),
        ({"shift": torch.ones(2, 8, 1, 1)}, ValueError, r"shift: got shape \(2, 8, 1, 1\), expected \(2, 8\)"),
        ({"shift": torch.ones(2, 8).long()}, TypeError, "shift: got torch.int64"),
        ({"shift": 1.0}, TypeError, "shift: got float, expected a tensor"),
        ({"x": torch.ones(8)}, ValueError, r"x: got shape \(8,\), expected \(batch, channels"),
        ({"x": torch.ones(2, 8, dtype=torch.long)}, TypeError, "x: got torch.int64"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_bad_input_is_named(changes, error, said, implementation):
    x, weight, bias = layer(2, 8, 3, 3)
    arguments = {"x": x, "num_groups": 4, "weight": weight, "bias": bias, "eps": 1e-5} | changes
    with use(implementation), pytest.raises(error, match=said):
        group_norm_silu(**arguments)

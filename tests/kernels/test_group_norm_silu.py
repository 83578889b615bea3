"""What is special about group_norm_silu: memory orders, statistics far from zero, shifts, residuals, what it keeps."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _native, group_norm_silu, use
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


def residual_for(x: Tensor) -> Tensor:
    """A residual as large as x, in its memory order."""
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))


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


@pytest.mark.parametrize("beside", ["nothing", "shift", "residual"])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_same_bits_on_any_number_of_threads(sizes, batch, last, beside):
    """Few samples are cut into pieces, many are not; sums are grouped by the shape alone, not by who takes a piece."""
    x, weight, bias = layer(batch, *sizes, last=last)
    inputs = {"x": x, "num_groups": 8, "weight": weight, "bias": bias, "eps": 1e-5}
    inputs["shift"] = shift_for(x) if beside == "shift" else None
    inputs["residual"] = residual_for(x) if beside == "residual" else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 3, 2):
            torch.set_num_threads(threads)
            found.append(checks.evaluate(OPS["group_norm_silu"], inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    total = x.double() + {"shift": shift_for(x)[:, :, None, None], "residual": residual_for(x)}.get(beside, 0)
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


@pytest.mark.parametrize("added", [False, True], ids=["shift", "shift and residual"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_the_norm_is_that_of_the_sum(silu, last, added):
    """Statistics, results and all gradients in float64."""
    x, weight, bias = layer(3, 12, 9, 7, last=last, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, shift_for(x), residual_for(x))][: 4 + added]
    x, weight, bias, shift = leaves[:4]
    residual = leaves[4] if added else None
    total = (x + residual if added else x) + shift[:, :, None, None]
    z = F.group_norm(total, 4, weight, bias, 1e-6)
    y, h, mean, rstd = OPS["group_norm_silu"].run(x, 4, weight, bias, 1e-6, silu, shift, residual)
    assert torch.equal(h, x + residual) if added else h.numel() == 0
    var, center = torch.var_mean(total.reshape(3, 4, -1), -1, correction=0)
    for found, expected in ((y, F.silu(z) if silu else z), (mean, center), (rstd, (var + 1e-6).rsqrt())):
        torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours = group_norm_silu(x, 4, weight, bias, 1e-6, silu=silu, shift=shift, residual=residual)
    theirs = F.silu(z) if silu else z
    outs = ((*ours,), (theirs, x + residual)) if added else ((ours,), (theirs,))
    upstreams = (upstream, 3 * upstream.flip(0))[: 1 + added]
    found, expected = (torch.autograd.grad(out, leaves, upstreams) for out in outs)
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
    for beside, small in (({}, []), ({"shift": shift_for(x)}, [24]), ({"residual": residual_for(x)}, [])):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            group_norm_silu(x.requires_grad_(), 4, weight, bias, 1e-5, **beside)
        assert sorted(t.numel() for t in kept) == [8, 8, 12, 12, *small, 2400]
        assert torch.equal(next(t for t in kept if t.numel() == 2400), x + beside.get("residual", 0))


def test_gradients_of_frozen_affine_are_not_made():
    x, weight, bias = layer(2, 8, 6, 6)
    out = OPS["group_norm_silu"].run(x, 4, weight, bias, 1e-5, True, None, None)
    backward = torch.ops.hypersd.group_norm_silu_backward
    for dh in (None, x):
        dx, dweight, dbias = backward(x, x, out[2], out[3], weight, bias, 4, True, True, False, None, dh)
        assert dx.shape == x.shape and dweight.numel() == dbias.numel() == 0
        dx, dweight, dbias = backward(x, x, out[2], out[3], weight, bias, 4, True, False, True, None, dh)
        assert dx.numel() == 0 and dweight.shape == dbias.shape == (8,)


RUNS = pytest.mark.parametrize("implementation", [*_native.ISA_LEVELS, "fallback"], indirect=True)


@RUNS
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_residual_has_the_bits_of_the_sum_and_its_norm(dtype, last, implementation):
    """h is torch's own x + residual; y and, where h is not used further, all gradients are those of the norm of h."""
    for sizes in ((3, 12, 9, 7), (2, 24, 90, 70)):
        x, weight, bias = layer(*sizes, last=last, dtype=dtype)
        residual = residual_for(x) * 3
        y, h = group_norm_silu(x, 4, weight, bias, 1e-5, residual=residual)
        assert torch.equal(h, x + residual) and h.stride() == y.stride() == x.stride() and h.dtype == dtype
        assert torch.equal(y, group_norm_silu(h, 4, weight, bias, 1e-5))
        other = residual.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)
        for one, two in zip(group_norm_silu(x, 4, weight, bias, 1e-5, residual=other), (y, h), strict=True):
            assert torch.equal(one, two) and one.stride() == two.stride()
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        plain = [h.clone().requires_grad_(), *leaves[1:3]]
        upstream = shift_for(x)[:, :, None, None] * x
        out = group_norm_silu(leaves[0], 4, *leaves[1:3], 1e-5, residual=leaves[3])
        found = torch.autograd.grad(out[0], leaves, upstream)
        expected = torch.autograd.grad(group_norm_silu(plain[0], 4, *plain[1:], 1e-5), plain, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, (*expected, expected[0]), strict=True))


@RUNS
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_h_is_added_before_the_one_rounding(last, implementation):
    """Half a step of bfloat16 is 1/256 of a number at most; the two roundings of two operators are off by more."""
    x, weight, bias = layer(2, 16, 20, 20, last=last, dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, residual_for(x))]
    y, h = group_norm_silu(leaves[0], 4, weight, bias, 1e-5, residual=leaves[1])
    dy, dh = (torch.randn_like(h) for _ in range(2))
    found = torch.autograd.grad((y, h), leaves, (dy, dh))
    wide = h.detach().double().requires_grad_()
    z = F.group_norm(wide, 4, weight.double(), bias.double(), 1e-5)
    (norm,) = torch.autograd.grad(F.silu(z), wide, dy.double())
    exact = norm + dh.double()
    allowed = 0.00391 * exact.abs() + 1e-4
    assert torch.equal(*found) and ((found[0].double() - exact).abs() <= allowed).all()
    twice = (norm.bfloat16() + dh).double()
    assert ((twice - exact).abs() > allowed).any()


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_either_result_may_be_unused_and_any_input_frozen(used, wanted, monkeypatch):
    """Of x, residual and shift; where h alone is used nothing is computed."""
    x, weight, bias = (t.double() for t in layer(2, 8, 5, 6))
    values = [x, residual_for(x), shift_for(x)]
    take = {"y": lambda y, h: y.square().sum(), "h": lambda y, h: h.pow(3).sum(),
            "both": lambda y, h: y.square().sum() + h.pow(3).sum()}[used]  # fmt: skip

    def gradients(fused: bool) -> tuple[Tensor | None, ...]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(values)]
        if fused:
            out = group_norm_silu(leaves[0], 4, weight, bias, 1e-5, shift=leaves[2], residual=leaves[1])
        else:
            h = leaves[0] + leaves[1]
            out = F.silu(F.group_norm(h + leaves[2][..., None, None], 4, weight, bias, 1e-5)), h
        loss = take(*out)
        if not loss.requires_grad:
            return (None,) * len(wanted)
        return torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True)

    expected = gradients(False)
    if used == "h":
        monkeypatch.delattr(importlib.import_module("hypersd.kernels.group_norm_silu"), "BACKWARD")
    for one, other in zip(gradients(True), expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_x_may_be_its_own_residual():
    x, weight, bias = layer(2, 8, 5, 6)
    leaf = x.requires_grad_()
    y, h = group_norm_silu(leaf, 4, weight, bias, 1e-5, residual=leaf)
    assert torch.equal(h, 2 * x) and torch.equal(y, group_norm_silu(2 * x, 4, weight, bias, 1e-5))
    (dx,) = torch.autograd.grad(h.sum(), leaf)
    assert torch.equal(dx, torch.full_like(x, 2))


OP = OPS["group_norm_silu"]
ADDED = [next(c for c in OP.cases if c.name == name) for name in ("odd_residual_last", "odd")]


@pytest.mark.parametrize("case", ADDED, ids=lambda case: case.name)
def test_compiles_whole_with_a_residual(case):
    torch._dynamo.reset()
    compiled = torch.compile(partial(checks.results, OP), fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = case.inputs()
    leaves = list(checks.leaves_of(OP, inputs).values())
    for used in ((0,), (1,), (0, 1)):
        outs = [list(run(inputs).values()) for run in (compiled, partial(checks.results, OP))]
        torch.testing.assert_close(*outs)
        upstreams = [residual_for(inputs["x"]) * (i + 1) for i in used]
        found, expected = (
            torch.autograd.grad([pair[i] for i in used], leaves, upstreams, allow_unused=True) for pair in outs
        )
        for one, other in zip(found, expected, strict=True):  # compiled, an unused gradient may be zeros
            torch.testing.assert_close(one, torch.zeros_like(one) if one is not None and other is None else other)


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
        ({"residual": torch.ones(2, 8)}, ValueError, r"residual: got shape \(2, 8\), expected \(2, 8, 3, 3\) as x"),
        ({"residual": torch.ones(1, 8, 3, 3)}, ValueError, r"residual: got shape \(1, 8, 3, 3\), expected"),
        ({"residual": torch.ones(2, 8, 3, 3).half()}, TypeError, "residual: got torch.float16, expected torch.float32"),
        ({"residual": torch.ones(2, 8, 3, 3).long()}, TypeError, "residual: got torch.int64"),
        ({"residual": torch.ones(2, 8, 3, 3, device="meta")}, ValueError, "residual: got device meta, expected cpu"),
        ({"residual": 1.0}, TypeError, "residual: got float, expected a tensor"),
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

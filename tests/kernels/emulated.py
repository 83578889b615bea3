"""The CUDA C++ kernels themselves, run on the CPU by cuda_emulated.h and held to the same float64 definition.

Not collected by name: test_cuda_emulated.py builds the library and runs this file in a process of its own, where the
launches' operators are those of the emulation. By hand: HYPERSD_EMULATED=library.so python -m pytest this file
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd.kernels import _native, affine_step, use
from hypersd.kernels._op import OPS, Op
from tests.kernels import checks, guards

torch.ops.load_library(os.environ["HYPERSD_EMULATED"])
_native.cuda_missing = lambda device: ""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Compute capability, multiprocessors, shared memory of a block: with clusters, without, and with so little memory that
# no group fits in, so that group norm takes two passes.
DEVICES = {"sm_90": "9,132,232448", "sm_80": "8,108,166912", "two_passes": "9,132,0"}


def devices(op: Op) -> tuple[str, ...]:
    """Those that make a difference."""
    return tuple(DEVICES) if op.name == "group_norm_silu" else ("sm_90",)


GROUP_NORM = OPS["group_norm_silu"]
OWN = [op for op in OPS.values() if op.cuda and op.cases]
EVERY = [pytest.param(op, device, id=f"{op.name}-{device}") for op in OWN for device in devices(op)]
CASES = [
    pytest.param(op, case, device, id=f"{op.name}-{case.name}-{device}")
    for op in OWN
    for case in checks.small(op)
    for device in devices(op)
    if sum(v.numel() for v in case.inputs().values() if isinstance(v, Tensor)) < 40_000
]
every = pytest.mark.parametrize(("op", "emulated"), EVERY, indirect=["emulated"])


@pytest.fixture(autouse=True)
def emulated(request, monkeypatch):
    monkeypatch.setenv("HYPERSD_EMULATED_DEVICE", DEVICES[getattr(request, "param", "sm_90")])
    with use("cuda"):
        yield


def divisible(op: Op, dtype: torch.dtype, last: bool = False) -> dict[str, Any]:
    """Inputs whose sizes divide by 128 bits, so that the wide path runs; for group norm eight blocks share groups that
    begin in the middle of a vector, far from zero."""
    if op.name != "group_norm_silu":
        return next(c for c in op.cases if c.name in ("emoji_b1_ddim_cfg", "emoji_b1", "matrix")).inputs(dtype)
    generator = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(1, 24, 64, 80, generator=generator)).to(dtype)
    weight, bias, shift = (torch.randn(s, generator=generator).to(dtype) for s in ((24,), (24,), (1, 24)))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return {"x": x, "num_groups": 2, "weight": weight, "bias": bias, "eps": 1e-5, "shift": shift}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case", "emulated"), CASES, indirect=["emulated"])
def test_error_at_most_twice_eagers(op, case, dtype, poisoned):
    assert checks.check(op, case.inputs(dtype)) == []


@every
def test_any_memory_order(op, poisoned):
    for dtype in DTYPES[:2]:
        for name, changed in checks.layouts(checks.odd(op)[0].inputs(dtype)):
            assert (op.mutated and not checks.accepts(op, changed)) or checks.check(op, changed) == [], name


@every
def test_nan_comes_out_where_the_definition_has_it(op):
    for case in checks.odd(op):
        for name, changed in checks.with_nan(case.inputs()):
            assert not checks.accepts(op, changed) or checks.check_nan(op, changed) == [], (case.name, name)


@pytest.mark.parametrize("last", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every
def test_wide_path(op, dtype, last, poisoned):
    if not last or op.name == "group_norm_silu":
        assert checks.check(op, divisible(op, dtype, last)) == []


def with_a_residual(dtype: torch.dtype, last: bool = False) -> dict[str, Any]:
    """The same with a residual and without a shift, whose gradient keeps that of h out of the kernel."""
    inputs = divisible(GROUP_NORM, dtype, last)
    residual = torch.empty_like(inputs["x"]).copy_(inputs["x"].flip(3))
    return inputs | {"shift": None, "residual": residual}


@pytest.mark.parametrize("last", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("emulated", devices(GROUP_NORM), indirect=True)
def test_wide_path_with_a_residual(emulated, dtype, last, poisoned):
    inputs = with_a_residual(dtype, last)
    assert checks.check(GROUP_NORM, inputs) == []
    assert torch.equal(checks.results(GROUP_NORM, inputs)["out 1"], inputs["x"] + inputs["residual"])


def unaligned(t: Tensor) -> Tensor:
    """One element beside 128 bits."""
    flat = t.flatten()
    moved = torch.cat([flat[:1], flat])[1:].view(t.shape)
    assert moved.data_ptr() % 16 and torch.equal(moved, t)
    return moved


@every
def test_memory_that_is_not_aligned(op, poisoned):
    """Where the sizes would allow the wide path: an unaligned access ends the process."""
    inputs = divisible(op, torch.bfloat16)
    name = next(k for k, v in inputs.items() if isinstance(v, Tensor) and v.dtype in DTYPES and v.dim() > 1)
    assert checks.check(op, inputs | {name: unaligned(inputs[name])}) == []


def test_a_residual_that_is_not_aligned(poisoned):
    inputs = with_a_residual(torch.bfloat16)
    assert checks.check(GROUP_NORM, inputs | {"residual": unaligned(inputs["residual"])}) == []
    x, dh = inputs["x"].requires_grad_(), inputs["residual"]
    outs = tuple(checks.results(GROUP_NORM, inputs).values())
    found, expected = (torch.autograd.grad(outs, x, (dh, t), retain_graph=True) for t in (unaligned(dh), dh))
    torch.testing.assert_close(found, expected)


@every
def test_same_bits_twice(op):
    inputs = divisible(op, torch.bfloat16)
    first, second = checks.evaluate(op, inputs), checks.evaluate(op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@every
def test_writes_nothing_beside_its_output(op, monkeypatch):
    inputs = next(c for c in checks.small(op) if c.name.startswith("odd")).inputs()
    with guards.guarded(monkeypatch, inputs) as (inside, bands):
        found = checks.evaluate(op, inside)
    assert guards.touched(bands) == 0 and len(bands) >= len(found)
    assert all(value.isfinite().all() for value in found.values())


@every
def test_a_wrong_kernel_turns_the_suite_red(op, monkeypatch):
    monkeypatch.setattr(op, "cuda", checks.tampered(op, op.cuda, lambda value: value * 1.00001))
    assert checks.check(op, checks.smallest(op).inputs()) != []


def test_mixed_dtypes():
    generator = torch.Generator().manual_seed(0)
    x, eps, noise = (torch.randn(3, 4, 16, 16, generator=generator) for _ in range(3))
    coef = torch.randn(3, 5, generator=generator).double()
    given = {"x": x.bfloat16(), "eps_cond": eps, "coef": coef, "noise": noise.half()}
    assert checks.check(OPS["affine_step"], given) == []
    assert affine_step(**given).dtype == torch.bfloat16
    loss = OPS["consistency_loss"].cases[0].inputs()
    mixed = {"x_s": loss["x_s"].half(), "x_t": loss["x_t"].bfloat16()}
    assert checks.check(OPS["consistency_loss"], loss | mixed) == []

"""The Triton kernels themselves, run on the CPU by Triton's interpreter and held to the same float64 definition.

Not collected by name: test_interpreter.py runs this file in a process with TRITON_INTERPRET=1, because Triton chooses
the interpreter when a kernel is decorated. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted.py
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from hypersd.kernels import _lora_gemm, _tune, explain, use
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import jit, tl
from tests.kernels import checks, guards

assert _tune.interpreted(), "start with TRITON_INTERPRET=1"

lora_linear_op = importlib.import_module("hypersd.kernels.lora_linear")
EVERY = [pytest.param(op, id=op.name) for op in OPS.values() if op.triton]
CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS.values()
    if op.triton
    for case in checks.small(op)
    if sum(v.numel() for v in case.inputs().values() if isinstance(v, Tensor)) < 100_000
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_error_at_most_twice_eagers(op, case, dtype, poisoned):
    with use("triton"):
        assert checks.check(op, case.inputs(dtype)) == []


@pytest.mark.parametrize("op", EVERY)
def test_any_memory_order(op, poisoned):
    with use("triton"):
        for name, changed in checks.layouts(checks.odd(op)[0].inputs()):
            if op.mutated and not checks.accepts(op, changed):
                continue
            # numbers that are all alike leave the errors of the reference to luck
            assert checks.check(op, changed, torch.finfo(torch.float32).eps) == [], name


@pytest.mark.parametrize("op", EVERY)
def test_nan_comes_out_where_the_definition_has_it(op):
    with use("triton"):
        for case in checks.odd(op):
            for name, changed in checks.with_nan(case.inputs()):
                assert not checks.accepts(op, changed) or checks.check_nan(op, changed) == [], (case.name, name)


@pytest.mark.parametrize("op", EVERY)
def test_same_bits_twice(op):
    inputs = checks.smallest(op).inputs(torch.bfloat16)
    with use("triton"):
        first, second = checks.evaluate(op, inputs), checks.evaluate(op, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("op", EVERY)
def test_writes_nothing_beside_its_output(op, monkeypatch):
    """Guard bands before and after every allocation stay as they were."""
    inputs = next(c for c in checks.small(op) if c.name.startswith("odd")).inputs()
    with use("triton"), guards.guarded(monkeypatch, inputs) as (inside, bands):
        found = checks.evaluate(op, inside)
    assert guards.touched(bands) == 0 and len(bands) >= len(found)
    assert all(value.isfinite().all() for value in found.values())


@jit
def _dot_kernel(a, b, out, WIDEN: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    left, right = tl.load(a + rows * N + columns), tl.load(b + rows * N + columns)
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    tl.store(out + rows * N + columns, tl.dot(left, right))


def test_bfloat16_dot_needs_widening_here():
    """The interpreter may multiply bfloat16 bit patterns as integers: dot kernels widen their operands under it."""
    torch.manual_seed(0)
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out, exact = torch.empty(32, 32), a.double() @ b.double()
    _dot_kernel[(1,)](a, b, out, WIDEN=True, N=32)
    assert ((out - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("op", EVERY)
def test_bfloat16_tripwire(op):
    """Relative error under 1 % in bfloat16: the interpreter's silent garbage is off by orders of magnitude."""
    inputs = checks.smallest(op).inputs(torch.bfloat16)
    with use("triton"):
        found = checks.evaluate(op, inputs)
    with use("reference"):
        exact = checks.evaluate(op, checks.widened(inputs))
    for name, truth in exact.items():
        assert ((found[name].double() - truth).norm() / truth.norm()).item() < 1e-2, name


@pytest.mark.parametrize("op", EVERY)
def test_a_wrong_kernel_turns_the_suite_red(op, monkeypatch):
    inputs = checks.smallest(op).inputs()
    monkeypatch.setattr(op, "triton", checks.tampered(op, op.triton, lambda value: value * 1.00001))
    with use("triton"):
        assert checks.check(op, inputs) != []


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.append(self.kernel)
            with _disable_current_modes():  # the interpreter's own copies are no part of the operator
                self.kernel[grid](*args, **options)

        return launch


@pytest.mark.parametrize("rows", [300, 1500])  # one chunk of rows, and several whose sums the last program adds
def test_backward_of_a_lora_layer_is_three_launches(rows, monkeypatch):
    """dS, dX, and dA with dB; nothing of ATen's in between."""
    generator = torch.Generator().manual_seed(0)
    dy, x, s, weight, a, b = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((rows, 24), (rows, 40), (rows, 8), (24, 40), (8, 40), (24, 8))
    )
    launches: list = []
    for name in ("_shrink_kernel", "_expand_kernel", "_gradients_kernel"):
        monkeypatch.setattr(_lora_gemm, name, Counted(getattr(_lora_gemm, name), launches))
    with use("triton"), Calls() as calls:
        dx, da, db = lora_linear_op.BACKWARD.triton(dy, x, s, weight, a, b, 0.5, None, True, True)
    assert len(launches) == 3 and len(set(launches)) == 3
    assert calls.names <= {"empty", "empty_like", "new_empty", "view", "_unsafe_view", "reshape"}, calls.names
    wide = {name: t.double() for name, t in zip(("dy", "x", "s", "w", "a", "b"), (dy, x, s, weight, a, b), strict=True)}
    ds = 0.5 * wide["dy"] @ wide["b"]
    exact = (wide["dy"] @ wide["w"] + ds @ wide["a"], ds.t() @ wide["x"], 0.5 * wide["dy"].t() @ wide["s"])
    for found, truth in zip((dx, da, db), exact, strict=True):
        assert float((found.double() - truth).norm() / truth.norm()) < 1e-2


@pytest.mark.parametrize("op", EVERY)
def test_explain_says_what_is_left_to_aten(op):
    """The kernels compute in float32; float64 is not theirs."""
    with use("triton"):
        inputs = checks.smallest(op).inputs()
        assert explain(op.function, **inputs).implementation == "triton"
        assert explain(op.function, **checks.widened(inputs)).implementation == "aten"


@pytest.mark.parametrize("ways", [("triton", "auto"), ("auto", "triton")], ids=str)
def test_backward_may_run_under_another_implementation(ways):
    """What forward keeps for backward differs between them by the scale."""
    inputs = checks.smallest(OPS["lora_linear"]).inputs() | {"scale": 0.25}
    found = []
    for forward, backward in (ways, ("reference", "reference")):
        leaves = list(checks.leaves_of(OPS["lora_linear"], inputs).values())
        with use(forward):
            outs = checks.results(OPS["lora_linear"], inputs)
        with use(backward):
            found.append(torch.autograd.grad(list(outs.values()), leaves, checks.upstreams(outs)))
    torch.testing.assert_close(*found)


class Calls(TorchDispatchMode):
    """The names of ATen's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))

"""Every operator on arguments of random sizes, views and dtypes: nothing here knows an operator by name.

HYPERSD_EXAMPLES=2000 looks longer; the seed is fixed, so the same number of examples is the same test.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypersd.kernels._op import OPS, Case, Op
from tests.kernels import checks

EXAMPLES = settings(
    max_examples=int(os.environ.get("HYPERSD_EXAMPLES", "50")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
EVERY = [pytest.param(op, id=op.name) for op in OPS.values()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (*range(10), 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 63, 64, 65, 80)
MOST = 40_000  # elements of an example
ROUNDINGS = 16  # what is wrong here is wrong by the size of the numbers; test_ops.py judges precision


def accepts(op: Op, inputs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad():
            checks.results(op, inputs)
    except (TypeError, ValueError):
        return False
    return True


def elements(inputs: dict[str, Any], sizes: dict[int, int]) -> int:
    """How many numbers `resized` makes."""
    return sum(math.prod(sizes.get(n, n) for n in v.shape) for v in inputs.values() if isinstance(v, Tensor))


def resized(inputs: dict[str, Any], sizes: dict[int, int]) -> dict[str, Any]:
    """The inputs with each size replaced wherever it occurs; the numbers are drawn from those that were there."""
    generator = torch.Generator().manual_seed(0)

    def resize(t: Tensor) -> Tensor:
        shape = [sizes.get(n, n) for n in t.shape]
        if shape == list(t.shape):
            return t
        new = torch.empty(shape, dtype=t.dtype)
        return new.copy_(t.flatten()[torch.randint(t.numel(), (new.numel(),), generator=generator)].view(shape))

    return {k: resize(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


@cache
def cases(op: Op) -> tuple[Case, ...]:
    return tuple(
        case for case in op.cases if 0 < checks.elements(op, case) <= MOST // 2 and tensors(op, case, full=True)
    )


@cache
def tensors(op: Op, case: Case, full: bool = False) -> tuple[str, ...]:
    """The names of a case's tensors; with `full` none unless all hold numbers."""
    found = {k: v for k, v in checks.shapes(op, case).items() if isinstance(v, Tensor)}
    return () if full and not all(t.numel() for t in found.values()) else tuple(found)


@cache
def sizes_of(op: Op, case: Case) -> dict[int, list[int]]:
    """What each size of a case can be changed to, alone."""
    inputs = case.inputs()
    present = sorted({n for name in tensors(op, case) for n in inputs[name].shape if n > 1})
    return {
        n: [new for new in SIZES if elements(inputs, {n: new}) <= MOST and accepts(op, resized(inputs, {n: new}))]
        for n in present
    }


@cache
def takes_strides(op: Op, case: Case, name: str) -> bool:
    inputs = case.inputs()
    return accepts(op, inputs | {name: stepped(inputs[name], 0)}) if inputs[name].dim() else False


@cache
def takes_dtype(op: Op, case: Case, name: str, dtype: torch.dtype) -> bool:
    inputs = case.inputs()
    return accepts(op, inputs | {name: inputs[name].to(dtype)})


def hollow(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Memory whose numbers would be seen in any result."""
    value = float("nan") if dtype.is_floating_point else 2**30
    return torch.full(shape, value, dtype=dtype)


def shifted(t: Tensor, by: int) -> Tensor:
    memory = hollow([t.numel() + by], t.dtype)
    return memory[by:].view(t.shape).copy_(t)


def stepped(t: Tensor, dim: int) -> Tensor:
    shape = [2 * n if d == dim else n for d, n in enumerate(t.shape)]
    return hollow(shape, t.dtype)[(slice(None),) * dim + (slice(None, None, 2),)].copy_(t)


def padded(t: Tensor, by: list[int]) -> Tensor:
    memory = hollow([n + 2 * p for n, p in zip(t.shape, by, strict=True)], t.dtype)
    return memory[tuple(slice(p, p + n) for n, p in zip(t.shape, by, strict=True))].copy_(t)


def permuted(t: Tensor, order: list[int]) -> Tensor:
    back = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)


def draw_view(data: Any, t: Tensor, strides: bool, mutated: bool) -> Tensor:
    kinds = ["as it is", "shifted"]
    if strides and t.dim():
        kinds += ["stepped", "padded", "permuted"] + ([] if mutated else ["expanded"])
    kind = data.draw(st.sampled_from(kinds))
    if kind == "shifted":
        return shifted(t, data.draw(st.integers(1, 9)))
    if kind in ("stepped", "expanded"):
        dim = data.draw(st.integers(0, t.dim() - 1))
        return stepped(t, dim) if kind == "stepped" else t.narrow(dim, 0, min(1, t.shape[dim])).expand_as(t)
    if kind == "padded":
        return padded(t, [data.draw(st.integers(0, 2)) for _ in t.shape])
    return permuted(t, data.draw(st.permutations(range(t.dim())))) if kind == "permuted" else t


@pytest.mark.parametrize("op", EVERY)
@EXAMPLES
@given(data=st.data())
def test_random_views(op: Op, data: Any) -> None:
    case = data.draw(st.sampled_from(cases(op)))
    sizes = {old: data.draw(st.sampled_from([old, *new])) for old, new in sizes_of(op, case).items()}
    assume(elements(checks.shapes(op, case), sizes) <= MOST)
    inputs = resized(case.inputs(data.draw(st.sampled_from(DTYPES))), sizes)
    assume(accepts(op, inputs))
    for name in tensors(op, case):
        t = inputs[name]
        other = data.draw(st.sampled_from([t.dtype, t.dtype, torch.float32, torch.bfloat16, torch.int32]))
        if other != t.dtype and takes_dtype(op, case, name, other):
            changed = inputs | {name: t.to(other)}
            t = changed[name] if accepts(op, changed) else t
        inputs[name] = draw_view(data, t, takes_strides(op, case, name), name in op.mutated)
    coarsest = max(torch.finfo(v.dtype).eps for v in inputs.values() if checks.numbers("", v))
    assert checks.check(op, inputs, ROUNDINGS * coarsest) == []


@pytest.mark.parametrize("op", EVERY)
def test_sizes_vary(op: Op) -> None:
    """What is random above is not one shape: each operator has two sizes at least that can be many."""
    assert max(sum(len(new) > 5 for new in sizes_of(op, case).values()) for case in cases(op)) >= 2

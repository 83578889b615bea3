"""Tensors of more than 2^31 elements: every address that a kernel computes lies in its tensor, up to the last element.

The tensors are mappings of memory that nobody has written, so that only the touched pages exist; of each launch the
last program runs, whose addresses are the highest (the last of each of two gradients that share a launch). Arithmetic
is the interpreter's: as wide as on a GPU. Run by test_interpreter.py, as interpreted.py is.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from hypersd.kernels import _tune, use
from hypersd.kernels._op import OPS
from tests.kernels import checks
from tests.kernels.guards import sparse

assert _tune.interpreted(), "start with TRITON_INTERPRET=1"

LARGE = 2**31
# operator, case, what its sizes become, whether backward runs too
BIG: list[tuple[str, str, dict[int, int], bool]] = [
    ("adamw_ema_", "graph", {5_003: 2_148_000_003}, False),
    ("affine_step", "odd", {11: 20_460_001}, True),
    ("affine_step", "odd_b1", {17: 22_000_003}, True),  # one sample is that large
    ("attention", "odd", {2: 7_900_001}, True),
    ("attention", "odd", {7: 27_600_001}, False),  # every program of dK and dV would read all of these queries
    ("clip_coefficient", "matrix", {70: 65_100_001}, False),
    ("consistency_loss", "odd", {11: 20_460_001}, True),
    ("consistency_loss", "odd", {3: 1, 11: 61_400_001}, True),
    ("geglu", "odd", {46: 286_400_002}, True),
    ("geglu", "odd", {5: 31_200_001}, True),
    ("group_norm_silu", "odd_alone", {3: 300, 10: 20_480, 7: 71}, True),
    ("group_norm_silu", "odd_alone_last", {3: 300, 10: 20_480, 7: 71}, True),
    ("group_norm_silu", "odd_residual", {3: 300, 10: 20_480, 7: 71}, True),
    ("group_norm_silu", "odd_residual_last", {3: 300, 10: 20_480, 7: 71}, True),
    ("group_norm_silu", "odd", {3: 300, 10: 20_480, 7: 71}, False),  # ATen adds up dx for the gradient of its shift
    ("lora_linear", "odd", {7: 14_601, 13: 49_201}, True),
    ("lora_linear", "odd", {7: 14_601, 11: 49_201}, True),
    ("lora_linear_routed", "odd", {7: 26_281, 13: 16_401}, True),
    ("lora_linear_routed", "odd", {7: 26_281, 11: 16_401}, True),
    ("norm_shrink", "odd", {7: 17_335, 21: 41_301}, True),
    ("score_gradient", "odd", {11: 20_460_001}, False),
]


def enlarged(t: Tensor, sizes: dict[int, int]) -> Tensor:
    """Zeros of the new sizes in the memory order of `t`; `t` itself where no size changes."""
    shape = [sizes.get(n, n) for n in t.shape]
    if shape == list(t.shape):
        return t
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
    back = sorted(range(t.dim()), key=order.__getitem__)
    return sparse(tuple(shape[d] for d in order), t.dtype).permute(back)


def extent(t: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    return (sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


class Addresses:
    """What the launches of a call touch: an address outside of its launch's tensors raises."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, int]] = {}  # where a tensor starts: (where it ends, highest byte touched)
        self.large = 0  # tensors of more than 2^31 elements seen

    def begin(self, tensors: list[Tensor]) -> None:
        self.blocks = {t.data_ptr(): (t.data_ptr() + extent(t), 0) for t in tensors if t.numel()}

    def touch(self, addresses: np.ndarray, itemsize: int) -> None:
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max()) + itemsize
        start = max((s for s in self.blocks if s <= low), default=0)
        end, reached = self.blocks.get(start, (0, 0))
        assert start and high <= end, f"bytes {low - start} to {high - start} of a tensor of {end - start}"
        self.blocks[start] = end, max(reached, high)

    def end(self, tensors: list[Tensor], kernel: str) -> None:
        for t in tensors:
            if t.numel() > LARGE:
                self.large += 1
                end, reached = self.blocks[t.data_ptr()]
                assert reached == end, f"{kernel} ends {end - reached} bytes before its tensor of {tuple(t.shape)}"


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    found = Addresses()

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn)
        kwargs = {k: v for k, v in kwargs.items() if k in known.args or k in known.kwonlyargs}
        scope = interpreter._patch_lang(self.fn)
        values = inspect.getcallargs(self.fn, *args, **kwargs)
        loops = ("BLOCK_K", "BLOCK_M") if "chunk" in values else ("BLOCK_K",)
        values |= {block: 2048 for block in loops if block in values}  # the same addresses in fewer steps
        tensors = [v for v in values.values() if isinstance(v, Tensor)]
        cast = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in values.items()}
        grid = (*self.grid, 1, 1)[:3]
        last = tuple(count - 1 for count in grid)
        places = {last, (last[0], values["tiles_k"] - 1, last[2])} if "tiles_k" in values else {last}
        found.begin(tensors)
        try:
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in places:
                interpreter.interpreter_builder.set_grid_idx(*place)
                self.fn(**cast)
        finally:
            scope.restore()
        found.end(tensors, self.fn.__name__)

    def watched(real: Any) -> Any:
        def run(builder: Any, pointers: Any, *rest: Any) -> Any:
            mask = next(r for r in rest if getattr(getattr(r, "data", None), "dtype", None) == np.bool_)
            itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            found.touch(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], itemsize)
            return real(builder, pointers, *rest)

        return run

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
        return sparse(tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape, dtype)

    def empty_like(t: Tensor, **options: Any) -> Tensor:
        order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), d))
        back = sorted(range(t.dim()), key=order.__getitem__)
        return sparse(tuple(t.shape[d] for d in order), options.get("dtype", t.dtype)).permute(back)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    for name in ("create_masked_load", "create_masked_store"):
        real = getattr(interpreter.InterpreterBuilder, name)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watched(real))
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *shape, **o: empty(*shape, **({"dtype": t.dtype} | o)))
    monkeypatch.setattr(checks, "copied", lambda t: t)
    return found


def test_every_operator_is_here() -> None:
    assert {name for name, *_ in BIG} == {op.name for op in OPS.values() if op.triton}


@pytest.mark.parametrize(("name", "case", "sizes", "backward"), BIG, ids=lambda v: str(v).replace(" ", ""))
def test_reaches_the_last_element_and_no_other_tensor(name, case, sizes, backward, request):
    op = OPS[name]
    small = next(c for c in op.cases if c.name == case).inputs(torch.bfloat16)
    inputs = {k: enlarged(v, sizes) if isinstance(v, Tensor) else v for k, v in small.items()}
    found = request.getfixturevalue("addresses")
    with use("triton"):
        leaves = checks.leaves_of(op, inputs) if backward else {}
        outs = checks.results(op, inputs)
        if backward:
            upstreams = [sparse(tuple(out.shape), out.dtype) for out in outs.values()]
            torch.autograd.grad(list(outs.values()), list(leaves.values()), upstreams)
    assert found.large >= 1 + backward


def test_a_32_bit_offset_is_seen(addresses):
    """The same trick as a kernel that forgets to widen would play."""
    from hypersd.kernels._tune import jit, tl

    @jit
    def narrow(x, BLOCK: tl.constexpr):
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + offset, 1.0)

    x = sparse((LARGE + 4096,), torch.bfloat16)
    with pytest.raises(Exception, match="overflow|bytes"):
        narrow[(x.numel() // 1024,)](x, BLOCK=1024)

"""geglu: y = value * gelu(gate), value and gate the halves of the last dimension, in that order

gelu(g) = g Phi(g), Phi the standard normal distribution (exact, no tanh). Shazeer 2020 (arXiv:2002.05202), in the order
of diffusers' feed-forward layers.

    bytes: 3 F itemsize forward, 5 F backward     flops: about 30 F     launches: 1     (F elements of y)
    replaces: gelu and the product, 5 F forward, with gelu(gate) kept for backward; here x alone is kept
    backward: dvalue = dy gelu(gate), dgate = dy value (Phi(gate) + gate phi(gate))
    arithmetic: float32 (float64 if x is float64), one rounding at the end
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl


def _case(name: str, *shape: int, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        return {"x": torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)}

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("geglu", _case),
    _case("odd", 3, 5, 46, bench=False),
    _case("odd_wide", 2, 3, 2 * 1025, bench=False),
    _case("vector", 14, bench=False),
    _case("image", 2, 4, 6, 10, bench=False),
    _case("empty_batch", 0, 4, 8, bench=False),
    _case("empty_row", 3, 0, bench=False),
)


def cost(x: Tensor) -> Cost:
    """x read once, y written once."""
    return Cost(flops=15 * x.numel(), bytes=x.numel() // 2 * 3 * x.element_size(), launches=1)


def backward_cost(x: Tensor) -> Cost:
    """x and dy read once, dx written once."""
    return Cost(flops=25 * x.numel(), bytes=x.numel() // 2 * 5 * x.element_size(), launches=1)


def reference(x: Tensor) -> Tensor:
    """The definition, as diffusers writes it."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def check(x: Tensor) -> None:
    """Raise TypeError or ValueError for what geglu does not take."""
    _rows.check_tensor("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected an even last dimension: values, then gates")


# --------------------------------------------------------------------------------------------------- Triton kernels


@jit(do_not_specialize=("chunks",))
def _forward_kernel(x, y, width, chunks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    at = row * 2 * width + inside
    value = tl.load(x + at, mask=mask).to(tl.float32)
    gate = tl.load(x + at + width, mask=mask).to(tl.float32)
    phi = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    tl.store(y + row * width + inside, (value * (gate * phi)).to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=("chunks",))
def _backward_kernel(x, dy, dx, width, chunks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    at = row * 2 * width + inside
    value = tl.load(x + at, mask=mask).to(tl.float32)
    gate = tl.load(x + at + width, mask=mask).to(tl.float32)
    grad = tl.load(dy + row * width + inside, mask=mask).to(tl.float32)
    phi = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + at, (grad * (gate * phi)).to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + at + width, (grad * value * (phi + gate * density)).to(dx.dtype.element_ty), mask=mask)


def _launch(kernel: Any, x: Tensor, *others: Tensor) -> None:
    width = x.shape[-1] // 2
    rows = x.numel() // (2 * width)
    config = _rows.streaming_config("geglu", _rows.arch(x), x.dtype, rows, width)
    chunks = -(-width // config.blocks["BLOCK"])
    with _rows.on_device(x):
        kernel[(rows * chunks,)](x, *others, width, chunks, **config.blocks, num_warps=config.num_warps)


def _triton(x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or not x.numel():  # kernels compute in float32
        return _fallback(x)
    y = _fake(x)
    _launch(_forward_kernel, x.contiguous(), y)
    return y


def _triton_backward(dy: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or not x.numel():
        return _reference_backward(dy, x)
    x = x.contiguous()
    dx = torch.empty_like(x)
    _launch(_backward_kernel, x, dy.contiguous(), dx)
    return dx


def _config(x: Tensor) -> Config:
    width = max(x.shape[-1] // 2, 1)
    return _rows.streaming_config("geglu", _rows.arch(x), x.dtype, x.numel() // (2 * width), width)


def _programs() -> list[Program]:
    programs = []
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float16, "*fp16"), (torch.float32, "*fp32")):
        config = _rows.streaming_config("geglu", "sm90", dtype, 4096, 1280)
        for name, kernel, tensors in (
            ("forward", _forward_kernel, ("x", "y")),
            ("backward", _backward_kernel, ("x", "dy", "dx")),
        ):
            signature = dict.fromkeys(tensors, pointer) | {"width": "i32", "chunks": "i32"}
            programs.append(
                Program(
                    f"{name} {pointer[1:]}",
                    kernel,
                    signature,
                    dict(config.blocks),
                    config,
                    divisible=(*tensors, "width"),
                    streaming=True,
                    max_registers=80,
                )
            )
    return programs


# ------------------------------------------------------------------------------------------------------ registration


def _fallback(x: Tensor) -> Tensor:
    value, gate = x.to(_rows.work_dtype(x)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype).contiguous()


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _reference_backward(dy: Tensor, x: Tensor) -> Tensor:
    work = _rows.work_dtype(x)
    value, gate = x.to(work).chunk(2, dim=-1)
    phi = 0.5 * torch.erfc(gate * -math.sqrt(0.5))
    density = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    dy = dy.to(work)
    return torch.cat([dy * (gate * phi), dy * value * (phi + gate * density)], -1).to(x.dtype)


BACKWARD = Op(
    "geglu_backward",
    "(Tensor dy, Tensor x) -> Tensor",
    reference=_reference_backward,
    fake=lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format),
    triton=_triton_backward,
    cpp=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor]:
    return (BACKWARD.run(dy, ctx.saved_tensors[0]),)


OP = Op(
    "geglu",
    "(Tensor x) -> Tensor",
    reference=reference,
    fallback=_fallback,
    fake=_fake,
    check=check,
    triton=_triton,
    cpp=True,
    differentiable=("x",),
    backward=_backward,
    setup_context=_setup_context,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_config,
    aten=_rows.aten_in_float64("x"),
    programs=_programs,
)


@OP.public
def geglu(x: Tensor) -> Tensor:
    """value * gelu(gate) with the exact gelu, where x = [value, gate] along its last dimension.

    Args:
        x: (..., 2 F), any strides, any floating-point dtype: what the projection of a GEGLU feed-forward layer returns.

    Returns:
        (..., F), contiguous, of the dtype of x; differentiable once. x is all that is kept for backward.

    Raises TypeError for what is no floating-point tensor, ValueError for an odd last dimension.
    """
    return OP(x)

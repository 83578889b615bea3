"""clip_coefficient: norm = sqrt(sum g^2),  coefficient = min(1, max_norm / (norm + 1e-6))

Clipping without a pass that writes and without waiting for the host: the optimizer multiplies the gradient by the
coefficient while it reads it anyway (`adamw_ema_`). The coefficient is nan where the norm is not finite, and that step
then changes nothing.

    bytes: N itemsize     flops: 2 N     launches: 2     (N elements)
    replaces: torch.nn.utils.clip_grad_norm_, three passes and several launches a tensor
    arithmetic: float32 sums of 4,096 elements, added in a fixed order (CPU: float64 throughout)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl

CHUNK = 4096


def _case(name: str, *shape: int, max_norm: float = 1.0, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        return {"grad": torch.randn(shape, generator=generator, device=device).to(dtype), "max_norm": max_norm}

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("clip_coefficient", _case),
    _case("odd_4099", 4_099, bench=False),
    _case("odd_17", 17, bench=False),
    _case("unclipped", 1_000, max_norm=1e6, bench=False),
    _case("matrix", 33, 70, bench=False),
    _case("two_chunks", 8_192, bench=False),
    _case("large", 262_147, bench=False),
)


def cost(grad: Tensor, max_norm: float) -> Cost:
    """The gradient read once."""
    return Cost(flops=2 * grad.numel(), bytes=grad.numel() * grad.element_size(), launches=2)


def reference(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The definition: plain torch in float32 at least."""
    norm = torch.linalg.vector_norm(grad, dtype=_rows.work_dtype(grad))
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, torch.where(norm.isfinite(), coefficient, torch.full_like(coefficient, math.nan))


def check(grad: Tensor, max_norm: float) -> None:
    """Raise TypeError or ValueError for arguments that clip_coefficient does not take."""
    _rows.check_tensor("grad", grad)
    if not max_norm > 0:  # infinity is one
        raise ValueError(f"max_norm: got {max_norm}, expected a positive number (math.inf: measure the norm only)")


# --------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _squares_kernel(grad, partial, count, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    offset = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(grad + offset, mask=offset < count, other=0.0).to(tl.float32)
    tl.store(partial + program, tl.sum(values * values, axis=0))


@jit(do_not_specialize=("chunks",))
def _finish_kernel(partial, norm, coefficient, max_norm, chunks, BLOCK: tl.constexpr):
    """One program adds the partial sums in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        total += tl.load(partial + inside, mask=inside < chunks, other=0.0)
    root = tl.sqrt_rn(tl.sum(total, axis=0))
    ratio = tl.div_rn(max_norm * 1.0, root + 1e-6)
    # inf - inf and nan - nan are nan: what is not finite gives nan
    tl.store(norm, root)
    tl.store(coefficient, tl.where(ratio < 1.0, ratio, 1.0) + (root - root))


def _triton(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    if grad.dtype == torch.float64 or not grad.numel():  # kernels compute in float32
        return reference(grad, max_norm)
    if not _rows.dense(grad, 0):
        grad = grad.contiguous()
    chunks = -(-grad.numel() // CHUNK)
    partial = torch.empty(chunks, dtype=torch.float32, device=grad.device)
    norm, coefficient = (torch.empty((), dtype=torch.float32, device=grad.device) for _ in range(2))
    with _rows.on_device(grad):
        _squares_kernel[(chunks,)](grad, partial, grad.numel(), BLOCK=CHUNK, num_warps=8)
        _finish_kernel[(1,)](partial, norm, coefficient, max_norm, chunks, BLOCK=1024, num_warps=4)
    return norm, coefficient


def _programs() -> list[Program]:
    programs = [
        Program(
            f"squares {pointer[1:]}",
            _squares_kernel,
            {"grad": pointer, "partial": "*fp32", "count": "i32", "BLOCK": "constexpr"},
            {"BLOCK": CHUNK},
            Config({"BLOCK": CHUNK}, 8),
            divisible=("grad", "count"),
            max_registers=64,
        )
        for pointer in ("*fp32", "*bf16")
    ]
    finish = {"partial": "*fp32", "norm": "*fp32", "coefficient": "*fp32", "max_norm": "fp32", "chunks": "i32"}
    finish |= {"BLOCK": "constexpr"}
    return [*programs, Program("finish", _finish_kernel, finish, {"BLOCK": 1024}, Config({"BLOCK": 1024}, 4))]


# ------------------------------------------------------------------------------------------------------ registration


def _fake(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    work = _rows.work_dtype(grad)
    return grad.new_empty((), dtype=work), grad.new_empty((), dtype=work)


OP = Op(
    "clip_coefficient",
    "(Tensor grad, float max_norm) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    check=check,
    triton=_triton,
    cpp=True,
    cases=CASES,
    cost=cost,
    config=lambda grad, max_norm: Config({"BLOCK": CHUNK}, 8),
    aten=_rows.aten_in_float64("grad"),
    programs=_programs,
)


@OP.public
def clip_coefficient(grad: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of a flat gradient, and the factor min(1, max_norm / (norm + 1e-6)) that clips it.

    Args:
        grad: (N,), all gradients in one buffer; any floating-point dtype, any shape with a dimension.
        max_norm: the largest norm left as it is, positive; math.inf only measures.

    Returns:
        (norm, coefficient): 0-d tensors on the device of grad, float32 (float64 for float64), without gradient. Nothing
        waits for the host. The coefficient is torch.nn.utils.clip_grad_norm_'s; nan where the norm is not finite.

    Raises TypeError for what is no floating-point tensor or no number, ValueError for a max_norm that is not positive.
    """
    return OP(grad, max_norm)

"""score_gradient: weight (x_fake - x_real) / mean |x - x_real|, the mean over each sample

The direction in which distribution matching moves a generated x: from what the fake score makes of it to what the real
score does, scaled by the distance that is left (DMD, arXiv:2311.18828, eq. 7-8).

    bytes: 4 N itemsize     flops: 6 N     launches: 2     (N elements)
    replaces: two differences, abs, mean, division, nan_to_num: some 9 passes over memory
    arithmetic: float32 (float64 if a tensor is float64), sums in a fixed order, one rounding to the dtype of x
    0 where the quotient is no finite number of that dtype: a sample that equals x_real throughout has no direction,
    and one that is not finite does not spoil the batch
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl

# the least number that the dtype rounds to infinity
FIRST_INFINITE = {torch.float16: 65520.0, torch.bfloat16: float.fromhex("0x1.ffp127")}


def _case(name: str, *shape: int, weight: bool = False, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        x, x_real, x_fake = (
            torch.randn(shape, generator=generator, device=device, dtype=torch.float32) for _ in range(3)
        )
        inputs = {"x": x.to(dtype), "x_real": x_real.to(dtype), "x_fake": x_fake.to(dtype)}
        factors = torch.linspace(0.5, 2.0, shape[0]).double()
        return inputs | ({"weight": factors} if weight else {})

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("score_gradient", _case),
    _case("odd", 3, 5, 7, 11, bench=False),
    _case("odd_weighted", 3, 5, 7, 11, weight=True, bench=False),
    _case("plane", 37, 2, bench=False),
    _case("video", 2, 4, 3, 10, 10, bench=False),
    _case("empty_batch", 0, 4, 8, 8, bench=False),
    _case("empty_sample", 2, 0, 8, bench=False),
)


def cost(x: Tensor, x_real: Tensor, x_fake: Tensor, weight: Tensor | None = None) -> Cost:
    """Each tensor read once, one written."""
    moved = sum(t.element_size() for t in (x, x_real, x_fake, x))
    return Cost(flops=6 * x.numel(), bytes=moved * x.numel(), launches=2)


@torch.no_grad()
def reference(x: Tensor, x_real: Tensor, x_fake: Tensor, weight: Tensor | None) -> Tensor:
    """The definition: plain torch in float32 at least."""
    work = _rows.work_dtype(x, x_real, x_fake)
    real = x_real.to(work)
    distance = (x.to(work) - real).abs().unsqueeze(-1).flatten(1).mean(1)
    factor = torch.ones_like(distance) if weight is None else weight.to(distance)
    factor = torch.where((distance > 0) & distance.isfinite(), factor / distance, 0.0)
    value = (factor.reshape(-1, *[1] * (x.dim() - 1)) * (x_fake.to(work) - real)).to(x.dtype)
    return torch.empty_like(x).copy_(torch.where(value.isfinite(), value, 0.0))


def check(x: Tensor, x_real: Tensor, x_fake: Tensor, weight: Tensor | None) -> None:
    """Raise TypeError or ValueError for arguments that score_gradient does not take."""
    _rows.check_tensor("x", x)
    _rows.check_tensor("x_real", x_real, x, "x")
    _rows.check_tensor("x_fake", x_fake, x, "x")
    if weight is not None:
        _rows.check_numbers("weight", weight, ((x.shape[0],),), x.device, finite=True)


# --------------------------------------------------------------------------------------------------- Triton kernels


@jit(do_not_specialize=("chunks",))
def _distance_kernel(x, x_real, partial, width, chunks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    offset = row * width + inside
    left = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(x_real + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + program, tl.sum(tl.abs(left - right), axis=0))


@jit(do_not_specialize=("chunks", "weight_stride"))
def _direction_kernel(
    x_real, x_fake, partial, weight, out, limit, width, chunks, weight_stride, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    sample = program // chunks
    total = tl.zeros((128,), tl.float32)
    for start in range(0, chunks, 128):  # every program of a sample adds its partial sums in the same order
        step = start + tl.arange(0, 128)
        total += tl.load(partial + sample * chunks + step, mask=step < chunks, other=0.0)
    distance = tl.div_rn(tl.sum(total, axis=0), width * 1.0)
    factor = 1.0
    if weight is not None:
        factor = tl.load(weight + sample * weight_stride).to(tl.float32)
    factor = tl.where((distance > 0.0) & (distance - distance == 0.0), tl.div_rn(factor, distance), 0.0)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    offset = sample.to(tl.int64) * width + inside
    real = tl.load(x_real + offset, mask=mask, other=0.0).to(tl.float32)
    value = factor * (tl.load(x_fake + offset, mask=mask, other=0.0).to(tl.float32) - real)
    value = tl.where(tl.abs(value) < limit, value, 0.0)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


def _triton(x: Tensor, x_real: Tensor, x_fake: Tensor, weight: Tensor | None) -> Tensor:
    if _rows.work_dtype(x, x_real, x_fake) == torch.float64 or not x.numel():  # kernels compute in float32
        return reference(x, x_real, x_fake, weight)
    rows, width = x.shape[0], x.numel() // x.shape[0]
    result, work = _rows.output_like(x, per_sample=True)
    x, x_real, x_fake = (_rows.matched(t, work) for t in (x, x_real, x_fake))  # type: ignore[assignment]
    weight = weight.to(x.device, non_blocking=True) if weight is not None else None
    config = _config(result)
    block = config.blocks["BLOCK"]
    chunks = -(-width // block)
    partial = torch.empty(rows * chunks, dtype=torch.float32, device=x.device)
    with _rows.on_device(x):
        _distance_kernel[(rows * chunks,)](x, x_real, partial, width, chunks, BLOCK=block, num_warps=config.num_warps)
        _direction_kernel[(rows * chunks,)](
            x_real, x_fake, partial, weight, work, FIRST_INFINITE.get(result.dtype, float("inf")), width, chunks,
            weight.stride(0) if weight is not None else 0, BLOCK=block, num_warps=config.num_warps,
        )  # fmt: skip
    return result if result is work else result.copy_(work)


def _config(x: Tensor, *others: Any, **options: Any) -> Config:
    rows = max(x.shape[0], 1)
    return _rows.streaming_config("score_gradient", _rows.arch(x), x.dtype, rows, x.numel() // rows)


def _programs() -> list[Program]:
    programs = []
    for pointer, dtype in (("*bf16", torch.bfloat16), ("*fp16", torch.float16), ("*fp32", torch.float32)):
        config = _rows.streaming_config("score_gradient", "sm90", dtype, 4, 65536)
        sizes = {"width": "i32", "chunks": "i32"}
        distance = {"x": pointer, "x_real": pointer, "partial": "*fp32", **sizes, "BLOCK": "constexpr"}
        direction = {"x_real": pointer, "x_fake": pointer, "partial": "*fp32", "weight": "*fp64", "out": pointer}
        direction |= {"limit": "fp32", **sizes, "weight_stride": "i32", "BLOCK": "constexpr"}
        programs += [
            Program(
                f"distance {pointer[1:]}",
                _distance_kernel,
                distance,
                dict(config.blocks),
                config,
                divisible=("x", "x_real", "width"),
                max_registers=48,
            ),
            Program(
                f"direction {pointer[1:]}",
                _direction_kernel,
                direction,
                dict(config.blocks),
                config,
                divisible=("x_real", "x_fake", "out", "width"),
                streaming=True,
                max_registers=64,
            ),
        ]
    return programs


# ------------------------------------------------------------------------------------------------------ registration


OP = Op(
    "score_gradient",
    "(Tensor x, Tensor x_real, Tensor x_fake, Tensor? weight) -> Tensor",
    reference=reference,
    fake=lambda x, x_real, x_fake, weight: torch.empty_like(x),
    check=check,
    triton=_triton,
    cpp=True,
    cases=CASES,
    cost=cost,
    config=_config,
    aten=_rows.aten_in_float64("x", "x_real", "x_fake"),
    programs=_programs,
)


@OP.public
def score_gradient(x: Tensor, x_real: Tensor, x_fake: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """The normalised distribution-matching direction weight (x_fake - x_real) / mean |x - x_real|, per sample.

    Args:
        x: (batch, ...) what the generator made. x_real, x_fake: what the real and the fake score predict as the clean
            x from a noised one. One shape and device, any strides, any floating-point dtypes.
        weight: (batch,) factors of the samples, float64 or float32, or None.

    Returns:
        A new tensor of the shape, dtype and (where dense) strides of x, without gradient: use it as the upstream
        gradient of x. Always finite: 0 where the quotient is no finite number of the dtype, so for a whole sample with
        x = x_real or with a distance that is not finite.

    Raises TypeError for what is no floating-point tensor, ValueError for a shape or device that does not fit.
    """
    return OP(x, x_real, x_fake, weight)

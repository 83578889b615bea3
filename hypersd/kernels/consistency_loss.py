"""consistency_loss: rho(d),  d = (p0 x_t + p1 eps_student) - (q0 x_s + q1 eps_target)

The distance between where the student's jump from x_t lands and where the target's jump from x_s lands, both at t_end;
LCM (arXiv:2310.04378, eq. 14) with every prediction type and boundary condition folded into four numbers per sample.

    mse  d^2      l1  |d|      huber  d^2 / 2 inside c, c (|d| - c / 2) outside      pseudo_huber  sqrt(d^2 + c^2) - c

    bytes: 4 N in, with a gradient N out, then 2 N in backward (times itemsize)     flops: about 14 N     launches: 2
    replaces: two boundary combinations, the distance, the mean and their backward, some 20 passes over memory
    gradient: p1 rho'(d) is written in the forward pass; backward scales it by upstream * weight / count
    arithmetic: float32 (float64 if a tensor is float64), sums in a fixed order
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl

KINDS = {"mse": 0, "huber": 1, "pseudo_huber": 2, "l1": 3}
REDUCTIONS = {"mean": True, "none": False}


def _case(
    name: str,
    *shape: int,
    kind: str = "pseudo_huber",
    reduction: str = "mean",
    weight: bool = False,
    bench: bool = True,
) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

        x_t, eps_student, eps_target, x_s = (draw(*shape) for _ in range(4))
        x_s, eps_target = x_t + 0.1 * x_s, eps_student + 0.1 * eps_target  # two jumps that nearly agree, as in training
        p = draw(shape[0], 2)
        coef = torch.cat([p, p + 0.01 * draw(shape[0], 2)], 1).double()
        tensors = {"eps_student": eps_student, "x_t": x_t, "eps_target": eps_target, "x_s": x_s}
        inputs: dict[str, Any] = {name: t.to(dtype) for name, t in tensors.items()}
        c = 0.1 if kind == "huber" else 1e-3
        inputs |= {"coef": coef.cpu(), "kind": kind, "c": c, "reduction": reduction}
        return inputs | ({"weight": draw(shape[0]).abs().double().cpu()} if weight else {})

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("consistency_loss", _case),
    _case("odd", 3, 5, 7, 11, bench=False),
    _case("odd_none", 3, 5, 7, 11, reduction="none", weight=True, bench=False),
    _case("odd_huber", 3, 5, 7, 11, kind="huber", weight=True, bench=False),
    _case("odd_l1", 2, 3, 33, 17, kind="l1", reduction="none", bench=False),
    _case("plane", 37, 2, bench=False),
    _case("vector", 1_001, reduction="none", bench=False),
    _case("video_mse", 2, 4, 3, 10, 10, kind="mse", bench=False),
    _case("empty_batch", 0, 4, 8, 8, reduction="none", bench=False),
)


def cost(eps_student: Tensor, x_t: Tensor, eps_target: Tensor, x_s: Tensor, coef: Tensor, **options: Any) -> Cost:
    """Four tensors read; the gradient, where asked for, written once."""
    count, size = eps_student.numel(), eps_student.element_size()
    wanted = eps_student.requires_grad and torch.is_grad_enabled()
    read = sum(t.element_size() for t in (eps_student, x_t, eps_target, x_s))
    return Cost(flops=14 * count, bytes=(read + size * wanted) * count, launches=2)


def backward_cost(eps_student: Tensor, **others: Any) -> Cost:
    """The slope that forward wrote is read, scaled and written."""
    count = eps_student.numel()
    return Cost(flops=count, bytes=2 * count * eps_student.element_size(), launches=1)


def _residual(eps_student: Tensor, x_t: Tensor, eps_target: Tensor, x_s: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    work = _rows.work_dtype(eps_student, x_t, eps_target, x_s)
    p0, p1, q0, q1 = _rows.per_row(coef, eps_student, work)
    landing = p0 * x_t.detach().to(work) + p1 * eps_student.to(work)
    return landing - (q0 * x_s.detach().to(work) + q1 * eps_target.detach().to(work)), p1


def _rho(d: Tensor, kind: int, c: float) -> Tensor:
    if kind == KINDS["mse"]:
        return d * d
    if kind == KINDS["huber"]:
        return torch.where(d.abs() <= c, 0.5 * d * d, c * (d.abs() - 0.5 * c))
    if kind == KINDS["pseudo_huber"]:
        return d * d / (torch.sqrt(d * d + c * c) + c)  # = sqrt(d^2 + c^2) - c, without its cancellation
    return d * _slope(d, kind, c).detach()  # |d|, whose own gradient makes nan a 0


def _slope(d: Tensor, kind: int, c: float) -> Tensor:
    """rho'(d)."""
    if kind == KINDS["mse"]:
        return 2 * d
    if kind == KINDS["huber"]:
        return d.clamp(-c, c)
    return d / torch.sqrt(d * d + c * c) if kind == KINDS["pseudo_huber"] else d.sign().where(d == d, d)


def reference(
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    weight: Tensor | None,
    kind: int,
    c: float,
    mean: bool,
    with_slope: bool = False,
) -> Tensor:
    """The definition: plain torch in float32 at least, differentiable in eps_student."""
    d, _ = _residual(eps_student, x_t, eps_target, x_s, coef)
    loss = _rho(d, kind, c).unsqueeze(-1).flatten(1).mean(1)
    if weight is not None:
        loss = loss * weight.to(loss)
    return loss.mean() if mean else loss


def _fallback(
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    weight: Tensor | None,
    kind: int,
    c: float,
    mean: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    loss = reference(eps_student, x_t, eps_target, x_s, coef, weight, kind, c, mean)
    if not with_slope:
        return loss, eps_student.new_empty(0)
    d, p1 = _residual(eps_student, x_t, eps_target, x_s, coef)
    return loss, torch.empty_like(eps_student).copy_(p1 * _slope(d, kind, c))


def check(
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    weight: Tensor | None,
    kind: int,
    c: float,
    mean: bool,
    with_slope: bool,
) -> None:
    """Raise TypeError or ValueError for arguments that consistency_loss does not take."""
    _rows.check_tensor("eps_student", eps_student)
    for name, tensor in (("x_t", x_t), ("eps_target", eps_target), ("x_s", x_s)):
        _rows.check_tensor(name, tensor, eps_student, "eps_student")
    batch = eps_student.shape[0]
    _rows.check_numbers("coef", coef, ((batch, 4), (4,)), eps_student.device, finite=True)
    if weight is not None:
        _rows.check_numbers("weight", weight, ((batch,),), eps_student.device, finite=True)
    if not 1e-18 <= _rows.check_real("c", c) <= 1e18:  # its square is a float32
        raise ValueError(f"c: got {c}, expected a positive number, 1e-18 to 1e18")


# --------------------------------------------------------------------------------------------------- Triton kernels


@jit(do_not_specialize=("chunks", "coef_stride"))
def _loss_kernel(
    eps_student, x_t, eps_target, x_s, coef, slope, partial, c, width, chunks, coef_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    offset = row * width + inside
    k = coef + row * coef_stride
    p0 = tl.load(k).to(tl.float32)
    p1 = tl.load(k + 1).to(tl.float32)
    q0 = tl.load(k + 2).to(tl.float32)
    q1 = tl.load(k + 3).to(tl.float32)
    landing = p0 * tl.load(x_t + offset, mask=mask, other=0.0).to(tl.float32)
    landing += p1 * tl.load(eps_student + offset, mask=mask, other=0.0).to(tl.float32)
    target = q0 * tl.load(x_s + offset, mask=mask, other=0.0).to(tl.float32)
    target += q1 * tl.load(eps_target + offset, mask=mask, other=0.0).to(tl.float32)
    d = landing - target  # 0 outside the mask, where every rho is 0
    if KIND == 0:
        rho = d * d
        derivative = 2 * d
    elif KIND == 1:
        outer = tl.abs(d) > c  # so asked, nan is inside
        rho = tl.where(outer, c * (tl.abs(d) - 0.5 * c), 0.5 * d * d)
        derivative = tl.where(outer, tl.where(d > 0, c, -c), d)
    elif KIND == 2:
        root = tl.sqrt_rn(d * d + c * c)
        rho = tl.div_rn(d * d, root + c)
        derivative = tl.div_rn(d, root)
    else:
        rho = tl.abs(d)
        derivative = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if slope is not None:
        tl.store(slope + offset, (p1 * derivative).to(slope.dtype.element_ty), mask=mask)
    tl.store(partial + program, tl.sum(rho, axis=0))


@jit(do_not_specialize=("rows", "chunks", "width"))
def _finish_kernel(partial, weight, loss, rows, chunks, width, BLOCK: tl.constexpr):
    """One program per output: sums the partials of `rows` samples in a fixed order, as many at a time as fit."""
    first = tl.program_id(0).to(tl.int64) * rows
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows * chunks, BLOCK):
        inside = start + tl.arange(0, BLOCK)
        mask = inside < rows * chunks
        part = tl.load(partial + first * chunks + inside, mask=mask, other=0.0)
        if weight is not None:
            part *= tl.load(weight + first + inside // chunks, mask=mask, other=0.0).to(tl.float32)
        total += part
    # two divisions: the product of the sizes need not be a float32
    tl.store(loss + tl.program_id(0), tl.div_rn(tl.div_rn(tl.sum(total, axis=0), width * 1.0), rows * 1.0))


@jit(do_not_specialize=("chunks", "upstream_stride", "weight_stride"))
def _scale_kernel(
    slope, upstream, weight, out, inverse_count, width, chunks, upstream_stride, weight_stride, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    offset = row * width + inside
    factor = tl.load(upstream + row * upstream_stride).to(tl.float32) * inverse_count
    if weight is not None:
        factor *= tl.load(weight + row * weight_stride).to(tl.float32)
    value = factor * tl.load(slope + offset, mask=mask).to(tl.float32)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=mask)


def _run_triton(
    operands: list[Tensor | None], coef: Tensor, weight: Tensor | None, kind: int, c: float, slope: Tensor | None,
    loss: Tensor,
) -> None:  # fmt: skip
    eps_student = operands[0]
    assert eps_student is not None
    rows = eps_student.shape[0]
    width = eps_student.numel() // rows
    config = _config(eps_student)
    block = config.blocks["BLOCK"]
    chunks = -(-width // block)
    partial_sums = torch.empty(rows * chunks, dtype=torch.float32, device=loss.device)
    _loss_kernel[(rows * chunks,)](
        *operands, coef, slope, partial_sums, c, width, chunks, 4 if coef.dim() == 2 else 0,
        KIND=kind, BLOCK=block, num_warps=config.num_warps,
    )  # fmt: skip
    grid, each = (1, rows) if loss.dim() == 0 else (rows, 1)
    _finish_kernel[(grid,)](partial_sums, weight, loss, each, chunks, width, BLOCK=256, num_warps=2)


def _run_cuda(
    operands: list[Tensor | None], coef: Tensor, weight: Tensor | None, kind: int, c: float, slope: Tensor | None,
    loss: Tensor,
) -> None:  # fmt: skip
    torch.ops.hypersd._consistency_loss_cuda(*operands, coef, weight, kind, c, slope, loss)


def _forward(
    run: Callable[..., None],
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    weight: Tensor | None,
    kind: int,
    c: float,
    mean: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    wide = _rows.work_dtype(eps_student, x_t, eps_target, x_s) == torch.float64
    if wide or eps_student.numel() == 0:  # kernels compute in float32
        return _fallback(eps_student, x_t, eps_target, x_s, coef, weight, kind, c, mean, with_slope)
    device, rows = eps_student.device, eps_student.shape[0]
    result, work = _rows.output_like(eps_student, per_sample=True)
    operands = [_rows.matched(t, work) for t in (eps_student, x_t, eps_target, x_s)]
    coef = coef.to(device, non_blocking=True).contiguous()
    weight = weight.to(device, non_blocking=True).contiguous() if weight is not None else None
    loss = torch.empty(() if mean else (rows,), dtype=torch.float32, device=device)
    with _rows.on_device(eps_student):
        run(operands, coef, weight, kind, c, work if with_slope else None, loss)
    if not with_slope:
        return loss, eps_student.new_empty(0)
    return loss, result if result is work else result.copy_(work)


def _scale_triton(
    slope: Tensor | None, upstream: Tensor, weight: Tensor | None, inverse_count: float, out: Tensor
) -> None:
    rows = out.shape[0]
    width = out.numel() // rows
    config = _config(out)
    block = config.blocks["BLOCK"]
    chunks = -(-width // block)
    _scale_kernel[(rows * chunks,)](
        slope, upstream, weight, out, inverse_count, width, chunks,
        upstream.stride(0) if upstream.dim() else 0, weight.stride(0) if weight is not None else 0,
        BLOCK=block, num_warps=config.num_warps,
    )  # fmt: skip


def _scale_cuda(
    slope: Tensor | None, upstream: Tensor, weight: Tensor | None, inverse_count: float, out: Tensor
) -> None:
    torch.ops.hypersd._consistency_loss_backward_cuda(slope, upstream, weight, inverse_count, out)


def _scaled(run: Callable[..., None], slope: Tensor, upstream: Tensor, weight: Tensor | None) -> Tensor:
    if slope.dtype == torch.float64 or slope.numel() == 0:
        return _reference_backward(slope, upstream, weight)
    result, work = _rows.output_like(slope, per_sample=True)
    weight = weight.to(slope.device, non_blocking=True) if weight is not None else None
    inverse_count = 1.0 / (slope.numel() if upstream.dim() == 0 else slope[0].numel())
    with _rows.on_device(slope):
        run(_rows.matched(slope, work), upstream, weight, inverse_count, work)
    return result if result is work else result.copy_(work)


def _config(eps_student: Tensor, **others: Any) -> Config:
    rows = max(eps_student.shape[0], 1)
    arch = _rows.arch(eps_student)
    return _rows.streaming_config("consistency_loss", arch, eps_student.dtype, rows, eps_student.numel() // rows)


def _programs() -> list[Program]:
    """What ships: every kind in bf16, the default kind in fp16 and fp32, the final sum, the scaling of backward."""
    programs = []
    sizes = {"width": "i32", "chunks": "i32"}
    for pointer, kinds in (("*bf16", KINDS), ("*fp16", ("pseudo_huber",)), ("*fp32", ("pseudo_huber",))):
        dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}[pointer]
        config = _rows.streaming_config("consistency_loss", "sm90", dtype, 4, 65536)
        tensors = dict.fromkeys(("eps_student", "x_t", "eps_target", "x_s"), pointer)
        signature = tensors | {"coef": "*fp64", "slope": pointer, "partial": "*fp32", "c": "fp32", **sizes}
        signature |= {"coef_stride": "i32", "KIND": "constexpr", "BLOCK": "constexpr"}
        for kind in kinds:
            programs.append(
                Program(
                    f"{kind} {pointer[1:]}",
                    _loss_kernel,
                    signature,
                    {"KIND": KINDS[kind], **config.blocks},
                    config,
                    divisible=(*tensors, "slope", "width"),
                    streaming=True,
                    max_registers=80,
                )
            )
        scale = {"slope": pointer, "upstream": "*fp32", "weight": "*fp64", "out": pointer, "inverse_count": "fp32"}
        scale |= {**sizes, "upstream_stride": "i32", "weight_stride": "i32", "BLOCK": "constexpr"}
        programs.append(
            Program(
                f"scale {pointer[1:]}",
                _scale_kernel,
                scale,
                dict(config.blocks),
                config,
                divisible=("slope", "out", "width"),
                streaming=True,
                max_registers=48,
            )
        )
    finish = {"partial": "*fp32", "weight": "*fp64", "loss": "*fp32", "rows": "i32", **sizes, "BLOCK": "constexpr"}
    finish = {name: finish[name] for name in ("partial", "weight", "loss", "rows", "chunks", "width", "BLOCK")}
    return [*programs, Program("finish", _finish_kernel, finish, {"BLOCK": 256}, Config({"BLOCK": 256}, 2))]


# ------------------------------------------------------------------------------------------------------ registration


def _fake(
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    weight: Tensor | None,
    kind: int,
    c: float,
    mean: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    work = _rows.work_dtype(eps_student, x_t, eps_target, x_s)
    loss = eps_student.new_empty(() if mean else (eps_student.shape[0],), dtype=work)
    return loss, torch.empty_like(eps_student) if with_slope else eps_student.new_empty(0)


def _reference_backward(slope: Tensor, upstream: Tensor, weight: Tensor | None) -> Tensor:
    work = _rows.work_dtype(slope)
    count = slope.numel() if upstream.dim() == 0 else slope[:1].numel()
    factor = upstream.to(work) / count
    factor = factor * weight.to(factor) if weight is not None else factor
    return torch.empty_like(slope).copy_(factor.reshape(-1, *[1] * (slope.dim() - 1)) * slope.to(work))


BACKWARD = Op(
    "consistency_loss_backward",
    "(Tensor slope, Tensor upstream, Tensor? weight) -> Tensor",
    reference=_reference_backward,
    fake=lambda slope, upstream, weight: torch.empty_like(slope),
    triton=partial(_scaled, _scale_triton),
    cuda=partial(_scaled, _scale_cuda),
    cpp=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.with_slope = inputs[9]
    ctx.save_for_backward(output[1], inputs[5], inputs[0])  # the last tells whose second derivative is asked for
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None or not ctx.needs_input_grad[0]:
        return (None,) * 10
    if not ctx.with_slope:
        raise RuntimeError("consistency_loss: with_slope was False in the forward pass, so there is no gradient")
    slope, weight, _ = ctx.saved_tensors
    # d loss / d eps_student = p1 rho'(d) * upstream * weight / count
    return (BACKWARD.run(slope, upstream, weight), *(None,) * 9)


def _option(name: str, value: str, known: dict[str, Any]) -> Any:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {value!r}, expected one of {tuple(known)}")
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {tuple(known)}")
    return known[value]


def _arguments(
    eps_student: Tensor, x_t: Tensor, eps_target: Tensor, x_s: Tensor, coef: Tensor, kind: str, c: float,
    weight: Tensor | None, reduction: str,
) -> tuple[Any, ...]:  # fmt: skip
    options = _option("kind", kind, KINDS), c, _option("reduction", reduction, REDUCTIONS)
    with_slope = torch.is_grad_enabled() and getattr(eps_student, "requires_grad", False)
    if with_slope and eps_student.dtype == torch.float16:
        eps_student = eps_student.float()  # the slope is kept until a scaled upstream meets it: half has not the range
    return eps_student, x_t, eps_target, x_s, coef, weight, *options, with_slope


OP = Op(
    "consistency_loss",
    "(Tensor eps_student, Tensor x_t, Tensor eps_target, Tensor x_s, Tensor coef, Tensor? weight, int kind, float c, "
    "bool mean, bool with_slope) -> (Tensor, Tensor)",
    reference=reference,
    fallback=_fallback,
    fake=_fake,
    check=check,
    triton=partial(_forward, _run_triton),
    cuda=partial(_forward, _run_cuda),
    cpp=True,
    differentiable=("eps_student",),
    backward=_backward,
    setup_context=_setup_context,
    result=lambda output: output[0],
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_config,
    aten=_rows.aten_in_float64("eps_student", "x_t", "eps_target", "x_s"),
    programs=_programs,
)


@OP.public
def consistency_loss(
    eps_student: Tensor,
    x_t: Tensor,
    eps_target: Tensor,
    x_s: Tensor,
    coef: Tensor,
    *,
    kind: str = "pseudo_huber",
    c: float = 1e-3,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """rho(d) for d = (p0 x_t + p1 eps_student) - (q0 x_s + q1 eps_target).

    Args:
        eps_student, x_t, eps_target, x_s: (batch, ...) of one shape and device, any strides, any floating-point dtypes.
            `eps_*` are raw network outputs of whatever prediction type the coefficients were made for.
        coef: (batch, 4) as p0 p1 q0 q1 (or (4,) for all samples), float64 (float32 is taken too), on the host or on
            the device of eps_student (there, like `weight`, for CUDA graph capture). Constants, like x_t, eps_target
            and x_s: no gradient flows into them.
        kind: "mse" d^2, "l1" |d|, "huber" (quadratic inside c, linear outside, as torch's with delta=c) or
            "pseudo_huber" sqrt(d^2 + c^2) - c.
        c: the width of huber and pseudo_huber, positive, in units of d.
        weight: (batch,) factors of the samples, float64 or float32, or None.
        reduction: "mean" over everything, a 0-d tensor; "none" leaves the mean of each sample, (batch,).

    Returns:
        float32 (float64 if a tensor is float64); differentiable once, in eps_student. nan when there are no elements.

    Raises TypeError for what is no floating-point tensor, string or number, ValueError for a shape, device or option
    that does not fit.
    """
    return OP(*_arguments(eps_student, x_t, eps_target, x_s, coef, kind, c, weight, reduction))

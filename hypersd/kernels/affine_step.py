"""affine_step: out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise

Every first-order or multistep solver step (DDIM, TCD, LCM, Euler flow, DPM-Solver++ 2M), classifier-free guidance and
the jump x_t -> x_s are this one sum, with one row of float64 coefficients per sample.

    bytes: (terms + 1) N itemsize, forward and backward     flops: 2 terms N     launches: 1     (`terms` tensors of N)
    replaces: k[0] * x + k[1] * eps_cond + ..., 2 terms - 1 passes over memory
    arithmetic: float32 (float64 if a tensor is float64), one rounding to the dtype of x at the end
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl

NAMES = ("x", "eps_cond", "eps_uncond", "history", "noise")


def _case(name: str, *shape: int, terms: int = 5, per_sample: bool = False, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        draw = [torch.randn(shape, generator=generator, device=device, dtype=torch.float32) for _ in range(terms)]
        rows = (shape[0], 5) if per_sample else (5,)
        coef = torch.randn(rows, generator=generator, device=device, dtype=torch.float32).double().cpu()
        coef[..., terms:] = 0
        return {"coef": coef, **{name: t.to(dtype) for name, t in zip(NAMES, draw, strict=False)}}

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("affine_step", _case),
    _case("ddim_2d", 17, 2, terms=2, per_sample=True, bench=False),
    _case("odd", 3, 5, 7, 11, per_sample=True, bench=False),
    _case("odd_b1", 1, 3, 33, 17, bench=False),
    _case("video", 2, 4, 3, 10, 10, per_sample=True, bench=False),
    _case("empty_batch", 0, 4, 8, 8, per_sample=True, bench=False),
    _case("empty_sample", 2, 0, 8, 8, bench=False),
)


def cost(
    x: Tensor,
    eps_cond: Tensor,
    coef: Tensor,
    eps_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> Cost:
    """Each tensor read once, one written."""
    read = [t for t in (x, eps_cond, eps_uncond, history, noise) if t is not None]
    moved = sum(t.element_size() for t in read) + x.element_size()
    return Cost(flops=2 * len(read) * x.numel(), bytes=moved * x.numel(), launches=1)


def backward_cost(**inputs: Any) -> Cost:
    """The gradient read once, that of each tensor written once: as much as forward moves."""
    forward = cost(**inputs)
    return Cost(forward.flops / 2, forward.bytes, forward.launches)


def reference(
    x: Tensor,
    eps_cond: Tensor,
    coef: Tensor,
    eps_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The definition: plain torch in float32 at least, differentiable in every tensor."""
    tensors = (x, eps_cond, eps_uncond, history, noise)
    work = _rows.work_dtype(*tensors)
    k = _rows.per_row(coef, x, work)
    out = k[0] * x.to(work)
    for factor, tensor in zip(k[1:], tensors[1:], strict=True):
        if tensor is not None:
            out = out + factor * tensor.to(work)
    return out.to(x.dtype)


def check(
    x: Tensor,
    eps_cond: Tensor,
    coef: Tensor,
    eps_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError for arguments that affine_step does not take."""
    _rows.check_tensor("x", x)
    for name, tensor in zip(NAMES[1:], (eps_cond, eps_uncond, history, noise), strict=True):
        if tensor is not None or name == "eps_cond":
            _rows.check_tensor(name, tensor, x, "x")
    _rows.check_numbers("coef", coef, ((5,), (x.shape[0], 5)), x.device, finite=True)


# ---------------------------------------------------------------------------------------------------- Triton kernel


# the row of a table may start at any multiple of 8 bytes: not a reason to compile again
@jit(do_not_specialize=("chunks", "coef_stride"), do_not_specialize_on_alignment=("coef",))
def _affine_step_kernel(
    x, eps_cond, eps_uncond, history, noise, out,
    coef, host0, host1, host2, host3, host4,  # coef: device pointer, or None and five numbers from the host
    width, chunks, coef_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // chunks).to(tl.int64)
    inside = (program % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < width
    offset = row * width + inside
    if coef is None:
        k0, k1, k2, k3, k4 = host0, host1, host2, host3, host4
    else:
        k = coef + row * coef_stride
        k0 = tl.load(k).to(tl.float32)
        if eps_cond is not None:
            k1 = tl.load(k + 1).to(tl.float32)
        if eps_uncond is not None:
            k2 = tl.load(k + 2).to(tl.float32)
        if history is not None:
            k3 = tl.load(k + 3).to(tl.float32)
        if noise is not None:
            k4 = tl.load(k + 4).to(tl.float32)
    total = k0 * tl.load(x + offset, mask=mask).to(tl.float32)
    if eps_cond is not None:
        total += k1 * tl.load(eps_cond + offset, mask=mask).to(tl.float32)
    if eps_uncond is not None:
        total += k2 * tl.load(eps_uncond + offset, mask=mask).to(tl.float32)
    if history is not None:
        total += k3 * tl.load(history + offset, mask=mask).to(tl.float32)
    if noise is not None:
        total += k4 * tl.load(noise + offset, mask=mask).to(tl.float32)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=mask)


Run = Callable[[list[Tensor | None], Tensor, Tensor | None, list[float], int], None]


def _launch(tensors: tuple[Tensor | None, ...], coef: Tensor, run: Run) -> Tensor:
    """`run` the kernel on tensors that lie as the output does, with coefficients on the device or five on the host."""
    x = tensors[0]
    assert x is not None
    rows = coef.shape[0] if coef.dim() == 2 and coef.shape[0] > 1 else 1
    result, work = _rows.output_like(x, per_sample=rows > 1)
    width = x.numel() // rows
    if width:
        operands = [_rows.matched(t, work) for t in tensors]
        pointer, host = None, [0.0] * 5
        if coef.is_cpu and rows == 1:
            values = coef.reshape(-1).tolist()  # five numbers on the host travel with the launch
            host[: len(values)] = values
        else:
            # Pageable host memory: staged, not waited for. For graph capture keep the table on the device.
            pointer = coef.to(x.device, non_blocking=True)
            if pointer.stride(-1) != 1 and pointer.shape[-1] > 1:
                pointer = pointer.contiguous()
        with _rows.on_device(x):
            run(operands, work, pointer, host, rows)
    return result if result is work else result.copy_(work)


def _run_triton(
    operands: list[Tensor | None], out: Tensor, pointer: Tensor | None, host: list[float], rows: int
) -> None:
    width = out.numel() // rows
    config = _rows.streaming_config("affine_step", _rows.arch(out), out.dtype, rows, width)
    block = config.blocks["BLOCK"]
    chunks = -(-width // block)
    _affine_step_kernel[(rows * chunks,)](
        *operands, out, pointer, *host, width, chunks, 0 if pointer is None else pointer.stride(0),
        BLOCK=block, num_warps=config.num_warps,
    )  # fmt: skip


def _run_cuda(operands: list[Tensor | None], out: Tensor, pointer: Tensor | None, host: list[float], rows: int) -> None:
    torch.ops.hypersd._affine_step_cuda(*operands, out, pointer, *host, rows)


def _forward(run: Run, x: Tensor, eps_cond: Tensor, coef: Tensor, *others: Tensor | None) -> Tensor:
    if _rows.work_dtype(x, eps_cond, *others) == torch.float64:  # kernels compute in float32
        return reference(x, eps_cond, coef, *others)
    return _launch((x, eps_cond, *others), coef, run)


def _scaled(run: Run, grad: Tensor, coef: Tensor, needed: int) -> list[Tensor]:
    if grad.dtype == torch.float64:
        return _reference_backward(grad, coef, needed)
    return [_launch((grad, None, None, None, None), coef[..., j : j + 1], run) for j in range(5) if needed >> j & 1]


def _config(x: Tensor, eps_cond: Tensor, coef: Tensor, **others: Tensor | None) -> Config:
    rows = coef.shape[0] if coef.dim() == 2 else 1
    return _rows.streaming_config("affine_step", _rows.arch(x), x.dtype, rows, x.numel() // max(rows, 1))


def _programs() -> list[Program]:
    """What ships: all five tensors and the guided DDIM step, 16 and 32 bit, coefficients on the device and the host."""
    programs = []
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float16, "*fp16"), (torch.float32, "*fp32")):
        for rows, width, given in ((4, 65536, NAMES), (1, 16384, NAMES[:3])):
            on_device = rows > 1
            signature = {name: pointer if name in given else "constexpr" for name in NAMES} | {"out": pointer}
            signature |= {"coef": "*fp64" if on_device else "constexpr"} | {f"host{i}": "fp32" for i in range(5)}
            signature |= {"width": "i32", "chunks": "i32", "coef_stride": "i32", "BLOCK": "constexpr"}
            config = _rows.streaming_config("affine_step", "sm90", dtype, rows, width)
            absent = {name: None for name in (*NAMES, "coef") if signature[name] == "constexpr"}
            programs.append(
                Program(
                    f"{len(given)} terms {pointer[1:]} {'device' if on_device else 'host'} coef",
                    _affine_step_kernel,
                    signature,
                    {**absent, **config.blocks},
                    config,
                    divisible=(*given, "out", "width"),
                    streaming=True,
                    max_registers=64,
                )
            )
    return programs


# ------------------------------------------------------------------------------------------------------ registration


def _fake(x: Tensor, eps_cond: Tensor, coef: Tensor, *others: Tensor | None) -> Tensor:
    return torch.empty_like(x)


def _reference_backward(grad: Tensor, coef: Tensor, needed: int) -> list[Tensor]:
    work = _rows.work_dtype(grad)
    k = _rows.per_row(coef, grad, work)
    return [torch.empty_like(grad).copy_(k[j] * grad.to(work)) for j in range(5) if needed >> j & 1]


BACKWARD = Op(
    "affine_step_backward",
    "(Tensor grad, Tensor coef, int needed) -> Tensor[]",
    reference=_reference_backward,
    fake=lambda grad, coef, needed: [torch.empty_like(grad) for j in range(5) if needed >> j & 1],
    triton=partial(_scaled, _run_triton),
    cuda=partial(_scaled, _run_cuda),
    cpp=True,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    x, eps_cond, _, eps_uncond, history, noise = inputs
    dtypes = [None if t is None else t.dtype for t in (x, eps_cond, eps_uncond, history, noise)]
    ctx.dtypes = dtypes if any(dtype not in (None, x.dtype) for dtype in dtypes) else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # d out / d tensor_j = k_j; the coefficients are constants
    x, eps_cond, _, eps_uncond, history, noise = ctx.needs_input_grad
    needed = x | eps_cond << 1 | eps_uncond << 2 | history << 3 | noise << 4
    if ctx.dtypes:  # each gradient is rounded to its own tensor's dtype, not first to that of x
        own = [dtype for j, dtype in enumerate(ctx.dtypes) if needed >> j & 1]
        wide = reduce(torch.promote_types, own, grad.dtype)
        wide_grads = BACKWARD.run(grad.to(wide), ctx.saved_tensors[0], needed)
        grads = [g.to(dtype) for g, dtype in zip(wide_grads, own, strict=True)]
    else:
        grads = BACKWARD.run(grad, ctx.saved_tensors[0], needed)
    if needed == 3:
        return *grads, None, None, None, None
    found = iter(grads)
    return tuple([next(found) if need else None for need in ctx.needs_input_grad])


OP = Op(
    "affine_step",
    "(Tensor x, Tensor eps_cond, Tensor coef, Tensor? eps_uncond, Tensor? history, Tensor? noise) -> Tensor",
    reference=reference,
    fake=_fake,
    check=check,
    triton=partial(_forward, _run_triton),
    cuda=partial(_forward, _run_cuda),
    cpp=True,
    differentiable=NAMES,
    backward=_backward,
    setup_context=_setup_context,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_config,
    aten=_rows.aten_in_float64(*NAMES),
    programs=_programs,
)


@OP.public
def affine_step(
    x: Tensor,
    eps_cond: Tensor,
    coef: Tensor,
    *,
    eps_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The weighted sum k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise.

    Args:
        x, eps_cond, eps_uncond, history, noise: (batch, ...) of one shape and device, any strides, any floating-point
            dtypes. A term left out does not contribute, whatever its coefficient.
        coef: (5,) for all samples or (batch, 5), float64 (float32 is taken too), on the host or on the device of x,
            in the order of the formula. Constants: no gradient flows into them. For CUDA graph capture put it on the
            device, or pass the (5,) form on the host, whose values are then fixed in the graph.

    Returns:
        A new tensor of the shape, dtype and (where dense) strides of x; differentiable once in every tensor.

    Raises TypeError for what is no floating-point tensor, ValueError for a shape or device that does not fit and for a
    coefficient on the host that is not finite.
    """
    return OP(x, eps_cond, coef, eps_uncond, history, noise)

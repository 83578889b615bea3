"""group_norm_silu: y = silu(z), z = (x - mean) rstd weight + bias, mean and rstd of a sample's group of channels

GroupNorm (Wu and He 2018, arXiv:1803.08494) and the SiLU that follows it in a residual block; y = z with `silu=False`.

    bytes: 2 N itemsize and 8 batch groups for the statistics (a GPU reads x twice)     flops: about 30 N    launches: 2
    replaces: statistics, normalisation and SiLU, 5 N, with z kept for backward; here x and the statistics are kept
    shift: x + shift stands for x, added in every pass and never written: the addition's 2 N are saved too
    residual: h = x + residual stands for x, written by the pass that takes the statistics: 4 N for y and h instead of
              the addition's 3 N and the norm's 2 N; backward adds the gradient of h in the pass that makes dx, 2 N less
    backward: dz = dy silu'(z), z computed again; per group, m(v) the mean over its elements and x^ = (x - mean) rstd,
              dx = rstd (weight dz - m(weight dz) - x^ m(weight dz x^)); dweight = sum dz x^, dbias = sum dz
    arithmetic: float32 (float64 if x is float64); deviations from a local mean, combined by Chan, Golub and LeVeque
    memory order: channels outside (contiguous) and channels inside (channels last) are kept; others become contiguous
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _group_norm, _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config


def _case(
    name: str,
    *shape: int,
    groups: int,
    silu: bool = True,
    affine: bool = True,
    shift: bool = False,
    residual: bool = False,
    last: bool = False,
    mean: float = 0.5,
    bench: bool = True,
) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

        def picture(center: float) -> Tensor:
            t = (center + draw(*shape)).to(dtype)
            return t.contiguous(memory_format=torch.channels_last) if last else t

        inputs: dict[str, Any] = {"x": picture(mean), "num_groups": groups}
        inputs["weight"] = (1 + 0.1 * draw(shape[1])).to(dtype) if affine else None
        inputs["bias"] = (0.1 * draw(shape[1])).to(dtype) if affine else None
        inputs |= {"eps": 1e-5, "silu": silu, "shift": draw(*shape[:2]).to(dtype) if shift else None}
        return inputs | {"residual": picture(0.0) if residual else None}

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("group_norm_silu", _case),
    _case("odd", 3, 10, 7, 5, groups=5, shift=True, residual=True, bench=False),
    _case("odd_last", 3, 10, 7, 5, groups=5, shift=True, residual=True, last=True, bench=False),
    _case("odd_shift", 3, 10, 7, 5, groups=5, shift=True, bench=False),
    _case("odd_residual", 3, 10, 7, 5, groups=5, residual=True, bench=False),
    _case("odd_residual_last", 3, 10, 7, 5, groups=5, residual=True, last=True, bench=False),
    _case("odd_alone", 3, 10, 7, 5, groups=5, bench=False),
    _case("odd_alone_last", 3, 10, 7, 5, groups=5, last=True, bench=False),
    _case("odd_wide_last", 2, 33, 37, 29, groups=3, mean=0.0, last=True, bench=False),
    _case("far_mean", 2, 12, 11, 9, groups=3, mean=20.0, affine=False, bench=False),
    _case("far_mean_last", 2, 12, 11, 9, groups=3, mean=20.0, affine=False, last=True, bench=False),
    _case("wide_shift", 2, 12, 45, 47, groups=3, silu=False, shift=True, bench=False),
    _case("wide_shift_last", 2, 33, 37, 29, groups=3, affine=False, shift=True, last=True, bench=False),
    _case("vectors_shift", 4, 24, groups=3, shift=True, bench=False),
    _case("wide_residual", 2, 12, 45, 47, groups=3, silu=False, residual=True, bench=False),
    _case("wide_residual_last", 2, 33, 37, 29, groups=3, mean=20.0, residual=True, last=True, bench=False),
    _case("vectors_residual", 4, 24, groups=3, affine=False, residual=True, bench=False),
    _case("one_group", 2, 6, 5, 5, groups=1, bench=False),
    _case("no_affine", 2, 8, 3, 5, groups=8, affine=False, silu=False, bench=False),
    _case("vectors", 4, 24, groups=3, bench=False),
    _case("tokens", 2, 12, 77, groups=4, bench=False),
    _case("video", 2, 8, 3, 5, 5, groups=4, bench=False),
    _case("empty_batch", 0, 8, 4, 4, groups=4, bench=False),
    _case("empty_shift", 0, 8, 4, 4, groups=4, shift=True, bench=False),
    _case("empty_residual", 0, 8, 4, 4, groups=4, residual=True, bench=False),
)


def cost(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True,
    shift: Tensor | None = None, residual: Tensor | None = None,
) -> Cost:  # fmt: skip
    """x (and the residual) read once, y (and h) and the statistics written once."""
    small = sum(t.numel() * t.element_size() for t in (weight, bias, shift) if t is not None)
    statistics = 2 * x.shape[0] * num_groups * _rows.work_dtype(x).itemsize
    passes = 2 if residual is None else 4
    return Cost(flops=30 * x.numel(), bytes=passes * x.numel() * x.element_size() + small + statistics, launches=2)


def backward_cost(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True,
    shift: Tensor | None = None, residual: Tensor | None = None,
) -> Cost:  # fmt: skip
    """x, dy, the statistics (and dh) read once, dx written once; parameters and shift read, their gradients written."""
    small = 2 * sum(t.numel() * t.element_size() for t in (weight, bias, shift) if t is not None)
    statistics = 2 * x.shape[0] * num_groups * _rows.work_dtype(x).itemsize
    passes = 3 if residual is None else 4
    return Cost(flops=45 * x.numel(), bytes=passes * x.numel() * x.element_size() + small + statistics, launches=3)


def reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """The definition, as a residual block writes it."""
    h = x if residual is None else x + residual
    x = h
    if shift is not None:
        x = x + _by_sample(shift, x, x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch has no gradient of a bias alone
    if x.numel() or weight is None:
        z = torch.group_norm(x, num_groups, weight, bias, eps)
    else:  # there torch's gradient of the weight is nan
        z = x * weight.view(-1, *[1] * (x.dim() - 2)) + (0 if bias is None else bias.view(-1, *[1] * (x.dim() - 2)))
    y = F.silu(z) if silu else z
    return y if residual is None else (y, h)


def check(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError for arguments that group_norm_silu does not take."""
    _rows.check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (batch, channels, ...)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: got {num_groups}, expected a divisor of the {channels} channels of x")
    for name, t, shape, what in (
        ("weight", weight, (channels,), "channel"),
        ("bias", bias, (channels,), "channel"),
        ("shift", shift, (x.shape[0], channels), "sample and channel"),
    ):
        if t is None:
            continue
        _rows.check_tensor(name, t)
        if t.shape != shape:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {shape}, one number per {what}")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected {x.device} as x")
    if residual is not None:
        _rows.check_tensor("residual", residual, x, "x")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: got {residual.dtype}, expected {x.dtype} as x")
    _rows.check_real("eps", eps, 0.0)


# ------------------------------------------------------------------------------------------------------ registration


def channels_inside(x: Tensor) -> bool:
    """Whether channels are the innermost dimension of memory, as in torch.channels_last, and x is not contiguous."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """An output for x: its memory order where it is one of the two, else contiguous."""
    kept = x.is_contiguous() or channels_inside(x)
    return torch.empty_like(x, memory_format=torch.preserve_format if kept else torch.contiguous_format)


def _by_channel(t: Tensor | None, x: Tensor, work: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(work).reshape(-1, *[1] * (x.dim() - 2))


def _by_sample(t: Tensor, x: Tensor, work: torch.dtype) -> Tensor:
    """(batch, channels) -> (batch, channels, 1, ...), to broadcast over x."""
    return t.to(work).reshape(*x.shape[:2], *[1] * (x.dim() - 2))


def _over_groups(t: Tensor, like: Tensor) -> Tensor:
    """(batch, groups) -> (batch, channels, 1, ...), to broadcast over `like`."""
    per_group = like.shape[1] // t.shape[1]
    return t.repeat_interleave(per_group, 1).reshape(*like.shape[:2], *[1] * (like.dim() - 2))


def _normalized(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x^, z) in the dtype of the statistics."""
    work = mean.dtype
    hat = (x.to(work) - _over_groups(mean, x)) * _over_groups(rstd, x)
    scale, base = _by_channel(weight, x, work), _by_channel(bias, x, work)
    z = hat if scale is None else hat * scale
    return hat, z if base is None else z + base


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """x + shift, in what is computed in."""
    work = _rows.work_dtype(x)
    return x if shift is None else x.to(work) + _by_sample(shift, x, work)


def _sum_like(x: Tensor, residual: Tensor | None) -> Tensor:
    """Memory for h = x + residual; nothing without a residual."""
    return x.new_empty(0) if residual is None else _empty_like(x)


def _fallback(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    work, h = _rows.work_dtype(x), _sum_like(x, residual)
    if not x.numel():
        mean = x.new_zeros((x.shape[0], num_groups), dtype=work)
        return _empty_like(x), h, mean, torch.zeros_like(mean)
    if residual is not None:
        x = h.copy_(x + residual)
    total = _shifted(x, shift)
    var, mean = torch.var_mean(total.to(work).unflatten(1, (num_groups, -1)).flatten(2), -1, correction=0)
    rstd = (var + eps).rsqrt()
    _, z = _normalized(total, mean, rstd, weight, bias)
    return _empty_like(x).copy_(F.silu(z) if silu else z), h, mean, rstd


def _fake(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
    shift: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = [x.new_empty((x.shape[0], num_groups), dtype=_rows.work_dtype(x)) for _ in range(2)]
    return _empty_like(x), _sum_like(x, residual), statistics[0], statistics[1]


def _reference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int,
    silu: bool, need_x: bool, need_affine: bool, shift: Tensor | None, dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    work = mean.dtype
    hat, z = _normalized(_shifted(x, shift), mean, rstd, weight, bias)
    dz = dy.to(work)
    if silu:
        gate = torch.sigmoid(z)
        dz = dz * (gate * (1 + z * (1 - gate)))
    outputs = [x.new_empty(0) for _ in range(3)]
    if need_x:
        scale = _by_channel(weight, x, work)
        grad = dz if scale is None else dz * scale

        def group_mean(t: Tensor) -> Tensor:
            return _over_groups(t.unflatten(1, (num_groups, -1)).flatten(2).mean(-1), x)

        dx = _over_groups(rstd, x) * (grad - group_mean(grad) - hat * group_mean(grad * hat))
        outputs[0] = _empty_like(x).copy_(dx if dh is None else dx + dh)
    if need_affine:
        over = [d for d in range(x.dim()) if d != 1]
        if weight is not None:
            outputs[1] = (dz * hat).sum(over).to(weight.dtype)
        if bias is not None:
            outputs[2] = dz.sum(over).to(bias.dtype)
    return outputs[0], outputs[1], outputs[2]


def _fake_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int,
    silu: bool, need_x: bool, need_affine: bool, shift: Tensor | None, dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = [x.new_empty(0) for _ in range(3)]
    dweight, dbias = (
        none[i] if t is None or not need_affine else torch.empty_like(t, memory_format=torch.contiguous_format)
        for i, t in ((1, weight), (2, bias))
    )
    return _empty_like(x) if need_x else none[0], dweight, dbias


# ------------------------------------------------------------------------------------------------------- GPU launchers


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x in one of the two memory orders, itself where it is, and whether its channels are inside."""
    inside = channels_inside(x)
    return x if inside else x.contiguous(), inside


def _lying_as(x: Tensor, t: Tensor) -> Tensor:
    """`t` in the memory order and dtype of x: itself, or a copy."""
    return t if t.stride() == x.stride() and t.dtype == x.dtype else _empty_like(x).copy_(t)


def _run_cuda(
    x: Tensor, y: Tensor, num_groups: int, inside: bool, weight: Tensor | None, bias: Tensor | None, eps: float,
    silu: bool, shift: Tensor | None, residual: Tensor | None, h: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    torch.ops.hypersd._group_norm_silu_cuda(x, y, mean, rstd, weight, bias, shift, residual, h, eps, silu, inside)
    return mean, rstd


def _run_cuda_backward(
    x: Tensor, dy: Tensor, dx: Tensor | None, num_groups: int, inside: bool, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, silu: bool,
    shift: Tensor | None, dh: Tensor | None,
) -> None:  # fmt: skip
    torch.ops.hypersd._group_norm_silu_backward_cuda(
        dy, x, mean, rstd, weight, bias, shift, dh, silu, inside, dx, dweight, dbias
    )  # fmt: skip


def _launch(
    run: Callable[..., tuple[Tensor, Tensor]], x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None,
    eps: float, silu: bool, shift: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or not x.numel():  # kernels compute in float32
        return _fallback(x, num_groups, weight, bias, eps, silu, shift, residual)
    x, inside = _laid_out(x)
    y, h = _empty_like(x), _sum_like(x, residual)
    residual = None if residual is None else _lying_as(x, residual)
    weight, bias, shift = (None if t is None else t.contiguous() for t in (weight, bias, shift))
    with _rows.on_device(x):
        statistics = run(
            x, y, num_groups, inside, weight, bias, eps, silu, shift, residual, None if residual is None else h
        )
    return y, h, *statistics


def _launch_backward(
    run: Callable[..., None], dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, num_groups: int, silu: bool, need_x: bool, need_affine: bool, shift: Tensor | None,
    dh: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or not x.numel():
        return _reference_backward(dy, x, mean, rstd, weight, bias, num_groups, silu, need_x, need_affine, shift, dh)
    x, inside = _laid_out(x)
    outputs = _fake_backward(dy, x, mean, rstd, weight, bias, num_groups, silu, need_x, need_affine, shift, dh)
    wanted = (need_x, need_affine and weight is not None, need_affine and bias is not None)
    dx, dweight, dbias = (out if want else None for out, want in zip(outputs, wanted, strict=True))
    weight, bias, shift = (None if t is None else t.contiguous() for t in (weight, bias, shift))
    dy, dh = _lying_as(x, dy), _lying_as(x, dh) if dh is not None and need_x else None
    with _rows.on_device(x):
        run(x, dy, dx, num_groups, inside, mean, rstd, weight, bias, dweight, dbias, silu, shift, dh)
    return outputs


def _config(x: Tensor, num_groups: int, **others: Any) -> Config:
    return _group_norm.grid(x, num_groups, channels_inside(x)).config


BACKWARD = Op(
    "group_norm_silu_backward",
    "(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int num_groups, bool silu, "
    "bool need_x, bool need_affine, Tensor? shift, Tensor? dh) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=partial(_launch_backward, _group_norm.backward),
    cuda=partial(_launch_backward, _run_cuda_backward),
    cpp=True,
)


def _sum_of_pixels(dx: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the shift: that of x summed over all but samples and channels, by ATen in float32 or wider."""
    if dx.dim() > 2:
        dx = dx.sum(list(range(2, dx.dim())), dtype=torch.promote_types(dx.dtype, dtype))
    return dx.to(dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, _, ctx.silu, shift, residual = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, bias, shift)
    ctx.mark_non_differentiable(mean, rstd, *([h] if residual is None else []))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None, *_: None) -> tuple[Tensor | None, ...]:
    need_x, _, need_weight, need_bias, _, _, need_shift, need_residual = ctx.needs_input_grad
    dh = dh if need_x or need_residual else None
    if dy is None:  # y was not used: h is a plain sum
        return dh if need_x else None, *[None] * 6, dh if need_residual else None
    x, mean, rstd, weight, bias, shift = ctx.saved_tensors
    joined = None if need_shift else dh  # the gradient of the shift is that of the norm alone
    dx, dweight, dbias = BACKWARD.run(
        dy, x, mean, rstd, weight, bias, ctx.num_groups, ctx.silu, need_x or need_residual or need_shift,
        need_weight or need_bias, shift, joined,
    )  # fmt: skip
    dshift = _sum_of_pixels(dx, shift.dtype) if need_shift else None
    if dh is not joined:
        dx = dx + dh
    wanted = (dx, need_x), (dweight, need_weight), (dbias, need_bias), (dx, need_residual)
    dx, dweight, dbias, dresidual = (grad if need else None for grad, need in wanted)
    return dx, None, dweight, dbias, None, None, dshift, dresidual


def _result(output: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """y, and h where there is one: without a residual it is a vector of nothing."""
    return output[0] if output[1].dim() == 1 else output[:2]


OP = Op(
    "group_norm_silu",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? shift, "
    "Tensor? residual) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fallback=_fallback,
    fake=_fake,
    check=check,
    triton=partial(_launch, _group_norm.forward),
    cuda=partial(_launch, _run_cuda),
    cpp=True,
    differentiable=("x", "weight", "bias", "shift", "residual"),
    backward=_backward,
    setup_context=_setup_context,
    result=_result,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_config,
    aten=_rows.aten_in_float64("x"),
    programs=_group_norm.programs,
)


@OP.public
def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SiLU of GroupNorm, or GroupNorm alone; of x + shift and x + residual, where these are given.

    Args:
        x: (batch, channels, ...), any floating-point dtype. Contiguous and channels-last memory is read as it lies;
            other strides are copied first.
        num_groups: a divisor of the channels.
        weight, bias: (channels,), any floating-point dtype, or None for 1 and 0.
        eps: added to the variance, which is that of the population, over a sample's group.
        silu: whether z * sigmoid(z) follows.
        shift: (batch, channels), any floating-point dtype: the normalised tensor, statistics included, is
            x + shift[:, :, None, ...], as where a residual block adds its time embedding. The sum is float32 (float64
            where x is) and never written: one rounding fewer than x + shift in the dtype of x.
        residual: the shape and dtype of x, any memory order (one that is not that of x is copied first): h =
            x + residual, rounded as torch's own sum, is what is normalised, and is returned for the sums to come.

    Returns:
        y; with a residual (y, h). The shape and dtype of x, channels last where x is, else contiguous; differentiable
        once in x, weight, bias, shift, whose gradient is that of the norm in x summed over the pixels, and residual,
        whose gradient is that of x: of the norm and of h. x (with a residual h in its place), shift and two float32
        numbers per sample and group are kept for backward.

    Raises TypeError for what is no floating-point tensor, for a residual of another dtype and for a number of another
    kind, ValueError for a shape, device or number that does not fit.
    """
    return OP(x, num_groups, weight, bias, eps, silu, shift, residual)

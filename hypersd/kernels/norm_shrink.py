"""norm_shrink: y = (x - mean) rstd weight + bias over the last dimension, and S = y a^T in the same pass

LayerNorm (Ba et al. 2016, arXiv:1607.06450) and the rank-wide product of the LoRA layers that read it: q, k and v, or
the projection of a feed-forward layer; their a may be stacked.

    bytes: x read, y and S written: (2 M K + M r) itemsize     flops: 2 M K r + 8 M K      launches: 1   (x is M x K)
    replaces: LayerNorm and y a^T, 3 M K + M r; one reading of y less for each further layer whose a is stacked
    taken by: whoever adds S b^T to a product of its own; lora_linear makes its S itself, hypersd.models does not use it
    backward: g = dY + dS a;  dx = rstd (weight g - m(weight g) - x^ m(weight g x^)), m the mean over K, x^ = (x - mean)
              rstd;  dweight = sum g x^, dbias = sum g over the rows;  da = dS^T y
    arithmetic: float32 (float64 if x is float64); y is rounded before it is multiplied, as by two operators
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora, _norm_shrink, _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config


def _case(name: str, *shape: int, r: int, affine: bool = True, mean: float = 0.5, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

        width = shape[-1]
        return {
            "x": (mean + draw(*shape)).to(dtype),
            "weight": (1 + 0.1 * draw(width)).to(dtype) if affine else None,
            "bias": (0.1 * draw(width)).to(dtype) if affine else None,
            "eps": 1e-5,
            "a": (draw(r, width) * max(width, 1) ** -0.5).to(dtype),
        }

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("norm_shrink", _case),
    _case("odd", 3, 7, 21, r=5, bench=False),
    _case("odd_wide", 2, 5, 131, r=37, mean=0.0, bench=False),
    _case("far_mean", 4, 33, r=3, mean=20.0, affine=False, bench=False),
    _case("vector", 16, r=4, bench=False),
    _case("wide_rank", 2, 9, 24, r=150, bench=False),
    _case("picture", 2, 3, 5, 12, r=2, affine=False, bench=False),
    _case("no_tokens", 2, 0, 16, r=4, bench=False),
)


def cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> Cost:
    """x and a read once, y and S written once."""
    m, (r, k) = x.numel() // max(x.shape[-1], 1), a.shape
    moved = 2 * x.numel() + m * r + a.numel() + sum(t.numel() for t in (weight, bias) if t is not None)
    return Cost(flops=2 * m * k * r + 8 * m * k, bytes=moved * x.element_size(), launches=1)


def backward_cost(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> Cost:
    """x, y, dy, dS, a and the statistics read once, dx and da written once; so are the parameters, their gradients."""
    m, (r, k) = x.numel() // max(x.shape[-1], 1), a.shape
    moved = 4 * x.numel() + m * r + 2 * a.numel() + 2 * sum(t.numel() for t in (weight, bias) if t is not None)
    statistics = 2 * m * _rows.work_dtype(x).itemsize
    return Cost(flops=4 * m * k * r + 16 * m * k, bytes=moved * x.element_size() + statistics, launches=3)


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, as a transformer block writes it."""
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return y, F.linear(y, a)


def check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> None:
    """Raise TypeError or ValueError for arguments that norm_shrink does not take."""
    _rows.check_tensor("x", x)
    width = x.shape[-1]
    if width == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a last dimension to normalise over")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _rows.check_tensor(name, t)
        if t.shape != (width,):
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected ({width},) as the last dimension of x")
        if t.device != x.device:
            raise ValueError(f"{name}: got device {t.device}, expected {x.device} as x")
    _rows.check_tensor("a", a)
    if a.dim() != 2 or a.shape[1] != width:
        raise ValueError(f"a: got shape {tuple(a.shape)}, expected (r, {width}) as the last dimension of x")
    if a.dtype != x.dtype:
        raise TypeError(f"a: got {a.dtype}, expected {x.dtype} as x")
    if a.device != x.device:
        raise ValueError(f"a: got device {a.device}, expected {x.device} as x")
    _rows.check_real("eps", eps, 0.0)


# -------------------------------------------------------------------------------------------------- ATen and Triton


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, bias) as ATen's LayerNorm takes them with float32 statistics: 16 bit beside float32 on a CPU."""
    work, width = _rows.work_dtype(x), x.shape[-1]
    weight = x.new_ones(width, dtype=work) if weight is None else weight.to(work)
    bias = x.new_zeros(width, dtype=work) if bias is None else bias.to(work)
    return (x if x.device.type == "cpu" else x.to(work)), weight, bias


def _fallback(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width, work = x.shape[-1], _rows.work_dtype(x)
    wide, scale, shift = _affine(x.reshape(-1, width), weight, bias)
    y, mean, rstd = torch.native_layer_norm(wide, (width,), scale, shift, eps)
    y = y.to(x.dtype)
    s = y.mm(a.t()).view(*x.shape[:-1], a.shape[0])
    return y.view(x.shape), s, mean.view(-1).to(work), rstd.view(-1).to(work)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(math.prod(x.shape[:-1]), dtype=_rows.work_dtype(x)) for _ in range(2))
    return y, x.new_empty(*x.shape[:-1], a.shape[0]), mean, rstd


def _reference_backward(
    x: Tensor, dy: Tensor | None, ds: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, a: Tensor, need_x: bool, need_affine: bool, need_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    dy, ds = (None if t is None else t.reshape(rows.shape[0], t.shape[-1]) for t in (dy, ds))
    outputs = [x.new_empty(0) for _ in range(4)]
    if need_x or need_affine:
        if ds is None:
            assert dy is not None
            g = dy
        else:
            g = ds.mm(a) if dy is None else torch.addmm(dy, ds, a)
        wide, scale, shift = _affine(rows, weight, bias)
        found = torch.ops.aten.native_layer_norm_backward(
            g.to(wide.dtype), wide, (width,), mean.view(-1, 1), rstd.view(-1, 1), scale, shift,
            [need_x, need_affine and weight is not None, need_affine and bias is not None],
        )  # fmt: skip
        for i, (grad, like) in enumerate(zip(found, (x, weight, bias), strict=True)):
            if like is not None and (need_affine if i else need_x):
                outputs[i] = grad.to(like.dtype).view(like.shape)
    if need_a and ds is not None:
        outputs[3] = ds.t().mm(y.reshape(-1, width))
    return outputs[0], outputs[1], outputs[2], outputs[3]


def _fake_backward(
    x: Tensor, dy: Tensor | None, ds: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, a: Tensor, need_x: bool, need_affine: bool, need_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def made(t: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty(0) if t is None or not needed else torch.empty_like(t, memory_format=torch.contiguous_format)

    return made(x, need_x), made(weight, need_affine), made(bias, need_affine), made(a, need_a and ds is not None)


def _triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64 or not x.numel() or not a.numel():
        return _fallback(x, weight, bias, eps, a)
    x, a = x.contiguous(), a.contiguous()
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    outputs = _fake(x, weight, bias, eps, a)
    _norm_shrink.forward(x, weight, bias, eps, a, *outputs)
    return outputs


def _triton_backward(
    x: Tensor, dy: Tensor | None, ds: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, a: Tensor, need_x: bool, need_affine: bool, need_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64 or not x.numel() or not a.numel():
        return _reference_backward(x, dy, ds, y, mean, rstd, weight, bias, a, need_x, need_affine, need_a)
    dy, ds, weight, bias = (None if t is None else t.contiguous() for t in (dy, ds, weight, bias))
    x, y, a = x.contiguous(), y.contiguous(), a.contiguous()
    dx, dweight, dbias, da = _fake_backward(
        x, dy, ds, y, mean, rstd, weight, bias, a, need_x, need_affine, need_a
    )  # fmt: skip
    if need_x or need_affine:
        sums = _norm_shrink.backward(dy, ds, x, mean, rstd, weight, a, dx if need_x else None, need_affine)
        if need_affine and weight is not None:
            dweight = sums[0].to(weight.dtype)
        if need_affine and bias is not None:
            dbias = sums[1].to(bias.dtype)
    if need_a and ds is not None:
        _norm_shrink.adapter_grad(ds, y, da)
    return dx, dweight, dbias, da


def _config(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> Config:
    return _norm_shrink.config(x.shape[:-1].numel(), x.shape[-1], a.shape[0], x.dtype, _rows.arch(x))


# ------------------------------------------------------------------------------------------------------ registration

BACKWARD = Op(
    "norm_shrink_backward",
    "(Tensor x, Tensor? dy, Tensor? ds, Tensor y, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor a, "
    "bool need_x, bool need_affine, bool need_a) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
    triton=_triton_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, a = inputs
    y, _, mean, rstd = output
    ctx.save_for_backward(x, y, mean, rstd, weight, bias, a)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None and ds is None:
        return (None,) * 5
    x, y, mean, rstd, weight, bias, a = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_a = ctx.needs_input_grad
    dx, dweight, dbias, da = BACKWARD.run(
        x, dy, ds, y, mean, rstd, weight, bias, a, need_x, need_weight or need_bias, need_a
    )
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        None,
        da if need_a and ds is not None else None,
    )


def _arguments(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> tuple[Any, ...]:
    if isinstance(a, Tensor) and isinstance(x, Tensor) and a.dtype != x.dtype and a.dtype in _rows.DTYPES:
        a = a.to(x.dtype)
    return x, weight, bias, eps, a


OP = Op(
    "norm_shrink",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor a) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fallback=_fallback,
    fake=_fake,
    check=check,
    triton=_triton,
    differentiable=("x", "weight", "bias", "a"),
    backward=_backward,
    setup_context=_setup_context,
    result=lambda output: output[:2],
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_config,
    aten=_rows.aten_in_float64("x"),
    programs=_norm_shrink.programs,
)


for _op in (OP, BACKWARD):
    _lora.skip_dispatcher(_op)


@OP.public
def norm_shrink(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor) -> tuple[Tensor, Tensor]:
    """y = LayerNorm(x) over the last dimension, and S = y a^T for the LoRA layers that read y.

    Args:
        x: (..., in), any strides, any floating-point dtype.
        weight, bias: (in,), any floating-point dtype, or None for 1 and 0.
        eps: added to the variance, which is that of the population.
        a: (r, in); the adapters of layers that share y may be stacked. Cast to x's dtype where it has another.

    Returns:
        y of the shape and dtype of x, and S (..., r), both contiguous; differentiable once in x, weight, bias and a.
        Inside torch.autocast nothing is cast: both stay in x's dtype.

    Raises TypeError for what is no floating-point tensor or no number, ValueError for a shape, device or number that
    does not fit.
    """
    arguments = _arguments(x, weight, bias, eps, a)
    if isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):  # S is of x's dtype, whatever computes it
            return OP(*arguments)
    return OP(*arguments)

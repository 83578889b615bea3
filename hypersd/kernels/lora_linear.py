"""lora_linear: y = x W^T + bias + scale (x a^T) b^T, with W and bias frozen

 backward  dX = dY W + scale dS a,  dS = dY b;   dA = scale dS^T x;   dB = scale dY^T S,  S = x a^T
 flops     2 M K N + 2 M r (K + N) as written (M rows, K in, N out, r rank)
 bytes     x, W, a, b read, y written

_lora.py names the exact forms (split, accumulate, fold; thin, full); the cheapest is taken and `explain` shows it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora, _lora_gemm, _lora_rows, _native, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._rows import on_device
from hypersd.kernels._tune import Config

FUSED = 1 << 18  # elements of y from which oneDNN's fused sum, 25 us dearer to call, saves more than that
WIDE = 1 << 24  # multiplications from which oneDNN's float32 product pays
_ONEDNN = torch.backends.mkldnn.is_available()


def _case(name: str, m: tuple[int, ...], k: int, n: int, r: int, *, bias: bool = True, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict:
        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        return {
            "x": draw(*m, k),
            "weight": draw(n, k, std=k**-0.5),
            "bias": draw(n) if bias else None,
            "a": draw(r, k, std=k**-0.5),
            "b": draw(n, r, std=0.1 * max(r, 1) ** -0.5),
            "scale": 0.75,
        }

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("lora_linear", _case),
    _case("odd", (3, 7), 13, 11, 5, bench=False),
    _case("vector", (), 24, 16, 4, bench=False),
    _case("rank_1", (2, 3, 5), 20, 36, 1, bias=False, bench=False),
    _case("wide_rank", (4, 9), 24, 40, 80, bench=False),
    _case("no_tokens", (2, 0), 16, 8, 4, bench=False),
)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> Cost:
    """The least of the forms: arithmetic of the cheapest, each tensor moved once."""
    n, k = weight.shape
    m, r = x.numel() // max(k, 1), a.shape[0]
    moved = x.numel() + m * n + n * k + a.numel() + b.numel()
    return Cost(2 * m * n * k + 2 * r * min(m * (k + n), n * k), moved * x.element_size(), 2)


def backward_cost(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **others: Any) -> Cost:
    """See _lora.backward_cost."""
    n, k = weight.shape
    m, ab = x.numel() // max(k, 1), a.numel() + b.numel()
    return _lora.backward_cost(m, k, n, a.shape[0], x.numel(), ab, x.element_size())


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool = False,
) -> Tensor:  # fmt: skip
    """The definition, as written."""
    factor = scale if scale_tensor is None else scale * scale_tensor
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * factor


# ---- the forms in ATen products; alpha is the scale, which S = alpha x a^T and dS = alpha dY b carry ------------


def forward_form(
    form: str, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float, s: Tensor | None
) -> Tensor:
    """y by one form; x is (M, K), s = alpha x a^T (fold does without)."""
    if form == "fold" or s is None:
        return F.linear(x, _lora.fold(weight, a, b, alpha), bias)
    if form == "accumulate":
        return F.linear(x, weight, bias).addmm_(s, b.t())
    if bias is not None and x.dtype not in _lora.SIXTEEN_BIT:
        return torch.addmm(bias, s, b.t()).addmm_(x, weight.t())
    update = s.mm(b.t())  # without the bias, whose rounding would swallow a small update
    if bias is None:
        return update.addmm_(x, weight.t())
    if update.numel() >= FUSED and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _ONEDNN:
        # the three, rounded once; it does not read the bias's strides
        return torch.ops.mkldnn._linear_pointwise.binary(x, update, weight, bias.contiguous(), "add")
    return update.addmm_(x, weight.t()).add_(bias)


def input_grad_form(
    form: str, dy: Tensor, ds: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, alpha: float
) -> Tensor:
    """dX by one form; dy is (M, N), ds = alpha dy b (fold does without)."""
    if form == "fold" or ds is None:
        return _wide_product(dy, _lora.fold(weight, a, b, alpha))
    if form == "accumulate":
        return _wide_product(dy, weight).addmm_(ds, a)
    return ds.mm(a).addmm_(dy, weight)


def _wide_product(dy: Tensor, weight: Tensor) -> Tensor:
    """dY W, in float32 by oneDNN where that pays, up to 1.6 times as fast as mm's BLAS; over more than 320 outputs its
    sums lose too many digits. (y stays with F.linear's routine: without an update it has the base layer's bits.)"""
    large = dy.shape[0] * weight.numel() >= WIDE and weight.shape[0] <= 320
    if large and dy.dtype == torch.float32 and dy.device.type == "cpu" and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(dy, weight.t(), None, "none", [], "")
    return dy.mm(weight)


def adapter_grad_form(
    form: str, dy: Tensor, ds: Tensor | None, x: Tensor, s: Tensor | None, a: Tensor, b: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """(dA, dB) by one form; dy is (M, N), x is (M, K), s = alpha x a^T where forward kept it."""
    if form == "full" or ds is None:
        g = dy.t().mm(x)
        return _lora.product(b.t(), g, alpha), _lora.product(g, a.t(), alpha)
    return ds.t().mm(x), dy.t().mm(_lora.product(x, a.t(), alpha) if s is None else s)


def _forms(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale, scale_tensor = _lora.on_host(scale, scale_tensor)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    form = _form(x, weight, a, keep)
    if form in _lora.NATIVE:
        return _lora_rows.forward(x, weight, bias, a, b, scale, (1, 1), (0, 0), keep, form == "rows_fold")
    a, b = _lora.alike(x, a, b)
    if scale_tensor is not None:
        b, scale = _lora.scaled(b, scale, scale_tensor), 1.0
    s = _lora.product(rows, a.t(), scale) if keep or form != "fold" else None
    y = forward_form(form, rows, weight, bias, a, b, scale, s).view(*x.shape[:-1], n)
    return y, s if keep and s is not None else x.new_empty(0)


def _forms_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    alpha, scale_tensor = _lora.on_host(scale, scale_tensor)
    chosen = _plan(x, weight, a, need_x, need_adapter)
    if chosen.input_grad == "rows":
        return _lora_rows.backward(dy, x, s, weight, a, b, alpha, (1, 1), (0, 0), need_x, need_adapter)
    n, k = weight.shape
    rows, dy, kinds = x.reshape(-1, k), dy.reshape(-1, n), (a.dtype, b.dtype)
    a, b = _lora.alike(x, a, b)
    if scale_tensor is not None:
        b, alpha = _lora.scaled(b, alpha, scale_tensor), 1.0
    thin = _lora.needs_ds(chosen.input_grad, chosen.adapter_grad, need_x, need_adapter)
    ds = _lora.product(dy, b, alpha) if thin else None
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if need_x:
        dx = input_grad_form(chosen.input_grad, dy, ds, weight, a, b, alpha).view(x.shape)
    if need_adapter:
        kept = s if s.dim() == 2 else None
        da, db = adapter_grad_form(chosen.adapter_grad, dy, ds, rows, kept, a, b, alpha)
        if scale_tensor is not None:
            db = _lora.scaled(db, scale, scale_tensor)
    return dx, da.to(kinds[0]), db.to(kinds[1])


# ---- Triton ------------------------------------------------------------------------------------------------------


def _aten(x: Tensor, *others: object, **options: object) -> str:
    """Why ATen's products compute this and not the kernels; empty: they do not."""
    if x.dtype == torch.float64:
        return "the kernels sum in float32"
    if x.dtype == torch.float32 and x.is_cuda:
        return "in float32 the sums of the kernels stray more than twice as far as ATen's"
    return ""


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _aten(x):
        return _forms(x, weight, bias, a, b, scale, scale_tensor, keep)
    n, k = weight.shape
    rows, weight, a, b = x.reshape(-1, k).contiguous(), weight.contiguous(), a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    with on_device(x):
        s = _lora_gemm.shrink(rows, a, True)
        y = _lora_gemm.expand(s, b, rows, weight, bias, scale, scale_tensor, True)
    return y.view(*x.shape[:-1], n), s if keep else x.new_empty(0)


def _triton_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _aten(x) or not dy.numel() or not a.numel():
        return _forms_backward(dy, x, s, weight, a, b, scale, scale_tensor, need_x, need_adapter)
    n, k = weight.shape
    rows, dy = x.reshape(-1, k).contiguous(), dy.reshape(-1, n).contiguous()
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    with on_device(x):
        count = _lora_gemm.counters(a.shape[0], k, n, device=x.device) if need_adapter else None
        ds = _lora_gemm.shrink(dy, b, False, count)
        if need_x:
            dx = _lora_gemm.expand(ds, a, dy, weight, None, scale, scale_tensor, False).view(x.shape)
        if count is not None:
            s = s if s.dim() == 2 else _lora_gemm.shrink(rows, a, True)
            da, db = torch.empty_like(a), torch.empty_like(b)
            _lora_gemm.gradients(ds, rows, s, dy, da, db, count, scale, scale_tensor)
    return dx, da, db


# ---- registration -----------------------------------------------------------------------------------------------


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> None:  # fmt: skip
    _lora.check("lora_linear", x, weight, bias, a, b, scale_tensor)
    if weight.dim() != 2:
        raise ValueError(f"lora_linear: weight has shape {tuple(weight.shape)}, expected (out, in)")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"lora_linear: x has shape {tuple(x.shape)}, expected (..., {k}) as in weight")
    if a.dim() != 2 or a.shape[1] != k:
        raise ValueError(f"lora_linear: a has shape {tuple(a.shape)}, expected (r, {k}) as in weight")
    if b.dim() != 2 or b.shape[0] != n or b.shape[1] != a.shape[0]:
        raise ValueError(f"lora_linear: b has shape {tuple(b.shape)}, expected ({n}, {a.shape[0]})")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty((x.shape[:-1].numel(), a.shape[0]) if keep else 0)


def _fake_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        a.new_empty(a.shape if need_adapter else 0),
        b.new_empty(b.shape if need_adapter else 0),
    )


def _plan(x: Tensor, weight: Tensor, a: Tensor, need_x: bool = True, need_adapter: bool = True) -> _lora.Plan:
    return _choice(x.shape, weight.shape, a.shape, x.dtype, weight.dtype, x.device, need_x, need_adapter)[0]


def _form(x: Tensor, weight: Tensor, a: Tensor, keep: bool) -> str:
    plan, alone = _choice(x.shape, weight.shape, a.shape, x.dtype, weight.dtype, x.device, True, True)
    return plan.forward if keep else alone


@_native.cache_by_isa
def _choice(
    x: torch.Size, weight: torch.Size, a: torch.Size, dtype: torch.dtype, weight_dtype: torch.dtype,
    device: torch.device, need_x: bool, need_adapter: bool,
) -> tuple[_lora.Plan, str]:  # fmt: skip
    """The forms of a training step, and that of y where nothing is kept. Every call asks, so one lookup must do."""
    m, (n, k), r, kind = x[:-1].numel(), weight, a[0], _lora.kind(device)
    step, alone = (device.type == "cpu" and _lora_rows.fits(dtype, weight_dtype, weight, r, b) for b in (True, False))
    plan = _lora.plan("lora_linear", m, k, n, r, dtype, kind, need_x, need_adapter, native=step)
    return plan, _lora.forward_form("lora_linear", m, k, n, r, dtype, kind, False, alone)


def _public_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor
) -> _lora.Plan:
    keep = _lora.wants_adapter_grad(a, b) and _keep(x, weight, a)
    return _plan(x, weight, a)._replace(forward=_form(x, weight, a, keep))


def _triton_config(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: object) -> Config:
    n, k = weight.shape
    return _lora_gemm.config(x.shape[:-1].numel(), n, k, a.shape[0], x.dtype)


BACKWARD = Op(
    "lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, float scale, Tensor? scale_tensor, "
    "bool need_x, bool need_adapter) -> (Tensor, Tensor, Tensor)",
    reference=_forms_backward,
    fake=_fake_backward,
    triton=_triton_backward,
)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor
) -> tuple[Any, ...]:
    x, weight, bias, a, b, factor, scale_tensor = _lora.arguments(x, weight, bias, a, b, scale)
    keep = _lora.wants_adapter_grad(a, b) and _keep(x, weight, a)
    return x, weight, bias, a, b, factor, scale_tensor, keep


def _keep(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether forward hands S = x a^T on to backward: where dA and dB will be taken from it."""
    if weight.dim() != 2 or not x.dim() or not a.dim():
        return False  # the check has a word for it
    return _plan(x, weight, a, x.requires_grad).adapter_grad != "full"


OP = Op(
    "lora_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, Tensor? scale_tensor, bool keep) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    check=_check,
    fallback=_forms,
    triton=_triton,
    differentiable=("x", "a", "b"),
    backward=_lora.backward_by(BACKWARD),
    setup_context=_lora.setup_context,
    result=lambda output: output[0],
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_triton_config,
    plan=_public_plan,
    autocast=("x", "weight", "bias"),
    aten=_aten,
    native=lambda **inputs: _public_plan(**inputs).forward in _lora.NATIVE,
    programs=_lora_gemm.programs,
)

for _op in (OP, BACKWARD):
    _lora.skip_dispatcher(_op)


@OP.public
def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """y = x W^T + bias + scale (x a^T) b^T, a linear layer with an unmerged adapter.

    x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r), all of one floating-point dtype and
    device; scale a float or a 0-d tensor (which stays on its device). Returns (..., out). Differentiable in x, a and b;
    weight and bias are frozen and get no gradient. An adapter kept in another dtype than x is cast to x's, and its
    gradients come back in its own; inside torch.autocast everything is cast as for torch.nn.functional.linear.
    Raises TypeError for a dtype or what is no number, and ValueError for a shape, a device or a number that does not
    fit, naming the argument.
    """
    return OP(*_arguments(x, weight, bias, a, b, scale))

"""lora_conv2d: y = conv(x, W) + bias + scale conv1x1(conv(x, a), b), with W and bias frozen

 backward  dX = conv^T(dY, W) + conv^T(dS, a),  dS = scale conv1x1^T(dY, b);  dA = the weight gradient of conv(x, a) at
           dS;  dB = scale dY^T S,  S = conv(x, a).  No weight gradient of W is computed, save where `full` uses it
 flops     2 M K N + 2 M r (K + N) as written: M output positions, K = in kh kw, N out
 bytes     x, W, a, b read, y written

_lora.py names the exact forms (split, accumulate, fold; thin, full); the cheapest is taken and `explain` shows it.
In 16 bit the base convolution, the update and the bias are added before the one rounding where the CPU has oneDNN;
elsewhere the update is added to the rounded sum. y and dX are channels_last where x or W is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora, _lora_rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._rows import is_integer

LARGEST = 2**31 - 1  # stride and padding: positions are counted in 64 bits


def _case(
    name: str, batch: int, k: int, n: int, size: int, kernel: int, r: int, *, stride: int = 1, bias: bool = True,
    channels_last: bool = False, bench: bool = True,
) -> Case:  # fmt: skip
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict:
        layout = torch.channels_last if channels_last else torch.contiguous_format

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        fan_in = k * kernel * kernel
        return {
            "x": draw(batch, k, size, size).contiguous(memory_format=layout),
            "weight": draw(n, k, kernel, kernel, std=fan_in**-0.5).contiguous(memory_format=layout),
            "bias": draw(n) if bias else None,
            "a": draw(r, k, kernel, kernel, std=fan_in**-0.5),
            "b": draw(n, r, 1, 1, std=0.1 * max(r, 1) ** -0.5),
            "scale": 0.75,
            "stride": stride,
            "padding": kernel // 2,
        }

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("lora_conv2d", _case),
    _case("odd", 3, 5, 7, 9, 3, 2, bias=False, bench=False),
    _case("odd_last", 2, 6, 5, 7, 3, 3, stride=2, channels_last=True, bench=False),
    _case("rank_1", 1, 4, 8, 5, 1, 1, bench=False),
    _case("rank_0", 2, 4, 8, 5, 3, 0, bench=False),
    _case("no_samples", 0, 4, 8, 5, 3, 2, bench=False),
)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> Cost:
    """The least of the forms: arithmetic of the cheapest, each tensor moved once."""
    m, k, n, r = _sizes(x, weight, a, _pair("stride", stride, 1), _pair("padding", padding, 0))
    moved = x.numel() + m * n + n * k + a.numel() + b.numel()
    return Cost(2 * m * n * k + 2 * r * min(m * (k + n), n * k), moved * x.element_size(), 2)


def backward_cost(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    **others: Any,
) -> Cost:
    """See _lora.backward_cost."""
    m, k, n, r = _sizes(x, weight, a, _pair("stride", stride, 1), _pair("padding", padding, 0))
    return _lora.backward_cost(m, k, n, r, x.numel(), a.numel() + b.numel(), x.element_size())


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    stride: list[int],
    padding: list[int],
    keep: bool = False,
) -> Tensor:
    """The definition, as written."""
    factor = scale if scale_tensor is None else scale * scale_tensor
    base = F.conv2d(x, weight, bias, stride, padding)
    if not a.shape[0]:  # torch's convolution wants a channel; the sums of nothing carry gradients of nothing
        return base + a.sum() + b.sum()
    return base + F.conv2d(F.conv2d(x, a, None, stride, padding), b) * factor


def _pair(name: str, value: int | tuple[int, int], low: int) -> list[int]:
    pair = [value, value] if is_integer(value) else value
    if not isinstance(pair, (tuple, list)) or not all(is_integer(number) for number in pair):
        raise TypeError(f"{name}: got {value!r}, expected one or two integers")
    _check_pair(name, pair, low)
    return list(pair)


def _check_pair(name: str, pair: tuple[int, ...] | list[int], low: int) -> None:
    if len(pair) != 2 or min(pair) < low or max(pair) > LARGEST:
        raise ValueError(f"lora_conv2d: {name} is {list(pair)}, expected one or two integers, {low} to {LARGEST}")


def _out_shape(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> list[int]:
    spatial = [(x.shape[2 + i] + 2 * padding[i] - weight.shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return [x.shape[0], weight.shape[0], *spatial]


def _layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last where x or the weight is, as torch's convolution has it."""
    return torch.channels_last if _lora_rows.is_last(x) or _lora_rows.is_last(weight) else torch.contiguous_format


def _sizes(x: Tensor, weight: Tensor, a: Tensor, stride: list[int], padding: list[int]) -> tuple[int, int, int, int]:
    batch, out, height, width = _out_shape(x, weight, stride, padding)
    return batch * height * width, weight.shape[1] * weight.shape[2] * weight.shape[3], out, a.shape[0]


# ---- the forms in ATen convolutions; bs = scale b ---------------------------------------------------------------


def forward_form(
    form: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bs: Tensor,
    s: Tensor | None,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """y by one form; s = conv(x, a), which fold does without."""
    if form == "fold" or s is None:
        return F.conv2d(x, _lora.fold(weight, a, bs, 1.0), bias, stride, padding)
    update = F.conv2d(s, bs)
    if form == "split" and x.device.type == "cpu" and torch.backends.mkldnn.is_available() and x.numel():
        if x.dtype in (torch.float32, torch.bfloat16):  # oneDNN adds the update before it stores: one rounding
            bias = None if bias is None else bias.contiguous()  # whose strides it does not read
            return torch.ops.mkldnn._convolution_pointwise.binary(
                x, update, weight, bias, padding, stride, [1, 1], 1, "add", None, None, [], None
            )
    return F.conv2d(x, weight, bias, stride, padding).add_(update)


def _grads(
    dy: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [need_x, need_weight, False]
    )[:2]


def narrow_grad(dy: Tensor, a: Tensor, bs: Tensor) -> Tensor:
    """dS = conv1x1^T(dY, bs), with dY's memory format."""
    return F.conv2d(dy, bs.transpose(0, 1))


def input_grad_form(
    form: str,
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    bs: Tensor,
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """dX by one form; ds = conv1x1^T(dY, bs), which fold does without."""
    if form == "fold" or ds is None:
        return _grads(dy, x, _lora.fold(weight, a, bs, 1.0), stride, padding, True, False)[0]
    dx = _grads(dy, x, weight, stride, padding, True, False)[0]
    return dx.add_(_grads(ds, x, a, stride, padding, True, False)[0])


def adapter_grad_form(
    form: str, dy: Tensor, ds: Tensor | None, x: Tensor, s: Tensor | None, weight: Tensor, a: Tensor, bs: Tensor,
    stride: list[int], padding: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dA, dB / scale) by one form; s = conv(x, a) where forward kept it."""
    if form == "full" or ds is None:
        g = _grads(dy, x, weight, stride, padding, False, True)[1].flatten(1)
        return bs.flatten(1).t().mm(g).view(a.shape), g.mm(a.flatten(1).t()).view(bs.shape)
    s = F.conv2d(x, a, None, stride, padding) if s is None else s
    return _grads(ds, x, a, stride, padding, False, True)[1], _grads(dy, s, bs, [1, 1], [0, 0], False, True)[1]


def _plan(x: Tensor, weight: Tensor, a: Tensor, stride: list[int], padding: list[int], *needs: bool) -> _lora.Plan:
    if not a.shape[0]:
        return _lora.Plan("fold", "fold", "full", "no adapter")
    # oneDNN's fp32 weight gradient of a 3x3 kernel with x in (B, C, H, W) order is up to four times too inexact for dB
    full = x.dtype in _lora.SIXTEEN_BIT or weight[0, 0].numel() == 1 or _lora_rows.is_last(x)
    sizes, native = _sizes(x, weight, a, stride, padding), _lora_rows.takes(x, weight, a)
    return _lora.plan("lora_conv2d", *sizes, x.dtype, _lora.kind(x.device), *needs, full=full, native=native)


def _form(x: Tensor, weight: Tensor, a: Tensor, stride: list[int], padding: list[int], keep: bool) -> str:
    if keep or not a.shape[0]:
        return _plan(x, weight, a, stride, padding).forward
    sizes, native = _sizes(x, weight, a, stride, padding), _lora_rows.takes(x, weight, a, backward=False)
    return _lora.forward_form("lora_conv2d", *sizes, x.dtype, _lora.kind(x.device), False, native)


def _forms(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    stride: list[int], padding: list[int], keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scale, scale_tensor = _lora.on_host(scale, scale_tensor)
    form = _form(x, weight, a, stride, padding, keep)
    if form in _lora.NATIVE:
        y, narrow = _lora_rows.forward(x, weight, bias, a, b, scale, stride, padding, keep, form == "rows_fold")
        return y, narrow.view(y.shape[0], *y.shape[2:], a.shape[0]).permute(0, 3, 1, 2) if keep else narrow
    a, b = _lora.alike(x, a, b)
    s = F.conv2d(x, a, None, stride, padding) if keep or form != "fold" else None
    y = forward_form(form, x, weight, bias, a, _lora.scaled(b, scale, scale_tensor), s, stride, padding)
    layout = _layout(x, weight)
    kept = s.contiguous(memory_format=layout) if keep and s is not None else x.new_empty(0)
    return y.contiguous(memory_format=layout), kept


def _forms_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    stride: list[int],
    padding: list[int],
    need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, scale_tensor = _lora.on_host(scale, scale_tensor)
    chosen, kept = _plan(x, weight, a, stride, padding, need_x, need_adapter), s.dim() == 4
    if chosen.input_grad == "rows":
        rows = s.permute(0, 2, 3, 1).reshape(-1, a.shape[0]) if kept else s
        return _lora_rows.backward(dy, x, rows, weight, a, b, scale, stride, padding, need_x, need_adapter)
    kinds = a.dtype, b.dtype
    a, b = _lora.alike(x, a, b)
    bs = _lora.scaled(b, scale, scale_tensor)
    ds = None
    if _lora.needs_ds(chosen.input_grad, chosen.adapter_grad, need_x, need_adapter):
        ds = narrow_grad(dy, a, bs)
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if need_x:
        dx = input_grad_form(chosen.input_grad, dy, ds, x, weight, a, bs, stride, padding)
        dx = dx.contiguous(memory_format=_layout(x, weight))
    if need_adapter:
        kept_s = s if kept else None
        da, db = adapter_grad_form(chosen.adapter_grad, dy, ds, x, kept_s, weight, a, bs, stride, padding)
        da, db = da.contiguous(), _lora.scaled(db, scale, scale_tensor).contiguous()
    return dx, da.to(kinds[0]), db.to(kinds[1])


# ---- registration -----------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    scale_tensor: Tensor | None,
    stride: list[int],
    padding: list[int],
    keep: bool,
) -> None:
    _lora.check("lora_conv2d", x, weight, bias, a, b, scale_tensor)
    if weight.dim() != 4:
        raise ValueError(f"lora_conv2d: weight has shape {tuple(weight.shape)}, expected (out, in, kh, kw)")
    n, k, height, width = weight.shape
    if x.dim() != 4 or x.shape[1] != k:
        raise ValueError(f"lora_conv2d: x has shape {tuple(x.shape)}, expected (batch, {k}, height, width)")
    if a.dim() != 4 or tuple(a.shape[1:]) != (k, height, width):
        raise ValueError(f"lora_conv2d: a has shape {tuple(a.shape)}, expected (r, {k}, {height}, {width})")
    if tuple(b.shape) != (n, a.shape[0], 1, 1):
        raise ValueError(f"lora_conv2d: b has shape {tuple(b.shape)}, expected ({n}, {a.shape[0]}, 1, 1)")
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    if min(_out_shape(x, weight, stride, padding)[2:]) < 1:
        reach = [size - 2 * pad for size, pad in zip(weight.shape[2:], padding, strict=True)]
        raise ValueError(f"lora_conv2d: x has shape {tuple(x.shape)}, expected images of at least {tuple(reach)}")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    stride: list[int], padding: list[int], keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, out, height, width = _out_shape(x, weight, stride, padding)
    layout = _layout(x, weight)
    y = x.new_empty(batch, out, height, width).contiguous(memory_format=layout)
    s = x.new_empty(batch, a.shape[0], height, width).contiguous(memory_format=layout) if keep else x.new_empty(0)
    return y, s


def _fake_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_x, need_adapter = rest[-2:]
    return (
        x.new_empty(x.shape).contiguous(memory_format=_layout(x, weight)) if need_x else x.new_empty(0),
        a.new_empty(a.shape if need_adapter else 0),
        b.new_empty(b.shape if need_adapter else 0),
    )


def _public_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor,
    stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] = 0,
) -> _lora.Plan:  # fmt: skip
    pairs = _pair("stride", stride, 1), _pair("padding", padding, 0)
    keep = _lora.wants_adapter_grad(a, b) and _keep(x, weight, a, *pairs)
    return _plan(x, weight, a, *pairs)._replace(forward=_form(x, weight, a, *pairs, keep))


BACKWARD = Op(
    "lora_conv2d_backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, float scale, Tensor? scale_tensor, "
    "SymInt[] stride, SymInt[] padding, bool need_x, bool need_adapter) -> (Tensor, Tensor, Tensor)",
    reference=_forms_backward,
    fake=_fake_backward,
)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor,
    stride: int | tuple[int, int], padding: int | tuple[int, int],
) -> tuple[Any, ...]:  # fmt: skip
    x, weight, bias, a, b, factor, scale_tensor = _lora.arguments(x, weight, bias, a, b, scale)
    pairs = _pair("stride", stride, 1), _pair("padding", padding, 0)
    keep = _lora.wants_adapter_grad(a, b) and _keep(x, weight, a, *pairs)
    return x, weight, bias, a, b, factor, scale_tensor, *pairs, keep


def _keep(x: Tensor, weight: Tensor, a: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether forward hands S = conv(x, a) on to backward: where dA and dB will be taken from it."""
    if x.dim() != 4 or weight.dim() != 4 or a.dim() != 4 or 0 in weight.shape:
        return False  # the check has a word for it
    return _plan(x, weight, a, stride, padding, x.requires_grad, True).adapter_grad != "full"


OP = Op(
    "lora_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, Tensor? scale_tensor, SymInt[] stride, "
    "SymInt[] padding, bool keep) -> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    check=_check,
    fallback=_forms,
    differentiable=("x", "a", "b"),
    backward=_lora.backward_by(BACKWARD),
    setup_context=_lora.setup_context,
    result=lambda output: output[0],
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    plan=_public_plan,
    autocast=("x", "weight", "bias"),
    native=lambda **inputs: _public_plan(**inputs).forward in _lora.NATIVE,
)

for _op in (OP, BACKWARD):
    _lora.skip_dispatcher(_op)


@OP.public
def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """y = conv(x, W) + bias + scale conv1x1(conv(x, a), b), a 2-D convolution with an unmerged adapter.

    x (batch, in, height, width), weight (out, in, kh, kw), bias (out,) or None, a (r, in, kh, kw), b (out, r, 1, 1),
    all of one floating-point dtype and device; scale a float or a 0-d tensor; stride and padding as in
    torch.nn.functional.conv2d, without dilation or groups. Returns (batch, out, height', width'), channels_last if x or
    weight is.
    Differentiable in x, a and b; weight and bias are frozen and get no gradient. An adapter of another dtype than x is
    cast to x's, and its gradients come back in its own; torch.autocast is honoured.
    Raises TypeError for a dtype or what is no number, and ValueError for a shape, a device or a number that does not
    fit, naming the argument.
    """
    return OP(*_arguments(x, weight, bias, a, b, scale, stride, padding))

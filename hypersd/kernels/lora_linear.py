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

from hypersd.kernels import _lora, _lora_rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._rows import on_device
from hypersd.kernels._tune import Config, Program, interpreted, jit, lookup, tl, triton

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


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool = False,
) -> Tensor:  # fmt: skip
    """The definition, as written."""
    factor = scale if scale_tensor is None else scale * scale_tensor
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b) * factor


# ---- the forms in ATen products; alpha is the scale -------------------------------------------------------------


def forward_form(
    form: str, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: float, s: Tensor | None
) -> Tensor:
    """y by one form; x is (M, K), s = x a^T (fold does without)."""
    if form == "fold" or s is None:
        return F.linear(x, _lora.fold(weight, a, b, alpha), bias)
    if form == "accumulate":
        return F.linear(x, weight, bias).addmm_(s, b.t(), alpha=alpha)
    if bias is not None and x.dtype not in _lora.SIXTEEN_BIT:
        return torch.addmm(bias, s, b.t(), alpha=alpha).addmm_(x, weight.t())
    update = _lora.product(s, b.t(), alpha)  # without the bias, whose rounding would swallow a small update
    if bias is None:
        return update.addmm_(x, weight.t())
    if update.numel() >= FUSED and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise.binary(x, update, weight, bias, "add")  # the three, rounded once
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
    """(dA, dB) by one form; dy is (M, N), x is (M, K), s = x a^T where forward kept it."""
    if form == "full" or ds is None:
        g = dy.t().mm(x)
        return _lora.product(b.t(), g, alpha), _lora.product(g, a.t(), alpha)
    return ds.t().mm(x), _lora.product(dy.t(), x.mm(a.t()) if s is None else s, alpha)


def _forms(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if _lora_rows.takes(x, weight, a):
        return _lora_rows.forward(x, weight, bias, a, b, scale, scale_tensor, (1, 1), (0, 0), keep)
    n, k = weight.shape
    rows = x.reshape(-1, k)
    form = _lora.forward_form("lora_linear", rows.shape[0], k, n, a.shape[0], x.dtype, x.device.type, keep)
    s = rows.mm(a.t()) if keep or form != "fold" else None
    if scale_tensor is not None:
        b, scale = _lora.scaled(b, scale, scale_tensor), 1.0
    y = forward_form(form, rows, weight, bias, a, b, scale, s).view(*x.shape[:-1], n)
    return y, s if keep and s is not None else x.new_empty(0)


def _forms_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if _lora_rows.takes(x, weight, a):
        rest = scale, scale_tensor, (1, 1), (0, 0), need_x, need_adapter
        return _lora_rows.backward(dy, x, s, weight, a, b, *rest)
    n, k = weight.shape
    rows, dy = x.reshape(-1, k), dy.reshape(-1, n)
    chosen = _lora.plan("lora_linear", rows.shape[0], k, n, a.shape[0], x.dtype, x.device.type, need_x, need_adapter)
    alpha = scale
    if scale_tensor is not None:
        b, alpha = _lora.scaled(b, scale, scale_tensor), 1.0
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
    return dx, da, db


# ---- Triton: the rank-wide products, and one GEMM whose fp32 accumulator starts from scale S u ------------------


@jit
def _tile(pointer, rows, columns, row_count, column_count, WIDEN: tl.constexpr):
    """A masked tile of a contiguous matrix, zeros outside; int64 row offsets."""
    offsets = rows[:, None].to(tl.int64) * column_count + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    tile = tl.load(pointer + offsets, mask=inside, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile  # the interpreter multiplies bfloat16 bit patterns


@jit
def _add_product(
    total, x, w, rows, columns, stop, m, n, k, NT: tl.constexpr, BLOCK_K: tl.constexpr, WIDEN: tl.constexpr
):
    """total + x (m, k) w at these rows and columns, over the first `stop` of k; w is (n, k) if NT, else (k, n)."""
    for start in range(0, stop, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        left = _tile(x, rows, inner, m, k, WIDEN)
        if NT:
            right = tl.trans(_tile(w, columns, inner, n, k, WIDEN))
        else:
            right = _tile(w, inner, columns, k, n, WIDEN)
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@jit
def _add_outer(total, u, v, ranks, columns, first, last, r, c, BLOCK_M: tl.constexpr, WIDEN: tl.constexpr):
    """total + u^T v over rows `first` to `last` of u (., r) and v (., c)."""
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        left = tl.trans(_tile(u, rows, ranks, last, r, WIDEN))
        total = tl.dot(left, _tile(v, rows, columns, last, c, WIDEN), total, input_precision="ieee")
    return total


@jit
def _put(pointer, total, rows, columns, m, n):
    """Store a tile of a contiguous (m, n) matrix."""
    offsets = rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(pointer + offsets, total.to(pointer.dtype.element_ty), mask=(rows[:, None] < m) & (columns[None, :] < n))


@jit
def _shrink_kernel(
    x, w, out, m, k, r, NT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """out (m, r) = x (m, k) w; w is (r, k) if NT, else (k, r)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = _add_product(total, x, w, rows, ranks, k, m, r, k, NT, BLOCK_K, WIDEN)
    _put(out, total, rows, ranks, m, r)


@jit
def _expand_kernel(
    s, u, x, w, bias, scale_tensor, y, scale, m, n, k, r, NT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y (m, n) = scale s (m, r) u + x (m, k) w + bias; u, w are (n, r), (n, k) if NT, else (r, n), (k, n)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _add_product(total, s, u, rows, columns, r, m, n, r, NT, BLOCK_R, WIDEN)
    factor = scale  # a float32 already; under the interpreter a Python float
    if HAS_SCALE:
        factor *= tl.load(scale_tensor).to(tl.float32)
    total *= factor
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    total = _add_product(total, x, w, rows, columns, k, m, n, k, NT, BLOCK_K, WIDEN)
    _put(y, total, rows, columns, m, n)


@jit
def _outer_kernel(
    u, v, out, m, r, c, chunk, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """out (chunks, r, c) fp32: u^T v over each chunk of rows; the caller adds the chunks in a fixed order."""
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, m)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = _add_outer(total, u, v, ranks, columns, first, last, r, c, BLOCK_M, WIDEN)
    _put(out + tl.program_id(2).to(tl.int64) * r * c, total, ranks, columns, r, c)


def _config(m: int, n: int, k: int, r: int, dtype: torch.dtype, arch: str = "sm90") -> Config:
    def analytic() -> Config:
        if dtype not in _lora.SIXTEEN_BIT:
            return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_R": 16}, 4, 2)
        wide = triton.cdiv(m, 128) * triton.cdiv(n, 128) >= 132  # tiles enough for one wave of a large GPU
        return Config({"BLOCK_M": 128, "BLOCK_N": 128 if wide else 64, "BLOCK_K": 64, "BLOCK_R": 64}, 8, 3)

    return lookup("lora_linear", arch, dtype, {"M": m, "N": n, "K": k, "R": r}, analytic)


def _widen(dtype: torch.dtype) -> bool:
    return interpreted() and dtype in _lora.SIXTEEN_BIT


def _shrink(x: Tensor, w: Tensor, nt: bool) -> Tensor:
    (m, k), r = x.shape, w.shape[0] if nt else w.shape[1]
    out = x.new_empty(m, r)
    config = _config(m, r, k, r, x.dtype)
    block_m, block_r = 64, min(64, max(16, triton.next_power_of_2(r)))
    if out.numel():
        grid = (triton.cdiv(m, block_m), triton.cdiv(r, block_r))
        _shrink_kernel[grid](
            x, w, out, m, k, r, nt, block_m, block_r, config.blocks["BLOCK_K"], _widen(x.dtype),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _expand(
    s: Tensor, u: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, scale: float, scale_tensor: Tensor | None, nt: bool
) -> Tensor:
    (m, k), r, n = x.shape, s.shape[1], w.shape[0] if nt else w.shape[1]
    y = x.new_empty(m, n)
    config = _config(m, n, k, r, x.dtype)
    if y.numel():
        grid = (triton.cdiv(m, config.blocks["BLOCK_M"]), triton.cdiv(n, config.blocks["BLOCK_N"]))
        _expand_kernel[grid](
            s, u, x, w, bias, scale_tensor, y, scale, m, n, k, r, nt, bias is not None, scale_tensor is not None,
            **config.blocks, WIDEN=_widen(x.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return y


def _outer(u: Tensor, v: Tensor) -> Tensor:
    (m, r), c = u.shape, v.shape[1]
    block_r, block_c = min(64, max(16, triton.next_power_of_2(r))), 64
    tiles = triton.cdiv(r, block_r) * triton.cdiv(c, block_c)
    chunks = max(1, min(triton.cdiv(m, 256), 264 // tiles))
    chunk = triton.cdiv(triton.cdiv(max(m, 1), chunks), 64) * 64
    chunks = triton.cdiv(max(m, 1), chunk)
    out = u.new_empty(chunks, r, c, dtype=torch.float32)
    grid = (triton.cdiv(r, block_r), triton.cdiv(c, block_c), chunks)
    _outer_kernel[grid](u, v, out, m, r, c, chunk, block_r, block_c, 64, _widen(u.dtype), num_warps=4, num_stages=3)
    return out.sum(0)


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return _forms(x, weight, bias, a, b, scale, scale_tensor, keep)
    n, k = weight.shape
    rows, weight, a, b = x.reshape(-1, k).contiguous(), weight.contiguous(), a.contiguous(), b.contiguous()
    with on_device(x):
        s = _shrink(rows, a, True)
        y = _expand(s, b, rows, weight, bias, scale, scale_tensor, True)
    return y.view(*x.shape[:-1], n), s if keep else x.new_empty(0)


def _triton_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, scale_tensor: Tensor | None,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return _forms_backward(dy, x, s, weight, a, b, scale, scale_tensor, need_x, need_adapter)
    n, k = weight.shape
    rows, dy = x.reshape(-1, k).contiguous(), dy.reshape(-1, n).contiguous()
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    with on_device(x):
        ds = _shrink(dy, b, False)
        if need_x:
            dx = _expand(ds, a, dy, weight, None, scale, scale_tensor, False).view(x.shape)
        if need_adapter:
            factor = scale if scale_tensor is None else scale * scale_tensor
            da = (_outer(ds, rows) * factor).to(a.dtype)
            db = (_outer(s if s.dim() == 2 else _shrink(rows, a, True), dy) * factor).to(b.dtype).t().contiguous()
    return dx, da, db


def programs() -> list[Program]:
    """The variants that ship, for the offline gate."""
    dtype, pointer = torch.bfloat16, "*bf16"
    small, sizes = Config({}, 4, 3), ("m", "k", "n", "r", "c", "chunk")

    def program(name: str, kernel: Any, types: dict, constants: dict, config: Config, registers: int) -> Program:
        types |= {size: "i32" for size in kernel.arg_names if size in sizes}
        divisible = tuple(n for n in types if n not in ("m", "scale", "scale_tensor"))
        ordered = {name: types[name] for name in kernel.arg_names if name in types}
        constants = constants | {"WIDEN": False}
        return Program(name, kernel, ordered, constants, config, divisible, dot=True, max_registers=registers)

    made = []
    for nt in (True, False):
        types = dict.fromkeys(("x", "w", "out"), pointer)
        blocks = {"NT": nt, "BLOCK_M": 64, "BLOCK_R": 64, "BLOCK_K": 64}
        made.append(program(f"shrink_{'nt' if nt else 'nn'}", _shrink_kernel, types, blocks, small, 128))
        for m in (8192, 1024):
            config = _config(m, 2560, 640, 64, dtype) if m == 8192 else _config(m, 640, 640, 64, dtype)
            types = dict.fromkeys(("s", "u", "x", "w", "bias", "y"), pointer) | {
                "scale_tensor": "*fp32",
                "scale": "fp32",
            }
            flags = {"NT": nt, "HAS_BIAS": nt, "HAS_SCALE": True, **config.blocks}
            name = f"expand_{'nt' if nt else 'nn'}_{config.blocks['BLOCK_N']}"
            made.append(program(name, _expand_kernel, types, flags, config, 168))
    types = {"u": pointer, "v": pointer, "out": "*fp32"}
    made.append(program("outer", _outer_kernel, types, {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_M": 64}, small, 128))
    return made


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


def _plan(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor) -> _lora.Plan:
    m = x.shape[:-1].numel()
    return _lora.plan("lora_linear", m, *reversed(weight.shape), a.shape[0], x.dtype, x.device.type)


def _triton_config(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: object) -> Config:
    n, k = weight.shape
    return _config(x.shape[:-1].numel(), n, k, a.shape[0], x.dtype)


BACKWARD = Op(
    "lora_linear_backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, float scale, Tensor? scale_tensor, "
    "bool need_x, bool need_adapter) -> (Tensor, Tensor, Tensor)",
    reference=_forms_backward,
    fake=_fake_backward,
    triton=_triton_backward,
)

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
    cases=CASES,
    cost=cost,
    config=_triton_config,
    plan=_plan,
    native=_lora_rows.native,
    programs=programs,
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
    Raises TypeError for a dtype and ValueError for a shape or a device that does not fit, naming the argument.
    """
    x, weight, bias, a, b, factor, scale_tensor = _lora.arguments(x, weight, bias, a, b, scale)
    keep = _lora.wants_adapter_grad(a, b) and _keep(x, weight, a)
    return OP(x, weight, bias, a, b, factor, scale_tensor, keep)


def _keep(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether forward hands S = x a^T on to backward: where dA and dB will be taken from it."""
    if weight.dim() != 2 or not x.dim() or not a.dim():
        return False  # the check has a word for it
    if _lora_rows.takes(x, weight, a):
        return True
    m, need_x = x.shape[:-1].numel(), x.requires_grad
    chosen = _lora.plan("lora_linear", m, *reversed(weight.shape), a.shape[0], x.dtype, x.device.type, need_x, True)
    return chosen.adapter_grad == "thin"

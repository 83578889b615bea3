"""What lora_linear and lora_conv2d share: their arguments, the folded weight, and which form runs.

Both are y = W x + bias + scale b (a x). With M output positions, K inputs to each, N outputs and rank r:
 split        the rank-wide product first; its expansion starts the sum (or joins it before the one rounding)
 accumulate   the base product first, then the update onto it
 fold         W' = W + scale b a in scratch, then one product: N K r work a call, where the others pay M r (K + N)
 rows         the C++ product of _lora_rows.py, where the CPU has it: split in one pass; also all of backward
 rows_fold    the same product, W' made as the weight is packed for it; y alone
 thin, full   dA and dB through dS and S, both M x r, or through G = dY^T X, the gradient that W would have had
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hypersd.kernels import _lora_rows, _native, _op
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Op
from hypersd.kernels._rows import DTYPES, autocast, check_real
from hypersd.kernels._tune import CONFIGS

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
NATIVE = ("rows", "rows_fold")
MAX_DISTANCE = 2.0  # powers of two, summed over M, K, N, r: a measured row farther away than this is not used

# Microseconds that a pass over several products of ATen takes beside them, and a call of rows does not: Python,
# dispatch, tensors in between. Measured on a 32x256x128 layer; the tables have the products alone.
COMPOSING = 12.0
# float32 in three parts on the tile unit, of which shared cores at times have half, is taken where it wins by a fifth.
IN_PARTS, SHARED = 64, 1.2  # from so many rows on (csrc/cpu/lora.cpp); times what was measured

# Rough rates for shapes that no row is near: FLOP/s, bytes/s, seconds per product.
_RATES = {"cpu": (1.3e11, 2.0e10, 5e-6), "cuda": (5.0e13, 2.5e12, 5e-6)}


class Plan(NamedTuple):
    """The form of y, of dX and of (dA, dB), and where the choice comes from."""

    forward: str
    input_grad: str
    adapter_grad: str
    provenance: str

    def __str__(self) -> str:
        return f"y by {self.forward}, dX by {self.input_grad}, dA and dB by {self.adapter_grad} [{self.provenance}]"


def analytic(m: int, k: int, n: int, r: int, device: str, itemsize: int) -> dict[str, float]:
    """Microseconds of each part from arithmetic, traffic and the number of products."""
    flops, bandwidth, launch = _RATES.get(device.split("_")[0], _RATES["cuda"])

    def product(p: int, q: int, inner: int, accumulate: bool = False) -> float:
        moved = p * inner + inner * q + p * q * (2 if accumulate else 1)
        return 1e6 * (2 * p * q * inner / flops + moved * itemsize / bandwidth + launch)

    fold = product(n, k, r, True)
    return {
        "split": product(m, r, k) + product(m, n, r) + product(m, n, k, True),
        "accumulate": product(m, r, k) + product(m, n, k) + product(m, n, r, True),
        "fold": fold + product(m, n, k),
        "dx_split": product(m, k, r) + product(m, k, n, True),
        "dx_accumulate": product(m, k, n) + product(m, k, r, True),
        "dx_fold": fold + product(m, k, n),
        "ds": product(m, r, n),
        "shrink": product(m, r, k),
        "thin": product(r, k, m) + product(n, r, m),
        "full": product(n, k, m) + product(r, k, n) + product(n, r, k),
        "rows": product(m, r, k) + product(m, n, k + r),
        "rows_fold": product(n, k, r) + product(m, n, k),
        "rows_dx": product(m, r, n) + product(m, k, n + r),
        "rows_grad": product(m, r, n) + product(r, k, m) + product(n, r, m),
        "rows_both": product(m, r, n) + product(m, k, n + r) + product(r, k, m) + product(n, r, m),
    }


def backward_cost(m: int, k: int, n: int, r: int, x: int, ab: int, itemsize: int, adapters: int = 1) -> Cost:
    """Of dX, dA and dB, the base frozen: arithmetic of the cheapest forms; dY, x (of `x` elements), S, W and the
    adapters (`ab` elements) read once, dX, dA and dB written once."""
    split, fold = 2 * m * r * (k + n), 2 * adapters * n * k * r
    thin, full = 2 * m * r * (k + n), 2 * m * n * k + 2 * fold
    least = min(split + thin, fold + 2 * m * n * r + thin, fold + full)  # where dX is split it shares dS with thin
    return Cost(2 * m * n * k + least, (m * n + 2 * x + m * r + n * k + 2 * ab) * itemsize, 3)


def kind(device: torch.device) -> str:
    """The kind of device whose measured times choose there: cuda, cpu, cpu_amx."""
    return _native.cpu_kind() if device.type == "cpu" else device.type


@cache
def _table(op: str, device: str) -> tuple[str, tuple[dict, ...]]:
    path = CONFIGS / device / f"{op}.json"
    if not path.is_file():
        return "", ()
    table = json.loads(path.read_text())
    return table["provenance"], tuple(table["rows"])


@cache
def _microseconds(
    op: str, m: int, k: int, n: int, r: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, float], str]:
    """Time of each part, by the nearest measured row of this op, kind of device and dtype, else by arithmetic."""
    name, sizes = str(dtype).removeprefix("torch."), {"M": m, "K": k, "N": n, "R": r}

    def away(row: dict) -> float:
        return sum(abs(math.log2(max(sizes[key], 1) / row["sizes"][key])) for key in sizes)

    source, rows = _table(op, device)
    nearest = min((row for row in rows if row["dtype"] == name), key=away, default=None)
    if nearest is None or away(nearest) > MAX_DISTANCE:
        return analytic(m, k, n, r, device, dtype.itemsize), "analytic"
    us = nearest["us"]
    if device == "cpu_amx" and dtype == torch.float32 and m >= IN_PARTS:
        us = {part: time * (SHARED if part.startswith("rows") else 1.0) for part, time in us.items()}
    return us, f"{source}, row " + "x".join(str(v) for v in nearest["sizes"].values())


@cache
def forward_form(
    op: str, m: int, k: int, n: int, r: int, dtype: torch.dtype, device: str, keep: bool, native: bool = False
) -> str:
    """The cheapest allowed form of y; with `keep`, S = a x must come with it. `native`: rows can compute this layer.

    In 16 bit neither fold nor accumulate: W + scale b a rounded to 16 bits loses an update below half a unit of W, and
    so does y when it is rounded before the update is added.
    """
    us, _ = _microseconds(op, m, k, n, r, dtype, device)
    if dtype in SIXTEEN_BIT:
        return "rows" if native and us.get("rows", 0.0) <= us["split"] + COMPOSING else "split"
    forms = ["split", "accumulate", "fold"]
    if native:
        forms += ["rows"] if keep else ["rows", "rows_fold"]
    if "rows" in us and "rows_fold" not in us:  # the same kernel at the same rate, other arithmetic
        us = us | {"rows_fold": us["rows"] * (m * k * n + n * k * r) / max(m * k * n + m * r * (k + n), 1)}
    return min(forms, key=lambda form: _forward_us(us, form, keep) + (0.0 if form in NATIVE else COMPOSING))


def _forward_us(us: dict[str, float], form: str, keep: bool) -> float:
    """A row that was measured where rows could not run says nothing of it."""
    return us.get(form, math.inf) + (us["shrink"] if keep and form == "fold" else 0.0)


@cache
def plan(
    op: str,
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    device: str,
    need_x: bool = True,
    need_adapter: bool = True,
    *,
    full: bool = True,
    native: bool = False,
) -> Plan:
    """The cheapest allowed forms of a training step. Without `full` that form is not taken, rows only with `native`.

    dX may fold in 16 bit: it is rounded to 16 bits anyway, and the error stays the plain expression's. There rows is
    taken unless it was measured to be slower: it takes float32 adapters as they are, the others take them rounded.
    """
    us, provenance = _microseconds(op, m, k, n, r, dtype, device)
    if native:  # one choice whatever gradients are asked for: forward cannot know, and S must be of one making
        best = plan(op, m, k, n, r, dtype, device, full=full)
        unknown = 0.0 if dtype in SIXTEEN_BIT else math.inf
        if us.get("rows", unknown) + us.get("rows_both", unknown) < _step_us(us, best) + 2 * COMPOSING:
            return Plan("rows", "rows", "rows", provenance)
    # float16 has no range to spare for G, a sum over all positions that dA and dB need not hold.
    gradients = ("thin", "full") if full and dtype != torch.float16 else ("thin",)
    plans = []
    for dx in ("split", "accumulate", "fold") if need_x else ("split",):
        for adapter in gradients if need_adapter else ("thin",):
            form = forward_form(op, m, k, n, r, dtype, device, need_adapter and adapter == "thin")
            plans.append(Plan(form, dx, adapter, provenance))
    return min(plans, key=lambda chosen: _step_us(us, chosen, need_x, need_adapter))


def _step_us(us: dict[str, float], chosen: Plan, need_x: bool = True, need_adapter: bool = True) -> float:
    """Microseconds of forward and backward by ATen's products."""
    form, dx, adapter, _ = chosen
    total = _forward_us(us, form, need_adapter and adapter == "thin")
    total += (us[f"dx_{dx}"] if need_x else 0) + (us[adapter] if need_adapter else 0)
    return total + (us["ds"] if needs_ds(dx, adapter, need_x, need_adapter) else 0)


def needs_ds(input_grad: str, adapter_grad: str, need_x: bool, need_adapter: bool) -> bool:
    """Whether these forms use dS = dY b."""
    return (need_adapter and adapter_grad == "thin") or (need_x and input_grad != "fold")


def product(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """alpha p q, without a pass for alpha."""
    return p.mm(q) if alpha == 1.0 else torch.addmm(p.new_empty(1), p, q, beta=0, alpha=alpha)


def alike(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The adapter in x's dtype, which ATen's products ask for."""
    return (a, b) if a.dtype == b.dtype == x.dtype else (a.to(x.dtype), b.to(x.dtype))


def scaled(b: Tensor, scale: float, scale_tensor: Tensor | None) -> Tensor:
    """scale b. A scale that lives on a device stays there: nothing waits for it."""
    if scale_tensor is not None:
        return b * (scale_tensor * scale).to(b.dtype)
    return b if scale == 1.0 else b * scale


def on_host(scale: float, scale_tensor: Tensor | None) -> tuple[float, Tensor | None]:
    """The scale as a float alone where reading it waits for nothing."""
    if scale_tensor is None or scale_tensor.device.type != "cpu":
        return scale, scale_tensor
    return scale * check_real("scale", scale_tensor.item()), None


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves x, S where kept, W and the adapter; `ctx.rest` is stride and padding, or nothing."""
    x, weight, _, a, b, ctx.scale, scale_tensor, *ctx.rest, _ = inputs
    ctx.made_by = _op.asked_for()
    ctx.save_for_backward(x, output[1], weight, a, b, scale_tensor)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward_by(op: Op) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of either op through its helper: gradients of x, a and b."""

    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        none = (None,) * (len(ctx.rest) + 3)
        if dy is None:
            return (None,) * 5 + none
        x, s, weight, a, b, scale_tensor = ctx.saved_tensors
        if ctx.made_by != _op.asked_for():  # whether S carries the scale is each implementation's own
            s = s.new_empty(0)
        need_x, _, _, need_a, need_b, *_ = ctx.needs_input_grad
        dx, da, db = op.run(dy, x, s, weight, a, b, ctx.scale, scale_tensor, *ctx.rest, need_x, need_a or need_b)
        return (dx if need_x else None, None, None, da if need_a else None, db if need_b else None, *none)

    return backward


def skip_dispatcher(op: Op) -> None:
    """Let eager calls on plain CPU tensors go straight to the op's Python function: nothing else is behind the
    dispatcher there, and crossing it twice costs 10 to 20 us a call."""
    assert op.fallback is not None
    dispatched, function = op.raw, op._checked(op.fallback)  # type: ignore[arg-type]

    def raw(first: Tensor, *rest: Any) -> Any:
        plain = type(first) in _PLAIN and first.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()
        return function(first, *rest) if plain else dispatched(first, *rest)

    op.raw = raw


_PLAIN = (Tensor, torch.nn.Parameter)


def wants_adapter_grad(a: Tensor, b: Tensor) -> bool:
    """Whether dA or dB will be asked for, and the call is an eager one: under torch.compile, where sizes may be symbols
    and no form is known yet, backward computes S again."""
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad) and not torch.compiler.is_compiling()


def fold(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """W + alpha b a in W's dtype and memory format (contiguous where it has none), linear or convolution."""
    if _lora_rows.is_last(weight):
        rows = weight.permute(0, 2, 3, 1)
        folded = torch.addmm(rows.flatten(1), b.flatten(1), a.permute(0, 2, 3, 1).flatten(1), alpha=alpha)
        return folded.view(rows.shape).permute(0, 3, 1, 2)
    return torch.addmm(weight.flatten(1), b.flatten(1), a.flatten(1), alpha=alpha).view(weight.shape)


def fold_weight(
    weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """W' = W + scale b a in new memory, without gradient: a layer with this weight is the layer with its adapter.

    Linear: weight (out, in), a (r, in), b (out, r). Convolution: weight (out, in, kh, kw), a (r, in, kh, kw),
    b (out, r, 1, 1); the memory format is weight's. Summed in float32 at least and stored as `dtype` (default:
    weight's). In 16 bit an update below half a unit of W vanishes: ask for float32 there.
    """
    with torch.no_grad():
        work = torch.promote_types(weight.dtype, torch.float32)
        return fold(weight.to(work), a.to(work), b.to(work) * scale, 1.0).to(dtype or weight.dtype)


def check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale_tensor: Tensor | None
) -> None:
    """What both ops ask alike: one dtype, one device, a weight, a bias that fits, a scalar scale."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x has dtype {x.dtype}, expected a floating-point one of 16 to 64 bits")
    if weight.dim() < 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (out, in, ...)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("a", a), ("b", b)):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{op}: {name} has layout {tensor.layout}, expected torch.strided")
        if tensor.dtype != x.dtype and not (name in "ab" and mixed(x, a, b)):
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {x.dtype} as x; cast one of them")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device} as x")
    if 0 in weight.shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected at least one input and one output")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if scale_tensor is not None and scale_tensor.dim() != 0:
        raise ValueError(f"{op}: scale has shape {tuple(scale_tensor.shape)}, expected a float or a 0-d tensor")


def check_scale(name: str, scale: Tensor) -> None:
    """Raise TypeError unless the tensor holds real numbers, ValueError where it waits for a gradient: none comes."""
    if scale.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {scale.dtype}, expected a floating-point one of 16 to 64 bits")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} has requires_grad, expected a constant, as no gradient flows into it: detach it")


def mixed(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether the adapter's dtypes are ones that the C++ kernel takes beside x."""
    return all(t.dtype == x.dtype or (t.dtype == torch.float32 and x.dtype == torch.bfloat16) for t in (a, b))


def arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, float, Tensor | None]:
    """The schema's arguments: adapter in x's dtype, everything in autocast's, the scale as a float or a tensor."""
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("a", a), ("b", b)):
        if not isinstance(t, Tensor) and (name != "bias" or t is not None):
            raise TypeError(f"{name} is a {type(t).__name__}, expected a tensor")
        if name in "ab" and t is not None and t.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {t.dtype}, expected a floating-point one of 16 to 64 bits")
    x, weight, bias = autocast(x, weight, bias)
    if a.dtype != x.dtype or b.dtype != x.dtype:
        ours = _op.asked_for() in ("auto", "cpp") and not torch.compiler.is_compiling()
        # pools of adapters (3-d) are multiplied by torch, which wants one dtype
        layer = a.dim() == weight.dim() and weight.dim() in (2, 4)
        if not (ours and layer and mixed(x, a, b) and _lora_rows.takes(x, weight, a)):
            a, b = a.to(x.dtype), b.to(x.dtype)
    if isinstance(scale, Tensor):
        check_scale("scale", scale)
        if scale.device.type == "meta" and x.device.type != "meta":
            raise ValueError(f"scale is on {scale.device}, expected {x.device} as x, or the CPU")
        return x, weight, bias, a, b, 1.0, scale.to(x.device, non_blocking=True)
    return x, weight, bias, a, b, check_real("scale", scale), None

"""attention: out = softmax(scale q k^T) v over (batch, heads, tokens, dim)

 backward  P = softmax(scale q k^T);  dV = P^T dO;  dP = dO v^T;  dS = P * (dP - rowsum(P * dP));
           dQ = scale dS k;  dK = scale dS^T q
 flops     4 B H Tq Tk D forward, 10 B H Tq Tk D backward      launches  1; backward 2, or 3 where queries are split
 bytes     q, k, v read, out written; backward reads q, dO, k, v twice and writes dQ, dK, dV

On a GPU _attention.py takes keys that fit one tile, more go to torch's attention (`explain` says when and why). On a
CPU csrc/cpu/attention.cpp takes any number of keys, but many go to torch where there is a tile unit (AMX).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _attention, _native, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._rows import DTYPES, autocast, check_real, check_strided

# queries times keys up to which, without C++, plain products beat torch's kernel: in backward above all
SHORT = 256 * 80
NATIVE = _native.available()
# keys from which torch's kernel is faster on a CPU with a tile unit: it never holds a whole row of scores
LONG = 1024


def _case(name: str, b: int, h: int, tq: int, tk: int, d: int, *, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(tokens: int) -> Tensor:  # as a projection leaves it: (batch, tokens, heads, dim)
            t = torch.randn((b, tokens, h, d), generator=generator, device=device).to(dtype)
            return t.transpose(1, 2)

        return {"q": draw(tq), "k": draw(tk), "v": draw(tk)}

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("attention", _case),
    _case("odd", 2, 3, 7, 5, 13, bench=False),
    _case("odd_d40", 2, 2, 70, 77, 40, bench=False),
    _case("odd_d80", 1, 2, 33, 77, 80, bench=False),
    _case("odd_d160", 1, 1, 130, 65, 160, bench=False),
    _case("odd_d128", 1, 2, 17, 128, 128, bench=False),
    _case("many_queries", 1, 1, 700, 9, 24, bench=False),
    _case("one_key", 3, 4, 16, 1, 16, bench=False),
    _case("no_queries", 2, 3, 0, 5, 16, bench=False),
    _case("no_keys", 2, 3, 4, 0, 16, bench=False),
)


def cost(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Cost:
    """Two products; q, k, v read and out written once."""
    b, h, tq, d = q.shape
    moved = 2 * q.numel() + k.numel() + v.numel()
    return Cost(4 * b * h * tq * k.shape[2] * d, moved * q.element_size(), 1)


def backward_cost(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Cost:
    """Five products, one of them forward's again; q, k, v and dout read, dq, dk, dv written once."""
    b, h, tq, d = q.shape
    moved = 3 * q.numel() + 2 * (k.numel() + v.numel())
    return Cost(10 * b * h * tq * k.shape[2] * d, moved * q.element_size(), 2)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """The definition, as written."""
    return torch.softmax(q @ k.transpose(-1, -2) * _factor(q, scale), -1) @ v


def _factor(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# ---- products of ATen -------------------------------------------------------------------------------------------


def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) of (n, tokens, dim) matrices."""
    return torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q3, k3, v3 = (t.flatten(0, 1) for t in (q, k, v))
    return torch.empty_like(q).copy_(torch.bmm(_probabilities(q3, k3, _factor(q, scale)), v3).view(q.shape))


def _products_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    d3, q3, k3, v3 = (t.flatten(0, 1) for t in (dout, q, k, v))
    scale, unused = _factor(q, scale), q.new_empty(1)
    p = _probabilities(q3, k3, scale)
    ds = torch._softmax_backward_data(torch.bmm(d3, v3.transpose(1, 2)), p, -1, p.dtype)
    dq = torch.baddbmm(unused, ds, k3, beta=0, alpha=scale)
    dk = torch.baddbmm(unused, ds.transpose(1, 2), q3, beta=0, alpha=scale)
    dv = torch.bmm(p.transpose(1, 2), d3)
    dq, dk, dv = (
        torch.empty_like(like).copy_(t.view(like.shape)) for t, like in ((dq, q), (dk, k), (dv, k))
    )  # fmt: skip
    return dq, dk, dv


# ---- Triton: _attention.py ----------------------------------------------------------------------------------------


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if not _attention.runs(q, k):
        return _products(q, k, v, scale)
    return _attention.forward(q, k, v, _factor(q, scale))


def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not _attention.runs(q, k):
        return _products_backward(dout, q, k, v, scale)
    return _attention.backward(dout, q, k, v, _factor(q, scale))


# ---- registration -----------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention: {name} is a {type(t).__name__}, expected a tensor")
        if t.dtype not in DTYPES or t.dtype != q.dtype:
            expected = "a floating-point one of 16 to 64 bits" if name == "q" else f"{q.dtype} as q"
            raise TypeError(f"attention: {name} has dtype {t.dtype}, expected {expected}")
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, expected {q.device} as q")
        check_strided(f"attention: {name}", t)
        if t.dim() != 4:
            raise ValueError(f"attention: {name} has shape {tuple(t.shape)}, expected (batch, heads, tokens, dim)")
    b, h, _, d = q.shape
    if k.shape[0] != b or k.shape[1] != h or k.shape[3] != d or d == 0:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected ({b}, {h}, keys, {d or 'dim > 0'}) as q")
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")
    if scale is not None:
        check_real("attention: scale", scale)


def _check_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    _check(q, k, v, scale)
    if dout.shape != q.shape or dout.dtype != q.dtype:
        raise RuntimeError(f"attention: a gradient {dout.dtype} {tuple(dout.shape)} of {q.dtype} {tuple(q.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *BACKWARD.run(dout, *ctx.saved_tensors, ctx.scale), None


def _aten(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str:
    """Why ATen's products compute this where Triton is asked for; empty: the kernels do."""
    return "" if _attention.runs(q, k) else "the kernels take what fits one tile, in float32 at most"


def elsewhere(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str:
    """Why torch's scaled_dot_product_attention is the one to compute this; empty where this op is."""
    keys, kind = k.shape[2], q.device.type
    if kind == "cuda":
        if q.dtype not in _attention.SIXTEEN_BIT:
            return f"the kernels here are made for 16 bit, not {q.dtype}"
        if keys > _attention.MAX_KEYS:
            return f"more than {_attention.MAX_KEYS} keys do not fit one tile"
        if q.shape[3] > _attention.PROVEN_DIM:
            return f"head dimensions over {_attention.PROVEN_DIM} are not proven on a GPU"
        return ""
    if kind != "cpu":
        return f"no kernel here for device type {kind}"
    if NATIVE and keys >= LONG and _native.cpu_kind() == "cpu_amx":
        return f"{LONG} keys and more are torch's on a CPU with a tile unit"
    if NATIVE or q.shape[2] * keys <= SHORT:
        return ""
    return f"no C++ kernel, and more than {SHORT} queries times keys"


BACKWARD = Op(
    "attention_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor, Tensor)",
    reference=_products_backward,
    check=_check_backward,
    fake=lambda dout, q, k, v, scale: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)),
    triton=_triton_backward,
    cpp=True,
)

OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float? scale) -> Tensor",
    reference=reference,
    fallback=_products,
    fake=lambda q, k, v, scale: torch.empty_like(q),
    check=_check,
    triton=_triton,
    cpp=True,
    differentiable=("q", "k", "v"),
    backward=_backward,
    setup_context=_setup_context,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=lambda q, k, v, scale=None: _attention.config_of(q, k),
    plan=lambda **inputs: "scores, softmax, product",
    autocast=("q", "k", "v"),
    aten=_aten,
    elsewhere=elsewhere,
    programs=_attention.programs,
)


@OP.public
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v, without mask or dropout (Vaswani et al., arXiv:1706.03762, eq. 1).

    Args:
        q: (batch, heads, queries, dim), any strides; the transposed view of a (batch, queries, heads, dim) projection
            is read as it lies, and the result has the same memory order.
        k, v: (batch, heads, keys, dim), dtype and device of q.
        scale: factor of the scores, dim ** -0.5 unless given.

    Returns:
        The shape and dtype of q; differentiable once (twice where torch's attention is) in q, k and v. Zeros where
        there are no keys. Inside torch.autocast everything is cast as for torch's attention.

    Few keys run here, many in torch.nn.functional.scaled_dot_product_attention: `explain` says which and why. Raises
    TypeError for a dtype or what is no number, ValueError for a shape or a device that does not fit, naming the
    argument.
    """
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.dim() != 4 or k.dim() != 4:
        _check(q, k, v, scale)
    q, k, v = autocast(q, k, v)
    if OP.is_elsewhere(q, k, v):
        _check(q, k, v, scale)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return OP(q, k, v, scale)

"""attention: out = softmax(scale q k^T) v over (batch, heads, tokens, dim)

 backward  P = softmax(scale q k^T);  dV = P^T dO;  dP = dO v^T;  dS = P * (dP - rowsum(P * dP));
           dQ = scale dS k;  dK = scale dS^T q
 flops     4 B H Tq Tk D forward, 10 B H Tq Tk D backward      launches  1; backward 2, or 3 where queries are split
 bytes     q, k, v read, out written; backward reads q, dO, k, v twice and writes dQ, dK, dV

On a GPU made for keys that fit one tile: a text prompt of 77 tokens, a small image. Every program holds all keys and
values of its head, so a row of scores is whole in registers: no online softmax, and backward needs neither out nor the
row log-sum-exp of forward (P and rowsum(P dP) come from the same tile). dK and dV are sums over queries: each program
sums its share in order, a last kernel adds the shares in order. More keys than a tile go to torch's attention
(`explain` says when and why). On a CPU csrc/cpu/attention.cpp takes any number of keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _native, _rows
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, interpreted, jit, lookup, tl, triton

MAX_KEYS = 128  # of the Triton kernels: one tile
MAX_DIM = 160
# On an H100 with Triton 3.6 the kernels' numbers were right up to this head dimension and wrong at 160, where the
# interpreter has them right: until that is understood, wider heads go to torch on a GPU.
PROVEN_DIM = 80
# queries times keys up to which, without C++, plain products beat torch's kernel: in backward above all
SHORT = 256 * 80
NATIVE = _native.available()
LOG2_E = 1.4426950408889634
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def _case(name: str, b: int, h: int, tq: int, tk: int, d: int, *, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw(tokens: int) -> Tensor:  # as a projection leaves it: (batch, tokens, heads, dim)
            t = torch.randn((b, tokens, h, d), generator=generator, device=device).to(dtype)
            return t.transpose(1, 2)

        return {"q": draw(tq), "k": draw(tk), "v": draw(tk)}

    return Case(name, make_inputs, bench)


CASES = (
    _case("emoji_b32_64x16", 32, 4, 64, 16, 32),
    _case("emoji_b32_64x64", 32, 4, 64, 64, 32),
    _case("emoji_b32_16x16", 32, 4, 16, 16, 32),
    _case("emoji_b64_64x16", 64, 4, 64, 16, 32),
    _case("emoji_b64_64x64", 64, 4, 64, 64, 32),
    _case("emoji_b32_256x16", 32, 4, 256, 16, 16),
    _case("emoji_b32_256x256", 32, 4, 256, 256, 16),
    _case("sd15_4096x77", 1, 8, 4096, 77, 40),
    _case("sd15_1024x77", 1, 8, 1024, 77, 80),
    _case("sd15_256x77", 1, 8, 256, 77, 160),
    _case("sd15_64x77", 1, 8, 64, 77, 160),
    _case("sd15_4096x4096", 1, 8, 4096, 4096, 40),
    _case("sd15_1024x1024", 1, 8, 1024, 1024, 80),
    _case("sd15_256x256", 1, 8, 256, 256, 160),
    _case("sd15_64x64", 1, 8, 64, 64, 160),
    _case("sdxl_4096x77", 2, 10, 4096, 77, 64),
    _case("sdxl_1024x77", 2, 20, 1024, 77, 64),
    _case("sdxl_4096x4096", 1, 10, 4096, 4096, 64),
    _case("sdxl_1024x1024", 1, 20, 1024, 1024, 64),
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


# ---- Triton -----------------------------------------------------------------------------------------------------


@jit
def _tile(pointer, tokens, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
          WIDEN: tl.constexpr):  # fmt: skip
    """Rows `tokens` of a (count, D) matrix, columns FIRST .. FIRST + WIDTH, zeros outside; int64 offsets."""
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = tokens[:, None].to(tl.int64) * stride + columns[None, :]
    mask = tokens[:, None] < count
    if FIRST + WIDTH > D:
        mask = mask & (columns[None, :] < D)
    tile = tl.load(pointer + offsets, mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDEN else tile  # the interpreter multiplies bfloat16 bit patterns


@jit
def _put(pointer, value, tokens, count, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    offsets = tokens[:, None].to(tl.int64) * stride + columns[None, :]
    mask = tokens[:, None] < count
    if FIRST + WIDTH > D:
        mask = mask & (columns[None, :] < D)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=mask)


@jit
def _scores(q0, k0, q1, k1, keys, tk, exponent, HAS_D1: tl.constexpr):
    """q k^T in powers of two, minus infinity beyond the last key."""
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if HAS_D1:
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return tl.where(keys[None, :] < tk, s * exponent, float("-inf"))


_SIZES = ("scale", "heads", "tq", "tk", "blocks", "splits", "chunk")
_STRIDES = {
    "forward": tuple(f"{t}_{axis}" for t in ("q", "k", "v", "o") for axis in "bht"),
    "dq": tuple(f"{t}_{axis}" for t in ("do", "q", "k", "v", "dq") for axis in "bht"),
    "dkdv": (*(f"{t}_{axis}" for t in ("do", "q", "k", "v") for axis in "bht"), "dk_s", "dk_b", "dk_h", "dk_t"),
}


@jit(do_not_specialize=_SIZES[:5] + _STRIDES["forward"])
def _forward_kernel(
    q, k, v, out, scale, heads, tq, tk, blocks,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries of one head, all of its keys. Strides are given in units of UNIT elements, which
    tells the compiler how far addresses are aligned. A head dimension is D0 + D1: 40 = 32 + 8, 80 = 64 + 16."""
    program = tl.program_id(0)
    head, first = program // blocks, (program % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * o_b + h * o_h) * UNIT
    keys = tl.arange(0, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    q0 = _tile(q, rows, tq, q_t * UNIT, 0, D0, D, WIDEN)
    k0 = _tile(k, keys, tk, k_t * UNIT, 0, D0, D, WIDEN)
    q1, k1 = q0, k0
    if D1 > 0:
        q1 = _tile(q, rows, tq, q_t * UNIT, D0, D1, D, WIDEN)
        k1 = _tile(k, keys, tk, k_t * UNIT, D0, D1, D, WIDEN)
    v0 = _tile(v, keys, tk, v_t * UNIT, 0, D0, D, WIDEN)
    s = _scores(q0, k0, q1, k1, keys, tk, scale * 1.4426950408889634, D1 > 0)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    norm = 1.0 / tl.sum(p, 1)[:, None]
    p = p.to(v0.dtype)
    _put(out, tl.dot(p, v0, input_precision="ieee") * norm, rows, tq, o_t * UNIT, 0, D0, D)
    if D1 > 0:
        v1 = _tile(v, keys, tk, v_t * UNIT, D0, D1, D, WIDEN)
        _put(out, tl.dot(p, v1, input_precision="ieee") * norm, rows, tq, o_t * UNIT, D0, D1, D)


@jit(do_not_specialize=_SIZES[:5] + _STRIDES["dq"])
def _dq_kernel(
    do, q, k, v, dq, lse, delta, scale, heads, tq, tk, blocks,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dq_b, dq_h, dq_t,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries of one head; log2 of the sum of exponentials and rowsum(P * dP) for dK and dV."""
    program = tl.program_id(0)
    head, first = program // blocks, (program % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    do += (b * do_b + h * do_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    dq += (b * dq_b + h * dq_h) * UNIT
    keys = tl.arange(0, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    q0 = _tile(q, rows, tq, q_t * UNIT, 0, D0, D, WIDEN)
    k0 = _tile(k, keys, tk, k_t * UNIT, 0, D0, D, WIDEN)
    q1, k1 = q0, k0
    if D1 > 0:
        q1 = _tile(q, rows, tq, q_t * UNIT, D0, D1, D, WIDEN)
        k1 = _tile(k, keys, tk, k_t * UNIT, D0, D1, D, WIDEN)
    s = _scores(q0, k0, q1, k1, keys, tk, scale * 1.4426950408889634, D1 > 0)
    high = tl.max(s, 1)
    p = tl.exp2(s - high[:, None])
    total = tl.sum(p, 1)
    p = p * (1.0 / total)[:, None]
    do0 = _tile(do, rows, tq, do_t * UNIT, 0, D0, D, WIDEN)
    v0 = _tile(v, keys, tk, v_t * UNIT, 0, D0, D, WIDEN)
    dp = tl.dot(do0, tl.trans(v0), input_precision="ieee")
    if D1 > 0:
        do1 = _tile(do, rows, tq, do_t * UNIT, D0, D1, D, WIDEN)
        v1 = _tile(v, keys, tk, v_t * UNIT, D0, D1, D, WIDEN)
        dp = tl.dot(do1, tl.trans(v1), dp, input_precision="ieee")
    mean = tl.sum(p * dp, 1)
    ds = (p * (dp - mean[:, None])).to(k0.dtype)
    statistics = head.to(tl.int64) * tq + rows
    tl.store(lse + statistics, high + tl.log2(total), mask=rows < tq)
    tl.store(delta + statistics, mean, mask=rows < tq)
    _put(dq, tl.dot(ds, k0, input_precision="ieee") * scale, rows, tq, dq_t * UNIT, 0, D0, D)
    if D1 > 0:
        _put(dq, tl.dot(ds, k1, input_precision="ieee") * scale, rows, tq, dq_t * UNIT, D0, D1, D)


@jit(do_not_specialize=_SIZES + _STRIDES["dkdv"])
def _dkdv_kernel(
    do, q, k, v, dk, dv, lse, delta, scale, heads, tq, tk, blocks, splits, chunk,
    do_b, do_h, do_t, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dk_s, dk_b, dk_h, dk_t,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The share that `chunk` queries of one head have in dK and dV of a block of its keys."""
    program = tl.program_id(0)
    split, program = program % splits, program // splits
    head = program // blocks
    keys = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    do += (b * do_b + h * do_h) * UNIT
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    lse += head.to(tl.int64) * tq
    delta += head.to(tl.int64) * tq
    share = (split.to(tl.int64) * dk_s + b * dk_b + h * dk_h) * UNIT
    k0 = _tile(k, keys, tk, k_t * UNIT, 0, D0, D, WIDEN)
    v0 = _tile(v, keys, tk, v_t * UNIT, 0, D0, D, WIDEN)
    dk0 = tl.zeros((BLOCK_N, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_N, D0), tl.float32)
    k1, v1, dk1, dv1 = k0, v0, dk0, dv0
    if D1 > 0:
        k1 = _tile(k, keys, tk, k_t * UNIT, D0, D1, D, WIDEN)
        v1 = _tile(v, keys, tk, v_t * UNIT, D0, D1, D, WIDEN)
        dk1 = tl.zeros((BLOCK_N, D1), tl.float32)
        dv1 = tl.zeros((BLOCK_N, D1), tl.float32)
    first = split * chunk
    for start in range(first, tl.minimum(first + chunk, tq), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q0 = _tile(q, rows, tq, q_t * UNIT, 0, D0, D, WIDEN)
        do0 = _tile(do, rows, tq, do_t * UNIT, 0, D0, D, WIDEN)
        s = tl.dot(k0, tl.trans(q0), input_precision="ieee")
        dp = tl.dot(v0, tl.trans(do0), input_precision="ieee")
        q1, do1 = q0, do0
        if D1 > 0:
            q1 = _tile(q, rows, tq, q_t * UNIT, D0, D1, D, WIDEN)
            do1 = _tile(do, rows, tq, do_t * UNIT, D0, D1, D, WIDEN)
            s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
            dp = tl.dot(v1, tl.trans(do1), dp, input_precision="ieee")
        high = tl.load(lse + rows, mask=rows < tq, other=float("inf"))  # P = 0 past the last query
        p = tl.exp2(s * (scale * 1.4426950408889634) - high[None, :])
        ds = (p * (dp - tl.load(delta + rows, mask=rows < tq, other=0.0)[None, :])).to(k0.dtype)
        p = p.to(k0.dtype)
        dv0 = tl.dot(p, do0, dv0, input_precision="ieee")
        dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
        if D1 > 0:
            dv1 = tl.dot(p, do1, dv1, input_precision="ieee")
            dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    _put(dk + share, dk0 * scale, keys, tk, dk_t * UNIT, 0, D0, D)
    _put(dv + share, dv0, keys, tk, dk_t * UNIT, 0, D0, D)
    if D1 > 0:
        _put(dk + share, dk1 * scale, keys, tk, dk_t * UNIT, D0, D1, D)
        _put(dv + share, dv1, keys, tk, dk_t * UNIT, D0, D1, D)


@jit(do_not_specialize=("splits",))
def _sum_kernel(partial, dk, dv, count, splits, BLOCK: tl.constexpr):
    """dk, dv (count,) = the shares in partial (2, splits, count), added in order."""
    inside = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = inside < count
    for which in tl.static_range(2):
        total = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            total += tl.load(partial + (which * splits + split).to(tl.int64) * count + inside, mask=mask, other=0.0)
        target = dk if which == 0 else dv
        tl.store(target + inside, total.to(target.dtype.element_ty), mask=mask)


def _config(which: str, tk: int, d: int, dtype: torch.dtype, arch: str = "sm90") -> Config:
    """Queries and keys of a tile; `which` is forward, dq (both hold all keys) or dkdv."""
    keys = max(16, triton.next_power_of_2(tk)) if triton else MAX_KEYS

    def analytic() -> Config:  # the largest tiles that spill no register
        if dtype not in SIXTEEN_BIT:
            return Config({"BLOCK_M": 16, "BLOCK_N": 64 if which == "dkdv" else keys}, 8, 1)
        small = d > 128 and arch.startswith("sm8")
        if which == "dkdv":
            few = d <= 64 or arch == "gfx"
            return Config({"BLOCK_M": 16 if small else 64 if d <= 64 else 32, "BLOCK_N": 64}, 4 if few else 8, 2)
        block_m = 16 if small else 128 if d <= (80 if which == "forward" else 64) else 64
        few = d > (80 if arch == "gfx" else 128) and not small
        return Config({"BLOCK_M": block_m, "BLOCK_N": keys}, 4 if few else 8, 1)

    return lookup(f"attention_{which}", arch, dtype, {"keys": keys, "D": d}, analytic)


def _parts(d: int) -> tuple[int, int]:
    """d as two powers of two (the second 0 where one does as well), each at least 16: what a product can take."""
    whole = max(16, 1 << (d - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << (d - first - 1).bit_length()) if d > first else 0
    return (first, second) if first >= 16 and first + second < whole else (whole, 0)


def _unit(*tensors: Tensor) -> int:
    """8 where every stride is a multiple of it (128 bits of a 16-bit type), else 1."""
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:-1]) else 1


def _strides(t: Tensor, unit: int) -> tuple[int, ...]:
    return tuple(stride // unit for stride in t.stride()[:-1])


def _rowwise(t: Tensor) -> Tensor:
    """`t` itself where the head dimension is dense in memory, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _split(tq: int, heads: int, block: int) -> tuple[int, int]:
    """(splits, chunk): into how many programs the queries of a head go, so that all heads together fill a GPU."""
    blocks = -(-tq // block)
    each = -(-blocks // max(1, min(blocks, -(-_rows.SMS // heads))))
    return -(-blocks // each), each * block


def _runs(q: Tensor, k: Tensor) -> bool:
    widest = MAX_DIM if interpreted() else PROVEN_DIM
    return q.dtype != torch.float64 and k.shape[2] <= MAX_KEYS and q.shape[3] <= widest and q.numel() * k.numel() > 0


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    if not _runs(q, k):
        return _products(q, k, v, scale)
    (b, h, tq, d), tk, out = q.shape, k.shape[2], torch.empty_like(q)
    config = _config("forward", tk, d, q.dtype, _rows.arch(q))
    q, k, v, work = _rowwise(q), _rowwise(k), _rowwise(v), _rowwise(out)
    unit = _unit(q, k, v, work)
    blocks = -(-tq // config.blocks["BLOCK_M"])
    with _rows.on_device(q):
        _forward_kernel[(b * h * blocks,)](
            q, k, v, work, _factor(q, scale), h, tq, tk, blocks,
            *(s for t in (q, k, v, work) for s in _strides(t, unit)), unit, d, *_parts(d),
            **config.blocks, WIDEN=_widen(q.dtype), num_warps=config.num_warps,
        )  # fmt: skip
    return out if work is out else out.copy_(work)


def _triton_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not _runs(q, k):
        return _products_backward(dout, q, k, v, scale)
    (b, h, tq, d), tk = q.shape, k.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    dout, q, k, v, dq_work, dk_work, dv_work = (_rowwise(t) for t in (dout, q, k, v, dq, dk, dv))
    lse, delta = torch.empty(2, b * h * tq, dtype=torch.float32, device=q.device).unbind()
    one, two = (_config(which, tk, d, q.dtype, _rows.arch(q)) for which in ("dq", "dkdv"))
    query_blocks, key_blocks = -(-tq // one.blocks["BLOCK_M"]), -(-tk // two.blocks["BLOCK_N"])
    splits, chunk = _split(tq, b * h * key_blocks, two.blocks["BLOCK_M"])
    share, dk_share, dv_share = 0, dk_work, dv_work
    if splits > 1:  # each writes its share in the memory order of dk
        share, strides = k.numel(), dk_work.stride()
        partial = torch.empty(2, splits, share, dtype=torch.float32, device=q.device)
        dk_share, dv_share = (p.as_strided(k.shape, strides, p.storage_offset()) for p in partial)
    unit = _unit(dout, q, k, v, dq_work, dk_work) if share % 8 == 0 else 1
    sizes, shared = (_factor(q, scale), h, tq, tk), [s for t in (dout, q, k, v) for s in _strides(t, unit)]
    constants = {"UNIT": unit, "D": d, "WIDEN": _widen(q.dtype)} | dict(zip(("D0", "D1"), _parts(d), strict=True))
    with _rows.on_device(q):
        _dq_kernel[(b * h * query_blocks,)](
            dout, q, k, v, dq_work, lse, delta, *sizes, query_blocks, *shared, *_strides(dq_work, unit),
            **constants, **one.blocks, num_warps=one.num_warps, num_stages=one.num_stages,
        )  # fmt: skip
        _dkdv_kernel[(b * h * key_blocks * splits,)](
            dout, q, k, v, dk_share, dv_share, lse, delta, *sizes, key_blocks, splits, chunk,
            *shared, share // unit, *_strides(dk_work, unit),
            **constants, **two.blocks, num_warps=two.num_warps, num_stages=two.num_stages,
        )  # fmt: skip
        if splits > 1:
            _sum_kernel[(-(-share // 1024),)](partial, dk_work, dv_work, share, splits, BLOCK=1024, num_warps=4)
    works = ((dq, dq_work), (dk, dk_work), (dv, dv_work))
    dq, dk, dv = (t if work is t else t.copy_(work) for t, work in works)
    return dq, dk, dv


def _widen(dtype: torch.dtype) -> bool:
    return interpreted() and dtype in SIXTEEN_BIT


def _triton_config(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Config:
    return _config("forward", k.shape[2], q.shape[3], q.dtype, _rows.arch(q))


_TARGETS = {"sm_80": "sm80", "gfx942": "gfx"}
_MAX_REGISTERS = {"forward": 184, "dq": 184, "dkdv": 224}


def _programs() -> list[Program]:
    """What ships: every head dimension in bf16 at 77 keys; fewer keys; fp16; the sum."""
    variants = [("*bf16", d, 77) for d in (32, 40, 64, 80, 128, 160)]
    variants += [("*bf16", 32, 16), ("*bf16", 32, 64), ("*fp16", 64, 77)]
    kernels = {
        "forward": (_forward_kernel, {name: "" for name in ("q", "k", "v", "out")}),
        "dq": (_dq_kernel, {name: "" for name in ("do", "q", "k", "v", "dq")}),
        "dkdv": (_dkdv_kernel, {name: "" for name in ("do", "q", "k", "v")} | {"dk": "*fp32", "dv": "*fp32"}),
    }
    made = []
    for pointer, d, tk in variants:
        dtype = {"*bf16": torch.bfloat16, "*fp16": torch.float16}[pointer]
        for which, (kernel, tensors) in kernels.items():
            config = _config(which, tk, d, dtype)
            types = {name: fixed or pointer for name, fixed in tensors.items()}
            types |= {"lse": "*fp32", "delta": "*fp32"} if which != "forward" else {}
            types |= {name: "i32" for name in (*_SIZES, *_STRIDES[which]) if name in kernel.arg_names}
            constants = dict(zip(("UNIT", "D", "D0", "D1"), (8, d, *_parts(d)), strict=True))
            made.append(
                Program(
                    f"{which} {pointer[1:]} {d} {tk}",
                    kernel,
                    types | {"scale": "fp32"},
                    {**constants, **config.blocks, "WIDEN": False},
                    config,
                    divisible=tuple(tensors),
                    dot=True,
                    max_registers=_MAX_REGISTERS[which],
                    configs={target: _config(which, tk, d, dtype, arch) for target, arch in _TARGETS.items()},
                )
            )
    types = {"partial": "*fp32", "dk": "*bf16", "dv": "*bf16", "count": "i32", "splits": "i32"}
    divisible, config = ("partial", "dk", "dv", "count"), Config({"BLOCK": 1024}, 4)
    return [*made, Program("sum", _sum_kernel, types, dict(config.blocks), config, divisible, streaming=True)]


# ---- registration -----------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"attention: {name} is a {type(t).__name__}, expected a tensor")
        if not t.dtype.is_floating_point or t.dtype != q.dtype:
            expected = "a floating-point one" if name == "q" else f"{q.dtype} as q"
            raise TypeError(f"attention: {name} has dtype {t.dtype}, expected {expected}")
        if t.device != q.device:
            raise ValueError(f"attention: {name} is on {t.device}, q on {q.device}")
        if t.dim() != 4:
            raise ValueError(f"attention: {name} has shape {tuple(t.shape)}, expected (batch, heads, tokens, dim)")
    b, h, _, d = q.shape
    if k.shape[0] != b or k.shape[1] != h or k.shape[3] != d or d == 0:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}, expected ({b}, {h}, keys, {d or 'dim > 0'}) as q")
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")


def _check_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    _check(q, k, v, scale)
    if dout.shape != q.shape or dout.dtype != q.dtype:
        raise RuntimeError(f"attention: a gradient {dout.dtype} {tuple(dout.shape)} of {q.dtype} {tuple(q.shape)}")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *BACKWARD.run(dout, *ctx.saved_tensors, ctx.scale), None


def elsewhere(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> str:
    """Why torch's scaled_dot_product_attention is the one to compute this; empty where this op is."""
    keys, kind = k.shape[2], q.device.type
    if kind == "cuda":
        if q.dtype not in SIXTEEN_BIT:
            return f"the kernels here are made for 16 bit, not {q.dtype}"
        if keys > MAX_KEYS:
            return f"more than {MAX_KEYS} keys do not fit one tile"
        if q.shape[3] > PROVEN_DIM:
            return f"head dimensions over {PROVEN_DIM} are not proven on a GPU"
        return ""
    if kind != "cpu":
        return f"no kernel here for device type {kind}"
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
    config=_triton_config,
    plan=lambda **inputs: "scores, softmax, product",
    elsewhere=elsewhere,
    programs=_programs,
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
    TypeError for a dtype, ValueError for a shape or a device that does not fit, naming the argument.
    """
    if not isinstance(q, Tensor) or not isinstance(k, Tensor) or q.dim() != 4 or k.dim() != 4:
        _check(q, k, v, 1.0)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if OP.is_elsewhere(q, k, v):
        _check(q, k, v, 1.0)
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return OP(q, k, v, scale)

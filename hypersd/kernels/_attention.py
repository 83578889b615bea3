"""attention on GPUs: Triton kernels and their launches, for keys that fit one tile.

A text prompt of 77 tokens, a small image. Every program holds all keys and values of its head, so a row of scores is
whole in registers: no online softmax, and backward needs neither out nor the row log-sum-exp of forward (P and
rowsum(P dP) come from the same tile). dK and dV are sums over queries: each program sums its share in order, a last
kernel adds the shares in order. A head dimension is computed as two powers of two: 40 = 32 + 16 (padded), 80 = 64 + 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd.kernels import _rows
from hypersd.kernels._tune import Config, Program, interpreted, jit, lookup, tl, triton

MAX_KEYS = 128  # one tile
MAX_DIM = 160
# On an H100 with Triton 3.6 the kernels' numbers were right up to this head dimension and wrong at 160, where the
# interpreter has them right: until that is understood, wider heads go to torch on a GPU.
PROVEN_DIM = 80
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


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
def _row_scores(
    q, k, rows, keys, tq, tk, q_stride, k_stride, exponent, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """q k^T in powers of two, minus infinity beyond the last key; and the two parts of the keys."""
    q0 = _tile(q, rows, tq, q_stride, 0, D0, D, WIDEN)
    k0 = _tile(k, keys, tk, k_stride, 0, D0, D, WIDEN)
    q1, k1 = q0, k0
    if D1 > 0:
        q1 = _tile(q, rows, tq, q_stride, D0, D1, D, WIDEN)
        k1 = _tile(k, keys, tk, k_stride, D0, D1, D, WIDEN)
    s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
    return tl.where(keys[None, :] < tk, s * exponent, float("-inf")), k0, k1


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
    tells the compiler how far addresses are aligned. The head dimension D is at most D0 + D1."""
    program = tl.program_id(0)
    head, first = program // blocks, (program % blocks) * BLOCK_M
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    out += (b * o_b + h * o_h) * UNIT
    keys = tl.arange(0, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    v0 = _tile(v, keys, tk, v_t * UNIT, 0, D0, D, WIDEN)
    exponent = scale * 1.4426950408889634
    s, _, _ = _row_scores(q, k, rows, keys, tq, tk, q_t * UNIT, k_t * UNIT, exponent, D, D0, D1, WIDEN)
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
    exponent = scale * 1.4426950408889634
    s, k0, k1 = _row_scores(q, k, rows, keys, tq, tk, q_t * UNIT, k_t * UNIT, exponent, D, D0, D1, WIDEN)
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


def config(which: str, tk: int, d: int, dtype: torch.dtype, arch: str = "sm90") -> Config:
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


def parts(d: int) -> tuple[int, int]:
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


def split(tq: int, heads: int, block: int) -> tuple[int, int]:
    """(splits, chunk): into how many programs the queries of a head go, so that all heads together fill a GPU."""
    blocks = -(-tq // block)
    each = -(-blocks // max(1, min(blocks, -(-_rows.SMS // heads))))
    return -(-blocks // each), each * block


def runs(q: Tensor, k: Tensor) -> bool:
    """Whether the kernels take these."""
    widest = MAX_DIM if interpreted() else PROVEN_DIM
    return q.dtype != torch.float64 and k.shape[2] <= MAX_KEYS and q.shape[3] <= widest and q.numel() * k.numel() > 0


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v in the memory order of q."""
    (b, h, tq, d), tk, out = q.shape, k.shape[2], torch.empty_like(q)
    tile = config("forward", tk, d, q.dtype, _rows.arch(q))
    q, k, v, work = _rowwise(q), _rowwise(k), _rowwise(v), _rowwise(out)
    unit = _unit(q, k, v, work)
    blocks = -(-tq // tile.blocks["BLOCK_M"])
    with _rows.on_device(q):
        _forward_kernel[(b * h * blocks,)](
            q, k, v, work, scale, h, tq, tk, blocks,
            *(s for t in (q, k, v, work) for s in _strides(t, unit)), unit, d, *parts(d),
            **tile.blocks, WIDEN=_widen(q.dtype), num_warps=tile.num_warps,
        )  # fmt: skip
    return out if work is out else out.copy_(work)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV, each in the memory order of its tensor."""
    (b, h, tq, d), tk = q.shape, k.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    dout, q, k, v, dq_work, dk_work, dv_work = (_rowwise(t) for t in (dout, q, k, v, dq, dk, dv))
    lse, delta = torch.empty(2, b * h * tq, dtype=torch.float32, device=q.device).unbind()
    one, two = (config(which, tk, d, q.dtype, _rows.arch(q)) for which in ("dq", "dkdv"))
    query_blocks, key_blocks = -(-tq // one.blocks["BLOCK_M"]), -(-tk // two.blocks["BLOCK_N"])
    splits, chunk = split(tq, b * h * key_blocks, two.blocks["BLOCK_M"])
    share, dk_share, dv_share = 0, dk_work, dv_work
    if splits > 1:  # each writes its share in the memory order of dk
        share, strides = k.numel(), dk_work.stride()
        partial = torch.empty(2, splits, share, dtype=torch.float32, device=q.device)
        dk_share, dv_share = (p.as_strided(k.shape, strides, p.storage_offset()) for p in partial)
    unit = _unit(dout, q, k, v, dq_work, dk_work) if share % 8 == 0 else 1
    sizes, shared = (scale, h, tq, tk), [s for t in (dout, q, k, v) for s in _strides(t, unit)]
    constants = {"UNIT": unit, "D": d, "WIDEN": _widen(q.dtype)} | dict(zip(("D0", "D1"), parts(d), strict=True))
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


def config_of(q: Tensor, k: Tensor) -> Config:
    return config("forward", k.shape[2], q.shape[3], q.dtype, _rows.arch(q))


_TARGETS = {"sm_80": "sm80", "gfx942": "gfx"}
_MAX_REGISTERS = {"forward": 184, "dq": 184, "dkdv": 224}


def programs() -> list[Program]:
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
            tile = config(which, tk, d, dtype)
            types = {name: fixed or pointer for name, fixed in tensors.items()}
            types |= {"lse": "*fp32", "delta": "*fp32"} if which != "forward" else {}
            types |= {name: "i32" for name in (*_SIZES, *_STRIDES[which]) if name in kernel.arg_names}
            constants = dict(zip(("UNIT", "D", "D0", "D1"), (8, d, *parts(d)), strict=True))
            made.append(
                Program(
                    f"{which} {pointer[1:]} {d} {tk}",
                    kernel,
                    types | {"scale": "fp32"},
                    {**constants, **tile.blocks, "WIDEN": False},
                    tile,
                    divisible=tuple(tensors),
                    dot=True,
                    max_registers=_MAX_REGISTERS[which],
                    configs={target: config(which, tk, d, dtype, arch) for target, arch in _TARGETS.items()},
                )
            )
    types = {"partial": "*fp32", "dk": "*bf16", "dv": "*bf16", "count": "i32", "splits": "i32"}
    divisible, tile = ("partial", "dk", "dv", "count"), Config({"BLOCK": 1024}, 4)
    return [*made, Program("sum", _sum_kernel, types, dict(tile.blocks), tile, divisible, streaming=True)]

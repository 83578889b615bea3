"""lora_linear on GPUs: Triton kernels and their launches.

Forward is two launches: S = x a^T, then one product whose float32 accumulator starts from scale S b^T. Backward is
three: dS = dY b, then dX in the same way, then dA and dB together. Those two are sums over all rows: chunks of rows are
summed apart, and whichever program of a tile ends last adds the chunks up in their order, so that equal inputs give
equal bits without a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _lora
from hypersd.kernels._tune import Config, Program, interpreted, jit, lookup, tl, triton

COLUMNS = 64  # of a tile of the adapter's gradients


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
    x, w, out, counters, m, k, r, count, NT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (m, r) = x (m, k) w; w is (r, k) if NT, else (k, r). Sets `count` counters of a later launch to 0."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = _add_product(total, x, w, rows, ranks, k, m, r, k, NT, BLOCK_K, WIDEN)
    _put(out, total, rows, ranks, m, r)
    if counters is not None:
        stop = tl.where(tl.program_id(0) + tl.program_id(1) == 0, count, 0)
        for start in range(0, stop, 256):
            index = start + tl.arange(0, 256)
            tl.store(counters + index, index * 0, mask=index < stop)


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
def _gradients_kernel(
    ds, x, s, dy, da, db, partial, counters, scale_tensor, scale, m, k, n, r, chunk, chunks, tiles_k,
    HAS_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """da (r, k) = scale ds^T x and, in the tiles from tiles_k on, db (n, r) = scale dy^T s."""
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.program_id(1)
    of_a = tile < tiles_k
    columns = (tile - tl.where(of_a, 0, tiles_k)) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(2) * chunk
    last = tl.minimum(first + chunk, m)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = _add_outer(total, ds, x, ranks, columns, first, tl.where(of_a, last, first), r, k, BLOCK_M, WIDEN)
    if s is not None:
        last = tl.where(of_a, first, last)
        total = _add_outer(total, s, dy, ranks, columns, first, last, r, n, BLOCK_M, WIDEN)
    # one tile of BLOCK_R x BLOCK_C numbers a program, whatever part of it lies inside
    place = (tl.program_id(0) * tl.num_programs(1) + tile).to(tl.int64)
    own = partial + place * chunks * BLOCK_R * BLOCK_C
    inner = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(own + tl.program_id(2).to(tl.int64) * BLOCK_R * BLOCK_C + inner, total)
    tl.debug_barrier()  # every thread's part is written before the count says so
    if tl.atomic_add(counters + place, 1, sem="acq_rel") == chunks - 1:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for _ in range(0, chunks):
            total += tl.load(own + inner, cache_modifier=".cg")
            own += BLOCK_R * BLOCK_C
        factor = scale
        if HAS_SCALE:
            factor *= tl.load(scale_tensor).to(tl.float32)
        total *= factor
        inside = ranks[:, None] < r
        if of_a:
            at = ranks[:, None].to(tl.int64) * k + columns[None, :]
            tl.store(da + at, total.to(da.dtype.element_ty), mask=inside & (columns[None, :] < k))
        elif s is not None:
            at = columns[None, :].to(tl.int64) * r + ranks[:, None]
            tl.store(db + at, total.to(db.dtype.element_ty), mask=inside & (columns[None, :] < n))


# ---- launches, on the current device ----------------------------------------------------------------------------


def config(m: int, n: int, k: int, r: int, dtype: torch.dtype, arch: str = "sm90") -> Config:
    def analytic() -> Config:
        if dtype not in _lora.SIXTEEN_BIT:
            return Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_R": 16}, 4, 2)
        wide = triton.cdiv(m, 128) * triton.cdiv(n, 128) >= 132  # tiles enough for one wave of a large GPU
        return Config({"BLOCK_M": 128, "BLOCK_N": 128 if wide else 64, "BLOCK_K": 64, "BLOCK_R": 64}, 8, 3)

    return lookup("lora_linear", arch, dtype, {"M": m, "N": n, "K": k, "R": r}, analytic)


def widen(dtype: torch.dtype) -> bool:
    return interpreted() and dtype in _lora.SIXTEEN_BIT


def shrink(x: Tensor, w: Tensor, nt: bool, counters: Tensor | None = None) -> Tensor:
    """x w^T with `nt`, else x w; sets the counters to 0."""
    (m, k), r = x.shape, w.shape[0] if nt else w.shape[1]
    out = x.new_empty(m, r)
    block_k = config(m, r, k, r, x.dtype).blocks["BLOCK_K"]
    block_m, block_r = 64, min(64, max(16, triton.next_power_of_2(r)))
    if out.numel():
        grid = (triton.cdiv(m, block_m), triton.cdiv(r, block_r))
        _shrink_kernel[grid](
            x, w, out, counters, m, k, r, 0 if counters is None else counters.numel(), nt, block_m, block_r, block_k,
            widen(x.dtype),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def expand(
    s: Tensor, u: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, scale: float, scale_tensor: Tensor | None, nt: bool
) -> Tensor:
    """x w^T + scale s u^T + bias with `nt`, else x w + scale s u + bias."""
    (m, k), r, n = x.shape, s.shape[1], w.shape[0] if nt else w.shape[1]
    y = x.new_empty(m, n)
    chosen = config(m, n, k, r, x.dtype)
    if y.numel():
        grid = (triton.cdiv(m, chosen.blocks["BLOCK_M"]), triton.cdiv(n, chosen.blocks["BLOCK_N"]))
        _expand_kernel[grid](
            s, u, x, w, bias, scale_tensor, y, scale, m, n, k, r, nt, bias is not None, scale_tensor is not None,
            **chosen.blocks, WIDEN=widen(x.dtype), num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return y


def blocks_of(r: int, *widths: int) -> tuple[int, int, list[int]]:
    """(rank block, rank tiles, column tiles of each width) of the adapter's gradients."""
    block = min(64, max(16, triton.next_power_of_2(r)))
    return block, triton.cdiv(r, block), [triton.cdiv(width, COLUMNS) for width in widths]


def counters(r: int, *widths: int, device: torch.device) -> Tensor:
    """Room for one count a tile of `gradients`, to be set to 0 by `shrink`."""
    _, rank_tiles, tiles = blocks_of(r, *widths)
    return torch.empty(rank_tiles * sum(tiles), dtype=torch.int32, device=device)


def gradients(
    ds: Tensor, x: Tensor, s: Tensor | None, dy: Tensor | None, da: Tensor, db: Tensor | None, count: Tensor,
    scale: float = 1.0, scale_tensor: Tensor | None = None,
) -> None:  # fmt: skip
    """da = scale ds^T x and, where given, db = scale dy^T s. `count`: zeros, one a tile; spent afterwards."""
    (m, r), k, n = ds.shape, x.shape[1], 0 if dy is None else dy.shape[1]
    block, rank_tiles, (tiles_k, tiles_n) = blocks_of(r, k, n)
    tiles = rank_tiles * (tiles_k + tiles_n)
    if not tiles:
        return
    chunks = max(1, min(triton.cdiv(m, 256), 264 // tiles))
    chunk = triton.cdiv(triton.cdiv(max(m, 1), chunks), 64) * 64
    chunks = triton.cdiv(max(m, 1), chunk)
    partial = torch.empty((tiles, chunks, block, COLUMNS), dtype=torch.float32, device=x.device)
    _gradients_kernel[(rank_tiles, tiles_k + tiles_n, chunks)](
        ds, x, s, dy, da, db, partial, count, scale_tensor, scale, m, k, n, r, chunk, chunks, tiles_k,
        scale_tensor is not None, block, COLUMNS, 64, widen(x.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip


def programs() -> list[Program]:
    """The variants that ship, for the offline gate."""
    dtype, pointer = torch.bfloat16, "*bf16"
    small, sizes = Config({}, 4, 3), ("m", "k", "n", "r", "count", "chunk", "chunks", "tiles_k")

    def program(name: str, kernel: Any, types: dict, constants: dict, chosen: Config, registers: int) -> Program:
        types |= {size: "i32" for size in kernel.arg_names if size in sizes}
        divisible = tuple(n for n in types if n not in ("m", "scale", "scale_tensor", "count", "chunks", "tiles_k"))
        ordered = {name: types[name] for name in kernel.arg_names if name in types}
        constants = constants | {"WIDEN": False}
        return Program(name, kernel, ordered, constants, chosen, divisible, dot=True, max_registers=registers)

    made = []
    for nt in (True, False):
        types = dict.fromkeys(("x", "w", "out"), pointer) | {"counters": "*i32"}
        blocks = {"NT": nt, "BLOCK_M": 64, "BLOCK_R": 64, "BLOCK_K": 64}
        made.append(program(f"shrink_{'nt' if nt else 'nn'}", _shrink_kernel, types, blocks, small, 128))
        for m in (8192, 1024):
            chosen = config(m, 2560, 640, 64, dtype) if m == 8192 else config(m, 640, 640, 64, dtype)
            types = dict.fromkeys(("s", "u", "x", "w", "bias", "y"), pointer) | {
                "scale_tensor": "*fp32",
                "scale": "fp32",
            }
            flags = {"NT": nt, "HAS_BIAS": nt, "HAS_SCALE": True, **chosen.blocks}
            name = f"expand_{'nt' if nt else 'nn'}_{chosen.blocks['BLOCK_N']}"
            made.append(program(name, _expand_kernel, types, flags, chosen, 168))
    types = dict.fromkeys(("ds", "x", "s", "dy", "da", "db"), pointer)
    types |= {"partial": "*fp32", "counters": "*i32", "scale_tensor": "*fp32", "scale": "fp32"}
    flags = {"HAS_SCALE": True, "BLOCK_R": 64, "BLOCK_C": COLUMNS, "BLOCK_M": 64}
    made.append(program("gradients", _gradients_kernel, types, flags, small, 168))
    return made

"""norm_shrink on GPUs: Triton kernels and their launches.

A program holds a block of rows and walks over the columns: once for the mean, once for the squared deviations, once to
normalise, store and multiply by a tile of `a`; only the first walk reads x from DRAM. A rank wider than one tile is cut
over the second grid dimension, whose first programs alone store y and the statistics. Backward walks twice: row sums,
then dx; dweight and dbias are summed per program and then, in order, over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _lora_gemm, _rows
from hypersd.kernels._tune import Config, Program, interpreted, jit, lookup, tl, triton

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
MAX_RANK = 128  # of one tile


@jit
def _load(pointer, rows, columns, m, k):
    """A masked tile of a contiguous (m, k) matrix, zeros outside; int64 row offsets."""
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    return tl.load(pointer + rows[:, None].to(tl.int64) * k + columns[None, :], mask=inside, other=0.0)


@jit
def _per_column(pointer, columns, k, default):
    """A row of column factors in float32, or `default` where there are none."""
    value = columns * 0.0 + default
    if pointer is not None:
        value = tl.load(pointer + columns, mask=columns < k, other=0.0).to(tl.float32)
    return value[None, :]


@jit
def _forward_kernel(
    x, weight, bias, a, y, s, mean, rstd, m, k, r, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    count = k * 1.0
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        total += tl.sum(_load(x, rows, columns, m, k).to(tl.float32), axis=1)
    center = total / count
    spread = tl.zeros((BLOCK_M,), tl.float32)
    rest = tl.zeros((BLOCK_M,), tl.float32)  # of the mean, below the last digit of `center`
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        apart = _load(x, rows, columns, m, k).to(tl.float32) - center[:, None]
        apart = tl.where(columns[None, :] < k, apart, 0.0)
        rest += tl.sum(apart, axis=1)
        spread += tl.sum(apart * apart, axis=1)
    rest /= count
    inverse = tl.div_rn(1.0, tl.sqrt_rn(spread / count - rest * rest + eps))
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    known = tl.where(tl.program_id(1) == 0, m, 0)  # rows whose y and statistics this program stores
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        apart = _load(x, rows, columns, m, k).to(tl.float32) - center[:, None]
        hat = (apart - rest[:, None]) * inverse[:, None]
        value = (hat * _per_column(weight, columns, k, 1.0) + _per_column(bias, columns, k, 0.0)).to(x.dtype.element_ty)
        inside = (rows[:, None] < m) & (columns[None, :] < k)
        tl.store(y + rows[:, None].to(tl.int64) * k + columns[None, :], value, mask=inside & (rows[:, None] < known))
        value = tl.where(inside, value, 0.0)
        right = tl.trans(_load(a, ranks, columns, r, k))
        if WIDEN:
            value, right = value.to(tl.float32), right.to(tl.float32)
        product = tl.dot(value.to(right.dtype), right, product, input_precision="ieee")
    inside = (rows[:, None] < m) & (ranks[None, :] < r)
    at = rows[:, None].to(tl.int64) * r + ranks[None, :]
    tl.store(s + at, product.to(s.dtype.element_ty), mask=inside)
    tl.store(mean + rows, center, mask=rows < known)
    tl.store(rstd + rows, inverse, mask=rows < known)


@jit
def _upstream(dy, ds, a, rows, columns, m, k, r, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr):
    """g = dy + ds a at these rows and columns, in float32."""
    if dy is not None:
        g = _load(dy, rows, columns, m, k).to(tl.float32)
    else:
        g = (rows[:, None] + columns[None, :]) * 0.0
    if ds is not None:
        for start in range(0, r, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            left, right = _load(ds, rows, ranks, m, r), _load(a, ranks, columns, r, k)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            g = tl.dot(left, right, g, input_precision="ieee")
    return g


@jit
def _backward_kernel(
    dy, ds, x, mean, rstd, weight, a, dx, sums, m, k, r,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx, and into sums (programs, 2, k) what this program's rows add to dweight and dbias; either may be None."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    center = tl.load(mean + rows, mask=rows < m, other=0.0)[:, None]
    inverse = tl.load(rstd + rows, mask=rows < m, other=0.0)[:, None]
    level = tl.zeros((BLOCK_M,), tl.float32)
    tilt = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, k, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        g = _upstream(dy, ds, a, rows, columns, m, k, r, BLOCK_R, WIDEN)
        hat = (_load(x, rows, columns, m, k).to(tl.float32) - center) * inverse
        if sums is not None:
            out = sums + tl.program_id(0).to(tl.int64) * 2 * k + columns
            tl.store(out, tl.sum(g * hat, axis=0), mask=columns < k)
            tl.store(out + k, tl.sum(g, axis=0), mask=columns < k)
        g *= _per_column(weight, columns, k, 1.0)
        level += tl.sum(g, axis=1)
        tilt += tl.sum(g * hat, axis=1)
    if dx is not None:
        level = (level / (k * 1.0))[:, None]
        tilt = (tilt / (k * 1.0))[:, None]
        for start in range(0, k, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            g = _upstream(dy, ds, a, rows, columns, m, k, r, BLOCK_R, WIDEN) * _per_column(weight, columns, k, 1.0)
            hat = (_load(x, rows, columns, m, k).to(tl.float32) - center) * inverse
            value = inverse * (g - level - hat * tilt)
            inside = (rows[:, None] < m) & (columns[None, :] < k)
            at = rows[:, None].to(tl.int64) * k + columns[None, :]
            tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------------------ launches


def config(m: int, k: int, r: int, dtype: torch.dtype, arch: str = "sm90") -> Config:
    """The tuned blocks, else 64 rows by 64 columns; fewer rows where those would leave processors idle."""

    def analytic() -> Config:
        rows = 64 if m >= 64 * _rows.SMS else 32
        ranks = min(MAX_RANK, max(16, triton.next_power_of_2(r)))
        return Config({"BLOCK_M": rows, "BLOCK_K": 64 if dtype in SIXTEEN_BIT else 32, "BLOCK_R": ranks}, 4, 2)

    return lookup("norm_shrink", arch, dtype, {"M": max(m, 1), "K": k, "R": max(r, 1)}, analytic)


def _launch(x: Tensor, r: int) -> tuple[int, int, Config, dict[str, Any]]:
    m, k = x.shape[:-1].numel(), x.shape[-1]
    chosen = config(m, k, r, x.dtype, _rows.arch(x))
    widen = interpreted() and x.dtype in SIXTEEN_BIT
    return m, k, chosen, {"WIDEN": widen, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, a: Tensor, y: Tensor, s: Tensor, mean: Tensor,
    rstd: Tensor,
) -> None:  # fmt: skip
    """Fills y, s, mean and rstd."""
    r = a.shape[0]
    m, k, chosen, options = _launch(x, r)
    grid = (triton.cdiv(m, chosen.blocks["BLOCK_M"]), triton.cdiv(r, chosen.blocks["BLOCK_R"]))
    with _rows.on_device(x):
        _forward_kernel[grid](x, weight, bias, a, y, s, mean, rstd, m, k, r, eps, **chosen.blocks, **options)


def backward(
    dy: Tensor | None, ds: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, a: Tensor,
    dx: Tensor | None, need_affine: bool,
) -> Tensor:  # fmt: skip
    """Fills dx where given; returns (dweight, dbias) as (2, k) float32, or nothing."""
    r = a.shape[0]
    m, k, chosen, options = _launch(x, r)
    blocks = {**chosen.blocks, "BLOCK_R": min(64, chosen.blocks["BLOCK_R"])}
    programs = triton.cdiv(m, blocks["BLOCK_M"])
    sums = x.new_empty((programs, 2, k), dtype=torch.float32) if need_affine else None
    with _rows.on_device(x):
        _backward_kernel[(programs,)](dy, ds, x, mean, rstd, weight, a, dx, sums, m, k, r, **blocks, **options)
        return x.new_empty(0) if sums is None else sums.sum(0)


def adapter_grad(ds: Tensor, y: Tensor, da: Tensor) -> None:
    """Fills da with ds^T y."""
    ds, y = ds.view(-1, ds.shape[-1]), y.view(-1, y.shape[-1])
    with _rows.on_device(y):
        count = _lora_gemm.counters(ds.shape[1], y.shape[1], device=y.device).zero_()
        _lora_gemm.gradients(ds, y, None, None, da, None, count)


# ------------------------------------------------------------------------------------------------------------ programs


def programs() -> list[Program]:
    """What ships: one adapter, and three stacked, in bfloat16."""
    made = []
    for m, r in ((8192, 64), (2048, 192)):
        chosen = config(m, 640, r, torch.bfloat16)
        pointers = dict.fromkeys(("x", "weight", "bias", "a", "y", "s", "dy", "ds", "dx"), "*bf16")
        pointers |= dict.fromkeys(("mean", "rstd", "sums"), "*fp32")
        sizes = {"m": "i32", "k": "i32", "r": "i32", "eps": "fp32"}
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            names = [parameter.name for parameter in kernel.params]
            signature = {n: (pointers | sizes)[n] for n in names if n in pointers or n in sizes}
            divisible = tuple(n for n in signature if n not in ("m", "eps"))
            blocks = dict(chosen.blocks)
            if name == "backward":
                blocks["BLOCK_R"] = min(64, blocks["BLOCK_R"])
            made.append(
                Program(
                    f"{name} r{r}", kernel, signature, blocks | {"WIDEN": False}, chosen, divisible=divisible,
                    dot=chosen.blocks["BLOCK_M"] >= 64, max_registers=255,
                )
            )  # fmt: skip
    return made

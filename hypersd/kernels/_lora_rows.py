"""The forms "rows" and "rows_fold" of lora_linear and lora_conv2d: one C++ product over rows of channels
(csrc/cpu/lora.cpp), on CPUs with AVX-512.

rows: base product, update and bias share one float32 sum, rounded once; dA and dB are summed in float32 as well. Only
S = scale a x and dS = scale b^T dY stand in between. Adapters may be float32 beside a bfloat16 layer, without a cast.
rows_fold (y alone, float32): scale b a joins W as W is packed for the product, and no W' is ever written to memory.

On CPUs with a tile unit for bfloat16 (AMX), products of float32 from 64 rows on go there in three parts each
(csrc/cpu/triple.h): no less exact than float32 sums, but an infinity ends as NaN.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hypersd.kernels import _native

PANEL = 1536 << 10  # bytes of packed weight that meet every row again: what the second-level cache keeps
TILED = 4  # times as much where the tile unit takes it in stretches that the first cache keeps
LAST = torch.channels_last


def takes(x: Tensor, weight: Tensor, a: Tensor, backward: bool = True) -> bool:
    """Whether the C++ product computes this layer here (and with `backward` its gradients). Convolutions: where pixels
    are rows (channels last)."""
    if x.device.type != "cpu" or not fits(x.dtype, weight.dtype, weight.shape, a.shape[0], backward):
        return False
    return weight.dim() == 2 or is_last(x) or is_last(weight)


def fits(dtype: torch.dtype, weight_dtype: torch.dtype, weight: torch.Size, rank: int, backward: bool = True) -> bool:
    """`takes` but for the device and the layout."""
    return (
        dtype == weight_dtype
        and dtype in _native.lora_dtypes()
        and _fits(weight, rank, dtype.itemsize, backward, _native.cpu_kind())
    )


@cache
def _fits(weight: tuple[int, ...], rank: int, itemsize: int, backward: bool, kind: str) -> bool:
    out, inner = weight[0], weight[1]
    per = 4 // itemsize  # bfloat16 is multiplied in pairs
    if rank == 0 or out == 0 or inner == 0 or out % per or inner % per or rank % per:
        return False
    taps = weight[2] * weight[3] if len(weight) == 4 else 1
    summed = max(taps * inner + rank, taps * (out + rank) if backward else 0)
    return 64 * itemsize * summed <= PANEL * (TILED if kind == "cpu_amx" else 1)


def is_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=LAST) if x.dim() == 4 else x.contiguous()


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    stride: list[int] | tuple[int, int], padding: list[int] | tuple[int, int], keep: bool, fold: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, S (positions, r) or, without `keep`, nothing); S carries the scale. `fold`: packs W', keeps nothing."""
    rows = x.contiguous() if weight.dim() == 2 else _rows(x)
    return torch.ops.hypersd._lora_rows.default(rows, weight, bias, a, b, scale, *stride, *padding, keep, fold)


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float,
    stride: list[int] | tuple[int, int], padding: list[int] | tuple[int, int], need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX, dA, dB), each empty where not needed; s as forward kept it, or empty: then it is computed again."""
    rows, dy = (x.contiguous(), dy.contiguous()) if weight.dim() == 2 else (_rows(x), _rows(dy))
    return torch.ops.hypersd._lora_rows_backward.default(
        dy, rows, s, weight, a, b, scale, *stride, *padding, need_x, need_adapter
    )

"""A latent batch as rows: one row per sample, `width` elements each, in one memory order that all operands share.

The Python twin of csrc/cpu/rows.h: argument checks for every implementation, memory order for the Triton launchers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from numbers import Real
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hypersd.kernels._tune import Config, lookup

SMS = 132  # of an H100 or H200: what the analytic choice of a grid counts with
ELEMENTS_PER_THREAD = 8  # 128 bits of a 16-bit type
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # what every op takes and torch computes with


def check_tensor(name: str, value: object, like: Tensor | None = None, like_name: str = "") -> None:
    """Raise TypeError or ValueError unless `value` is a tensor of DTYPES (of the shape and device of `like`)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got {value.dtype}, expected a floating-point dtype of 16 to 64 bits")
    check_strided(name, value)
    if like is None:
        if value.dim() < 1:
            raise ValueError(f"{name}: got a 0-d tensor, expected a batch dimension")
        return
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {tuple(like.shape)} as {like_name}")
    if value.device != like.device:
        raise ValueError(f"{name}: got device {value.device}, expected {like.device} as {like_name}")


def check_strided(name: str, value: Tensor) -> None:
    """Raise TypeError for a sparse tensor."""
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got {value.layout}, expected a dense tensor (torch.strided)")


def as_real(name: str, value: Any) -> float:
    """`value` as a float; TypeError unless it is a real number: neither a bool nor what float() would read one from."""
    if type(value) is float or isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return float(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an int, or a symbol of torch.compile for one; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def check_real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`as_real`, and ValueError unless it is finite and in [low, high]."""
    number = as_real(name, value)
    if not (low <= number <= high and -math.inf < number < math.inf):  # as torch.compile can trace it
        raise ValueError(f"{name}: got {number}, expected {low:g} to {high:g}, finite")
    return number


def check_numbers(
    name: str, value: object, shapes: tuple[tuple[int, ...], ...], device: torch.device, finite: bool = False
) -> None:
    """Raise TypeError or ValueError unless `value` is float32 or float64, of one of `shapes`, here or on the host (and
    `finite`, where the host can see it)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a float64 tensor")
    if value.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"{name}: got {value.dtype}, expected torch.float64 (or torch.float32)")
    if not any(value.shape == shape for shape in shapes):
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}")
    if value.device != device and value.device.type != "cpu":
        raise ValueError(f"{name}: got device {value.device}, expected {device} or the CPU")
    check_strided(name, value)
    here = finite and type(value) is Tensor and value.device.type == "cpu"
    if here and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        wrong = next((number for number in value.flatten().tolist() if not math.isfinite(number)), None)
        if wrong is not None:
            raise ValueError(f"{name}: got {wrong}, expected finite numbers")


def autocast(first: Tensor, *others: Any) -> tuple[Any, ...]:
    """The tensors (or None) as torch.autocast hands them to a product: 16 and 32 bit in its dtype, else as they are."""
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in DTYPES[:3] else t for t in (first, *others)
    )  # fmt: skip


def work_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What to compute in: float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def aten_in_float64(*names: str) -> Callable[..., str]:
    """An op's `aten`: its kernels compute in float32, and leave inputs to ATen where one of `names` is float64."""

    def aten(**inputs: Any) -> str:
        wide = work_dtype(*(inputs[name] for name in names)) == torch.float64
        return "the kernels compute in float32, not float64" if wide else ""

    return aten


def per_row(values: Tensor, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The columns of (columns,) or (batch, columns) coefficients, each shaped to broadcast over the rows of `like`."""
    values = values.to(device=like.device, dtype=dtype)
    table = values.reshape(-1, values.shape[-1]) if values.numel() else values.reshape(0, values.shape[-1])
    return [column.reshape(-1, *[1] * (like.dim() - 1)) for column in table.unbind(-1)]


def dense(t: Tensor, first: int) -> bool:
    """Whether dimensions `first`.. fill memory without gaps, in any order, and dimension 0 steps over whole samples."""
    if t.numel() == 0 or t.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(t.shape[first:], t.stride()[first:], strict=True), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return first == 0 or t.shape[0] == 1 or t.stride(0) == expected


def output_like(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    """(result, work): an output with torch's strides for `x`, and where to compute it (the same where possible)."""
    result = torch.empty_like(x)
    return result, result if dense(result, int(per_sample)) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def matched(t: Tensor | None, layout: Tensor) -> Tensor | None:
    """`t` in the memory order of `layout`: itself, or a copy."""
    if t is None or t.stride() == layout.stride() or (t.is_contiguous() and layout.is_contiguous()):
        return t
    return torch.empty_strided(layout.shape, layout.stride(), dtype=t.dtype, device=t.device).copy_(t)


def on_device(t: Tensor) -> AbstractContextManager:
    """Makes the device of `t` current, as launching Triton kernels wants."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def arch(t: Tensor) -> str:
    """The folder of tuned configurations for the device of `t`."""
    if not t.is_cuda:
        return "none"
    return _gpu_arch(t.device)


@lru_cache
def _gpu_arch(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@lru_cache(maxsize=1024)
def streaming_config(op: str, arch: str, dtype: torch.dtype, rows: int, width: int) -> Config:
    """Launch of a kernel that streams rows x width elements: the tuned row, else the largest block that fills a GPU."""

    def analytic() -> Config:
        for block in (1024, 512):  # 512: 128 bits a thread also where a warp has 64
            if rows * -(-width // block) >= 2 * SMS:
                break
        threads_per_warp = 64 if arch == "gfx" else 32
        return Config({"BLOCK": block}, num_warps=max(1, block // (threads_per_warp * ELEMENTS_PER_THREAD)))

    return lookup(op, arch, dtype, {"rows": max(rows, 1), "width": max(width, 1)}, analytic)

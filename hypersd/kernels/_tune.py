"""Launch configurations: tuned rows are data (configs/<arch>/<op>.json); without one, a stated analytic default.

Also the one place that knows whether Triton is there, so that op files import on machines without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # no wheel for this platform: ops keep their reference
    triton = tl = None
    _missing = f"Triton is not installed ({error}); `pip install triton` where it has a wheel"

    def jit(function: Any = None, **options: Any) -> Any:
        return function if function else lambda wrapped: wrapped
else:
    _missing = ""

    def jit(function: Any = None, **options: Any) -> Any:
        """triton.jit, its launches with multiply-adds fused: Triton's releases differ in the default, and 3.9 warns."""
        kernel = triton.jit(function, **options)
        if function is None:
            return lambda wrapped: _fused(kernel(wrapped))
        return _fused(kernel)

    def _fused(kernel: Any) -> Any:
        kernel.run = partial(kernel.run, enable_fp_fusion=True)
        return kernel


CONFIGS = Path(__file__).parent / "configs"
MAX_DISTANCE = 4.0  # in powers of two, summed over the sizes: farther rows say nothing about this problem

__all__ = ["Config", "Program", "interpreted", "jit", "lookup", "tl", "triton", "triton_missing"]


def triton_missing() -> str:
    """Why Triton cannot be used; empty when it can."""
    return _missing


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when the process started)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """One launch: compile-time blocks, warps, stages; `provenance` says where the choice comes from."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1
    provenance: str = "analytic"

    def __str__(self) -> str:
        blocks = " ".join(f"{key}={value}" for key, value in self.blocks.items())
        return f"{blocks} warps={self.num_warps} stages={self.num_stages} [{self.provenance}]"


@dataclass(frozen=True)
class Program:
    """One compiled variant that the offline gate builds for every target: kernel, types, compile-time values, limits.

    `signature` gives the Triton type of each argument ("*fp32", "i64", "fp32", "constexpr"); `constexprs` the values.
    `divisible` names arguments known to be multiples of 16. `dot` kernels must use wgmma on sm_90; `streaming` ones
    must move 128 bits at a time. `configs` names the targets that are launched otherwise than by `config`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    config: Config
    divisible: tuple[str, ...] = ()
    dot: bool = False
    streaming: bool = False
    max_registers: int = 128
    options: Mapping[str, Any] = field(default_factory=dict)
    configs: Mapping[str, Config] = field(default_factory=dict)


@cache
def _rows(op: str, arch: str) -> list[dict[str, Any]]:
    path = CONFIGS / arch / f"{op}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def lookup(op: str, arch: str, dtype: torch.dtype, sizes: Mapping[str, int], analytic: Callable[[], Config]) -> Config:
    """The nearest tuned row of the same dtype (distance: powers of two, summed over `sizes`), else `analytic()`."""
    name = str(dtype).removeprefix("torch.")
    best, distance = None, MAX_DISTANCE
    for row in _rows(op, arch):
        if row["dtype"] == name and row["sizes"].keys() == sizes.keys():
            away = sum(abs(math.log2(max(sizes[key], 1) / max(row["sizes"][key], 1))) for key in sizes)
            if away <= distance:
                best, distance = row, away
    if best is None:
        return analytic()
    return Config(best["blocks"], best["num_warps"], best["num_stages"], best["provenance"])

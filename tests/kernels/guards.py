"""Memory for tests: between guard bands, which show a kernel that leaves its tensor; and larger than the machine."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import checks

BAND = 1 << 14  # elements: more than the tile of any kernel


def place(shape: Sequence[int], dtype: torch.dtype, bands: list[Tensor], value: float = 7.0) -> Tensor:
    """A tensor in the middle of memory that holds `value`."""
    count = math.prod(shape)
    memory = torch.full((count + 2 * BAND,), value, dtype=dtype)
    bands.append(memory)
    return memory[BAND : BAND + count].view(tuple(shape))


def sparse(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    count = math.prod(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, max(count * dtype.itemsize, 1), flags=flags)
    zeros = torch.frombuffer(memory, dtype=dtype, count=count) if count else torch.zeros(0, dtype=dtype)
    return zeros.view(tuple(shape))


def touched(bands: list[Tensor]) -> int:
    """How many numbers of the bands have changed."""
    return sum(int((edge != 7).sum()) for memory in bands for edge in (memory[:BAND], memory[-BAND:]))


@contextmanager
def guarded(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Any]
) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:  # fmt: skip
    """(inputs between bands of NaN, the bands around whatever is allocated inside, and around what is written to)."""
    outside: list[Tensor] = []
    inside = {
        k: place(v.shape, v.dtype, outside, math.nan).copy_(v) if checks.numbers(k, v) and v.is_contiguous() else v
        for k, v in inputs.items()
    }
    bands: list[Tensor] = []
    real = torch.empty

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu", **options: Any) -> Tensor:
        sizes = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        return place(sizes, dtype, bands) if dtype.is_floating_point else real(sizes, dtype=dtype, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda t, **_: place(t.shape, t.dtype, bands))
        patch.setattr(torch.Tensor, "new_empty", lambda t, *shape, **o: empty(*shape, **({"dtype": t.dtype} | o)))
        patch.setattr(checks, "copied", lambda t: place(t.shape, t.dtype, bands).copy_(t))
        yield inside, bands

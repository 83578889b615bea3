"""What a device reaches at best, measured once a process, when the benchmark begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hypersd.kernels._cost import Ceiling, Cost

from . import gpu

# bytes that a copy moves: from what fits into a core's cache to what memory must deliver
COPIES = tuple(2**power for power in range(18, 29, 2))
# rows, inner size and columns of the products: what is fast depends on the CPU, its caches and its tile unit
PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (4096, 1280, 320))
SECONDS = 0.05


class Roofline:
    """The ceiling for a call: on a GPU that of its memory; on a CPU that of the copy that moves as much or less, since
    what fits into a cache comes from there."""

    def __init__(self, by_size: dict[int, Ceiling]) -> None:
        self.by_size = by_size

    def __call__(self, cost: Cost) -> Ceiling:
        fitting = [size for size in self.by_size if size <= cost.bytes]
        return self.by_size[max(fitting, default=min(self.by_size))]

    def stamp(self) -> dict[str, Any]:
        """The measured rates and what else a row should say of the device."""
        least, largest = (self.by_size[size] for size in (min(self.by_size), max(self.by_size)))
        if least is largest:
            return gpu.stamp(largest)
        rates = {
            f"{str(k).removeprefix('torch.')}_tflops": round(v / 1e12, 3) for k, v in largest.flops_per_second.items()
        }
        speeds = {"copy_gb_per_s": largest.bytes_per_second, "cached_copy_gb_per_s": least.bytes_per_second}
        return {name: round(value / 1e9, 1) for name, value in speeds.items()} | rates


def _best(call: Callable[[], Any]) -> float:
    """The least seconds of a call."""
    call()
    best, stop = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP per second of a product of these sizes, in the fastest way to ask for it."""
    x, weight = (torch.randn(size, inner).to(dtype) for size in (rows, columns))
    q, out = weight.T.contiguous(), torch.empty(rows, columns, dtype=dtype)
    ways = (lambda: torch.mm(x, q), lambda: torch.mm(x, q, out=out), lambda: F.linear(x, weight))
    return 2 * rows * inner * columns / min(map(_best, ways))


def cpu(dtypes: Sequence[torch.dtype]) -> Roofline:
    """Copies and products of several sizes, the latter in float32 and these dtypes, with the threads in use."""
    provenance = f"measured in this process on {torch.get_num_threads()} threads"
    with torch.no_grad():
        every = dict.fromkeys((torch.float32, *dtypes))
        rates = {dtype: max(_product(*sizes, dtype) for sizes in PRODUCTS) for dtype in every}
        found = {}
        for moved in COPIES:
            one, other = (torch.ones(moved // 8) for _ in range(2))
            found[moved] = Ceiling(moved / _best(lambda a=one, b=other: a.copy_(b)), rates, 0.0, provenance)
    return Roofline(found)


def measured(device: str, dtypes: Sequence[torch.dtype]) -> Roofline:
    """The roofline of "cpu" or "cuda"."""
    if device == "cuda":
        return Roofline({0: gpu.calibrate()})
    return cpu(dtypes)

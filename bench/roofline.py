"""What a device reaches at best, measured once a process, when the benchmark begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hypersd.kernels._cost import Ceiling, Cost

from . import gpu

# bytes that a copy moves: from what fits into a core's cache to what memory must deliver
COPIES = tuple(2**power for power in range(18, 29, 2))
PRODUCT = 1024  # rows and columns of the products
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


def cpu(dtypes: Sequence[torch.dtype]) -> Roofline:
    """Copies of several sizes, products of 1024 x 1024 in float32 and these dtypes, with the threads in use."""
    provenance = f"measured in this process on {torch.get_num_threads()} threads"
    with torch.no_grad():
        rates = {}
        for dtype in dict.fromkeys((torch.float32, *dtypes)):
            p, q = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
            rates[dtype] = 2 * PRODUCT**3 / _best(lambda p=p, q=q: torch.mm(p, q))
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

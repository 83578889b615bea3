"""What an op must move and compute, and how fast a device can at best: the roofline."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """Work of one call: floating-point operations, bytes of DRAM traffic when nothing is cached, kernel launches."""

    flops: float
    bytes: float
    launches: int = 1

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.launches + other.launches)


@dataclass(frozen=True)
class Ceiling:
    """Best rates of a device: bytes per second, FLOP per second by dtype, seconds per launch, and their provenance."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]
    launch_seconds: float
    provenance: str

    def seconds(self, cost: Cost, dtype: torch.dtype) -> float:
        """Lower bound of the time of `cost`: the slower of memory and arithmetic, plus the launches."""
        flops = self.flops_per_second.get(dtype, self.flops_per_second[torch.float32])
        return max(cost.bytes / self.bytes_per_second, cost.flops / flops) + cost.launches * self.launch_seconds


# Keys are fragments of torch.cuda.get_device_name(). Vector (not tensor core) rate for fp32 and fp64.
CEILINGS: dict[str, Ceiling] = {
    "H200": Ceiling(
        4.3e12,
        {torch.float32: 60e12, torch.float64: 30e12, torch.bfloat16: 788e12, torch.float16: 788e12},
        3e-6,
        "measured copy and dense bf16 GEMM on random data; fp32 and fp64 from the datasheet, rounded down",
    ),
    "H100": Ceiling(
        2.9e12,
        {torch.float32: 60e12, torch.float64: 30e12, torch.bfloat16: 690e12, torch.float16: 690e12},
        3e-6,
        "not measured: 0.87 of the SXM datasheet's bandwidth, 0.70 of its bf16 rate",
    ),
}


def ceiling(device: torch.device | str) -> Ceiling | None:
    """The ceiling of `device`, or None where none was measured (every CPU, every GPU not in the table)."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((row for fragment, row in CEILINGS.items() if fragment in name), None)

"""Time on a GPU: CUDA events around many calls, replay of a graph of them, and what the device can do at best.

A call as a program makes it costs the longer of the host's launches and the GPU's work; a replayed graph costs the work
alone. The one beside the other says where the time goes. The calls of a round go through copies of the inputs that are
together larger than the second-level cache, so that memory is read from memory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels._cost import Ceiling

Call = Callable[[], Any]
Step = Callable[[], Call]  # does what is not timed, and returns what is
MAX_COPIES = 64
MIN_CALLS = 10
MIN_ROUNDS = 7


def copies(moved: float, device: str = "cuda") -> int:
    """Copies of inputs of `moved` bytes that overflow the second-level cache twice, at most MAX_COPIES."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MAX_COPIES, round(2 * cache / max(moved, 1))))


def cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs in other memory; what is on the host stays."""
    return {k: v.clone() if isinstance(v, Tensor) and v.is_cuda else v for k, v in inputs.items()}


def microseconds(rounds: dict[str, tuple[Step, int]], seconds: float) -> dict[str, list[float]]:
    """Time of each provider's round by CUDA events, divided by its count; the providers take turns."""
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    order = list(rounds)
    stop = time.perf_counter() + seconds
    while order and (len(samples[order[0]]) < MIN_ROUNDS or time.perf_counter() < stop):
        for name in order:
            prepare, count = rounds[name]
            run = prepare()
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            first.record()
            run()
            last.record()
            last.synchronize()
            samples[name].append(first.elapsed_time(last) * 1e3 / count)
        order.append(order.pop(0))
    return samples


def calls(steps: dict[str, Sequence[Step]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of a call as a program makes it, many in a row."""
    rounds: dict[str, tuple[Step, int]] = {}
    for name, made in steps.items():
        many = list(made) * -(-MIN_CALLS // len(made))

        def prepare(many: list[Step] = many) -> Call:
            ready = [step() for step in many]

            def run() -> None:
                for call in ready:
                    call()

            return run

        prepare()()
        rounds[name] = (prepare, len(many))
    return microseconds(rounds, seconds)


def graph(made: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of these calls, one after the other, and what the first returned. Raises RuntimeError where one of them
    waits for the GPU or copies from the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    captured = torch.cuda.CUDAGraph()
    gc.collect()
    gc.disable()  # a tensor freed by a collection in the middle of a capture would break it
    try:
        with torch.cuda.stream(stream):
            for call in made[:2]:
                call()  # libraries take their scratch memory of this stream now
            torch.cuda.synchronize()
            captured.capture_begin()
            try:
                first = made[0]()
                for call in made[1:]:
                    call()
            finally:
                captured.capture_end()
    finally:
        gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    return captured, first


def calibrate() -> Ceiling:
    """What this device reaches: bytes per second of a copy, FLOP per second of large products, seconds per kernel."""

    def best(call: Call, count: int) -> float:
        return 1e-6 * min(calls({"": [lambda: call] * count}, 0.1)[""])

    with torch.no_grad():
        one, other = (torch.empty(2**28, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
        bandwidth = 2 * one.numel() / best(lambda: one.copy_(other), 10)
        rates = {}
        sizes = {torch.float32: 4096, torch.float64: 4096, torch.bfloat16: 8192, torch.float16: 8192}
        for dtype, size in sizes.items():
            p, q = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
            out = torch.empty_like(p)
            rates[dtype] = 2 * size**3 / best(lambda p=p, q=q, out=out: torch.mm(p, q, out=out), 10)
        small = torch.zeros(1, device="cuda")
        replayed, _ = graph([lambda: small.add_(1)] * 200)
        launch = 1e-6 * min(microseconds({"": (lambda: replayed.replay, 200)}, 0.05)[""])
    return Ceiling(bandwidth, rates, launch, "measured on this device when the benchmark began")


def stamp(roof: Ceiling) -> dict[str, Any]:
    """The measured ceiling and what else says under which conditions a GPU was timed."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "l2_bytes": properties.L2_cache_size,
        "copy_gb_per_s": round(roof.bytes_per_second / 1e9),
        **{f"{str(k).removeprefix('torch.')}_tflops": round(v / 1e12, 1) for k, v in roof.flops_per_second.items()},
        "graph_kernel_us": round(roof.launch_seconds * 1e6, 2),
    }

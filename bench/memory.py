"""The most memory that a call holds at once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop otherwise


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The largest running sum of torch's CPU allocations while `run` runs; on a GPU, above what was held before."""
    gc.collect()  # what earlier runs left in cycles would be freed in the middle, and taken off
    if device != "cpu":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        return torch.cuda.max_memory_allocated() - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak

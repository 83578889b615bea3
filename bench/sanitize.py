"""Runs the GPU kernels of every operator once over small cases, for NVIDIA's checkers:

    compute-sanitizer --tool memcheck  --error-exitcode 9 python -m bench.sanitize    (also racecheck, initcheck)

Every tensor gets its own allocation, so that an access beside it is seen; inputs are drawn on the host; nothing is
compiled by torch. Forward and backward, in three dtypes, with tables on the device and on the host.
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when CUDA starts

import torch
from torch import Tensor

from hypersd.kernels import use
from hypersd.kernels._op import OPS, Case, Op

from .harness import with_leaves, written

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = 60_000  # numbers in all inputs together


def cases(op: Op) -> list[Case]:
    """The small ones: those with odd sizes, which tests alone use, and the smallest of the benchmark."""
    sizes = {c: sum(v.numel() for v in c.inputs().values() if isinstance(v, Tensor)) for c in op.cases}
    small = sorted((c for c in op.cases if 0 < sizes[c] <= SMALL), key=sizes.__getitem__)
    return [c for c in small if not c.bench] + [c for c in small if c.bench][:1]


def run(op: Op, case: Case, dtype: torch.dtype, device: str, tables: str) -> None:
    """Forward and backward once; raises AssertionError where something is not finite."""
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) and (tables == device or value.dtype == dtype) else value
        for name, value in case.inputs(dtype).items()
    }
    inputs, leaves = with_leaves(op, inputs)
    value = written(op, inputs, op.function(**inputs))
    outs = (value,) if isinstance(value, Tensor) else value
    found = list(outs)
    if leaves:
        found += torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(out) for out in outs])
    assert all(bool(t.cpu().isfinite().all()) for t in found)


def implementations(op: Op, device: str) -> list[str]:
    """Our own kernels that can run there, else what would run."""
    own = [name for name in ("triton", "cuda") if not op.unavailable(name, torch.device(device))]
    return own if own and device == "cuda" else ["auto"]


def main(names: list[str], device: str = "cuda", dtypes: tuple[torch.dtype, ...] = DTYPES) -> int:
    runs = [(OPS[name], one) for name in names or OPS for one in implementations(OPS[name], device)]
    for op, implementation in runs:
        done = 0
        with use(implementation):
            for case in cases(op):
                for dtype in dtypes:
                    for tables in (device, "cpu") if case.inputs().get("coef") is not None else (device,):
                        run(op, case, dtype, device, tables)
                        done += 1
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{op.name}: {done} calls with their backward ({implementation})", flush=True)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    sys.exit(main(arguments.ops, arguments.device))

"""One process of `bench compare`: this bench over the hypersd of another folder.

python worker.py FOLDER native|times|counters OPTIONS     (OPTIONS: a JSON object; prints one JSON object a line)
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any


def arrange(folder: str) -> None:
    """`import hypersd` means the one in `folder`, `import bench` the folder of this file."""
    sys.path[0] = folder
    package = types.ModuleType("bench")
    package.__path__ = [str(Path(__file__).resolve().parent)]
    sys.modules["bench"] = package


def native() -> None:
    """Whether the C++ kernels run, or why none do."""
    from hypersd.kernels import _native

    print(json.dumps({"compiled": _native.available(), "status": _native.status()}))


def times(ops: list[str], prefixes: list[str], dtypes: list[str], seconds: float, check: bool) -> None:
    """Our time of every case and mode; what is wrong gets none."""
    import torch
    from torch import Tensor

    from bench import harness, peers
    from hypersd.kernels._op import OPS

    for op in (OPS[name] for name in ops if name in OPS):
        for case in op.cases:
            if not case.bench or not case.name.startswith(tuple(prefixes)):
                continue
            for name in dtypes:
                dtype = getattr(torch, name)
                inputs = case.inputs(dtype)
                runner, backward = peers.ours(op, inputs), bool(op.backward)
                verdict = judge(op, inputs, runner, dtype) if check else "green"
                sizes = {key: list(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
                for mode in ("fwd", "bwd", "full") if backward else ("fwd",):
                    row = {"op": op.name, "case": case.name, "dtype": name, "mode": mode, "verdict": verdict}
                    row |= {"sizes": sizes, "p50": None}
                    if verdict == "green":
                        samples = harness.interleaved({"": harness.step(runner, mode)}, seconds)[""]
                        row["p50"] = harness.percentiles(samples)[1]
                    print(json.dumps(row), flush=True)


def judge(op: Any, inputs: dict[str, Any], runner: Any, dtype: Any) -> str:
    """The verdict of the harness on results and gradients."""
    from bench import harness, peers

    wide = {k: v.double() if hasattr(v, "double") and v.is_floating_point() else v for k, v in inputs.items()}
    backward = bool(op.backward)
    exact = harness.outputs(peers.eager(op, wide), backward)
    own, plain = (harness.error(harness.outputs(one, backward), exact) for one in (runner, peers.eager(op, inputs)))
    return harness.verdict(own, plain, dtype)


def counters(ops: list[str], prefixes: list[str]) -> None:
    """Machine code and work of every operator."""
    from bench import counters as job
    from hypersd.kernels._op import OPS

    known = [name for name in ops if name in OPS]
    for kind, found in (("kernel", job.kernels(known)), ("work", job.work(known, tuple(prefixes)))):
        for entry in found:
            print(json.dumps({"kind": kind} | entry), flush=True)


if __name__ == "__main__":
    arrange(sys.argv[1])
    import hypersd.kernels  # noqa: F401  the registry fills

    {"native": native, "times": times, "counters": counters}[sys.argv[2]](**json.loads(sys.argv[3]))

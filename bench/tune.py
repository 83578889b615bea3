"""Measures the parts of lora_linear and lora_conv2d and writes the cost tables that choose among their forms.

    python -m bench.tune [lora_linear | lora_conv2d ...] [--dtype float32 ...] [--seconds 0.2]

One row a case and dtype: microseconds of each part, the least of interleaved repetitions (other work on the machine
only ever adds time). Rows of other dtypes in the file are kept.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hypersd.files import atomic_write
from hypersd.kernels import _lora
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import CONFIGS

from .environment import environment

FORMS = ("split", "accumulate", "fold")


def parts(op: str, inputs: dict) -> tuple[dict[str, int], dict[str, Callable[[], object]]]:
    """The sizes of the row, and each part as a function without arguments."""
    module = importlib.import_module(f"hypersd.kernels.{op}")
    x, weight, bias, a, b = (inputs[name] for name in ("x", "weight", "bias", "a", "b"))
    scale = inputs["scale"]
    made: dict[str, Callable[[], object]] = {}
    if op == "lora_linear":
        n, k = weight.shape
        x = x.reshape(-1, k)
        sizes = (x.shape[0], k, n, a.shape[0])
        dy = torch.randn(x.shape[0], n).to(x.dtype)
        ds, tail = dy.mm(b), (a, b, scale)
        made["ds"] = lambda: _lora.product(dy, b, scale)
        shrink = lambda: x.mm(a.t())  # noqa: E731
        dx_head, grad_head, more = (weight,), (), ()
    else:
        more = tuple([inputs[name]] * 2 for name in ("stride", "padding"))
        sizes = module._sizes(x, weight, a, *more)
        tail = (a, b * scale)
        shrink = lambda: torch.nn.functional.conv2d(x, a, None, *more)  # noqa: E731
        dy = torch.randn_like(module.forward_form("fold", x, weight, bias, *tail, None, *more))
        ds = module.narrow_grad(dy, *tail)
        made["ds"] = lambda: module.narrow_grad(dy, *tail)
        dx_head, grad_head = (x, weight), (weight,)
    s = shrink()
    for form in FORMS:
        made[form] = lambda form=form: module.forward_form(
            form, x, weight, bias, *tail, None if form == "fold" else shrink(), *more
        )
        made[f"dx_{form}"] = lambda form=form: module.input_grad_form(form, dy, ds, *dx_head, *tail, *more)
    for form in ("thin", "full"):
        made[form] = lambda form=form: module.adapter_grad_form(form, dy, ds, x, s, *grad_head, *tail, *more)
    made["shrink"] = shrink
    return dict(zip(("M", "K", "N", "R"), sizes, strict=True)), made


def measure(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The least microseconds of each, all interleaved for about `seconds` each."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    stop, rounds = time.perf_counter() + seconds * len(functions), 0
    while rounds < 5 or time.perf_counter() < stop:
        rounds += 1
        for name, function in functions.items():
            start = time.perf_counter_ns()
            function()
            best[name] = min(best[name], (time.perf_counter_ns() - start) / 1e3)
    return {name: round(value, 1) for name, value in best.items()}


def tune(op: str, dtypes: list[str], seconds: float) -> Path:
    """Write configs/cpu/<op>.json."""
    path = CONFIGS / "cpu" / f"{op}.json"
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in old if row["dtype"] not in dtypes]
    stamp = environment()
    for name in dtypes:
        for case in OPS[op].cases:
            if case.bench:
                with torch.no_grad():
                    sizes, functions = parts(op, case.inputs(getattr(torch, name)))
                    if any(row["dtype"] == name and row["sizes"] == sizes for row in rows):
                        continue  # the same case in another memory format: the forms compare alike
                    row = {"dtype": name, "sizes": sizes, "us": measure(functions, seconds)}
                rows.append(row)
                print(op, name, case.name, " ".join(f"{k}={v:.0f}" for k, v in row["us"].items()), flush=True)
    provenance = "measured on {cpu}, {threads} threads, torch {torch}, {date}".format(**stamp)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    atomic_write(path, lambda file: file.write_text(f'{{"provenance": "{provenance}", "rows": [\n  {lines}\n]}}\n'))
    _lora.plan.cache_clear()
    _lora._table.cache_clear()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=[])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.2)
    args = parser.parse_args()
    for op in args.ops or ["lora_linear", "lora_conv2d"]:
        print(tune(op, args.dtype, args.seconds))


if __name__ == "__main__":
    main()

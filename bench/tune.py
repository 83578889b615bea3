"""Measures the parts of lora_linear and lora_conv2d and writes the cost tables that choose among their forms.

    python -m bench.tune [lora_linear | lora_conv2d ...] [--dtype float32 ...] [--seconds 0.2] [--forward]

One row a shape (the operator's cases of the embedded model and of SD1.5, and every layer of an SD1.5 UNet) and dtype:
microseconds of each part, the least of interleaved repetitions (other work on the machine only ever adds time). Rows of
other dtypes in the file are kept.
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
from hypersd.kernels import _lora, _lora_rows, _native
from hypersd.kernels._op import OPS, Case
from hypersd.kernels._tune import CONFIGS

from .environment import environment

FORMS = ("split", "accumulate", "fold")
FORWARD = (*FORMS, "rows", "rows_fold", "shrink")

# (tokens, in, out) and (input size, in, out, kernel, stride) of an SD1.5 UNet's layers
LINEAR = (
    *((4096, k, n) for k, n in ((320, 320), (320, 2560), (1280, 320))),
    *((1024, k, n) for k, n in ((640, 640), (640, 5120), (2560, 640))),
    *((m, k, n) for m in (256, 64) for k, n in ((1280, 1280), (1280, 10240), (5120, 1280))),
    *((77, 768, n) for n in (320, 640, 1280)),
    *((1, 1280, n) for n in (320, 640, 1280)),
)
CONV = (
    *((64, k, n, 3, 1) for k, n in ((320, 320), (640, 320), (960, 320), (640, 640))),
    *((64, k, n, 1, 1) for k, n in ((320, 320), (640, 320), (960, 320))),
    *((32, k, n, 3, 1) for k, n in ((320, 640), (640, 640), (960, 640), (1280, 640), (1920, 640), (1280, 1280))),
    *((32, k, n, 1, 1) for k, n in ((320, 640), (640, 640), (960, 640), (1280, 640), (1920, 640))),
    *((16, k, 1280, kernel, 1) for k in (640, 1280, 1920, 2560) for kernel in (3, 1)),
    *((8, k, 1280, kernel, 1) for k in (1280, 2560) for kernel in (3, 1)),
    *((size, k, k, 3, 2) for size, k in ((64, 320), (32, 640), (16, 1280))),
)


def shapes(op: str) -> list[Case]:
    """The operator's own cases first."""
    case = importlib.import_module(f"hypersd.kernels.{op}")._case
    if op == "lora_linear":
        more = [case(f"unet_{m}x{k}x{n}", (1, m), k, n, 64) for m, k, n in LINEAR]
    else:
        more = [case(f"unet_{s}x{k}x{n}_{w}_{step}", 1, k, n, s, w, 64, stride=step) for s, k, n, w, step in CONV]
    return [c for c in OPS[op].cases if c.name.startswith(("emoji_", "sd15_"))] + more


def parts(op: str, inputs: dict) -> tuple[dict[str, int], dict[str, Callable[[], object]]]:
    """The sizes of the row, and each part as a function without arguments."""
    module = importlib.import_module(f"hypersd.kernels.{op}")
    x, weight, bias, a, b = (inputs[name] for name in ("x", "weight", "bias", "a", "b"))
    scale, inputs_ab = inputs["scale"], (a, b)
    made: dict[str, Callable[[], object]] = {}
    if op == "lora_linear":
        n, k = weight.shape
        x = x.reshape(-1, k)
        sizes = (x.shape[0], k, n, a.shape[0])
        dy = torch.randn(x.shape[0], n).to(x.dtype)
        ds, tail = dy.mm(b), (a, b, scale)
        made["ds"] = lambda: _lora.product(dy, b, scale)
        shrink = lambda: _lora.product(x, a.t(), scale)  # noqa: E731
        dx_head, grad_head, more, steps = (weight,), (), (), ((1, 1), (0, 0))
    else:
        more = steps = tuple([inputs[name]] * 2 for name in ("stride", "padding"))
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
    if weight.dim() == 4:
        x, weight, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, dy))
    if _lora_rows.takes(x, weight, a, backward=False):
        made["rows"] = lambda: _lora_rows.forward(x, weight, bias, *inputs_ab, scale, *steps, True)
        if x.dtype == torch.float32:
            made["rows_fold"] = lambda: _lora_rows.forward(x, weight, bias, *inputs_ab, scale, *steps, False, True)
    if _lora_rows.takes(x, weight, a):
        kept = made["rows"]()[1]
        for name, needs in {"rows_dx": (True, False), "rows_grad": (False, True), "rows_both": (True, True)}.items():
            made[name] = lambda needs=needs: _lora_rows.backward(dy, x, kept, weight, *inputs_ab, scale, *steps, *needs)
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


def tune(op: str, dtypes: list[str], seconds: float, forward: bool = False) -> Path:
    """Write configs/<kind of CPU>/<op>.json; with `forward` only those parts anew, beside a row's others."""
    path = CONFIGS / _native.cpu_kind() / f"{op}.json"
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in old if row["dtype"] not in dtypes]
    stamp = environment()
    for name in dtypes:
        for case in shapes(op):
            with torch.no_grad():
                sizes, functions = parts(op, case.inputs(getattr(torch, name)))
                if any(row["dtype"] == name and row["sizes"] == sizes for row in rows):
                    continue  # the same case in another memory format: the forms compare alike
                row = {"dtype": name, "sizes": sizes, "us": {}}
                if forward:
                    row = next((r for r in old if r["dtype"] == name and r["sizes"] == sizes), row)
                if row["us"]:  # a row that is new needs every part
                    functions = {part: function for part, function in functions.items() if part in FORWARD}
                row["us"] = row["us"] | measure(functions, seconds)
            rows.append(row)
            print(op, name, case.name, " ".join(f"{k}={v:.0f}" for k, v in row["us"].items()), flush=True)
    provenance = "measured on {cpu}, {threads} threads, torch {torch}, {date}".format(**stamp)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    atomic_write(path, lambda file: file.write_text(f'{{"provenance": "{provenance}", "rows": [\n  {lines}\n]}}\n'))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", default=[])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--forward", action="store_true", help="the parts of the forward alone")
    args = parser.parse_args()
    for op in args.ops or ["lora_linear", "lora_conv2d"]:
        print(tune(op, args.dtype, args.seconds, args.forward))


if __name__ == "__main__":
    main()

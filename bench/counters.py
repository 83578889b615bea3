"""What needs no clock: machine code of the Triton kernels, and work by cost() of the operators' cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hypersd.errors import HypersdError
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import triton_missing

NVIDIA = ("sm_80", "sm_90")
Found = dict[str, Any]


def kernels(ops: Iterable[str], targets: Sequence[str] = NVIDIA) -> list[Found]:
    """One entry for each kernel that ships, and target: op, kernel, target, counters."""
    if triton_missing():
        return []
    from . import offline

    return [
        {"op": name, "kernel": program.name, "target": target}
        | asdict(offline.counters(offline.build(program, target)))
        for name in ops
        if OPS[name].programs
        for program in OPS[name].programs()  # type: ignore[misc]
        for target in targets
    ]


def work(ops: Iterable[str], prefixes: tuple[str, ...]) -> list[Found]:
    """One entry for each benchmark case: bytes, flops and launches that cost() declares, in float32."""
    found = []
    for name in ops:
        for case in OPS[name].cases if OPS[name].cost else ():
            if case.bench and case.name.startswith(prefixes):
                with FakeTensorMode():
                    inputs = case.inputs()
                    cost = OPS[name].cost(**inputs)  # type: ignore[misc]
                sizes = {key: list(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
                found.append({"op": name, "case": case.name, **vars(cost), "sizes": sizes})
    return found


def _row(entry: Found) -> list[str]:
    numbers = [str(entry[key]) for key in ("registers", "spills", "shared")]
    numbers += [f"{entry[f'wide_{kind}']}/{entry[kind]}" for kind in ("loads", "stores")]
    return [entry["kernel"], *numbers, *(str(entry[key]) for key in ("async_copies", "wgmma", "mma", "instructions"))]


def show(found: dict[str, list[Found]], console: Console) -> None:
    """A table for each operator and target, and one of the work; 80 columns are enough."""
    heads = ("regs", "spill", "shared", "loads", "stores", "async", "wgmma", "mma", "instr")
    for op, target in dict.fromkeys((entry["op"], entry["target"]) for entry in found["kernels"]):
        title = f"{op} on {target} (loads and stores: of 128 bits / all)"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.add_column("kernel", overflow="fold")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for entry in found["kernels"]:
            if (entry["op"], entry["target"]) == (op, target):
                table.add_row(*_row(entry))
        console.print(table)
    if found["work"]:
        table = Table(title="work by cost(), float32", title_justify="left", box=None, pad_edge=False)
        for head in ("op", "case"):
            table.add_column(head, overflow="fold")
        for head in ("bytes", "flops", "launches"):
            table.add_column(head, justify="right", no_wrap=True)
        for entry in found["work"]:
            amounts = (f"{entry['bytes']:,.0f}", f"{entry['flops']:.3g}", str(entry["launches"]))
            table.add_row(entry["op"], entry["case"], *amounts)
        console.print(table)


def main(
    ops: Sequence[str],
    *,
    targets: Sequence[str] | None = None,
    shapes: Sequence[str] | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> int:
    """Print the counters of `ops` (default: all). Returns 0; HypersdError for a name that is not known."""
    from .run import unknown

    console = console or Console()
    targets = targets or NVIDIA
    wrong = unknown(ops, shapes or (), (), list(OPS))
    strange = [name for name in targets if name not in NVIDIA]
    if wrong or strange:
        said = wrong or f"no target {strange[0]}; known: {', '.join(NVIDIA)}"
        raise HypersdError(said, exit_code=2)
    names = list(ops) or list(OPS)
    prefixes = tuple(f"{name}_" for name in shapes) if shapes else ("",)
    if as_json:
        print(json.dumps({"kernels": kernels(names, targets), "work": work(names, prefixes)}, indent=1))
        return 0
    if triton_missing():
        console.print(f"no machine code: {triton_missing()}", style="dim", soft_wrap=True)
    for name in names:
        show({"kernels": kernels([name], targets), "work": []}, console)
    show({"kernels": [], "work": work(names, prefixes)}, console)
    return 0

"""What `hypersd bench` runs: the operators asked for, over the shape sets asked for, reported as they end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hypersd.errors import HypersdError
from hypersd.kernels._op import OPS
from hypersd.kernels._shapes import SETS

from . import peers as peers_of
from . import report, roofline
from .environment import environment
from .harness import OURS, Result, measure_op

# what is quick: the embedded model on a CPU, and there torch.compile takes most of the time
SHAPES = {"cpu": ("emoji",), "cuda": ("sd15", "sdxl")}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
SECONDS = {"cpu": 0.2, "cuda": 0.15}
PEERS = {  # of what is timed besides operators
    "sampler_step": ("scheduler", "diffusers"),
    "sd15_unet": ("peft", "base", "diffusers"),
    "tscd_step": ("diffusers+peft",),
}


def others() -> dict[str, Callable[..., Iterable[list[Result]]]]:
    """What is timed besides operators, by name."""
    from . import sampler, sd15_unet, tscd_step

    return {"sampler_step": sampler.measure, "sd15_unet": sd15_unet.measure, "tscd_step": tscd_step.measure}


def unknown(ops: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], known_ops: Sequence[str] = ()) -> str:
    """One line about the first name that is not known; empty when all are."""
    for what, names, known in (
        ("operator", ops, known_ops or [*OPS, *others()]),
        ("shape set", shapes, SETS),
        ("dtype", dtypes, ("float32", "float64", "bfloat16", "float16")),
    ):
        for name in names:
            if name not in known:
                return f"no {what} {name}; known: {', '.join(known)}"
    return ""


def unwritable(path: Path | None) -> str:
    """One line about why no file can be written there; empty when one can."""
    if path is None or (path.parent.is_dir() and not path.is_dir()):
        return ""
    return f"{path} is a folder, name a file" if path.is_dir() else f"{path}: there is no folder {path.parent}; make it"


def unknown_peer(ops: Sequence[str], peers: Sequence[str]) -> str:
    """One line about the first peer that none of `ops` has; empty when all are known."""
    named = [p for op in ("", *ops) for p in (*peers_of.PROVIDERS.get(op, ()), *PEERS.get(op, ()))]
    known = list(dict.fromkeys(named))
    wrong = next((peer for peer in peers if peer not in known), None)
    return f"no peer {wrong}; known: {', '.join(known)}" if wrong else ""


def main(
    ops: Sequence[str] = (),
    *,
    device: str = "cpu",
    json_path: Path | None = None,
    plot_path: Path | None = None,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    peers: Sequence[str] | None = None,
    seconds: float | None = None,
    console: Console | None = None,
) -> int:
    """Measure `ops` (default: every operator and the sampler step) and print a table each. Returns 1 when one of our
    own rows is red, else 0. `seconds` is the time of a case, dtype and mode. Raises HypersdError for a name that is not
    known or a file that has no folder."""
    console = console or Console()
    names, shapes, dtypes = list(ops) or [*OPS, "sampler_step"], shapes or SHAPES[device], dtypes or DTYPES[device]
    wrong = unknown(names, shapes, dtypes) or unknown_peer(names, peers or ())
    wrong = wrong or unwritable(json_path) or unwritable(plot_path)
    if wrong:
        raise HypersdError(wrong, exit_code=2)
    types = [getattr(torch, name) for name in dtypes]
    roof = roofline.measured(device, types)
    stamp = environment(device) | roof.stamp()
    console.print(" ".join(f"{key}={value}" for key, value in stamp.items()), style="dim", soft_wrap=True)
    options: dict[str, Any] = {
        "device": device, "shapes": tuple(f"{name}_" for name in shapes), "peers": peers, "dtypes": types,
        "seconds": seconds or SECONDS[device],
    }  # fmt: skip
    every: list[Result] = []
    for name in names:
        for peer, why in peers_of.absent(name, device).items():
            console.print(f"{name}: {peer} is not available: {why}", style="dim", soft_wrap=True, markup=False)
        rows: list[Result] = []
        for group in measure_op(OPS[name], roof=roof, **options) if name in OPS else others()[name](**options):
            rows += group
            if json_path is not None:
                report.write(group, json_path, stamp)
        if rows:
            report.show(rows, console)
        else:
            console.print(f"{name} has no case in {', '.join(shapes)}", style="dim")
        every += rows
    if plot_path is not None and every:
        report.plot(every, plot_path, stamp)
    return int(any(row.provider == OURS and not row.green for row in every))

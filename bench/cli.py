"""`hypersd bench`: run (what is meant when no command is named), compare, counters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class RunUnlessNamed(TyperGroup):
    """`hypersd bench geglu` means `hypersd bench run geglu`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunUnlessNamed, help="Time the kernels against their peers, or two states of the code.")

Ops = Annotated[list[str] | None, typer.Argument(metavar="[OP]...", help="operators; default: all")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="SET", help="emoji, sd15, sdxl, sd3 or flux; repeatable; default: emoji; on cuda sd15, sdxl"),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="repeatable; default: float32 and bfloat16; on cuda bfloat16"),
]
Seconds = Annotated[float | None, typer.Option(min=0.001, help="time for each case, dtype and mode")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="append one JSON line a row")]


def _end(code: int) -> None:
    if code:
        raise typer.Exit(code)


@app.command()
def run(
    ops: Ops = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    peer: Annotated[list[str] | None, typer.Option(help="only this peer; repeatable; default: all")] = None,
    seconds: Seconds = None,
    json_file: Json = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="time and share of the roofline")] = None,
) -> None:
    """Time operators against their peers; every row is checked for correctness before it is timed.

    Beside the operators there are sampler_step and tscd_step, a solver step and a whole training step, and sd15_unet,
    a full-size UNet with an unmerged LoRA (five minutes).
    """
    from hypersd import resolve

    from .run import main

    _end(
        main(
            ops or [], device=resolve.pick_device(device).type, json_path=json_file, plot_path=plot, shapes=shapes,
            dtypes=dtypes, peers=peer, seconds=seconds,
        )
    )  # fmt: skip


@app.command()
def compare(
    reference: Annotated[str, typer.Argument(metavar="REF", help="a git commit or branch, or a file of rows")],
    ops: Ops = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the rows to compare with a REF that is a file")
    ] = None,
    shapes: Shapes = None,
    dtypes: Dtypes = None,
    seconds: Seconds = None,
    rounds: Annotated[int, typer.Option(min=2, help="processes of each state, in turns")] = 5,
    times: Annotated[bool, typer.Option(help="compare times")] = True,
    counters: Annotated[bool, typer.Option(help="compare what the compiled kernels hold and do")] = True,
    json_file: Json = None,
) -> None:
    """This tree against another state of it: times of the CPU's kernels, in processes that take turns, with their
    noise; and, noise-free, registers, spills, shared memory, loads and matrix products of the GPU's kernels."""
    from . import compare as job

    if Path(reference).is_file():
        if rows is None:
            raise typer.BadParameter("REF is a file of rows: name the other file with --rows")
        _end(job.files(Path(reference), rows, ops or []))
        return
    _end(
        job.trees(
            reference, ops or [], shapes=shapes, dtypes=dtypes, seconds=seconds, rounds=rounds, times=times,
            counters=counters, json_path=json_file,
        )
    )  # fmt: skip


@app.command()
def counters(
    ops: Ops = None,
    target: Annotated[list[str] | None, typer.Option(help="sm_80 or sm_90; repeatable; default: both")] = None,
    shapes: Shapes = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What the Triton kernels compile to, and what each operator must move and launch; no GPU is needed."""
    from . import counters as job

    _end(job.main(ops or [], targets=target, shapes=shapes, as_json=as_json))

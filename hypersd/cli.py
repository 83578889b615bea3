"""The `hypersd` command: what a person types, checked, handed on, and every failure said in one line.

Exit code 0: done. 2: the request is wrong (option, recipe). 1: anything else. `--debug`, anywhere, shows tracebacks.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from hypersd.errors import HypersdError
from hypersd.memory import keep_freed_memory

app = typer.Typer(
    name="hypersd",
    help="Distil a latent diffusion model into one that samples in 1 to 8 steps, and sample from it.",
    epilog="--debug, anywhere, shows the traceback of a failure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
try:
    from hypersd.bench.cli import app as bench
except ModuleNotFoundError:  # a checkout that is not installed
    from bench.cli import app as bench
app.add_typer(bench, name="bench")
out_console, error_console = Console(), Console(stderr=True)

Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu or cuda")]
Model = Annotated[str, typer.Option(help='"embedded", or a folder in the diffusers layout')]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]


class BudgetName(str, Enum):
    quick = "quick"
    full = "full"


class DtypeName(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


Dtype = Annotated[DtypeName, typer.Option(help="of the network; bfloat16 for large ones")]


class Format(str, Enum):
    peft = "peft"
    kohya = "kohya"
    hyper = "hyper"


class Solver(str, Enum):
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    tcd = "tcd"
    lcm = "lcm"
    perflow = "perflow"
    euler = "euler"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the LoRA, pictures, metrics.json and report.html")] = Path(
        "out/demo"
    ),
    budget: Annotated[
        BudgetName, typer.Option(help="quick: minutes on two cores; full: an hour or so")
    ] = BudgetName.quick,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint of this budget in the folder")] = False,
    device: Device = "auto",
) -> None:
    """Distil the embedded model, sample it in 1, 2, 4 and 8 steps beside its teacher, and write a report."""
    from hypersd import demo as job

    metrics = job.run(out, budget.value, resume=resume, device=device, console=error_console)
    _summary(metrics)
    _say(f"report: {out / 'report.html'}")


@app.command()
def distill(
    recipe: Annotated[str, typer.Argument(help="a TOML file, or the name of a shipped recipe")],
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="override one key; repeatable")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="run folder [default: out/RECIPE]")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in the run folder")] = False,
    from_good: Annotated[
        bool,
        typer.Option(help="go back to checkpoint.good, from before a warning; --set may change what is not yet over"),
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="check everything, print the plan, load and write nothing")] = False,
    device: Device = "auto",
) -> None:
    """Train a few-step LoRA, or a whole few-step network, by a recipe."""
    from hypersd import resolve
    from hypersd.distill.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    out = out or Path("out") / Path(recipe).stem
    resolve.check(loaded, out, resume=resume, from_good=from_good)
    if dry_run:
        from hypersd import plan

        plan.show(plan.plan(loaded), out_console)
        return
    from hypersd.console import Progress
    from hypersd.distill import parallel
    from hypersd.distill.trainer import Trainer

    out = resolve.writable(out)
    with ExitStack() as held:
        held.enter_context(parallel.joined(device))
        if parallel.is_first():
            held.enter_context(resolve.alone(out))
        else:
            _be_quiet()
        progress = held.enter_context(Progress(loaded.work, error_console))
        with parallel.in_turn():
            components, dataset = resolve.load_run(
                loaded, out / "latents", device, lambda done, total: progress("encode pictures", done, total)
            )
        trainer = Trainer(
            loaded, components, dataset, out,
            progress=lambda stage, step, total, loss: progress(stage, step, total, f"loss {loss:.3g}"),
            **resolve.load_rewards(loaded, components),
        )  # fmt: skip
        trainer.run(resume=resume, from_good=from_good)
    _say(f"{'weights' if loaded.train.full else 'LoRA'}: {trainer.file}")


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="captions, one picture each")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file; its metadata says how to sample")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="file of a whole network, in diffusers' keys, instead of a LoRA")
    ] = None,
    model: Model = "embedded",
    prompt_file: Annotated[Path | None, typer.Option(help="text file with one caption a line")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="[default: the LoRA's; 25 without one]")] = None,
    solver: Annotated[Solver | None, typer.Option(help="[default: the LoRA's]")] = None,
    timesteps: Annotated[
        str, typer.Option(help="where to sample, such as 999,749,499,249 [default: the LoRA's or solver's]")
    ] = "",
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="noise put back in each step [default: the LoRA's]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=0, help="[default: the LoRA's; 3, for FLUX 3.5, without one]")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="what no picture shall show; needs guidance above 1")] = "",
    resolution: Annotated[
        int | None, typer.Option(min=8, help="pixels a side [default: the LoRA's or model's]")
    ] = None,
    dtype: Dtype = DtypeName.float32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="folder for the PNG files")] = Path("out/samples"),
    device: Device = "auto",
) -> None:
    """Sample pictures: one PNG a caption, and grid.png."""
    from hypersd import pictures, resolve
    from hypersd.sampling.sampler import SOLVERS, sampler_for

    captions = resolve.captions(prompts or [], prompt_file)
    try:
        grid = [int(part) for part in timesteps.split(",")] if timesteps else []
    except ValueError:
        raise HypersdError(f"--timesteps {timesteps} is not a list such as 999,749,499,249", exit_code=2) from None
    if grid and steps not in (None, len(grid)):
        raise HypersdError(f"--timesteps names {len(grid)} and --steps {steps}; leave --steps out", exit_code=2)
    steps = len(grid) or steps
    out = resolve.writable(out)
    undistilled = {"solver": "ddim", "steps": str(steps or 25)}
    if lora and weights:
        raise HypersdError("--lora and --weights exclude each other; leave one out", exit_code=2)
    if weights:
        state, metadata = resolve.read_weights(weights)
    else:
        state, metadata = resolve.read_lora(lora) if lora else ({}, undistilled)
    if solver is not None and solver.value != metadata.get("solver"):
        for name in ("eta", "timesteps"):  # they belong to the file's own solver
            metadata.pop(name, None)
    given = {"solver": solver and solver.value, "timesteps": grid or None, "eta": eta}
    metadata |= {name: str(value) for name, value in given.items() if value is not None}
    chosen = metadata.get("solver", "tcd")
    if eta is not None and "eta" not in SOLVERS.get(chosen, (None, {}))[1]:
        raise HypersdError(f"--eta means nothing to the solver {chosen}; it is for ddim and tcd", exit_code=2)
    if grid and chosen not in SOLVERS:
        raise HypersdError(f"--timesteps means nothing to the solver {chosen}; name another --solver", exit_code=2)
    backbone, components, process = resolve.load_with_lora(
        model, state, metadata, device, resolution=resolution, dtype=dtype.value
    )
    metadata = resolve.told_guidance(metadata, backbone.network, guidance_scale, usual=1.0 if state else 3.0)
    table = sampler_for(process, metadata, steps)
    if negative_prompt and not table.is_guided:
        raise HypersdError("--negative-prompt needs a guidance of two passes: --guidance-scale above 1", exit_code=2)
    pictures.sample_to(
        out, components, backbone, table, captions, role="lora" if state else "base", seed=seed,
        negative_prompt=negative_prompt,
    )  # fmt: skip
    _say(f"{len(captions)} pictures in {out}")


class _Evaluate(TyperGroup):
    """`hypersd evaluate FILE` judges a file, `hypersd evaluate paper` is a command of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args[:1] == ["paper"] else ["lora", *args])


evaluation = typer.Typer(cls=_Evaluate)
app.add_typer(evaluation, name="evaluate", help="Judge a LoRA beside its teacher; `evaluate paper`: every method.")


@evaluation.command("lora")
def evaluate(
    lora: Annotated[Path, typer.Argument(help="LoRA file, or that of a whole network")],
    model: Model = "embedded",
    pictures: Annotated[
        Path | None, typer.Option(help="folder of real captioned pictures [embedded: held-out scenes]")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="their CSV or JSONL file [default: found in the folder]")
    ] = None,
    features: Annotated[str, typer.Option(help="judge (embedded model only) or effnet-lite0")] = "",
    samples: Annotated[int, typer.Option(min=2, help="pictures a row")] = 512,
    guidance_scale: Annotated[float, typer.Option(help="of teacher and undistilled model")] = 3.0,
    dtype: Dtype = DtypeName.float32,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="folder for metrics.json, pictures and report.html")] = Path("out/evaluate"),
    device: Device = "auto",
) -> None:
    """Judge a LoRA, at the numbers of steps it is made for, beside its teacher and the undistilled model."""
    from hypersd.compare import compare

    metrics = compare(
        lora, model, out, pictures=pictures, captions=captions, features=features, samples=samples,
        guidance_scale=guidance_scale, seed=seed, device=device, dtype=dtype.value, console=error_console,
    )  # fmt: skip
    _summary(metrics)
    _say(f"report: {out / 'report.html'}")


@evaluation.command("paper")
def evaluate_paper(
    methods: Annotated[
        list[str] | None, typer.Argument(help="only these, as lcm or pcm-phases4 [default: all]")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=1, help="network evaluations of each training; forward 1, backward 2")
    ] = 100_000,
    samples: Annotated[int, typer.Option(min=2, help="pictures a row")] = 1024,
    seeds: Annotated[int, typer.Option(min=1, help="how many")] = 3,
    overrides: Annotated[list[str], typer.Option("--set", metavar="A.B=C", help="override a key of every recipe")] = [],  # noqa: B006
    rows: Annotated[Path, typer.Option(help="file that rows are appended to")] = Path("bench/results/paper.jsonl"),
    page: Annotated[Path, typer.Option(help="page that --draw writes")] = Path("docs/paper.md"),
    draw: Annotated[bool, typer.Option("--draw", help="only draw the page from the rows")] = False,
    out: Annotated[Path, typer.Option(help="folder for trainings and judged pictures")] = Path("out/paper"),
    device: Device = "auto",
) -> None:
    """Train every method at the same budget on the embedded model and judge it; goes on where it was stopped."""
    from hypersd import paper

    if not draw:
        chosen = paper.choose(methods or [])
        job = paper.Paper(
            out, rows, budget=budget, samples=samples, overrides=overrides, device=device, console=error_console
        )
        job.run(chosen, range(seeds))
        _say(f"rows: {rows}")
        return
    paper.write_page(rows, page)
    _say(f"page: {page}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="LoRA file")],
    target: Annotated[Path, typer.Argument(help="file to write")],
    format: Annotated[Format, typer.Option("--format", help="key layout of the target")],
    model: Model = "embedded",
) -> None:
    """Rewrite a LoRA file in PEFT's or (SD1.5, SDXL) kohya's keys, or as the published Hyper-SD3 and Hyper-FLUX files
    are (hyper: no alpha, for a weight of 0.125); --model names the model it belongs to."""
    from hypersd import resolve

    resolve.convert(source, target, format.value, model)
    _say(f"{format.value} LoRA: {target}")


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="FILE...", help="LoRA files; the first says how to sample")],
    out: Annotated[Path, typer.Option(help="file to write")],
    weights: Annotated[str, typer.Option(help="strength of each file, such as 1,0.5 [default: 1 each]")] = "",
    rank: Annotated[int | None, typer.Option(min=1, help="cut to this rank by SVD [default: exact, the sum]")] = None,
    format: Annotated[Format, typer.Option("--format", help="key layout of the target")] = Format.peft,
    model: Model = "embedded",
) -> None:
    """Merge LoRA files into one: the sum of their updates, exactly or cut to a rank. One file: only its strength."""
    from hypersd import resolve

    try:
        strengths = [float(part) for part in weights.split(",")] if weights else [1.0] * len(sources)
    except ValueError:
        raise HypersdError(f"--weights {weights} is not a list of numbers such as 1,0.5", exit_code=2) from None
    dropped = resolve.merge(sources, strengths, out, model, rank=rank, format=format.value)
    _say(f"merged LoRA: {out}" + (f", {100 * dropped:.3g} % of the update's energy dropped" if rank else ""))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say what is installed, which kernels run, and for those that do not, why."""
    from hypersd.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        items = value.items() if isinstance(value, dict) else [("", value)]
        for number, (key, item) in enumerate(items):
            text = ", ".join(item) if isinstance(item, list) else str(item)
            head = name if number == 0 else ""
            out_console.print(
                f"[bold]{head:<24}[/bold]{key + ' ' if key else ''}{escape(text)}", highlight=False, soft_wrap=True
            )


def _be_quiet() -> None:
    """One of several processes speaks for all of them."""
    out_console.quiet = error_console.quiet = True
    logging.getLogger("hypersd").setLevel(logging.ERROR)


def _say(text: str) -> None:
    out_console.print(escape(text), highlight=False, soft_wrap=True)


def _summary(metrics: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,  # 80 columns are enough
        title=f"{metrics['samples']} pictures a row, features: {metrics['features']}",
        title_justify="left",
    )
    for name in ("", "NFE", "Frechet", "alignment", "objects", "aesthetic", "diversity"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def add(label: str, row: dict[str, Any], style: str = "") -> None:
        values = [row[key] for key in ("frechet", "alignment", "objects", "aesthetic", "diversity")]
        table.add_row(label, str(row["nfe"]), *("–" if v is None else f"{v:.3g}" for v in values), style=style)

    add("teacher", metrics["teacher"])
    for group in ("undistilled", "student"):
        table.add_section()
        for steps, row in metrics[group].items():
            add(f"{group}, {steps} step{'s' if steps != '1' else ''}", row, "bold" if group == "student" else "")
    out_console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; ends the process with the exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The command's exit code. Every failure is one line on stderr, unless `--debug` asks for more."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments[:1] != ["bench"]:  # which measures what others do in a process as it comes
        keep_freed_memory()
    # nothing here ever needs a hub; without this the loaders would try to reach one
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not debug:
        warnings.simplefilter("ignore")
        for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(arguments, standalone_mode=False)
        if code == 130:  # how newer typer reports Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except HypersdError as error:
        return _fail(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; what was finished before is intact", 1, debug)
    except BrokenPipeError:
        # the reader of our output is gone: nothing more can be said
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 1
    except MemoryError:
        return _fail("out of memory; take a smaller batch or model", 1, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own usage errors, whichever click they come from
            return _fail(f"{error.format_message()} (see --help)", getattr(error, "exit_code", 2), debug)
        kind = type(error).__name__
        return _fail(f"unexpected {kind}: {error or 'no message'}; run again with --debug for the traceback", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if code == 2 and os.environ.get("RANK", "0") != "0":
        return code  # the first of several processes is told the same, and says it
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code

"""`hypersd bench compare`: this tree against another git state of it, or two files of rows.

Times: one process after the other runs the kernels of one state, the two states taking turns, all with the bench and
the libraries of this tree. A ratio counts as a change when it leaves 1 by more than 5 % and by more than three standard
errors of its mean over the turns. Machine code needs no such bound: equal sources give equal counts.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hypersd.errors import HypersdError

HERE = Path(__file__).resolve().parent
THRESHOLD, SIGMAS = 0.05, 3.0
KEY = ("op", "case", "dtype", "mode", "provider")
Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One row in both states: microseconds, their ratio (above 1: now slower) and its noise bound."""

    key: tuple[str, ...]
    before: float
    now: float
    ratio: float
    bound: float

    @property
    def verdict(self) -> str:
        if abs(self.ratio - 1) <= self.bound:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def change(key: tuple[str, ...], before: Sequence[float], now: Sequence[float], sigma: float | None = None) -> Change:
    """Times of the turns, in pairs; `sigma` is the standard error of the ratio where one turn cannot tell it."""
    logs = [math.log(b / a) for a, b in zip(before, now, strict=True)]
    ratio = math.exp(statistics.fmean(logs))
    if sigma is None:
        sigma = ratio * statistics.stdev(logs) / math.sqrt(len(logs))
    return Change(key, statistics.median(before), statistics.median(now), ratio, max(THRESHOLD, SIGMAS * sigma))


# ---- two files ----------------------------------------------------------------------------------------------------


def read(path: Path, ops: Sequence[str]) -> dict[tuple[str, ...], list[Row]]:
    """The timed rows of a file by key, in order: one row for each run of it. Raises HypersdError for other files."""
    found: dict[tuple[str, ...], list[Row]] = {}
    number = 0
    try:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):  # noqa: B007
            row = json.loads(line)
            if row["p50"] and (not ops or row["op"] in ops):
                found.setdefault(tuple(row[name] for name in KEY), []).append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise HypersdError(f"{path} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise HypersdError(f"{path}, line {number}: not a row of `hypersd bench --json` ({error})") from error
    return found


def _spread(row: Row) -> float:
    """The relative standard deviation of single calls, from the percentiles 20 and 80 of a row."""
    return (row["p80"] - row["p20"]) / (2 * 0.8416 * row["p50"])


def files(reference: Path, rows: Path, ops: Sequence[str], console: Console | None = None) -> int:
    """Compare the rows that both files have. A key with several rows in both files gets its noise from them, one
    with a single row from the spread of its calls, which overstates it."""
    console = console or Console()
    before, now = read(reference, ops), read(rows, ops)
    changes = []
    for key in (key for key in before if key in now):
        turns = min(len(before[key]), len(now[key]))
        olds, news = before[key][-turns:], now[key][-turns:]
        sigma = math.hypot(_spread(olds[0]), _spread(news[0])) if turns == 1 else None
        changes.append(change(key, [row["p50"] for row in olds], [row["p50"] for row in news], sigma))
    if not changes:
        raise HypersdError(f"{reference} and {rows} have no timed row in common")
    machines = {(row[0]["device"], row[0]["cpu"]) for found in (before, now) for row in found.values()}
    if len(machines) > 1:
        console.print(f"the rows come from different machines: {sorted(machines)}", style="yellow", soft_wrap=True)
    show(changes, console)
    return 0


# ---- two trees ----------------------------------------------------------------------------------------------------


def git(*arguments: str, folder: Path = HERE) -> str:
    """Output of a git command. Raises HypersdError with git's own first line."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise HypersdError(f"git cannot be run ({error}); bench compare needs a git checkout") from error
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[0]
        raise HypersdError(
            f"git {arguments[0]}: {said}; bench compare needs a git checkout and a commit or branch of it"
        )
    return done.stdout.strip()


@contextmanager
def checkout(reference: str, console: Console) -> Iterator[Path]:
    """A worktree of `reference` with its C++ kernels: this tree's, where the sources are equal, else built anew."""
    root = Path(git("rev-parse", "--show-toplevel"))
    commit = git("rev-parse", "--verify", f"{reference}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="hypersd-compare-")) / "tree"
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        built = [*(root / "hypersd").glob("_C.*so")]
        same = not git("diff", "--name-only", commit, "--", "csrc", "setup.py", folder=root)
        if built and same:
            shutil.copy(built[0], folder / "hypersd")
        elif built:
            console.print(f"building the C++ kernels of {reference}", style="dim")
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode or not [*(folder / "hypersd").glob("_C.*so")]:
                said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
                raise HypersdError(f"the C++ kernels of {reference} do not build: {said}")
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))
        shutil.rmtree(folder.parent, ignore_errors=True)


def work(folder: Path, job: str, **options: Any) -> list[Row]:
    """What a worker process says about the tree in `folder`."""
    command = [sys.executable, str(HERE / "worker.py"), str(folder), job, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        raise HypersdError(f"{job} of {folder.name} ended with code {done.returncode}: {said}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def trees(
    reference: str,
    ops: Sequence[str],
    *,
    shapes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    seconds: float | None = None,
    rounds: int = 3,
    times: bool = True,
    counters: bool = True,
    json_path: Path | None = None,
    console: Console | None = None,
) -> int:
    """Compare this tree with `reference`. Returns 0 whatever it finds; HypersdError for an unknown name or a missing
    folder."""
    from hypersd.kernels._op import OPS

    from .run import DTYPES, SHAPES, unknown, unwritable

    console = console or Console()
    shapes, dtypes = list(shapes or SHAPES["cpu"]), list(dtypes or DTYPES["cpu"])
    wrong = unknown(ops, shapes, dtypes, list(OPS)) or unwritable(json_path)
    if wrong:
        raise HypersdError(wrong, exit_code=2)
    asked = {"ops": list(ops) or list(OPS), "prefixes": [f"{name}_" for name in shapes]}
    now = HERE.parent
    with checkout(reference, console) as before:
        if times:
            stamp = {"reference": reference, **compiled(before, now, console)}
            changes = timed(before, now, rounds, console, dtypes=dtypes, seconds=seconds or 0.05, **asked)
            show(changes, console)
            if json_path is not None:
                with json_path.open("a") as file:
                    for one in changes:
                        file.write(json.dumps(vars(one) | {"verdict": one.verdict} | stamp) + "\n")
        if counters:
            show_counters(work(before, "counters", **asked), work(now, "counters", **asked), console)
    return 0


def compiled(before: Path, now: Path, console: Console) -> dict[str, bool]:
    """Whether each state runs its C++ kernels, as its rows are stamped; says so where one does not."""
    stamp = {}
    for name, which, folder in (("before", "the reference", before), ("now", "this tree", now)):
        (said,) = work(folder, "native")
        stamp[f"{name}_compiled"] = said["compiled"]
        if not said["compiled"]:
            line = f"{which} has no compiled kernels, its times are those of the references in Python: {said['status']}"
            console.print(line, style="yellow", soft_wrap=True, highlight=False)
    return stamp


def timed(before: Path, now: Path, rounds: int, console: Console, **options: Any) -> list[Change]:
    """The rows that both states have with the same sizes and right results, `rounds` processes each, in turns."""
    samples: dict[tuple[str, ...], tuple[list[float], list[float]]] = {}
    sizes: dict[tuple[str, ...], list[Any]] = {}
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)  # neither state always runs after the other
        for state in order:
            for row in work((before, now)[state], "times", check=turn == 0, **options):
                key = tuple(row[name] for name in KEY[:-1])
                if row["p50"] is None:
                    which = ("the reference", "this tree")[state]
                    console.print(f"{' '.join(key)}, {which}: {row['verdict']}", style="red", soft_wrap=True)
                    continue
                samples.setdefault(key, ([], []))[state].append(row["p50"])
                sizes.setdefault(key, []).append(row["sizes"])
        console.print(f"turn {turn + 1} of {rounds} done", style="dim")
    whole = {key: pair for key, pair in samples.items() if len(pair[0]) == len(pair[1]) == rounds}
    fair = {key: pair for key, pair in whole.items() if all(size == sizes[key][0] for size in sizes[key])}
    if len(fair) < len(samples):
        console.print(f"{len(samples) - len(fair)} rows are not in both states with the same sizes", style="yellow")
    return [change(key, *pair) for key, pair in fair.items()]


# ---- reporting ----------------------------------------------------------------------------------------------------


def show(changes: Sequence[Change], console: Console) -> None:
    """A table for each operator and dtype, and how many rows changed."""
    from .report import microseconds

    for op, dtype in dict.fromkeys((one.key[0], one.key[2]) for one in changes):
        title = f"{op}, {dtype}: time now over before"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for head in ("case", "mode"):
            table.add_column(head, no_wrap=True)
        for head in ("before us", "now us", "ratio", "noise"):
            table.add_column(head, justify="right", overflow="fold")
        table.add_column("", no_wrap=True)
        for one in changes:
            if (one.key[0], one.key[2]) == (op, dtype):
                who = f"{one.key[1]} {one.key[4]}" if len(one.key) > 4 else one.key[1]
                style = {"slower": "red", "faster": "green"}.get(one.verdict, "")
                cells = [who, one.key[3], microseconds(one.before), microseconds(one.now)]
                table.add_row(*cells, f"{one.ratio:.3f}", f"{100 * one.bound:.0f}%", one.verdict, style=style)
        console.print(table)
    count = {name: sum(one.verdict == name for one in changes) for name in ("faster", "same", "slower")}
    console.print(f"{count['faster']} faster, {count['same']} the same, {count['slower']} slower of {len(changes)}")


def differences(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """One line for each kernel or case whose counters are not those of before."""

    def by_name(rows: Sequence[Row]) -> dict[str, Row]:
        names = ("kind", "op", "kernel", "target", "case")
        return {" ".join(str(row[name]) for name in names if name in row): row for row in rows}

    old, new = by_name(before), by_name(now)
    lines = [f"{name}: gone" for name in old if name not in new]
    for name, row in new.items():
        if name not in old:
            lines.append(f"{name}: new")
            continue
        moved = [f"{key} {old[name].get(key)} -> {value}" for key, value in row.items() if old[name].get(key) != value]
        lines += [f"{name}: {', '.join(moved)}"] if moved else []
    return lines


def show_counters(before: Sequence[Row], now: Sequence[Row], console: Console) -> None:
    """What differs, or that nothing does."""
    lines = differences(before, now)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    kernels = sum(row["kind"] == "kernel" for row in now)
    console.print(f"counters of {kernels} compiled kernels and {len(now) - kernels} cases: {len(lines)} differ")

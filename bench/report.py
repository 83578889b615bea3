"""Rows as a table that fits 80 columns, as JSON lines, as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hypersd.files import atomic_write

from .harness import OURS, Result

Group = dict[str, Result]  # the rows of one case, dtype and mode, by provider
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")


def groups(rows: Sequence[Result]) -> list[Group]:
    """Rows that may be compared, together, in their order."""
    found: dict[tuple[str, str, str, str], Group] = {}
    for row in rows:
        found.setdefault((row.op, row.case, row.dtype, row.mode), {})[row.provider] = row
    return list(found.values())


def microseconds(value: float) -> str:
    """Three digits or more, with a unit from a thousand on: 12.3, 456, 7.89ms."""
    if value < 1e3:
        return f"{value:.3g}"
    return f"{value / 1e3:.3g}ms" if value < 1e6 else f"{value / 1e6:.3g}s"


def show(rows: Sequence[Result], console: Console) -> None:
    """A table for each dtype: our median, and each provider's time over ours; then the spread of each ratio."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        _table([row for row in rows if row.dtype == dtype], console)
    for provider in _peers(rows):
        for mode in dict.fromkeys(row.mode for row in rows):
            ratios = [r.over_ours for r in rows if r.provider == provider and r.mode == mode and r.over_ours]
            if ratios:
                spread = f"median {statistics.median(ratios):.2f}, least {min(ratios):.2f}, most {max(ratios):.2f}"
                console.print(f"  {provider} over {OURS}, {mode}: {spread} of {len(ratios)}", soft_wrap=True)


def _peers(rows: Sequence[Result]) -> list[str]:
    return [name for name in dict.fromkeys(row.provider for row in rows) if name != OURS]


def _table(rows: Sequence[Result], console: Console) -> None:
    """What does not fit beside the case goes into a second table: nothing is left out or cut."""
    made = groups(rows)
    fixed = max(len(row.case) for row in rows) + max(len(row.mode) for row in rows) + 4 + 7 + 2 + 4 + 2 + 7
    parts: list[list[str]] = [[]]
    room = console.width - fixed
    for name in _peers(rows):
        if parts[-1] and room < _width(name) + 2:
            parts.append([])
            room = console.width - fixed
        parts[-1].append(name)
        room -= _width(name) + 2
    for number, peers in enumerate(parts):
        title = f"{rows[0].op}, {rows[0].dtype}: time of {OURS}, and that of its peers over it"
        table = Table(title=title if number == 0 else None, title_justify="left", box=None, pad_edge=False)
        table.add_column("case", no_wrap=True)
        table.add_column("mode", no_wrap=True)
        for name, width in (("us", 7), ("% of roof", 4), ("error / eager's", 7)):
            table.add_column(name, justify="right", width=width, overflow="fold")
        for name in peers:
            table.add_column(name, justify="right", width=_width(name), overflow="fold")
        for group in made:
            table.add_row(*_cells(group, peers))
        console.print(table)
    for row in rows:
        if not row.green:
            console.print(f"  [red]{row.case} {row.mode} {row.provider}: {escape(row.verdict)}", soft_wrap=True)


def _width(name: str) -> int:
    return min(max(len(name), 5), 9)


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1e3 else f"{value:.0f}"


def _cells(group: Group, peers: Sequence[str]) -> list[str]:
    ours = group[OURS]
    time = microseconds(ours.p50) if ours.p50 is not None else "[red]red"
    roof = "" if ours.of_roofline is None else f"{100 * ours.of_roofline:.0f}"
    ratios = [group[name] if name in group else None for name in peers]
    cells = ["" if r is None else _ratio(r.over_ours) if r.over_ours else "[red]red" for r in ratios]
    return [ours.case, ours.mode, time, roof, _ratio_of_errors(ours), *cells]


def _ratio_of_errors(row: Result) -> str:
    if row.error is None or not row.eager_error:
        return "-" if row.error is None else f"{row.error:.0e} / 0"
    return f"{row.error / row.eager_error:.2f}"


def write(rows: Sequence[Result], path: Path, stamp: dict[str, Any]) -> None:
    """Append one JSON line a row."""
    with path.open("a") as file:
        for row in rows:
            entry = {key: value for key, value in vars(row).items() if key != "extra"}
            file.write(json.dumps(entry | row.extra | stamp) + "\n")


def plot(rows: Sequence[Result], path: Path, stamp: dict[str, Any]) -> None:
    """One line a case, dtype and mode: left the peers' time over ours, right the share of the roofline."""
    from matplotlib.figure import Figure

    from hypersd.evaluate.plots import number_ticks

    made = [group for group in groups(rows) if group.get(OURS) and group[OURS].p50]
    figure = Figure(figsize=(12, 1.6 + 0.22 * max(len(made), 4)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = [OURS, *_peers(rows)]
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        points = [(number, group[name]) for number, group in enumerate(made) if name in group and group[name].p50]
        style = {"color": colour, "s": 26, "label": name, "marker": "D" if name == OURS else "o"}
        left.scatter([row.over_ours for _, row in points], [number for number, _ in points], **style)
        points = [(number, row) for number, row in points if row.of_roofline]
        right.scatter([100 * row.of_roofline for _, row in points], [number for number, _ in points], **style)
    labels = [f"{r.op} {r.case} {r.dtype} {r.mode}" for r in (group[OURS] for group in made)]
    left.set_yticks(range(len(made)), labels, fontsize=7)
    left.set_ylim(len(made) - 0.5, -0.5)
    left.set_xscale("log")
    number_ticks(left.xaxis)
    left.axvline(1, color="0.6", linewidth=0.8)
    left.set_xlabel(f"time over {OURS}'s (right of 1: {OURS} is faster)")
    right.set_xlabel("% of the roofline")
    right.set_xlim(left=0)
    right.axvline(100, color="0.6", linewidth=0.8)
    left.legend(fontsize=7, loc="upper right")
    for axis in (left, right):
        axis.grid(axis="x", color="0.9")
    place = stamp["device"] if stamp["device"] != "cpu" else f"{stamp['cpu']}, {stamp['threads']} threads"
    figure.suptitle(f"{place}, torch {stamp['torch']}, commit {stamp['commit']}, {stamp['date']}", fontsize=8)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))

"""The picture grid and the curves, each in a light and a dark version."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, GAP, GROUP_GAP, CAPTION, HEADER = 128, 6, 24, 236, 72


@dataclass(frozen=True)
class Theme:
    background: str
    text: str
    muted: str
    line: str
    teacher: str
    undistilled: str
    student: str
    stages: tuple[str, ...]


LIGHT = Theme(
    "#ffffff", "#1c2330", "#667085", "#e3e7ee", "#475467", "#d9822b", "#2563c9",
    ("#2563c9", "#0f9f8f", "#8a4fd0", "#c9437f", "#d9822b", "#5b8c2a"),
)  # fmt: skip
DARK = Theme(
    "#161b26", "#e8ebf2", "#98a2b3", "#2c3444", "#c3cad6", "#f0a455", "#6ea8ff",
    ("#6ea8ff", "#45cfbf", "#b994f5", "#f286b5", "#f0a455", "#a3d16b"),
)  # fmt: skip


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """matplotlib's own DejaVu Sans: the same on every machine, and it knows more than Latin."""
    from matplotlib import font_manager

    name = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(name), size)


def grid(
    pictures: Mapping[str, np.ndarray],
    captions: Sequence[str],
    nfe: Mapping[str, int],
    theme: Theme = LIGHT,
    labels: Mapping[str, str] | None = None,
) -> Image.Image:
    """Captions down, [teacher | undistilled 1 2 4 8 | student 1 2 4 8] across.

    pictures: column key ("teacher", "student/4") -> (len(captions), H, W, 3) uint8; `nfe` network evaluations of each,
    unless `labels` says what stands above the columns. Columns of one group share what is before the slash.
    """
    groups: dict[str, list[str]] = {}
    for key in pictures:
        groups.setdefault(key.partition("/")[0], []).append(key)
    groups = {name: groups[name] for name in ("teacher", "undistilled", "student") if name in groups} or groups
    title, label_font, caption_font = font(20, bold=True), font(15), font(17)
    labels = labels or {key: _label(key, nfe[key]) for keys in groups.values() for key in keys}
    # a lone column may be narrower than what is written above it
    over = {name: max(label_font.getlength(labels[keys[-1]]) - CELL, 0) for name, keys in groups.items()}
    widths = {name: round(len(keys) * (CELL + GAP) - GAP + over[name]) for name, keys in groups.items()}
    width = CAPTION + sum(widths.values()) + GROUP_GAP * (len(groups) - 1)
    canvas = Image.new("RGB", (width, HEADER + len(captions) * (CELL + GAP) - GAP), theme.background)
    draw = ImageDraw.Draw(canvas)
    for row, caption in enumerate(captions):
        lines = textwrap.wrap(caption, 22)[:5] or [""]
        middle = HEADER + row * (CELL + GAP) + CELL / 2
        draw.multiline_text((0, middle), "\n".join(lines), theme.text, caption_font, anchor="lm", spacing=6)
    left = CAPTION
    for name, keys in groups.items():
        colour = getattr(theme, name, theme.text)
        draw.text((left, 6), name, colour, title, anchor="lt")
        draw.line((left, 35, left + widths[name], 35), colour, 2)
        for column, key in enumerate(keys):
            x = left + column * (CELL + GAP)
            draw.text((x, 46), labels[key], theme.muted, label_font, anchor="lt")
            for row, picture in enumerate(pictures[key]):
                tile = Image.fromarray(picture)
                filter = Image.Resampling.NEAREST if tile.width < CELL else Image.Resampling.LANCZOS
                canvas.paste(tile.resize((CELL, CELL), filter), (x, HEADER + row * (CELL + GAP)))
        left += widths[name] + GROUP_GAP
    return canvas


def _label(key: str, nfe: int) -> str:
    """For instance "50 NFE", "1 step", "4 steps (8 NFE)"."""
    steps = key.partition("/")[2]
    if not steps:
        return f"{nfe} NFE"
    return f"{steps} step{'s' if steps != '1' else ''}" + (f" ({nfe} NFE)" if nfe != int(steps) else "")


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Centred running mean with shrinking windows at the ends."""
    x = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    index = np.arange(len(x))
    low, high = np.maximum(index - width // 2, 0), np.minimum(index + width // 2 + 1, len(x))
    return (sums[high] - sums[low]) / (high - low)


PANELS = {
    "frechet": "Frechet distance (lower is better)",
    "alignment": "alignment (higher)",
    "objects": "captioned objects found (share)",
    "diversity": "diversity (as real is best)",
}


def curves(metrics: Mapping[str, Any], losses: Sequence[Mapping[str, Any]], theme: Theme = LIGHT) -> bytes:
    """PNG: the loss over the steps of every stage, and quality over sampling steps.

    losses: {"stage": name, "step": global optimizer step, "loss": value} in order; may be empty.
    """
    names = [name for name in PANELS if metrics["teacher"].get(name) is not None]
    with _figure((11, 6.5 if losses else 3.5), theme) as (figure, buffer):
        shape = figure.add_gridspec(2 if losses else 1, max(len(names), 1))
        if losses:
            _losses(figure.add_subplot(shape[0, :]), losses, theme)
        for column, name in enumerate(names):
            _quality(figure.add_subplot(shape[-1, column]), metrics, name, theme)
        if names:
            handles, labels = figure.axes[-1].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return buffer.getvalue()


COMPARED = {
    "frechet": PANELS["frechet"],
    "alignment": PANELS["alignment"],
    "aesthetic": "preference (higher)",
    "diversity": PANELS["diversity"],
}
OTHERS = ("#0f9f8f", "#8a4fd0", "#c9437f", "#5b8c2a", "#8d6e63", "#d1a000", "#5f7a94", "#b5452f", "#2aa7d6", "#98983a")
MARKERS = ("o", "s", "D")
Line = Mapping[str, Mapping[int, Sequence[float]]]  # column of COMPARED -> number of steps -> the value of each seed


def comparison(
    lines: Mapping[str, Line], teacher: Line, undistilled: Line, strong: str = "", theme: Theme = LIGHT
) -> bytes:
    """PNG: quality over sampling steps, a line a method, mean and standard deviation over the seeds.

    `strong`: the one that stands out. The teacher is a level across. The undistilled model's line may leave the
    picture, and so may others where they are farther off than it is: the rest decides what is in it.
    """
    others = [name for name in lines if name != strong]
    styles = {strong: (theme.student, "o")}
    for number, name in enumerate(others):  # once the colours are used up, another marker goes round with them
        styles[name] = OTHERS[number % len(OTHERS)], MARKERS[number // len(OTHERS) % len(MARKERS)]
    with _figure((11, 3.9), theme) as (figure, buffer):
        for axes, (column, title) in zip(figure.subplots(1, len(COMPARED)), COMPARED.items(), strict=True):
            seen = [
                values
                for line in (*lines.values(), teacher)
                for steps, values in line.get(column, {}).items()
                if not _is_worse(line, undistilled, steps)
            ]
            for label, line in lines.items():
                colour, marker = styles[label]
                width = 2.2 if label == strong else 1.1
                _line(axes, label, line.get(column, {}), colour, linewidth=width, marker=marker)
            _line(axes, "undistilled", undistilled.get(column, {}), theme.undistilled, linestyle=":")
            for values in teacher.get(column, {}).values():
                axes.axhline(np.mean(values), color=theme.teacher, linestyle="--", linewidth=1.2, label="teacher")
            _limits(axes, np.concatenate(seen) if seen else np.zeros(1), logarithmic=column == "frechet")
            ticks = sorted({steps for line in lines.values() for steps in line.get(column, {})})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
            axes.set_xlabel("sampling steps")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(labels, figure.get_figwidth()))
    return buffer.getvalue()


def _is_worse(line: Line, than: Line, steps: int) -> bool:
    """Whether its Frechet distance is larger at so many steps, where both have one."""
    one, other = (each.get("frechet", {}).get(steps) for each in (line, than))
    return one is not None and other is not None and bool(np.mean(one) > np.mean(other))


def _legend_columns(labels: Sequence[str], width: float, most: int = 7) -> int:
    """As many as fit into `width` inches: 0.08 for a letter of the longest label of each, 0.6 for its line."""

    def needed(columns: int) -> float:
        return sum(0.08 * max(map(len, part), default=0) + 0.6 for part in np.array_split(np.array(labels), columns))

    return next((n for n in range(min(most, len(labels)), 1, -1) if needed(n) <= width), 1)


def _line(axes: Any, label: str, values: Mapping[int, Sequence[float]], colour: str, **options: Any) -> None:
    steps = sorted(values)
    means = [np.mean(values[n]) for n in steps]
    spread = [np.std(values[n], ddof=1) if len(values[n]) > 1 else 0.0 for n in steps]
    style = {"marker": "o", "linestyle": "-", "markersize": 3, "elinewidth": 0.9, "linewidth": 1.1} | options
    axes.errorbar(steps, means, spread, label=label, color=colour, **style)


def _limits(axes: Any, seen: np.ndarray, logarithmic: bool) -> None:
    low, high = float(seen.min()), float(seen.max())
    if logarithmic and low > 0:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.15)
        number_ticks(axes.yaxis)
    else:
        margin = 0.06 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)


def number_ticks(axis: Any) -> None:
    """Plain numbers along a logarithmic axis, with what is drawn and its limits set, also where it is short."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    is_short = high < 10 * low  # where 1, 2 and 5 of each decade may be one tick or none
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if is_short else LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure(size: tuple[float, float], theme: Theme) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure of so many inches in the theme's colours; what is drawn on it is in the buffer, PNG, after the block."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": theme.text, "axes.labelcolor": theme.muted,
        "xtick.color": theme.muted, "ytick.color": theme.muted, "axes.edgecolor": theme.line,
        "axes.facecolor": theme.background, "figure.facecolor": theme.background, "axes.spines.top": False,
        "axes.spines.right": False, "grid.color": theme.line, "axes.grid": True, "axes.axisbelow": True,
        "legend.frameon": False,
    }  # fmt: skip
    buffer = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        yield figure, buffer
        figure.savefig(buffer, format="png")


def _losses(axes: Any, losses: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    stages = list(dict.fromkeys(entry["stage"] for entry in losses))
    for number, stage in enumerate(stages):
        points = [(entry["step"], entry["loss"]) for entry in losses if entry["stage"] == stage]
        steps, values = (list(column) for column in zip(*points, strict=True))
        colour = theme.stages[number % len(theme.stages)]
        axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(steps, smooth(values, max(len(values) // 25, 3)), color=colour, linewidth=1.8, label=stage)
    if all(entry["loss"] > 0 for entry in losses):
        axes.set_yscale("log")
        number_ticks(axes.yaxis)
    axes.set_title("training loss by stage (each stage has its own scale)", loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    # beside the title, where no stage can run into it
    axes.legend(ncols=max(len(stages), 1), loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _quality(axes: Any, metrics: Mapping[str, Any], name: str, theme: Theme) -> None:
    for row in ("undistilled", "student"):
        points = sorted((int(steps), entry[name]) for steps, entry in metrics.get(row, {}).items())
        axes.plot(
            [x for x, _ in points], [y for _, y in points], "o-", color=getattr(theme, row), markersize=4, label=row
        )
    teacher = metrics["teacher"]
    axes.axhline(
        teacher[name], color=theme.teacher, linestyle="--", linewidth=1.2, label=f"teacher, {teacher['nfe']} NFE"
    )
    real = metrics.get("reference", {}).get("real", {}).get(name)
    if real is not None:
        axes.axhline(real, color=theme.muted, linestyle=":", linewidth=1.2, label="real pictures")
    ticks = sorted(int(steps) for steps in metrics.get("student", {}))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    if name == "frechet":
        axes.set_yscale("log")
        number_ticks(axes.yaxis)
    axes.set_title(PANELS[name], loc="left", fontsize=9, fontweight="bold")
    axes.set_xlabel("sampling steps")

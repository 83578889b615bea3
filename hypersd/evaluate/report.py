"""metrics.json, grid.png, curves.png and report.html: one self-contained page that makes no request."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import json
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hypersd import __version__
from hypersd.evaluate.plots import DARK, LIGHT, curves, grid
from hypersd.files import atomic_write

if TYPE_CHECKING:
    from hypersd.evaluate.run import Evaluation

PACKAGES = ("triton", "diffusers", "peft", "transformers", "safetensors", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Version of hypersd, Python and the packages that numbers depend on; absent ones are left out."""
    found = {"hypersd": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int:
    """Most memory held so far: on the GPU where one is in use, else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def metrics_document(
    evaluation: Evaluation, *, features: str, samples: int, seconds: float, recipe: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What metrics.json holds. `reference` and `intervals` stand beside the three rows that are compared."""
    rows = evaluation.rows
    document = {
        "teacher": rows["teacher"],
        "undistilled": rows["undistilled"],
        "student": rows["student"],
        "reference": rows.get("reference", {}),
        "intervals": evaluation.intervals,
        "features": features,
        "samples": samples,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
        "recipe": dict(recipe),
        "versions": versions(),
        "seed": seed,
    }
    return finite(document)


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    metrics: Mapping[str, Any],
    *,
    losses: Sequence[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None,
    title: str = "Few-step distillation",
    command: str = "",
    heldout: bool = False,
) -> Path:
    """Write the four files into `folder`, each atomically; returns the path of report.html.

    losses: see plots.curves. timings: seconds of each part of the run, in order. heldout: no caption was trained on.
    """
    folder = Path(folder)
    nfe = _nfe(metrics)
    grids = {name: _png(grid(evaluation.pictures, evaluation.captions, nfe, theme)) for name, theme in _THEMES.items()}
    charts = {name: curves(metrics, losses, theme) for name, theme in _THEMES.items()}
    page = render(metrics, grids, charts, timings=timings or {}, title=title, command=command, heldout=heldout)
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    atomic_write(folder / "grid.png", lambda path: path.write_bytes(grids["light"]))
    atomic_write(folder / "curves.png", lambda path: path.write_bytes(charts["light"]))
    atomic_write(folder / "metrics.json", lambda path: path.write_text(text, "utf-8"))
    return atomic_write(folder / "report.html", lambda path: path.write_text(page, "utf-8"))


_THEMES = {"light": LIGHT, "dark": DARK}


def render(
    metrics: Mapping[str, Any],
    grids: Mapping[str, bytes],
    charts: Mapping[str, bytes],
    *,
    timings: Mapping[str, float],
    title: str,
    command: str,
    heldout: bool = False,
) -> str:
    """The page as text. Pictures are PNG bytes per theme and end up inside it."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=_number, duration=_duration)
    template = environment.from_string((resources.files("hypersd.evaluate") / "report.html.j2").read_text("utf-8"))
    return template.render(
        m=metrics,
        rows=_rows(metrics),
        cards=_cards(metrics),
        grids={name: _uri(data) for name, data in grids.items()},
        charts={name: _uri(data) for name, data in charts.items()},
        timings=timings,
        title=title,
        command=command,
        heldout=heldout,
        recipe=json.dumps(metrics["recipe"], indent=2),
    )


def _rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table in reading order, with their intervals and group names."""
    intervals = metrics.get("intervals", {})
    rows = []
    for name, label in (
        ("real", "real pictures, second draw"),
        ("autoencoder", "real pictures through the autoencoder"),
    ):
        if name in metrics.get("reference", {}):
            row = metrics["reference"][name]
            rows.append(
                {"group": "reference", "label": label, **row, "ci": intervals.get("reference", {}).get(name, {})}
            )
    rows.append({"group": "teacher", "label": "teacher", **metrics["teacher"], "ci": intervals.get("teacher", {})})
    for group in ("undistilled", "student"):
        for steps in sorted(metrics[group], key=int):
            label = f"{group}, {steps} step{'s' if steps != '1' else ''}"
            rows.append(
                {"group": group, "label": label, **metrics[group][steps], "ci": intervals.get(group, {}).get(steps, {})}
            )
    return rows


def _cards(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One card per step count: the student against the teacher and against the undistilled model."""
    teacher = metrics["teacher"]
    cards = []
    for steps in sorted(metrics["student"], key=int):
        student, plain = metrics["student"][steps], metrics["undistilled"].get(steps, {})
        base, undistilled = teacher["frechet"], plain.get("frechet")
        cards.append(
            {
                "steps": int(steps),
                "fewer": teacher["nfe"] / student["nfe"],
                "to_teacher": student["frechet"] / base if base else None,
                "to_plain": undistilled / base if base and undistilled is not None else None,
            }
        )
    return cards


def _nfe(metrics: Mapping[str, Any]) -> dict[str, int]:
    nfe = {"teacher": metrics["teacher"]["nfe"]}
    for group in ("undistilled", "student"):
        nfe.update({f"{group}/{steps}": row["nfe"] for steps, row in metrics[group].items()})
    return nfe


def _number(value: float | None, scale: float = 1) -> str:
    """Three significant digits, and never an exponent where plain digits do."""
    if value is None:
        return "–"
    value *= scale
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def finite(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null, at any depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

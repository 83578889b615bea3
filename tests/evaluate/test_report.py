from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hypersd.evaluate import plots
from hypersd.evaluate.plots import CAPTION, CELL, GAP, HEADER, grid, smooth
from hypersd.evaluate.report import finite, metrics_document, write_report
from hypersd.evaluate.run import Evaluation

STEPS = (1, 2, 4, 8)


def row(nfe: int, frechet: float | None, **others: float) -> dict[str, Any]:
    return {
        "nfe": nfe,
        "frechet": frechet,
        "alignment": 0.25,
        "objects": 0.875,
        "aesthetic": None,
        "diversity": 3.0,
    } | others


@pytest.fixture
def evaluation() -> Evaluation:
    pictures = {"teacher": np.full((2, 16, 16, 3), 10, np.uint8)}
    for n in STEPS:
        pictures[f"undistilled/{n}"] = np.full((2, 16, 16, 3), 20 + n, np.uint8)
        pictures[f"student/{n}"] = np.full((2, 16, 16, 3), 200 + n, np.uint8)
    return Evaluation(
        rows={
            "teacher": row(50, 4.0),
            "undistilled": {str(n): row(2 * n, 40.0 / n, objects=float("nan")) for n in STEPS},
            "student": {str(n): row(n, 5.0) for n in STEPS},
            "reference": {"real": row(0, 0.5)},
        },
        intervals={"teacher": {"objects": [0.861, 0.889]}},
        pictures=pictures,
        captions=["a fox <b>& co</b>", "a cake"],
    )


@pytest.fixture
def metrics(evaluation: Evaluation) -> dict[str, Any]:
    return metrics_document(evaluation, features="tiny", samples=2, seconds=65.04, recipe={"a": 1}, seed=7)


def test_metrics_have_the_promised_keys(metrics):
    promised = {"teacher", "undistilled", "student", "features", "samples", "seconds", "peak_memory_bytes", "recipe"}
    assert promised | {"versions", "seed"} <= set(metrics)
    for entry in [metrics["teacher"], *metrics["undistilled"].values(), *metrics["student"].values()]:
        assert set(entry) == {"nfe", "frechet", "alignment", "objects", "aesthetic", "diversity"}
    assert list(metrics["student"]) == ["1", "2", "4", "8"]
    assert metrics["undistilled"]["1"]["objects"] is None  # NaN is not JSON
    assert metrics["peak_memory_bytes"] > 10_000_000
    assert {"hypersd", "python", "torch"} <= set(metrics["versions"])
    assert finite([1.0, {"a": float("inf")}, (2, "x")]) == [1.0, {"a": None}, [2, "x"]]


def test_report_is_one_self_contained_page(tmp_path, evaluation, metrics):
    losses = [{"stage": "tscd-8", "step": i, "loss": 1.0 / i} for i in range(1, 30)]
    path = write_report(
        tmp_path, evaluation, metrics, losses=losses, timings={"train": 3661.0}, title="A <title>", command="run & see"
    )
    page = path.read_text()
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "DATA", page)
    assert not re.search(r"https?:|//\w|<script|<link|@import|url\(", without_pictures)
    assert re.findall(r'(?:src|srcset|href)="([^"]*)"', without_pictures) == ["DATA"] * 4
    assert "A &lt;title&gt;" in page and "run &amp; see" in page
    assert "1 h 01 min" in page and "1 min 05 s" in page
    assert "1.25×" in page  # 5.0 / 4.0
    assert "without distillation 10.0×" in page  # 40 / 4
    assert "86.1 to 88.9" in page and "None" not in without_pictures and "nan" not in without_pictures
    for data in re.findall(r"base64,([A-Za-z0-9+/=]+)", page):
        assert Image.open(io.BytesIO(base64.b64decode(data))).width > 600
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.json", "grid.png", "curves.png", "report.html"}


def test_report_without_losses_or_reference(tmp_path, evaluation, metrics):
    for entry in (evaluation.rows, metrics):
        entry.pop("reference")
    for entry in [metrics["teacher"], *metrics["undistilled"].values(), *metrics["student"].values()]:
        entry.update(alignment=None, objects=None, diversity=None)
    assert "second draw" not in write_report(tmp_path, evaluation, metrics).read_text()


def test_grid_places_each_picture_under_its_column(evaluation, metrics):
    nfe = {key: 50 if key == "teacher" else int(key.partition("/")[2]) for key in evaluation.pictures}
    image = np.asarray(grid(evaluation.pictures, evaluation.captions, nfe))
    middle = HEADER + CELL + GAP + CELL // 2
    line = image[middle, CAPTION:, 0]
    levels = [int(v) for v in line[np.flatnonzero(np.diff(line, prepend=255))] if v != 255]
    assert levels == [10, 21, 22, 24, 28, 201, 202, 204, 208]


def test_smooth_keeps_length_and_mean_of_a_line():
    assert smooth([1, 2, 3, 4, 5], 3).tolist() == [1.5, 2, 3, 4, 4.5]
    assert smooth([7.0], 9).tolist() == [7.0]


def test_a_legend_takes_as_many_columns_as_fit():
    short, long = ["tcd"] * 5, ["a name of so many letters that it needs a line"] * 4
    assert plots._legend_columns(short, 11.0) == 5 and plots._legend_columns(["tcd"] * 30, 11.0) == 7
    assert plots._legend_columns(long, 11.0) == 2 and plots._legend_columns(long, 2.0) == 1
    assert plots._legend_columns([], 11.0) == 1

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hypersd import cli, paper
from hypersd.distill.recipe import load_recipe
from hypersd.distill.stage import GuidedStage
from hypersd.errors import HypersdError
from hypersd.evaluate import plots
from hypersd.evaluate.metrics import Moments, frechet_distance
from hypersd.evaluate.paper import (
    COLUMNS,
    TABLES,
    TEACHER_STEPS,
    VARIANTS,
    Ledger,
    Variant,
    draw,
    evaluations_of,
    figures,
    recipe_of,
    spread,
)
from hypersd.paper import Paper

KEYS = {
    "table", "method", "variant", "steps", "seed", "frechet", "frechet_to_teacher", "alignment", "objects", "aesthetic",
    "diversity", "features", "samples", "train_seconds", "network_evaluations", "recipe", "versions",
}  # fmt: skip


def test_every_variant_spends_the_budget() -> None:
    for variant in VARIANTS:
        if not variant.stages:
            continue
        recipe = recipe_of(variant, 300_000, seed=2)
        assert recipe.train.seed == 2 and recipe.data.kind == "scenes"
        # to within half a step of each stage
        step = max(stage.network_evaluations for stage in recipe.stages) * recipe.train.batch_size
        assert abs(evaluations_of(recipe) - 300_000) <= step / 2 * len(recipe.stages)
        taught = [stage for stage in recipe.stages if isinstance(stage, GuidedStage)]
        base = [stage for stage in taught if getattr(stage, "teacher", "base") == "base"]
        assert {stage.guidance_scale for stage in base} == {(2.5, 2.5)} or not taught
    lcm = recipe_of(next(v for v in VARIANTS if v.method == "lcm"), 300_000, 0)
    assert [stage.iterations for stage in lcm.stages] == [round(300_000 / (32 * 6))]  # 2 teacher, 1 target, 3 student
    halves = Variant(("2",), "lcm", "", ({"method": "lcm"}, {"method": "tcd"}), shares=(0.75, 0.25))
    first, second = recipe_of(halves, 300_000, 0, ["train.batch_size=10"]).stages
    assert (first.iterations, second.iterations) == (3750, 1250)
    assert recipe_of(halves, 300_000, 0).train.warmup == 50 and recipe_of(halves, 30_000, 0).train.warmup == 39 // 4


def test_the_unified_variant_is_the_shipped_recipe() -> None:
    quick, full = load_recipe("emoji-quick"), load_recipe("emoji-full")
    cost = [stage.iterations * stage.network_evaluations for stage in quick.stages]
    unified, complete = (v for v in VARIANTS if v.method == "unified" and "2" in v.tables)
    assert complete.name == "TSCD+DMD+feedback"
    assert recipe_of(unified, 32 * sum(cost), 0).stages == quick.stages
    assert unified.tables == ("2", "3", "4") and unified.steps == (1, 2, 4, 8)
    for table, follow in (("3", {"TCD+feedback", "TSCD+feedback"}), ("5", {"DMD", "TCD+DMD", "TSCD+DMD"})):
        others = ("8-4-2-1 by stage", "equal shares", "equal shares boundary")
        rows = {(v.method, v.name) for v in VARIANTS if table in v.tables and v.name not in others}
        assert rows == {("tcd", ""), ("tscd", "8-4-2-1")} | {("unified", name) for name in follow}
    # after TSCD, and TCD in its place, the others get as much beside it as in the shipped recipe
    named = {v.name: v for v in VARIANTS if v.method == "unified"}
    tscd, feedback = sum(cost[:4]), cost[4]
    dmd = tscd * full.stages[4].iterations * full.stages[4].network_evaluations
    dmd /= sum(stage.iterations * stage.network_evaluations for stage in full.stages[:4])
    for name, others in (("feedback", [feedback]), ("DMD", [dmd]), ("DMD+feedback", [dmd, feedback])):
        for first in ("TSCD", "TCD"):
            if name == "DMD+feedback" and first == "TCD":
                continue
            shares = named[f"{first}+{name}"].shares
            each = cost[:4] if first == "TSCD" else [tscd]
            assert shares == pytest.approx([c / (tscd + sum(others)) for c in each + others], rel=0.02)
    stages = recipe_of(named["TSCD+DMD"], 32 * (tscd + dmd), 0).stages
    assert [stage.segments for stage in stages[:4]] == [8, 4, 2, 1]
    assert stages[4].model_dump(exclude={"iterations"}) == full.stages[4].model_dump(exclude={"iterations"})
    (alone,) = recipe_of(named["DMD"], 300_000, 0).stages
    assert (alone.consistency, alone.real_score, alone.adversarial_weight, alone.fake_updates) == (0, "base", 0.02, 2)


def test_tscd_ablations_change_what_their_table_says() -> None:
    quick = [stage.model_dump() for stage in load_recipe("emoji-quick").stages[:4]]
    for v in (v for v in VARIANTS if v.method == "tscd"):
        stages = [stage.model_dump() for stage in recipe_of(v, 300_000, 0).stages]
        assert stages[0]["teacher"] == "base" and stages[0]["guidance_scale"] == (2.5, 2.5)
        shipped = {stage["segments"]: stage for stage in quick}
        differ = {
            key for stage in stages[1:] for key in stage if stage[key] != shipped[stage["segments"]][key]
        } - {"iterations", "guidance_scale"}  # fmt: skip
        expected = {"teacher": {"teacher"}, "t_end": {"t_end"}, "N": {"grid"}}
        if v.tables in (("teacher",), ("t_end",), ("N",)):
            assert differ == expected[v.tables[0]]
        elif v.tables == ("distance",):
            assert differ in ({"loss"}, {"weighting"}, {"critic", "staged_weights"}, {"staged_weights"}, set())
        else:
            assert differ == ({"t_end"} if v.name.endswith("boundary") else set())


def test_lightning_halves_down_to_the_steps_that_are_judged() -> None:
    ladders = {v.steps: v for v in VARIANTS if v.method == "lightning"}
    for steps, expected in (((1,), [8, 4, 2, 1]), ((2,), [8, 4, 2]), ((4,), [8, 4]), ((8,), [16, 8])):
        stages = recipe_of(ladders[steps], 300_000, 0).stages
        assert [stage.steps for stage in stages] == expected
        assert stages[0].teacher == "base" and stages[0].adversarial_weight == 0
        assert all(s.teacher == "previous_stage" and s.adversarial_weight > 0 and s.mse_weight == 1 for s in stages[1:])


def test_variants_are_told_apart() -> None:
    keys = [(v.method, v.name) for v in VARIANTS]
    assert len(set(keys)) == len(keys)
    assert {table for v in VARIANTS for table in v.tables} == set(TABLES)
    assert {v.method for v in VARIANTS} >= {"teacher", "undistilled", "lcm", "tcd", "pcm", "tdd", "perflow", "tscd"}
    assert {v.method for v in VARIANTS} >= {"lightning", "dmd2", "rg_lcd", "unified"}
    trainings: dict[str, Any] = {}
    for v in VARIANTS:  # one folder, one training
        assert trainings.setdefault(v.folder, (v.stages, v.data)) == (v.stages, v.data)
    for method in ("lcm", "tcd", "pcm", "tdd", "tscd", "lightning", "dmd2", "rg_lcd", "unified"):
        judged = {steps for v in VARIANTS if v.method == method and "2" in v.tables for steps in v.steps}
        assert judged >= {1, 2, 4, 8}


def test_ledger(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "paper.jsonl"
    ledger = Ledger(path)
    ledger.append({"method": "lcm", "steps": 1})
    ledger.append({"method": "lcm", "steps": 2})
    again = Ledger(path)
    assert again.rows == ledger.rows and again.find(method="lcm", steps=2) == [{"method": "lcm", "steps": 2}]
    assert not again.find(method="lcm", steps=3)
    path.write_text(path.read_text() + '{"meth')
    with pytest.raises(HypersdError, match="line 3 is cut short"):
        Ledger(path)


def test_the_page() -> None:
    def row(method: str, steps: int, seed: int, frechet: float) -> dict[str, Any]:
        key = {"table": "2", "method": method, "variant": "", "steps": steps, "seed": seed, "budget": 5e5}
        values = dict.fromkeys(COLUMNS, 1.0) | {"frechet": frechet, "frechet_to_teacher": None}
        return key | values | {"samples": 64, "features": "emoji judge", "captions": 1, "network_evaluations": 500_000}

    pair = {"method": "tscd", "variant": "", "against": "lcm", "steps": 1, "column": "frechet"}
    pair |= {"difference": -1.5, "low": -2.0, "high": -1.0}
    older = pair | {"difference": -9.0, "seeds": [0]}
    pair |= {"seeds": [0, 1]}
    worse = pair | {"column": "alignment", "low": -0.2, "high": -0.1}
    open_ = pair | {"against": "tcd", "high": 0.5}
    rows = [row("lcm", 2, 0, 4.0), row("lcm", 1, 0, 8.0), row("lcm", 1, 1, 10.0)]
    page = draw(rows, [pair, older, worse, open_])
    lines = page.splitlines()
    assert "| 1 | lcm | 9 ± 1.4 | – | 1 ± 0 | 1 ± 0 | 1 ± 0 | 1 ± 0 | 500,000 |" in lines
    assert lines.index("| 2 | lcm | 4 | – | 1 | 1 | 1 | 1 | 500,000 |") > 0
    assert "| 1 | tscd | lcm | frechet | -1.5 | -2 to -1 | 2 |" in lines and "-9" not in page
    assert "| 1 | tscd | frechet | 1 | 1 | 0 |" in lines and "| 1 | tscd | alignment | 0 | 0 | 1 |" in lines
    assert "Not measured: teacher, undistilled, tcd, pcm (phases=1), " in page and page.count("Not measured") == 1
    assert "PCM is there without its critic and with it, DMD2 of one step as it is, fed at 999" in page
    assert "spends 500,000 network evaluations" in page and "over the seeds 0, 1" in page
    two = [row("lcm", 2, 0, 4.0), row("tcd", 2, 0, 4.0)]
    found = figures([*two, row("teacher", 25, 0, 1.0), row("tcd", 2, 0, 4.0) | {"table": "3"}])
    assert list(found) == ["2"] and found["2"].startswith(b"\x89PNG")  # one line is nothing to compare
    assert ".png" not in page and "](x.png)" in draw([row("lcm", 2, 0, 4.0)], pictures={"2": "x.png", "3": "y.png"})
    with pytest.raises(HypersdError, match="no rows"):
        draw([])
    assert spread([2.0, 4.0]) == "3 ± 1.4" and spread([None]) == "–"


def test_the_committed_rows_have_the_promised_columns() -> None:
    """Rows of trainings and nothing else; comparisons are in the file beside it."""
    path = Path(__file__).parents[2] / "bench" / "results" / "paper.jsonl"
    rows, pairs = Ledger(path).rows, Ledger(paper.pairs_of(path)).rows
    assert rows and pairs
    assert {frozenset(row) for row in rows} == {frozenset(KEYS | {"budget", "captions"})}
    assert all(
        row.keys() >= {"method", "variant", "against", "steps", "column", "seeds", "low", "high"} for row in pairs
    )


@pytest.mark.slow
def test_one_cell_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A method is trained, judged and drawn; a second call adds nothing, and a lost row needs no training."""
    rows, page = tmp_path / "paper.jsonl", tmp_path / "paper.md"
    tiny = ["data.count=32", "train.batch_size=8", "lora.rank=4", "lora.alpha=4.0"]
    arguments = ["evaluate", "paper", "pcm-phases2", "perflow-windows2", "--seeds", "1", "--samples", "8"]
    arguments += ["--budget", "200", "--rows", str(rows), "--out", str(tmp_path / "out"), "--device", "cpu"]
    arguments += [part for one in tiny for part in ("--set", one)]
    assert cli.run(arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pcm-phases2 pcm-2: 4/4 in ")]
    assert len(said) == 1 and said[0].endswith("about 0 s left in all")
    first = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["steps"]) for row in first] == [("pcm", 2), ("perflow", 2)]
    for row in first:
        assert row.keys() >= KEYS
        assert row["frechet"] > 0 and row["frechet_to_teacher"] > 0 and row["train_seconds"] > 0
        assert 0 <= row["objects"] <= 1 and row["diversity"] > 0
    # 8 pictures a step; pcm: 2 + 1 + 3 evaluations of each, perflow: 8 steps of 2, and 3
    assert [row["network_evaluations"] for row in first] == [4 * 8 * 6, 1 * 8 * 19]
    kept = load_file(tmp_path / "paper/budget-200-samples-8-captions-1/seed-0/pcm-phases2.safetensors")
    assert kept["2/alignment"].shape == (8,) and float(kept["2/frechet"][0]) == pytest.approx(first[0]["frechet"])
    before = rows.read_text()
    assert cli.run(arguments) == 0 and rows.read_text() == before
    rows.write_text(before.splitlines()[0] + "\n")
    weights = tmp_path / "out" / "budget-200" / "seed-0" / "perflow-windows2" / "lora.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert cli.run(arguments) == 0
    assert weights.stat().st_mtime_ns == stamp
    assert [json.loads(line)["frechet"] for line in rows.read_text().splitlines()] == [r["frechet"] for r in first]
    assert cli.run([*arguments, "--draw", "--page", str(page)]) == 0
    assert (
        "| 2 | pcm (phases=2) |" in page.read_text() and "quality over sampling steps](paper-2.png)" in page.read_text()
    )
    with Image.open(tmp_path / "paper-2.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    rows.write_text("")
    assert cli.run([*arguments, "--set", "train.learning_rate=1e-5"]) == 1
    assert "was trained by another recipe" in capsys.readouterr().err
    assert cli.run(["evaluate", "paper", "lcn"]) == 2
    assert "method 'lcn' is unknown; known: dmd2, " in capsys.readouterr().err


def test_a_row_has_the_distances_to_real_and_to_the_teacher_s_pictures(tmp_path: Path) -> None:
    job = Paper(tmp_path / "out", tmp_path / "paper.jsonl", budget=40.0, samples=16, device="cpu")
    generator = torch.Generator().manual_seed(0)
    real, own, teacher = (torch.randn(16, 8, generator=generator) + shift for shift in (0.0, 1.0, 3.0))
    job.judge.real = Moments.of(real)

    def pictures(variant: Variant, steps: int, seed: int) -> dict[str, torch.Tensor]:
        features = {("teacher", TEACHER_STEPS, 5): teacher, ("undistilled", 2, 5): own}[variant.method, steps, seed]
        return {"features": features, "diversity": torch.tensor(0.5)}

    job.pictures = pictures  # type: ignore[method-assign]
    for method, steps in (("undistilled", 2), ("teacher", TEACHER_STEPS)):
        job.cell(next(v for v in VARIANTS if v.method == method), steps, 5)
    first, last = job.ledger.find(method="undistilled"), job.ledger.find(method="teacher")
    for rows, features in ((first, own), (last, teacher)):
        assert {row["frechet"] for row in rows} == {frechet_distance(Moments.of(features), job.judge.real)}
    apart = frechet_distance(Moments.of(own), Moments.of(teacher))
    assert {row["frechet_to_teacher"] for row in first} == {apart}
    assert {row["frechet_to_teacher"] for row in last} == {None}


def test_what_is_judged_by_stage_are_the_weights_of_that_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "read_lora", lambda path: (path, {}))
    job = Paper(tmp_path / "out", tmp_path / "paper.jsonl", budget=40.0, samples=16, device="cpu")
    found = {v.by_stage: job.weights(v, 4, 0)[0].name for v in VARIANTS if v.folder == "tscd-8-4-2-1"}
    assert found == {False: "lora.safetensors", True: "lora-4step.safetensors"}


def test_what_is_worse_than_nothing_does_not_set_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    undistilled = {"frechet": {1: [40.0], 2: [7.0]}}
    line = {"frechet": {1: [140.0, 90.0], 2: [6.0], 4: [140.0]}}
    assert [plots._is_worse(line, undistilled, steps) for steps in (1, 2, 4, 8)] == [True, False, False, False]
    assert not plots._is_worse({}, undistilled, 1) and not plots._is_worse(line, {}, 1)
    shown: list[list[float]] = []
    monkeypatch.setattr(plots, "_limits", lambda axes, values, logarithmic: shown.append(sorted(values)))
    rest = {column: {1: [0.5], 2: [0.5]} for column in plots.COMPARED}
    lines = {"good": rest | {"frechet": {1: [3.0], 2: [2.0]}}, "far": rest | {"frechet": {1: [900.0], 2: [2.5]}}}
    plots.comparison(lines, rest | {"frechet": {25: [1.4]}}, undistilled)
    assert shown[list(plots.COMPARED).index("frechet")] == [1.4, 2.0, 2.5, 3.0]


def test_comparisons_need_only_what_lies_beside_the_rows(tmp_path: Path) -> None:
    """Over the seeds that both sides have; earlier ones over fewer stay."""
    rows = tmp_path / "rows" / "paper.jsonl"

    def job(out: str) -> Paper:
        return Paper(tmp_path / out, rows, budget=40.0, samples=16, device="cpu")

    ours, theirs = (next(v for v in VARIANTS if v.method == name) for name in ("unified", "tcd"))
    full = next(v for v in VARIANTS if v.folder == "unified-TSCD+DMD+feedback")
    generator = torch.Generator().manual_seed(0)
    first, values = job("first"), {}
    for variant, seeds in ((ours, (0, 1, 2)), (theirs, (1, 2)), (full, (1,))):
        for seed in seeds:
            features = torch.randn(16, 8, generator=generator) + len(seeds)
            first.judge.real = Moments.of(torch.randn(64, 8, generator=generator))
            found = {"features": features, "alignment": torch.rand(16, generator=generator, dtype=torch.float64)}
            first.keep(variant, 2, seed, found)
            values[variant.folder, seed] = (
                frechet_distance(Moments.of(features), first.judge.real),
                float(found["alignment"].mean()),
            )
    job("second").compare([ours, theirs], [1])
    job("third").compare([ours, theirs, full], [0, 1, 2])
    job("third").compare([ours, theirs, full], [0, 1, 2])
    assert not rows.exists()
    written = [json.loads(line) for line in rows.with_name("paper-pairs.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["column"], row["seeds"]) for row in written] == [
        (ours.name, "frechet", [1]), (ours.name, "alignment", [1]),
        (ours.name, "frechet", [1, 2]), (ours.name, "alignment", [1, 2]),
        (full.name, "frechet", [1]), (full.name, "alignment", [1]),
    ]  # fmt: skip
    for row in written:
        column = ("frechet", "alignment").index(row["column"])
        sides = f"unified-{row['variant']}", "tcd"
        ends = [np.mean([values[name, seed][column] for seed in row["seeds"]]) for name in sides]
        assert row["difference"] == pytest.approx(ends[0] - ends[1], rel=1e-5)
        assert row["low"] < row["difference"] < row["high"] and row["against"] == "tcd" and row["steps"] == 2
    tscd, lcm = (next(v for v in VARIANTS if v.method == name) for name in ("tscd", "lcm"))
    for variant in (tscd, lcm):
        first.keep(variant, 2, 1, {"features": torch.randn(16, 8, generator=generator)})
    job("fourth").compare([tscd, theirs, lcm], [1])
    added = [json.loads(line) for line in rows.with_name("paper-pairs.jsonl").read_text().splitlines()][len(written) :]
    assert [(row["method"], row["against"], row["column"]) for row in added] == [("tscd", "tcd", "frechet")]


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    """A training that another process is at comes last, and is not done twice."""
    rows, out = tmp_path / "paper.jsonl", tmp_path / "out"
    arguments = ["evaluate", "paper", "pcm-phases2", "perflow-windows2", "--seeds", "1", "--samples", "2"]
    arguments += ["--budget", "40", "--rows", str(rows), "--out", str(out), "--device", "cpu"]
    for one in ("data.count=8", "train.batch_size=4", "lora.rank=4", "lora.alpha=4.0"):
        arguments += ["--set", one]
    command = [sys.executable, "-m", "hypersd", *arguments]
    with Paper.lock(out / "budget-40" / "seed-0" / "pcm-phases2"):
        both = [subprocess.Popen(command) for _ in range(2)]
        while not rows.exists():
            assert all(process.poll() is None for process in both)
            time.sleep(0.2)
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["steps"]) for row in found] == [("perflow", 2), ("pcm", 2)]


@pytest.mark.slow
def test_a_method_with_rewards_end_to_end(tmp_path: Path) -> None:
    rows = tmp_path / "paper.jsonl"
    arguments = ["evaluate", "paper", "rg_lcd-latent-proxy", "--seeds", "1", "--samples", "2", "--budget", "40"]
    arguments += ["--rows", str(rows)]
    tiny = ["data.count=8", "train.batch_size=4", "lora.rank=4", "lora.alpha=4.0"]
    arguments += ["--out", str(tmp_path / "out"), "--device", "cpu", *(part for one in tiny for part in ("--set", one))]
    assert cli.run(arguments) == 0
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["method"], row["steps"]) for row in found] == [("rg_lcd", steps) for steps in (1, 2, 4, 8)]
    assert all(row["frechet"] > 0 and row["alignment"] is not None for row in found)
    log = (tmp_path / "out" / "budget-40" / "seed-0" / "rg_lcd-latent-proxy" / "metrics.jsonl").read_text().splitlines()
    assert set(json.loads(log[0])["measures"]) >= {"scene_alignment", "judge_preference", "proxy_loss"}

"""The main job from end to end, on a tiny random model in the place of the embedded one."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from PIL import Image

from hypersd import cli, demo
from hypersd.console import Progress, duration
from hypersd.distill.recipe import load_recipe
from hypersd.distill.trainer import Trainer
from hypersd.evaluate.run import COLUMNS, evaluate
from hypersd.models.export import load_lora

RECIPE = """
[data]
count = 8
[lora]
rank = 2
alpha = 2.0
[train]
batch_size = 2
[[stages]]
method = "tscd"
segments = 2
iterations = 2
guidance_scale = [3.0, 5.0]
[[stages]]
method = "tscd"
segments = 1
iterations = 2
guidance_scale = [3.0, 3.0]
[[stages]]
method = "dmd"
iterations = 1
guidance_scale = [3.0, 3.0]
fake_updates = 1
[[stages]]
method = "feedback"
iterations = 2
rollout = [1, 2, 4, 8]
anchor = 0.1
[[stages.rewards]]
kind = "scene_preference"
threshold = 5.0
[[stages.rewards]]
kind = "judge_preference"
weight = 0.0
"""


class Colours:
    """Judges by colour; what matters here is only that every column is filled."""

    def features(self, images):
        return images.mean((2, 3))

    def alignment(self, images, captions):
        return images[:, 0].mean((1, 2))

    def preference(self, images):
        return images.std((1, 2, 3))

    def objects(self, images):
        return torch.randn(len(images), 256, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def embedded(tmp_path, tiny_sd_folder, monkeypatch):
    """Nothing but the weights is replaced: model folder, judge, and a recipe of seven optimizer steps."""
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE)
    monkeypatch.setattr("hypersd.emoji.model_folder", lambda: tiny_sd_folder)
    monkeypatch.setattr("hypersd.emoji.evaluators.load", lambda name, device: Colours())
    monkeypatch.setitem(demo.BUDGETS, "quick", demo.Budget(str(recipe), 3))
    return tmp_path


def test_demo_leaves_everything_that_it_promises(embedded, capsys, monkeypatch):
    out, judged = embedded / "out", []

    def judge(*arguments, **options):
        judged.append(options["role"])
        return evaluate(*arguments, **options)

    monkeypatch.setattr(demo, "evaluate", judge)
    assert cli.run(["demo", "--out", str(out)]) == 0
    names = {"lora.safetensors", "grid.png", "curves.png", "metrics.json", "report.html"}
    assert {path.name for path in out.iterdir()} == names | {"training"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["samples"] == 3 and metrics["teacher"]["nfe"] == 50
    stages = ["tscd-2", "tscd-1", "dmd", "feedback"]
    assert metrics["recipe"]["stages"][0]["segments"] == 2 and len(metrics["recipe"]["stages"]) == len(stages)
    assert all(f"<dt>{name}</dt>" in (out / "report.html").read_text() for name in stages)
    for group in ("undistilled", "student"):
        assert list(metrics[group]) == ["1", "2", "4", "8"]
        for row in metrics[group].values():
            assert set(row) == set(COLUMNS) and None not in row.values()
    assert metrics["student"]["4"]["nfe"] == 4 and metrics["undistilled"]["4"]["nfe"] == 8
    assert metrics["reference"]["real"]["diversity"] > 0
    assert Image.open(out / "grid.png").width > 1000
    assert (out / "lora.safetensors").read_bytes() == (out / "training" / "lora.safetensors").read_bytes()
    merged, metadata = load_lora(out / "lora.safetensors")
    parts = [load_lora(out / "training" / f"{name}.safetensors")[0] for name in ("lora-dmd", "lora-feedback")]
    assert metadata["rank"] == "4" and metadata["method"] == "feedback" and metadata["steps"] == "1,2,3,4,5,6,7,8"
    for key in (key for key in merged if "lora_A" in key):
        down, up = key, key.replace("lora_A", "lora_B")
        wanted = sum(part[up].double().flatten(1) @ part[down].double().flatten(1) for part in parts)
        assert torch.allclose(merged[up].double().flatten(1) @ merged[down].double().flatten(1), wanted, atol=1e-9)
    assert judged == ["previous+ema"]  # what is judged is what is written
    printed = capsys.readouterr()
    assert "student, 8 steps" in printed.out and str(out / "report.html") in printed.out.replace("\n", "")
    assert "tscd-2: 2/2" in printed.err and "about 0 s left in all" in printed.err


def test_an_interrupted_demo_goes_on(embedded, capsys, monkeypatch):
    """By its own budget only, where there is something to go on from; what is done is not trained again."""
    out, taken, optimizer_step = embedded / "out", [], Trainer._optimizer_step

    def step(self, method):
        taken.append((self.stage, self.step))
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGINT)  # handled before the next step's end
        return optimizer_step(self, method)

    def judge(*arguments, **options):
        raise InterruptedError

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    monkeypatch.setattr(demo, "evaluate", judge)
    assert cli.run(["demo", "--out", str(out), "--resume"]) == 1
    assert "error: --resume with budget quick: no checkpoint" in capsys.readouterr().err and not out.exists()
    assert cli.run(["demo", "--out", str(out)]) == 1
    assert "resume goes on from there" in capsys.readouterr().err
    index = out / "training" / "latents" / "index.json"
    before = index.read_bytes()
    (embedded / "other.toml").write_text(RECIPE.replace("count = 8", "count = 9"))
    monkeypatch.setitem(demo.BUDGETS, "full", demo.Budget(str(embedded / "other.toml"), 3))
    assert cli.run(["demo", "--out", str(out), "--resume", "--budget", "full"]) == 2
    assert "with budget full: " in (said := capsys.readouterr().err) and "made with data.count = 8, the" in said
    assert index.read_bytes() == before
    for _ in range(2):  # the second time nothing is left to train
        with pytest.raises(InterruptedError):
            demo.run(out, resume=True)
        assert taken == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1)]
    assert load_lora(out / "training" / "lora.safetensors")[1]["method"] == "feedback"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_from_cached_latents(embedded):
    runs = []
    for _ in range(2):
        demo.run(embedded / "out")
        metrics = json.loads((embedded / "out" / "metrics.json").read_text())
        runs.append({name: metrics[name] for name in ("teacher", "undistilled", "student", "reference", "intervals")})
    assert runs[0] == runs[1]


def test_an_option_of_the_recipe_decides_guidance_and_work(embedded):
    recipe = load_recipe(str(embedded / "tiny.toml"))
    assert demo.guidance_of(recipe) == 4.0
    work = demo.work_of(recipe, samples=36)
    assert work["encode pictures"] == 8 and work["tscd-2"] == 2 * 2 * 6  # teacher 2, target 1, student 1 + 2
    # fake score 1 + 3; 70 % of a batch: student 3, real, fake, anchor 4; the others a consistency loss
    assert work["dmd"] == pytest.approx(2 * (4 + 0.7 * 9 + 0.3 * 6))
    # steps before the one with the gradient, the mean of roll-outs of 1, 2, 4 and 8; that one; the anchor
    assert work["feedback"] == 2 * 2 * ((0 + 1 + 2.5 + 5.5) / 4 + 3 + 1)
    assert work["judge teacher"] == 50 * 100 and work["judge student/4"] == 400


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_bfloat16_only_where_the_machine_has_it(embedded, monkeypatch, native, dtype):
    recipe = embedded / "tiny.toml"
    recipe.write_text(RECIPE.replace("[train]", '[train]\ndtype = "bfloat16"'))
    monkeypatch.setattr(demo, "has_bfloat16", lambda device: native)
    trained = []

    def stop(recipe, *arguments, **options):
        trained.append(recipe.train.dtype)
        raise InterruptedError

    monkeypatch.setattr(demo, "Trainer", stop)
    with pytest.raises(InterruptedError):
        demo.run(embedded / "out")
    assert trained == [dtype]


def test_quick_and_full_recipes_are_shipped():
    for budget in ("quick", "full"):
        recipe = load_recipe(demo.BUDGETS[budget].recipe)
        assert recipe.model.path == "embedded" and recipe.stages[-1].is_separate


def test_time_left_counts_all_work(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("hypersd.console.time.monotonic", lambda: clock[0])
    with Progress({"first": 10, "second": 30}) as progress:
        assert progress.remaining() is None
        clock[0] = 110.0
        progress("first", 5, 5)
        assert progress.remaining() == pytest.approx(30.0)
        clock[0] = 125.0
        progress("second", 1, 2)
        assert progress.remaining() == pytest.approx(15.0)
    assert progress.seconds == {"first": 10.0, "second": 15.0}


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 200, 3900)] == ["0 s", "1 min 00 s", "3 min 20 s", "1 h 05 min"]

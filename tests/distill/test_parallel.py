"""Several processes train what one would, stop together, and leave one set of files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hypersd.distill import parallel
from hypersd.distill.checkpoint import load_checkpoint
from hypersd.distill.methods import check_run
from hypersd.distill.recipe import parse_recipe
from hypersd.errors import HypersdError
from tests.distill import toy
from tests.distill.one_of_several import trainer

ROOT = Path(__file__).parents[2]
TRAIN = {"batch_size": 4, "accumulation": 6, "learning_rate": 1e-2, "ema_decay": 0.5, "clip": 0.01, "watch_every": 2}
FIRST = {"method": "tscd", "segments": 2, "iterations": 4}
SETTINGS = {
    "train": TRAIN,
    "stages": [
        FIRST,
        {"method": "tscd", "segments": 1, "iterations": 2, "teacher": "previous_stage", "grid": 8},
        {"method": "dmd", "iterations": 2, "real_score": "base", "fake_updates": 2, "consistency": 0.5},
    ],
}


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    where |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}


def start(out: Path, settings: dict[str, Any], size: int, trouble: str = "-") -> list[tuple[int, str]]:
    """(exit code, stderr) of each process."""
    out.mkdir(exist_ok=True)
    recipe = out / "recipe.json"
    recipe.write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.distill.one_of_several", str(out), str(recipe), trouble]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment(rank, size, port), stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def alone(out: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    return trainer(settings, out).run().state_dict()


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_train_what_one_would(size: int, tmp_path: Path) -> None:
    expected = alone(tmp_path / "one", SETTINGS)
    assert [(code, text) for code, text in start(tmp_path / "several", SETTINGS, size) if code] == []
    each = [load_file(tmp_path / "several" / f"rank{rank}.safetensors") for rank in range(size)]
    assert all(torch.equal(other[name], tensor) for other in each[1:] for name, tensor in each[0].items())
    assert_close(each[0], expected)
    rows, others = log(tmp_path / "several"), log(tmp_path / "one")
    steps = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(row["index"], row["step"]) for row in rows] == steps
    for row, other in zip(rows, others, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-8)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-8)
        assert row.get("measures", {}).keys() == other.get("measures", {}).keys()
    assert rows[3]["measures"]["variety"] == pytest.approx(others[3]["measures"]["variety"], rel=1e-8)
    assert rows[-1]["measures"]["fake_loss"] == pytest.approx(others[-1]["measures"]["fake_loss"], rel=1e-8)
    tensors, state = load_checkpoint(tmp_path / "several" / "checkpoint.safetensors")
    kept, theirs = load_checkpoint(tmp_path / "one" / "checkpoint.safetensors")
    assert state == theirs
    assert_close(tensors, kept)


@pytest.mark.slow
def test_one_that_is_asked_to_stop_stops_all_and_any_number_goes_on(tmp_path: Path) -> None:
    settings = {"train": TRAIN, "stages": [FIRST]}
    expected = alone(tmp_path / "one", settings)
    for code, text in start(tmp_path / "several", settings, 2, "stop"):
        assert code == 1 and "error: stopped in stage tscd-2 after step 2; the state is saved" in text
    assert len(log(tmp_path / "several")) == 2
    again = trainer(settings, tmp_path / "several").run(resume=True).state_dict()
    assert_close(again, expected)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_stops_all_before_the_step(tmp_path: Path) -> None:
    settings = {"train": TRAIN | {"checkpoint_every": 1}, "stages": [FIRST]}
    for code, text in start(tmp_path, settings, 2, "nan"):
        assert code == 1 and "step 1: loss nan" in text
    assert load_checkpoint(tmp_path / "checkpoint.safetensors")[1]["step"] == 1


@pytest.mark.slow
def test_one_that_dies_ends_the_others_with_a_line(tmp_path: Path) -> None:
    (code, text), (died, _) = start(tmp_path, {"train": TRAIN, "stages": [FIRST]}, 2, "die")
    assert died == 3 and code == 1
    assert text.strip().splitlines()[-1].startswith("error: lost another process of this run")


def test_what_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe({"train": TRAIN, "stages": [FIRST]})
    for count in ("1", "2", "3", "6"):
        monkeypatch.setenv("WORLD_SIZE", count)
        check_run(recipe, toy.PROCESS)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(HypersdError, match="accumulation = 6 passes a step cannot be shared by 4 processes") as caught:
        check_run(recipe, toy.PROCESS)
    assert caught.value.exit_code == 2
    with (
        pytest.raises(HypersdError, match="device cuda:1 is one for 4 processes") as caught,
        parallel.joined("cuda:1"),
    ):
        pass
    assert caught.value.exit_code == 2
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(HypersdError, match=r"4 processes cannot join \(.*RANK.*\); start them with torchrun") as caught:
        parallel.joined("cpu").__enter__()
    assert caught.value.exit_code == 2


def test_processes_that_did_not_join_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HypersdError, match="2 processes were started, and each would train the whole") as caught:
        trainer({"train": TRAIN, "stages": [FIRST]}, tmp_path)
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_alone_nothing_is_joined_and_nothing_waits() -> None:
    with parallel.joined(), parallel.in_turn():
        assert not parallel._is_joined() and (parallel.rank(), parallel.size(), parallel.is_first()) == (0, 1, True)
        assert parallel.any_of(True) and not parallel.any_of(False)
        tensor = torch.tensor([1.0, 2.0])
        assert parallel.sum_(tensor) is tensor and tensor.tolist() == [1.0, 2.0]


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """One encodes, one speaks, one writes; what comes out is what one process makes of the same recipe."""
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        '[model]\npath = "embedded"\n[data]\nkind = "scenes"\ncount = 4\n[lora]\nrank = 2\nalpha = 2.0\n'
        "[train]\nbatch_size = 1\naccumulation = 2\nlearning_rate = 1e-3\n"
        '[[stages]]\nmethod = "tscd"\nsegments = 2\niterations = 2\n'
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    found = []
    for name, launch in ("one", []), ("two", torchrun):
        command = [sys.executable, *launch, "-m", "hypersd", "distill", str(recipe), "--out", name, "--device", "cpu"]
        where = environment(0, 1, 0) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"LoRA: {name}/lora.safetensors\n"
        assert done.stderr.count("encode pictures: 4/4") == done.stderr.count("tscd-2: 2/2") == 1
        found.append(load_file(tmp_path / name / "lora.safetensors"))
        assert len(list((tmp_path / name).rglob("*.safetensors"))) == 5  # shard, empty prompt, stage, last, checkpoint
    one, two = found
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items()) and any(t.any() for t in one.values())

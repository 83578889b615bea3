"""Score distillation of a whole network at timestep 800: trained, resumed, exported, and sampled by its own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hypersd import cli, resolve
from hypersd.distill.recipe import Recipe, parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models import Backbone, FullBackbone, LoraSpec, load_components, save_lora
from hypersd.sampling import sample, sampler_for
from tests.conftest import SCHEDULER, make_unet
from tests.distill.test_trainer import Stop, assert_same, latents, losses, stop_at


def recipe(init: Path | None = None, train: dict[str, Any] | None = None, **options: Any) -> Recipe:
    stage = {"method": "dmd", "iterations": 4, "timestep": 800, "real_score": "base", "guidance_scale": [2.0, 2.0]}
    stage |= {"fake_updates": 1, "adversarial_weight": 0.1, "anchor": [0.0, 0.0], "consistency": 0.0}
    base: dict[str, Any] = {"full": True, "init": str(init) if init else None, "batch_size": 2, "learning_rate": 1e-4}
    base |= {"checkpoint_every": 2, "watch_every": 2, "ema_decay": 0.5}
    return parse_recipe({"train": base | (train or {}), "stages": [stage | options]})


def trainer(r: Recipe, out: Path, **options: Any) -> Trainer:
    return Trainer(r, SimpleNamespace(network=make_unet(), scheduler_config=SCHEDULER), latents(), out, **options)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    backbone = Backbone(make_unet(), LoraSpec(rank=2, alpha=2.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(0, 0.1, generator=generator)
    return save_lora(tmp_path / "lora.safetensors", backbone, "student", {"solver": "tcd"})


def test_one_step_from_800(lora: Path, tiny_sd_folder: Path, tmp_path: Path) -> None:
    """Begins as the network with the LoRA, learns, resumes to the same bits; the file gives x_0 of the EMA weights."""
    r, run = recipe(lora), tmp_path / "cut"
    whole = trainer(r, tmp_path / "whole")
    start = {name: p.detach().clone() for name, p in whole.backbone.role_parameters("student").items()}
    merged = FullBackbone(make_unet())
    merged.load_lora_state_dict(resolve.read_lora(lora)[0], "student")
    assert all(torch.equal(p, start[name]) for name, p in merged.role_parameters("student").items())
    backbone = whole.run()
    moved = {name: (p - start[name]).abs().max() for name, p in backbone.role_parameters("student").items()}
    assert all(0 < change < 1e-3 for change in moved.values())  # every weight, by at most 4 steps
    frozen = make_unet().state_dict()
    assert all(torch.equal(p, frozen[name]) for name, p in backbone.network.named_parameters())
    with pytest.raises(Stop):
        trainer(r, run, progress=stop_at("dmd", 3)).run()
    assert_same(backbone, trainer(r, run).run(resume=True))
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 4
    names = {"unet-dmd.safetensors", "unet.safetensors"}
    assert {path.name for path in run.glob("unet*")} == names and not list(run.glob("lora*"))
    state, metadata = resolve.read_weights(whole.file)
    for out in (run, tmp_path / "whole"):
        for name in names:
            again = resolve.read_weights(out / name)
            assert again[1] == metadata and all(torch.equal(again[0][key], state[key]) for key in state)
    assert metadata["steps"] == "1" and json.loads(metadata["timesteps"]) == {"1": [800]}
    student, components, process = resolve.load_with_lora(str(tiny_sd_folder), state, metadata, "cpu")
    z = torch.randn(2, *components.latent_shape, generator=torch.Generator().manual_seed(3))
    cond, time = {"encoder_hidden_states": torch.randn(2, 16, 32)}, torch.tensor([800, 800])
    table = sampler_for(process, metadata)
    x_0 = sample(lambda x_t, t: student(x_t, t, cond, role="lora"), table, z)
    alpha, sigma = (float(level[0]) for level in process.at(np.array([800])))
    with torch.no_grad():  # the same operators: on a CPU both run fused
        expected = (z - sigma * backbone(z, time, cond, role="ema")) / alpha
    torch.testing.assert_close(x_0, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["none", "feed_forward", "full"])
def test_16_bit(checkpointing: str, tmp_path: Path) -> None:
    r = recipe(train={"dtype": "bfloat16", "gradient_checkpointing": checkpointing}, iterations=1)
    t = trainer(r, tmp_path)
    backbone = t.run()
    ema = backbone.role_parameters("ema")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in ema.values())
    state, _ = resolve.read_weights(t.file)
    assert all(torch.equal(state[name], p.to(torch.bfloat16)) for name, p in ema.items())


def test_sample_by_the_command_line(lora: Path, tiny_sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    t = trainer(recipe(iterations=1), tmp_path / "run")
    t.run()
    common = ["sample", "a fox", "--model", str(tiny_sd_folder), "--out"]
    assert cli.run([*common, str(tmp_path / "own"), "--weights", str(t.file)]) == 0
    # a file that says nothing is sampled by the rules of its published name
    published = tmp_path / "Hyper-SDXL-1step-Unet.safetensors"
    load_components(tiny_sd_folder).network.save_pretrained(tmp_path)
    shutil.move(tmp_path / "diffusion_pytorch_model.safetensors", published)
    assert resolve.read_weights(published)[1]["timesteps"] == "[800]"
    assert cli.run([*common, str(tmp_path / "published"), "--weights", str(published)]) == 0
    pictures = [(tmp_path / name / "0000.png").read_bytes() for name in ("own", "published")]
    assert pictures[0] != pictures[1]
    save_file({}, tmp_path / "empty.safetensors")
    capsys.readouterr()
    for arguments, code, message in [
        (["--lora", str(lora), "--weights", str(t.file)], 2, "--lora and --weights exclude each other"),
        (["--weights", str(tmp_path / "empty.safetensors")], 1, "empty.safetensors holds no tensors"),
        (["--lora", str(t.file)], 1, "unet.safetensors holds no LoRA; whole networks are for"),
    ]:
        assert cli.run([*common, str(tmp_path / "no"), *arguments]) == code
        assert message in capsys.readouterr().err


def test_what_a_run_will_want_is_looked_for(lora: Path, tiny_sd_folder: Path, tmp_path: Path) -> None:
    path = {"model": {"path": str(tiny_sd_folder)}}
    document = recipe(lora).model_dump(mode="json") | path
    resolve.check(parse_recipe(document), tmp_path)
    t = trainer(recipe(iterations=1), tmp_path / "run")
    t.run()
    document["train"]["init"] = str(t.file)
    with pytest.raises(HypersdError, match="train.init: .*unet.safetensors holds no LoRA"):
        resolve.check(parse_recipe(document), tmp_path)

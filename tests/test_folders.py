"""The commands on folders of SD3 and FLUX, and LoRAs that keep guidance, as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hypersd import cli
from hypersd.models.export import load_lora
from hypersd.models.load import load_components
from hypersd.resolve import load_with_lora, read_lora
from hypersd.sampling import denoiser, sample, sampler_for
from tests.conftest import make_flux, make_sd3, make_t5
from tests.test_cli import fails, pictures  # noqa: F401

RECIPE = """
[model]
path = "{model}"
[data]
kind = "folder"
path = "{pictures}"
resolution = 32
caption_dropout = {dropout}
[lora]
rank = 4
alpha = 4.0
[train]
batch_size = 2
learning_rate = 1e-3
gradient_checkpointing = "full"
[[stages]]
method = "tscd"
segments = {segments}
iterations = 2
grid = {grid}
guidance_scale = {guidance}
offset_noise = 0.0
{more}
"""


def distilled(out: Path, model: Path, pictures: Path, **changes: Any) -> Path:  # noqa: F811
    """The LoRA that `hypersd distill` makes of two steps."""
    values = {"dropout": 0.0, "segments": 2, "grid": 8, "guidance": [3.0, 5.0], "more": ""} | changes
    out.mkdir()
    (out / "recipe.toml").write_text(RECIPE.format(model=model, pictures=pictures, **values))
    assert cli.run(["distill", str(out / "recipe.toml"), "--out", str(out / "run")]) == 0
    return out / "run" / "lora.safetensors"


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path / "0000.png"))


@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_distill_sample_convert(request, shape: str, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = request.getfixturevalue(f"tiny_{shape}_folder")
    lora = distilled(tmp_path / "a", folder, pictures)
    _, metadata = load_lora(lora)
    assert metadata["resolution"] == "32" and json.loads(metadata["sigmas"]) == {"2": [1.0, 0.5]}
    assert metadata.get("embedded_guidance") == (None if shape == "sd3" else "4")
    hyper = tmp_path / "hyper.safetensors"
    assert cli.run(["convert", str(lora), str(hyper), "--format", "hyper", "--model", str(folder)]) == 0
    back = tmp_path / "back.safetensors"
    assert cli.run(["convert", str(hyper), str(back), "--format", "peft", "--model", str(folder)]) == 0
    state, said = load_lora(hyper)
    assert not [key for key in state if "alpha" in key] and said["lora_scale"] == "0.125"
    # scale 1 becomes 8 times b at 0.125, a power of two: exactly the same update
    first, last = load_file(lora), load_file(back)
    alphas = json.loads(load_lora(back)[1]["lora_adapter_metadata"])
    assert alphas["transformer.lora_alpha"] == 0.5
    assert all(torch.equal(last[key], tensor * (8 if "lora_B" in key else 1)) for key, tensor in first.items())
    for name, path in (("own", lora), ("hyper", hyper), ("back", back)):
        assert (
            cli.run(["sample", "a fox", "--lora", str(path), "--model", str(folder), "--out", str(tmp_path / name)])
            == 0
        )
    own = picture(tmp_path / "own")
    assert own.shape == (32, 32, 3)  # of the training pictures, not the model's own
    for name in ("hyper", "back"):
        assert np.array_equal(own, picture(tmp_path / name))


@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_a_published_file_works_by_its_name(request, shape: str, tmp_path: Path) -> None:
    """Rank 64 on every linear layer and SD3's patch convolution, PEFT's keys, no alpha; the rules come by file name."""
    folder = request.getfixturevalue(f"tiny_{shape}_folder")
    network = {"sd3": make_sd3, "flux": make_flux}[shape]()
    generator = torch.Generator().manual_seed(0)
    state, deltas = {}, {}
    for path, module in network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            a = 0.05 * torch.randn(64, *module.weight.shape[1:], generator=generator)
            b = 0.05 * torch.randn(module.weight.shape[0], 64, *[1] * (a.dim() - 2), generator=generator)
            state[f"transformer.{path}.lora_A.weight"], state[f"transformer.{path}.lora_B.weight"] = a, b
            deltas[path] = 0.125 * (b.flatten(1) @ a.flatten(1)).view(module.weight.shape)
    name = {"sd3": "Hyper-SD3-8steps-CFG-lora", "flux": "Hyper-FLUX.1-dev-8steps-lora"}[shape]
    file = tmp_path / f"{name}.safetensors"
    save_file(state, file)
    state, metadata = read_lora(file)
    backbone, components, process = load_with_lora(str(folder), state, metadata, resolution=32)
    assert len(backbone.role_slots("lora")) == len(deltas)
    table = sampler_for(process, metadata)
    assert (
        len(table) == 8
        and (table.is_guided, table.embedded_guidance) == {"sd3": (True, None), "flux": (False, 3.5)}[shape]
    )
    with torch.no_grad():
        for path, delta in deltas.items():
            network.get_submodule(path).weight += delta
    merged = load_components(folder).network
    merged.load_state_dict(network.state_dict())
    from hypersd.models import Backbone, encode_prompts

    cond = encode_prompts(components, ["a fox"])
    x_T = torch.randn(1, *components.latent_shape, generator=generator)
    plain = sampler_for(process, metadata | {"guidance_scale": "1"})
    ours = sample(denoiser(backbone, cond, role="lora"), plain, x_T)
    theirs = sample(denoiser(Backbone(merged, roles=()), cond, role="base"), plain, x_T)
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_dry_run_needs_no_weights(request, capsys, shape: str, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = shutil.copytree(request.getfixturevalue(f"tiny_{shape}_folder"), tmp_path / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    options = ["--set", f"model.path={folder}", "--set", f"data.path={pictures}", "--dry-run"]
    assert cli.run(["distill", shape, *options]) == 0
    out = capsys.readouterr().out
    network = {"sd3": make_sd3, "flux": make_flux}[shape]()
    count = sum(p.numel() for p in network.parameters())
    assert f"{count / 1e6:,.1f} M parameters" in out and "4 pictures" in out and "MiB text encoders" in out
    assert [line.split()[1] for line in out.splitlines() if "tscd-" in line] == ["tscd-8", "tscd-4", "tscd-2", "tscd-1"]
    from hypersd.distill.recipe import load_recipe
    from hypersd.plan import plan

    found = plan(load_recipe(shape, options[1:4:2]))
    t5 = sum(p.numel() for p in make_t5({"sd3": 64, "flux": 32}[shape]).parameters())
    assert found["text_bytes"] > 4 * t5 and found["base_bytes"] > 2 * count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folder"), [("sd15", "sd"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("flux", "flux")])
def test_the_shipped_recipe_runs_whole(request, name: str, folder: str, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """Every stage as it ships but for the numbers of pictures and iterations, into one file that samples."""
    from hypersd.distill.recipe import load_recipe

    model, out = request.getfixturevalue(f"tiny_{folder}_folder"), tmp_path / "run"
    stages = load_recipe(name).stages
    settings = [f"model.path={model}", f"data.path={pictures}", "data.resolution=32", "lora.rank=4", "lora.alpha=4"]
    settings += ["train.batch_size=1", "train.accumulation=2", "train.watch_every=0"]
    settings += [f"stages.{i}.iterations=1" for i in range(len(stages))]
    assert cli.run(["distill", name, "--out", str(out), *(part for one in settings for part in ("--set", one))]) == 0
    done = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in done] == [stage.name for stage in stages]
    assert all(np.isfinite(row["loss"]) for row in done)
    picture = ["--lora", str(out / "lora.safetensors"), "--model", str(model), "--steps", "1", "--out", str(tmp_path)]
    assert cli.run(["sample", "a fox", *picture]) == 0


def test_guidance_is_kept_and_negative_prompts_count(tiny_sd_folder, pictures: Path, tmp_path: Path) -> None:  # noqa: F811
    """Taught without guidance on captions and none; the file says how much the sampler adds."""
    lora = distilled(
        tmp_path / "a", tiny_sd_folder, pictures, dropout=0.5, segments=8, guidance=[1.0, 1.0],
        more="sampling_guidance = 2.5",
    )  # fmt: skip
    _, metadata = load_lora(lora)
    assert metadata["guidance_scale"] == "2.5" and metadata["steps"] == "8" and metadata["solver"] == "ddim"
    options = ["--lora", lora, "--model", tiny_sd_folder]
    for name, more in {
        "plain": [],
        "same": ["--negative-prompt", ""],
        "negative": ["--negative-prompt", "a red apple"],
        "stronger": ["--guidance-scale", "7.5"],
    }.items():
        assert cli.run(["sample", "a fox", *map(str, [*options, *more, "--out", tmp_path / name])]) == 0
    plain = picture(tmp_path / "plain")
    assert np.array_equal(plain, picture(tmp_path / "same"))
    assert not np.array_equal(plain, picture(tmp_path / "negative"))
    assert not np.array_equal(plain, picture(tmp_path / "stronger"))


def test_what_cannot_be_had_is_one_line(fails, tiny_flux_folder, tiny_sd_folder, tmp_path: Path) -> None:  # noqa: F811
    run = ["sample", "a fox", "--out", tmp_path]
    line = fails(2, *run, "--model", tiny_flux_folder, "--resolution", "32", "--negative-prompt", "a cat", "--steps", 1)
    assert "--negative-prompt needs" in line
    line = fails(1, *run, "--model", tiny_flux_folder, "--resolution", "36", "--steps", 1)
    assert "36 x 36 pixels is not possible with this model; take multiples of 8" in line
    line = fails(1, *run, "--model", tiny_sd_folder, "--solver", "euler", "--steps", 1)
    assert "for flow models; use ddim" in line


def test_other_sizes_and_solvers(tiny_sd3_folder, tmp_path: Path) -> None:
    for solver in ("ddim", "euler"):
        out = tmp_path / solver
        arguments = ["--model", tiny_sd3_folder, "--steps", 2, "--solver", solver, "--resolution", 40, "--out", out]
        assert cli.run(["sample", "a fox", *map(str, arguments)]) == 0
        assert picture(out).shape == (40, 40, 3)
    assert not np.array_equal(picture(tmp_path / "ddim"), picture(tmp_path / "euler"))


def test_sixteen_bits_are_near(tiny_flux_folder, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        arguments = ["--model", tiny_flux_folder, "--steps", 2, "--resolution", 32, "--out", tmp_path / dtype]
        assert cli.run(["sample", "a fox", "--dtype", dtype, *map(str, arguments)]) == 0
    first, second = (picture(tmp_path / dtype).astype(float) for dtype in ("float32", "bfloat16"))
    assert 0 < np.abs(first - second).mean() < 3

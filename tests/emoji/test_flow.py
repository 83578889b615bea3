"""The flow teacher: how it is trained, put together as a folder of SD3, and distilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.stats import kstest

from hypersd import resolve
from hypersd.distill.recipe import load_recipe, parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.emoji import flow, tokens, train_flow
from hypersd.emoji.scenes import render
from hypersd.errors import HypersdError
from hypersd.models import encode_null, encode_prompts, load_components
from hypersd.models.backbone import Backbone
from hypersd.sampling.sampler import denoiser, sample
from hypersd.sampling.solvers import ddim
from hypersd.sampling.timesteps import trailing

CAPTIONS = ["a fox on a blue background", "an owl and a car on a red background"]
SHORT: dict[str, Any] = {"steps": 40, "batch": 16, "peak": 3e-3, "pool": 96, "workers": 0, "save_every": 20}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer and scheduler after 40 steps, with the state and the log of the training beside them."""
    folder = tmp_path_factory.mktemp("flow")
    train_flow.main(**SHORT, work=folder / "work", out=folder)
    return folder


@pytest.fixture(scope="module")
def folder(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flow.assemble(own, tmp_path_factory.mktemp("cache"))


def error_of(components: Any, state: dict[str, torch.Tensor]) -> float:
    """Mean squared error of the velocity at sigma = 0.6 on the training latents."""
    x = state["latents"].float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    told = train_flow.conditions(components.text_encoders[0], state["ids"].long())
    with torch.no_grad():
        out = components.network(0.4 * x + 0.6 * noise, timestep=torch.full((len(x),), 600.0), **told).sample
    return (out - (noise - x)).square().mean().item()


def test_the_transformer_is_small_and_learns(own: Path, folder: Path) -> None:
    (file,) = (own / "transformer").glob("*.safetensors")
    assert file.stat().st_size < 3_600_000
    with safe_open(file, "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    components = load_components(folder)
    data = load_file(own / "work" / "latents.safetensors")
    trained = error_of(components, data)
    components.network = train_flow.new_transformer()
    untrained = error_of(components, data)
    # it begins with the velocity 0, whose error is var(noise) + var(latents)
    assert untrained == pytest.approx(1 + data["latents"].float().square().mean().item(), rel=0.02)
    assert trained < 0.75 * untrained


def test_training_goes_on_where_it_stopped(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(average: Any, out: Path) -> None:
        raise Stop

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "latents.safetensors").symlink_to(own / "work" / "latents.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(train_flow, "save", stop)
        with pytest.raises(Stop):
            train_flow.main(**SHORT, work=tmp_path / "work", out=tmp_path)
    assert int(load_file(tmp_path / "work" / "transformer.safetensors")["step"]) == 20
    train_flow.main(**SHORT, work=tmp_path / "work", out=tmp_path)
    a, b = (load_file(next((at / "transformer").glob("*.safetensors"))) for at in (own, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_levels_are_logit_normal() -> None:
    sigma = train_flow.logit_normal(512, torch.Generator().manual_seed(0))
    assert kstest(sigma.logit().numpy(), "norm").statistic < 1 / 512 + 1e-3
    assert 0 < sigma.min() and sigma.max() < 1


@torch.no_grad()
def test_it_is_an_ordinary_folder_of_sd3(folder: Path) -> None:
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    components = load_components(folder)
    states, null_states, pooled, null_pooled = pipe.encode_prompt(
        CAPTIONS, None, None, device="cpu", max_sequence_length=0
    )
    for ours, theirs in (
        (encode_prompts(components, CAPTIONS), (states, pooled)),
        (encode_null(components, 2), (null_states, null_pooled)),
        (train_flow.conditions(components.text_encoders[0], tokens.encode(tokens.build(), CAPTIONS)), (states, pooled)),
    ):
        torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours["pooled_projections"], theirs[1], rtol=0, atol=1e-5)
    # trailing Euler steps on the shifted schedule are what our table says
    x_T = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    process = components.noise_process()
    table = ddim(process, trailing(4, 1000))
    backbone = Backbone(components.network, roles=())
    z = sample(denoiser(backbone, encode_prompts(components, CAPTIONS), role="base"), table, x_T)
    theirs = pipe(
        CAPTIONS, latents=x_T, guidance_scale=1.0, output_type="latent", max_sequence_length=0, height=64, width=64,
        sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4,
    ).images  # fmt: skip
    torch.testing.assert_close(z, theirs, rtol=0, atol=1e-4)


def test_the_folder_is_made_once_for_each_content(own: Path, folder: Path, tmp_path: Path) -> None:
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert flow.assemble(own, folder.parent) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    other = tmp_path / "own"
    for name in ("transformer", "scheduler"):
        (other / name).mkdir(parents=True)
        for file in (own / name).iterdir():
            (other / name / file.name).write_bytes(file.read_bytes())
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 3.0}))
    assert flow.assemble(other, folder.parent) != folder


def test_what_is_missing_is_said(own: Path, tmp_path: Path) -> None:
    with pytest.raises(HypersdError, match="train it with python -m hypersd.emoji.train_flow"):
        flow.assemble(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(HypersdError, match="set XDG_CACHE_HOME"):
        flow.assemble(own, tmp_path / "file" / "cache")


def test_the_recipe_distils_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emoji-flow recipe, shortened, through the same steps as the command line takes."""
    monkeypatch.setattr(flow, "FLOW", folder)
    monkeypatch.setattr("hypersd.emoji.flow_model_folder", lambda: folder)
    stages = [f"stages.{i}.iterations={n}" for i, n in enumerate((30, 2, 2, 2))]
    fast = ["data.count=64", "train.batch_size=8", "train.learning_rate=1e-3", "train.warmup=2", "lora.rank=8"]
    recipe = load_recipe("emoji-flow", stages + fast)
    components = resolve.load_model(recipe.model.path, "cpu")
    assert components.noise_process().kind == "flow"
    dataset = resolve.load_dataset(recipe, components, tmp_path / "data")
    Trainer(recipe, components, dataset, tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["index"] == 0]
    assert len(losses) == 30 and sum(losses[-8:]) < 0.9 * sum(losses[:8])
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata()["prediction_type"] == "flow_prediction"


@pytest.mark.slow
def test_one_step_of_the_student_is_nearer_to_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 iterations of TSCD with one segment; the aim is 25 guided steps of the teacher from the same noise."""
    more = SHORT | {"steps": 200, "peak": 2e-3, "pool": 256, "save_every": 200}
    train_flow.main(**more, work=tmp_path / "work", out=tmp_path)
    folder = flow.assemble(tmp_path, tmp_path / "cache")
    monkeypatch.setattr("hypersd.emoji.flow_model_folder", lambda: folder)
    stage = {"method": "tscd", "segments": 1, "iterations": 60, "grid": 16, "loss": "mse", "guidance_scale": [2.5, 2.5]}
    recipe = parse_recipe(
        {
            "model": {"path": "embedded-flow"},
            "data": {"kind": "scenes", "count": 256},
            "lora": {"rank": 16, "alpha": 16.0},
            "train": {"batch_size": 16, "learning_rate": 2e-3, "warmup": 5, "ema_decay": 0.9},
            "stages": [stage],
        }
    )
    components = resolve.load_model("embedded-flow", "cpu")
    dataset = resolve.load_dataset(recipe, components, tmp_path / "data")
    backbone = Trainer(recipe, components, dataset, tmp_path).run()
    captions = render(5, 32, "heldout").captions
    cond, null = encode_prompts(components, captions), encode_null(components, 32)
    x_T = torch.randn(32, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    tables = {steps: ddim(components.noise_process(), trailing(steps, 1000)) for steps in (1, 25)}
    with torch.no_grad():
        base = denoiser(backbone, cond, null=null, role="base")
        aim, undistilled = (sample(base, tables[steps].guided(2.5), x_T) for steps in (25, 1))
        student = sample(denoiser(backbone, cond, role="ema"), tables[1], x_T)
    assert (student - aim).square().mean() < 0.75 * (undistilled - aim).square().mean()

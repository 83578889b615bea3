"""What a recipe's feedback stage and a merge stand for, from files to callables."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hypersd import cli, resolve
from hypersd.distill.method import Context
from hypersd.distill.methods import METHODS
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.emoji.scenes import BACKGROUNDS, is_heldout
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.export import load_lora, save_lora
from hypersd.models.load import Components, load_components, read_scheduler
from hypersd.models.lora import LoraSpec
from hypersd.models.noise_process import NoiseProcess
from tests.conftest import SCHEDULER, make_flux, make_unet
from tests.distill import toy
from tests.models.test_rewards import mask2former


def recipe(folder: Path | None = None, model: str = "embedded", **options: Any) -> Any:
    stage = {"method": "feedback", "iterations": 1} | options
    data = {} if folder is None else {"kind": "folder", "path": str(folder)}
    document = {"model": {"path": model}, "data": data, "train": {"init": "x.safetensors"}, "stages": [stage]}
    return parse_recipe(document)


def test_structure_of_a_folder_of_pictures(tmp_path: Path, tiny_sd_folder: Path) -> None:
    """COCO's annotations reach the segmenter with the picture that the data set's number means."""
    annotations = []
    for index in (0, 1):  # in the order of names
        Image.fromarray(np.full((64, 64, 3), 80 * index, np.uint8)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a picture")
    square = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]
    annotations = [{"id": 1, "image_id": 5, "category_id": 3, "segmentation": [square]}]
    images = [{"id": 4 + i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in (0, 1)]
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 3}]}))
    weights = tmp_path / "mask2former"
    mask2former().save_pretrained(weights)
    (weights / "preprocessor_config.json").write_text("{}")
    structure = {"kind": "transformers", "path": str(weights), "annotations": str(coco)}
    r = recipe(tmp_path, str(tiny_sd_folder), structure=structure)
    found = resolve.load_rewards(r, load_components(tiny_sd_folder))
    images_ = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    (structure_loss,) = found["structure"].values()
    loss = structure_loss(images_, np.array([1, 0]))
    (gradient,) = torch.autograd.grad(loss, images_)
    # number 1 has the instance, and stands first in this batch
    assert gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0 and found["rewards"] == {}


def test_the_device_only_holds_what_is_at_work(
    tmp_path: Path, tiny_sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text encoders and VAE, then VAE and network; where the data is cached, text encoders are not even loaded."""
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("black")
    r = recipe(tmp_path, str(tiny_sd_folder), structure={"kind": "solo"})
    components = load_components(tiny_sd_folder, text_encoders=False)
    happened: list[str] = []
    to, load_text_encoders = Components.to, Components.load_text_encoders

    def moved(self: Components, *args: Any, network: bool = True) -> Components:
        happened.append(f"network {network}, {len(self.text_encoders)} text")
        return to(self, *args, network=network)

    def loaded(self: Components) -> None:
        happened.append("text loaded")
        load_text_encoders(self)

    monkeypatch.setattr(Components, "load_text_encoders", loaded)
    monkeypatch.setattr(Components, "to", moved)
    monkeypatch.setattr(resolve, "load_components", lambda *_, **__: components)
    _, data = resolve.load_run(r, tmp_path / "latents", "cpu")
    assert happened == ["text loaded", "network False, 1 text", "network True, 0 text"]
    happened.clear()
    _, again = resolve.load_run(r, tmp_path / "latents", "cpu")
    assert happened == ["network True, 0 text"]
    monkeypatch.undo()
    whole = resolve.load_dataset(r, resolve.load_model(str(tiny_sd_folder), "cpu"), tmp_path / "whole")
    for other in (again, whole):
        for name, tensor in data.shards[0].items():
            assert torch.equal(tensor, other.shards[0][name])


def test_what_cannot_be_had_is_said(tmp_path: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    term = {"kind": "aesthetic", "threshold": 6.0}
    for r, message in [
        (recipe(tmp_path, str(tiny_sd_folder), rewards=[term]), "reward aesthetic needs path"),
        (recipe(rewards=[{"kind": "judge_alignment", "threshold": 1.0}]), "judges and is never optimised"),
        (recipe(structure={"kind": "solo", "path": "x"}), "needs path, annotations"),
        (recipe(tmp_path, structure={"kind": "scenes"}), 'belongs to data.kind = "scenes"'),
    ]:
        with pytest.raises(HypersdError, match=message) as caught:
            resolve.load_rewards(r, components)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_every_stage_has_what_it_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of one kind with other files are not mixed up; equal ones are loaded once; a kind alone still serves."""
    loaded: list[str] = []
    monkeypatch.setattr(resolve, "load_reward", lambda kind, path, device: loaded.append(path) or (kind, path))
    monkeypatch.setattr(resolve, "load_structure", lambda term, *_: loaded.append(term.path) or term.path)
    stages = [
        {"method": "feedback", "adapter": "continue", "iterations": 1, "structure": {"kind": "solo", "path": solo},
         "rewards": [{"kind": "aesthetic", "path": path, "threshold": 1.0}]}
        for path, solo in (("a", "s"), ("b", "t"), ("a", "s"))
    ]  # fmt: skip
    stages.append({"method": "rg_lcd", "iterations": 1, "rewards": [{"kind": "aesthetic", "path": "b"}]})
    r = parse_recipe({"model": {"path": "m"}, "train": {"init": "x"}, "stages": stages})
    found = resolve.load_rewards(r, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    assert loaded == ["a", "s", "b", "t"]
    process, decode = NoiseProcess.from_config(SCHEDULER), torch.nn.Identity()
    context = Context(Backbone(make_unet(), roles=("previous",)), process, {}, None, decode, **found)  # type: ignore
    methods = [METHODS[type(stage)](stage, context) for stage in r.stages]
    assert [m.rewards["aesthetic"][1] for m in methods] == ["a", "b", "a", "b"]  # type: ignore[attr-defined]
    assert [m.structure for m in methods[:3]] == ["s", "t", "s"]  # type: ignore[attr-defined]
    own = Context(context.backbone, process, {}, None, decode, {"aesthetic": "mine"}, "own")  # type: ignore
    methods = [METHODS[type(stage)](stage, own) for stage in r.stages]
    assert [m.rewards for m in methods] == [{"aesthetic": "mine"}] * 4  # type: ignore[attr-defined]
    assert methods[0].structure == "own"  # type: ignore[attr-defined]


def test_what_is_missing_is_said_before_anything_is_encoded(
    tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `distill` and by its --dry-run: everything beside model and pictures that a run will want."""
    monkeypatch.setattr(resolve, "load_run", lambda *_: pytest.fail("the model is loaded"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64)).save(pictures / "0.png")
    (pictures / "0.txt").write_text("black")
    init, run = tmp_path / "init.safetensors", tmp_path / "run"
    network = load_components(tiny_sd_folder).network
    backbone = Backbone(network, LoraSpec(3, 6.0))
    save_lora(init, backbone, "student")
    save_lora(tmp_path / "flux.safetensors", Backbone(make_flux()), "student")
    (tmp_path / "cut.safetensors").write_bytes(init.read_bytes()[:-1000])
    (tmp_path / "empty").mkdir()
    mask2former().save_pretrained(tmp_path / "mask2former")
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))

    def said(*options: str, reward: str = "", structure: str = "", adapter: str = "continue") -> str:
        """The last line of `distill` and of its --dry-run, which must be the same."""
        path = tmp_path / "recipe.toml"
        path.write_text(
            f'model.path = "{tiny_sd_folder}"\ndata = {{kind = "folder", path = "{pictures}"}}\n'
            f'lora = {{rank = 3, alpha = 6.0}}\ntrain.init = "{init}"\n'
            f'[[stages]]\nmethod = "feedback"\niterations = 1\nadapter = "{adapter}"\n'
            f"rewards = [{reward}]\n" + (f"structure = {structure}" if structure else "")
        )
        lines = []
        for more in ([], ["--dry-run"]):
            capsys.readouterr()
            assert cli.run(["distill", str(path), "--out", str(run), *options, *more]) > 0
            lines.append(capsys.readouterr().err.strip().splitlines()[-1])
        assert lines[0] == lines[1] and not run.exists()
        return lines[0]

    def reward(kind: str, path: str) -> str:
        return f'{{kind = "{kind}", path = "{tmp_path / path}", threshold = 1.0}}'

    def structure(kind: str, path: str, annotations: str) -> str:
        return f'{{kind = "{kind}", path = "{tmp_path / path}", annotations = "{tmp_path / annotations}"}}'

    good = {"structure": structure("transformers", "mask2former", "coco.json")}
    for adapter in ("continue", "separate"):
        assert "train.init: none.safetensors does not exist" in said(
            "--set", "train.init=none.safetensors", adapter=adapter, **good
        )
        cut = f"train.init={tmp_path / 'cut.safetensors'}"
        assert "cut.safetensors is truncated" in said("--set", cut, adapter=adapter, **good)
        flux = f"train.init={tmp_path / 'flux.safetensors'}"
        assert "train.init: the LoRA belongs to another model" in said("--set", flux, adapter=adapter, **good)
    assert "rank 3 in the file and 4 in role 'student'; set lora.rank" in said("--set", "lora.rank=4", **good)
    assert "LoRA targets to_kk; check" in said("--set", 'lora.targets=["to_q", "to_kk"]', **good)
    assert "no checkpoint" in said("--resume", **good) and "checkpoint.good" in said("--from-good", **good)
    assert f"no folder {tmp_path / 'none'}" in said(reward=reward("aesthetic", "none"))
    assert "empty holds no .safetensors" in said(reward=reward("aesthetic", "empty"))
    assert "reward 'taste' is unknown" in said(reward=reward("taste", "empty"))
    assert "aesthetic needs path" in said(reward='{kind = "aesthetic", threshold = 1.0}')
    assert f"{tmp_path / 'none'} does not exist" in said(structure=structure("solo", "none", "coco.json"))
    assert f"no folder {tmp_path / 'none'}" in said(structure=structure("transformers", "none", "coco.json"))
    assert "cannot read" in said(structure=structure("transformers", "mask2former", "none.json"))
    assert "does not name 0.png" in said(**good)  # the last thing that is looked at


def test_prompts_from_a_file(tmp_path: Path) -> None:
    """Without empty lines, or the mark that some editors put before the first."""
    (tmp_path / "prompts.txt").write_text("\ufefftwo\n\n three \n", "utf-8")
    assert resolve.captions(["one"], tmp_path / "prompts.txt") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"method": "tscd", "segments": 1, "grid": 5000}, "grid = 5000 wants a model of 5000 timesteps"),
        ({"method": "tscd", "segments": 2000, "grid": 3000}, "grid = 3000 wants"),
        ({"method": "rg_lcd", "rewards": [{"kind": "scene_alignment"}], "grid": 1001}, "grid = 1001 wants"),
        ({"method": "pcm", "phases": 1000, "grid": 1000}, "phases must lie between 1 and 999, got 1000"),
        ({"method": "perflow", "windows": 300}, "windows = 300 wants a model of 1200 timesteps"),
        ({"method": "lightning", "teacher": "base", "student_steps": 1, "teacher_steps": 1001}, "teacher_steps = 1001"),
        ({"method": "dmd", "real_score": "base", "anchor_steps": 5000}, "anchor_steps = 5000 wants"),
        ({"method": "dmd", "real_score": "base", "timestep": 1000}, "timestep = 1000 wants a model of 1001 timesteps"),
        ({"method": "dmd2", "timesteps": [1000, 500]}, r"timesteps = \[1000, 500\] wants a model of 1001 timesteps"),
        ({"method": "feedback", "rollout": [1, 1001], "structure": {"kind": "scenes"}}, r"rollout = \[1, 1001\] wants"),
    ],
)
def test_a_stage_that_the_model_cannot_serve_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict[str, Any], message: str
) -> None:
    """The model has 1000 timesteps. By the command before anything is encoded, by the trainer before it trains."""
    first = {"method": "tscd", "segments": 1, "iterations": 1}
    r = parse_recipe({"stages": [first, stage | {"iterations": 1}]})
    config = read_scheduler(resolve.model_folder("embedded"))
    bare = SimpleNamespace(scheduler_config=config, network=None)
    monkeypatch.setattr(resolve, "Backbone", lambda *_: pytest.fail("the network is looked at"))
    for ask in (lambda: resolve.check(r, tmp_path), lambda: Trainer(r, bare, toy.dataset(1), tmp_path)):
        with pytest.raises(HypersdError, match=rf"^stages\.1: {message}") as caught:
            ask()
        assert caught.value.exit_code == 2


def test_processes_that_cannot_share_the_passes_are_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = parse_recipe({"stages": [{"method": "tscd", "segments": 1, "iterations": 1}]})
    resolve.check(r, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(resolve, "Backbone", lambda *_: pytest.fail("the network is looked at"))
    with pytest.raises(HypersdError, match="accumulation = 1 passes a step cannot be shared by 2 processes"):
        resolve.check(r, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_judged_was_never_trained_on_and_the_zero_line_is_another_draw() -> None:
    both = resolve.scene_references(40, 3, (2, 3))
    for reference in both:
        assert reference.objects is not None
        for objects, caption in zip(reference.objects, reference.captions, strict=True):
            assert is_heldout(objects, list(BACKGROUNDS).index(caption.split()[-2]))
    assert not set(both[0].captions) & set(both[1].captions)
    assert both[0].variety is not None and both[0].variety.shape == (2, 3, 64, 64, 3)


def test_guidance_is_what_the_network_takes() -> None:
    """Asked for, said by the file, or usual; as two passes or as an input. FLUX.1-schnell takes none."""
    unet, dev, schnell = make_unet(), make_flux(), make_flux(guidance_embeds=False)
    for network, said, asked, expected in [
        (unet, {}, None, {"guidance_scale": "3.0"}),
        (unet, {"guidance_scale": "2"}, None, {"guidance_scale": "2"}),
        (unet, {"guidance_scale": "2"}, 5.0, {"guidance_scale": "5.0"}),
        (dev, {"guidance_scale": "1"}, None, {"guidance_scale": "1", "embedded_guidance": "3.5"}),
        (dev, {"embedded_guidance": "2"}, None, {"embedded_guidance": "2"}),
        (dev, {"embedded_guidance": "2"}, 5.0, {"embedded_guidance": "5.0"}),
        (schnell, {}, None, {"guidance_scale": "1.0"}),
    ]:
        assert resolve.told_guidance(said, network, asked, 3.0) == expected


def test_merge_by_the_command_line(tmp_path: Path, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Strengths, exactness, rank and format; how to sample comes from the first file."""
    backbone = Backbone(load_components(tiny_sd_folder).network, LoraSpec(3, 6.0), roles=("a", "b"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in ("a", "b"):
            for p in backbone.role_parameters(role).values():
                p.normal_(0, 0.1, generator=generator)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_lora(one, backbone, "a", {"solver": "tcd", "prediction_type": "epsilon"})
    save_lora(two, backbone, "b", {"solver": "ddim"}, format="kohya")
    out = tmp_path / "out.safetensors"
    common = ["merge", str(one), str(two), "--out", str(out), "--model", str(tiny_sd_folder)]
    assert cli.run([*common, "--weights", "1,-0.5"]) == 0
    state, metadata = load_lora(out)
    assert metadata["solver"] == "tcd" and json.loads(metadata["merged"]) == [[one.name, 1.0], [two.name, -0.5]]
    backbone.load_lora_state_dict(state, "merged")

    def update(role: str, path: str) -> torch.Tensor:
        layer = backbone.lora_layers(role)[path]
        return layer.scale * layer.b.double().flatten(1) @ layer.a.double().flatten(1)

    for path in list(backbone.role_slots("a"))[:4]:
        wanted = update("a", path) - 0.5 * update("b", path)
        torch.testing.assert_close(update("merged", path), wanted, rtol=1e-5, atol=1e-7)
    capsys.readouterr()
    assert cli.run([*common, "--rank", "4", "--format", "kohya"]) == 0
    said = capsys.readouterr().out
    assert "% of the update's energy dropped" in said and 0 < float(said.split(", ")[1].split(" %")[0]) < 50
    state, metadata = load_lora(out)
    assert metadata["rank"] == "4" and all("lora_unet_" in key for key in state)
    assert cli.run([*common, "--weights", "1,x"]) == 2 and "is not a list of numbers" in capsys.readouterr().err
    assert cli.run([*common, "--weights", "1"]) == 2 and "1 weights for 2 LoRAs" in capsys.readouterr().err

"""Distillation of SD3 and FLUX shaped networks by the same trainer and the same methods."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.distill.data import Batch, LatentDataset
from hypersd.distill.method import Context, Draw
from hypersd.distill.methods import METHODS
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.models.export import load_lora, save_lora
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling import sampler_for
from tests.conftest import FLOW_SCHEDULER, FLUX_SCHEDULER, make_flux, make_sd3, make_vae

NETWORKS = {"sd3": make_sd3, "flux": make_flux}
STAGES: dict[str, dict[str, Any]] = {
    "tscd": {"segments": 4, "grid": 8, "guidance_scale": [3.0, 5.0], "offset_noise": 0.0},
    "tcd": {"grid": 8, "guidance_scale": [3.0, 5.0]},
    "lcm": {"grid": 8, "guidance_scale": [3.0, 5.0]},
    "pcm": {"phases": 4, "grid": 8, "guidance_scale": [3.0, 5.0]},
    "tdd": {"grid": 16, "guidance_scale": [3.0, 3.0]},
    "perflow": {"windows": 2, "solver_steps": 2, "guidance_scale": [3.0, 5.0]},
    "lightning": {"teacher_steps": 4, "student_steps": 2, "teacher": "base", "guidance_scale": [3.0, 5.0]},
    "dmd2": {"timesteps": [999, 499], "adversarial_weight": 0.0, "guidance_scale": [3.0, 5.0], "fake_updates": 1},
    "dmd": {"guidance_scale": [3.0, 5.0], "real_score": "base", "consistency": 0.5, "grid": 8, "fake_updates": 1},
}


def latents(shape: str, count: int = 8) -> LatentDataset:
    generator = torch.Generator().manual_seed(1)
    width, pooled = {"sd3": (64, 64), "flux": (32, 32)}[shape]

    def cond(n: int) -> dict[str, torch.Tensor]:
        states = torch.randn(n, 6, width, generator=generator)
        return {"encoder_hidden_states": states, "pooled_projections": torch.randn(n, pooled, generator=generator)}

    shard = {"latents": torch.randn(count, 4, 8, 8, generator=generator), **cond(count)}
    return LatentDataset([shard], ["x"] * count, cond(1))


def components(shape: str) -> Any:
    scheduler = {"sd3": FLOW_SCHEDULER, "flux": FLUX_SCHEDULER}[shape]
    return SimpleNamespace(network=NETWORKS[shape](), scheduler_config=scheduler, vae_scale_factor=4)


def recipe(*stages: dict[str, Any], **train: Any) -> Any:
    settings = {"batch_size": 2, "learning_rate": 1e-3, "gradient_checkpointing": "none"} | train
    return parse_recipe({"lora": {"rank": 4, "alpha": 4.0}, "train": settings, "stages": list(stages)})


def stage(method: str, iterations: int = 2, **changes: Any) -> dict[str, Any]:
    return {"method": method, "iterations": iterations} | STAGES[method] | changes


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


# what is FLUX's own in the other methods is in what they share with these
CASES = [*(("sd3", method) for method in STAGES), ("flux", "tscd"), ("flux", "perflow"), ("flux", "dmd")]


@pytest.mark.parametrize(("shape", "method"), CASES)
def test_every_method_trains_and_its_file_samples(shape: str, method: str, tmp_path: Path) -> None:
    parts = components(shape)
    trainer = Trainer(recipe(stage(method)), parts, latents(shape), tmp_path)
    backbone = trainer.run()
    assert np.isfinite(losses(tmp_path)).all()
    assert any(p.abs().max() > 0 for n, p in backbone.role_parameters("ema").items() if "lora_B" in n)
    # all attention and feed-forward layers of both streams, none of the norms
    adapted = set(backbone.role_slots("student"))
    wanted = ("attn.to_q", "attn.to_out.0", "ff.net.2") + (("proj_mlp",) if shape == "flux" else ("add_k_proj",))
    assert all(any(path.endswith(end) for path in adapted) for end in wanted)
    assert not any("norm" in path or "embed" in path for path in adapted)
    _, metadata = load_lora(tmp_path / "lora.safetensors")
    process = NoiseProcess.from_config(parts.scheduler_config, latent_size=(8, 8))
    assert metadata["prediction_type"] == "flow_prediction" and metadata["resolution"] == "32"
    assert metadata.get("embedded_guidance") == {"sd3": None, "flux": "4"}[shape]
    for count, timesteps in json.loads(metadata["timesteps"]).items():
        table = sampler_for(process, metadata, int(count))
        assert len(table) == int(count) and not table.is_guided
        sigmas = json.loads(metadata["sigmas"])[count]
        assert np.allclose(sigmas, (np.array(timesteps) + 1) / 1000, rtol=0, atol=1e-12)
        shifted = process.shift * np.array(sigmas) / (1 + (process.shift - 1) * np.array(sigmas))
        assert np.allclose(table.timesteps, 1000 * shifted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", NETWORKS)
def test_training_lowers_the_loss(shape: str, tmp_path: Path) -> None:
    """The random teacher's field is far from straight; an adapter on every block can follow it on eight latents."""
    r = recipe(
        stage("tscd", 60, segments=2, t_end="boundary", loss="mse", target="online", guidance_scale=[4.0, 4.0]),
        batch_size=8, learning_rate=3e-3,
    )  # fmt: skip
    Trainer(r, components(shape), latents(shape), tmp_path).run()
    found = losses(tmp_path)
    assert np.mean(found[-15:]) < 0.8 * np.mean(found[:15])


@pytest.mark.parametrize("shape", NETWORKS)
def test_sixteen_bits_and_what_is_computed_again(shape: str, tmp_path: Path) -> None:
    """Checkpointing changes no bit of the adapters; a base in bfloat16 has nearly the loss of one in float32."""
    found, adapters = {}, {}
    for dtype, mode in [("float32", "none"), ("float32", "feed_forward"), ("float32", "full"), ("bfloat16", "full")]:
        out = tmp_path / f"{dtype}-{mode}"
        r = recipe(stage("tscd", 2), dtype=dtype, gradient_checkpointing=mode)
        backbone = Trainer(r, components(shape), latents(shape), out).run()
        found[dtype, mode], adapters[dtype, mode] = losses(out), backbone.role_parameters("student")
    for mode in ("feed_forward", "full"):
        pairs = zip(adapters["float32", "none"].values(), adapters["float32", mode].values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert found["bfloat16", "full"] == pytest.approx(found["float32", "none"], rel=0.2)
    assert found["bfloat16", "full"] != found["float32", "none"]


@pytest.mark.parametrize("shape", NETWORKS)
def test_resume_gives_the_bits_of_an_unbroken_run(shape: str, tmp_path: Path) -> None:
    """Two stages, the second taught by the first; FLUX's guidance is drawn anew for each batch."""
    r = recipe(
        stage("tscd", 3), stage("tscd", 3, segments=2, teacher="previous_stage"), checkpoint_every=2, batch_size=2
    )
    parts = components(shape)
    whole = Trainer(r, copy.deepcopy(parts), latents(shape), tmp_path / "whole").run()

    class Stop(Exception):
        pass

    def stop(name: str, step: int, total: int, loss: float) -> None:
        if name == "tscd-2" and step == 3:
            raise Stop

    first = Trainer(r, copy.deepcopy(parts), latents(shape), tmp_path / "broken", progress=stop)
    with pytest.raises(Stop):
        first.run()
    resumed = Trainer(r, copy.deepcopy(parts), latents(shape), tmp_path / "broken").run(resume=True)
    for role in ("student", "ema"):
        pairs = zip(whole.role_parameters(role).values(), resumed.role_parameters(role).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_flux_is_told_the_guidance_of_the_stage(tmp_path: Path) -> None:
    """One pass per role, each told the same draw from the range; the networks of others are told nothing."""
    seen: list[tuple[int, Any]] = []
    for shape in NETWORKS:
        parts = components(shape)
        trainer = Trainer(recipe(stage("tscd", 1), watch_every=0), parts, latents(shape), tmp_path / shape)
        seen.clear()
        handle = parts.network.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len(args[0]), kwargs.get("guidance"))), with_kwargs=True
        )
        trainer.run()
        handle.remove()
        if shape == "flux":
            guidance = seen[0][1]
            assert [size for size, _ in seen] == [2, len(seen[1][1]), 2]
            assert ((guidance >= 3) & (guidance <= 5)).all() and guidance[0] != guidance[1]
            assert all(torch.isin(told, guidance).all() for _, told in seen)
        else:  # teacher with both branches of guidance, target, student
            assert [size for size, _ in seen][::2] == [4, 2] and all(told is None for _, told in seen)


@pytest.mark.parametrize("method", ["tscd", "tcd", "pcm", "tdd", "perflow", "lightning"])
def test_a_teacher_that_is_told_its_guidance_is_not_scaled_by_it_as_well(method: str) -> None:
    """Where the velocity is the same everywhere, every jump lands where the teacher's steps land: nothing to learn."""

    class Straight:
        embeds_guidance = True

        def __call__(self, x_t: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.ones_like(x_t)

    (one,) = recipe(stage(method)).stages
    process = NoiseProcess.from_config(FLUX_SCHEDULER, latent_size=(8, 8))
    context = Context(Straight(), process, {})  # type: ignore[arg-type]
    batch = Batch(torch.randn(16, 4, 8, 8), {"guidance": torch.full((16,), 4.0)})
    loss = METHODS[type(one)](one, context).loss(batch, Draw((1,), torch.device("cpu")))
    assert float(loss) == pytest.approx(0.0, abs=1e-4)


def test_a_published_file_starts_a_run_at_its_own_strength(tmp_path: Path) -> None:
    """train.init takes files without alpha at the weight that they are made for."""
    path = tmp_path / "Hyper-SD3-8steps-CFG-lora.safetensors"
    trainer = Trainer(recipe(stage("tscd", 1)), components("sd3"), latents("sd3"), tmp_path / "a")
    backbone = trainer.backbone
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(0, 0.1)
    save_lora(path, backbone, "student", {}, "hyper")
    state, metadata = load_lora(path)
    assert metadata["lora_scale"] == "0.125" and not any("alpha" in key for key in [*state, *metadata])
    r = recipe(stage("tscd", 1), init=str(path))
    other = Trainer(r, components("sd3"), latents("sd3"), tmp_path / "b").backbone
    for layers in zip(backbone.lora_layers("student").values(), other.lora_layers("student").values(), strict=True):
        ours, theirs = (layer.scale * layer.b @ layer.a for layer in layers)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", NETWORKS)
def test_feedback_on_top_of_a_distilled_flow_model(shape: str, tmp_path: Path) -> None:
    """Rewards see decoded pictures; the gradient reaches the adapter through VAE, roll-out and transformer."""
    parts = components(shape)
    parts.vae = make_vae(scaling_factor=1.5305, shift_factor=0.0609).requires_grad_(False)
    terms = [{"kind": "brightness", "threshold": 5.0}]
    feedback = {"method": "feedback", "iterations": 2, "rollout": [2], "rewards": terms}
    r = recipe(stage("tscd", 1, segments=1), feedback)
    rewards = {"brightness": lambda images, captions: images.mean((1, 2, 3))}
    backbone = Trainer(r, parts, latents(shape), tmp_path, rewards=rewards).run()
    moved = {n for n, p in backbone.role_parameters("student").items() if "lora_B" in n and p.abs().max() > 0}
    assert {f"transformer_blocks.0.attn.{layer}.lora_B.weight" for layer in ("to_q", "add_v_proj")} <= moved
    assert load_lora(tmp_path / "lora-feedback.safetensors")[1]["solver"] == "tcd"


def assert_resumes(r: Any, out: Path, name: str, at: int, **options: Any) -> None:
    """A run that is killed in stage `name` at step `at` ends with the bits, scales and losses of an unbroken one."""

    class Stop(Exception):
        pass

    def stop(stage: str, step: int, total: int, loss: float) -> None:
        if (stage, step) == (name, at):
            raise Stop

    def trainer(where: str, **more: Any) -> Trainer:
        return Trainer(r, copy.deepcopy(options["parts"]), latents("sd3"), out / where, rewards=REWARDS, **more)

    whole = trainer("whole").run()
    with pytest.raises(Stop):
        trainer("broken", progress=stop).run()
    resumed = trainer("broken").run(resume=True)
    assert losses(out / "whole") == losses(out / "broken") and set(whole.roles) == set(resumed.roles)
    for role in set(whole.roles) & {"student", "ema", "previous"}:
        assert whole.role_scales(role) == resumed.role_scales(role)
        pairs = zip(whole.role_parameters(role).values(), resumed.role_parameters(role).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


REWARDS = {"brightness": lambda images, captions: images.mean((1, 2, 3))}


def test_an_adapter_on_top_of_a_file_resumes_at_its_own_strength(tmp_path: Path) -> None:
    """The file has 0.125 and no alpha; what feedback trains on top is the recipe's."""
    init = tmp_path / "Hyper-SD3-8steps-CFG-lora.safetensors"
    backbone = Trainer(recipe(stage("tscd", 1)), components("sd3"), latents("sd3"), tmp_path / "a").backbone
    save_lora(init, backbone, "student", {}, "hyper")
    parts = components("sd3")
    parts.vae = make_vae(scaling_factor=1.5305, shift_factor=0.0609).requires_grad_(False)
    terms = [{"kind": "brightness", "threshold": 5.0}]
    feedback = {"method": "feedback", "iterations": 4, "rollout": [2], "rewards": terms}
    r = recipe(stage("tscd", 1, segments=1), feedback, init=str(init), checkpoint_every=2, watch_every=0)
    assert_resumes(r, tmp_path, "feedback", 3, parts=parts)


def test_a_teacher_from_a_file_is_gone_after_its_stage(tmp_path: Path) -> None:
    init = tmp_path / "init.safetensors"
    backbone = Trainer(recipe(stage("tscd", 1)), components("sd3"), latents("sd3"), tmp_path / "a").backbone
    save_lora(init, backbone, "student", {}, "peft")
    stages = stage("lightning", 2, teacher="previous_stage"), stage("dmd2", 4)
    r = recipe(*stages, init=str(init), checkpoint_every=2, watch_every=0)
    assert_resumes(r, tmp_path, "dmd2-2", 3, parts=components("sd3"))


def test_rewards_keep_less_of_the_decoder_where_blocks_are_computed_again(tmp_path: Path) -> None:
    """gradient_checkpointing = "full" reaches the autoencoder; the bits stay."""
    terms = [{"kind": "brightness", "threshold": 5.0}]
    feedback = {"method": "feedback", "iterations": 2, "rollout": [1], "rewards": terms}
    found, saved = {}, {}
    for mode in ("none", "full"):
        parts = components("sd3")
        parts.vae = make_vae(scaling_factor=1.5305, shift_factor=0.0609).requires_grad_(False)
        r = recipe(stage("tscd", 1, segments=1), feedback, gradient_checkpointing=mode, watch_every=0)
        trainer = Trainer(r, parts, latents("sd3"), tmp_path / mode, rewards=REWARDS)
        found[mode] = trainer.run()
        sizes: list[int] = []
        z = torch.randn(1, 4, 8, 8, requires_grad=True)

        def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            trainer._decode(z)
        saved[mode] = sum(sizes)
    assert saved["full"] < 0.5 * saved["none"]
    pairs = zip(*(found[mode].role_parameters("student").values() for mode in ("none", "full")), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("adapter", ["separate", "continue"])
def test_feedback_tells_flux_the_guidance_of_the_weights_that_it_improves(adapter: str, tmp_path: Path) -> None:
    """Of the stage before, or of the file that it starts from."""
    parts = components("flux")
    parts.vae = make_vae(scaling_factor=0.3611, shift_factor=0.1159).requires_grad_(False)
    terms = [{"kind": "brightness", "threshold": 5.0}]
    feedback = {"method": "feedback", "iterations": 1, "rollout": [2], "rewards": terms, "adapter": adapter}
    rewards = {"brightness": lambda images, captions: images.mean((1, 2, 3))}
    seen: list[torch.Tensor] = []
    parts.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"]), with_kwargs=True
    )

    def run(name: str, *stages: dict[str, Any], **train: Any) -> None:
        r = recipe(*stages, watch_every=0, **train)
        Trainer(r, copy.deepcopy(parts), latents("flux"), tmp_path / name, rewards=rewards).run()
        assert all(((told >= 1.0) & (told <= 2.0)).all() for told in seen) and seen
        for file in ("lora-feedback", "lora"):
            assert load_lora(tmp_path / name / f"{file}.safetensors")[1]["embedded_guidance"] == "1.5"

    run("whole", stage("tscd", 1, segments=1, guidance_scale=[1.0, 2.0]), feedback)
    seen.clear()
    run("init", feedback, init=str(tmp_path / "whole" / "lora-1step.safetensors"))
    assert all((told == 1.5).all() for told in seen)


CRITICS: list[dict[str, Any]] = [
    stage("tscd", adversarial_weight=0.1),
    stage("tscd", adversarial_weight=0.1, critic="encoder", segments=1),
    stage("lightning", adversarial_weight=1.0, mse_weight=0.0),
    stage("dmd2", adversarial_weight=0.1),
]


@pytest.mark.parametrize("shape", NETWORKS)
@pytest.mark.parametrize("with_critic", CRITICS, ids=["features", "encoder", "lightning", "dmd2"])
def test_every_critic_judges_a_transformer_s_samples(shape: str, with_critic: dict[str, Any], tmp_path: Path) -> None:
    r = recipe(with_critic | {"guidance_scale": [3.0, 3.0]}, gradient_checkpointing="full")
    parts = components(shape)
    frozen = {name: p.clone() for name, p in parts.network.named_parameters()}
    backbone = Trainer(r, parts, latents(shape), tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    measures = rows[-1]["measures"]
    assert any(np.isfinite(value) for name, value in measures.items() if "critic" in name), measures
    assert any(p.any() for n, p in backbone.role_parameters("student").items() if "lora_B" in n)
    released = dict(backbone.release().named_parameters())
    assert all(torch.equal(p, released[name]) for name, p in frozen.items())

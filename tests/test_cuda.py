"""The device path above the kernels, on a GPU: the training step, the sampler, the backbone, the judges."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from hypersd.distill import trainer as training
from hypersd.distill.data import Batch, LatentDataset
from hypersd.distill.method import Context, Draw
from hypersd.distill.recipe import Recipe
from hypersd.distill.stages import TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.models import (
    Backbone,
    LoraSpec,
    NoiseProcess,
    decode_latents,
    encode_images,
    encode_null,
    encode_prompts,
    load_components,
)
from hypersd.sampling import ddim, denoiser, lcm_grid, sample, tcd, trailing
from tests.conftest import SCHEDULER, make_unet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
SPEC = LoraSpec(rank=4, alpha=4)
PROCESS = NoiseProcess.from_config(SCHEDULER)


@pytest.fixture(autouse=True)
def full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """An error where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class HostDraw(Draw):
    """The same noise on every device."""

    def __init__(self, key: tuple[int, ...], device: torch.device) -> None:
        super().__init__(key, torch.device("cpu"))

    def normal(self, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(like)


def make_backbone(device: str, dtype: torch.dtype = torch.float32, roles: tuple[str, ...] = ("student", "ema")):
    """The tiny UNet with adapters that change the output; the same numbers on every device."""
    backbone = Backbone(make_unet(), SPEC, roles=())
    generator = torch.Generator().manual_seed(3)
    for role in roles:
        backbone.add_role(role, generator=generator)
        for parameter in backbone.role_parameters(role).values():
            with torch.no_grad():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    masters = {role: backbone.role_parameters(role) for role in roles}
    torch.nn.Module.to(backbone.network, device, dtype)  # that of diffusers warns
    for role in roles:  # adapters stay float32
        for parameter in masters[role].values():
            parameter.data = parameter.data.float()
    return backbone


def inputs(device: str, count: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(count, 4, 16, 16, generator=generator)
    text = torch.randn(count, 16, 32, generator=generator)
    return x_t.to(device), torch.tensor([10, 500, 900][:count]).to(device), {"encoder_hidden_states": text.to(device)}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    distance = float((found.cpu().double() - expected.double()).norm() / expected.double().norm())
    assert distance <= tolerance, distance


def loss_and_gradients(device: str, previous: bool, checkpointing: str = "none") -> tuple[Tensor, dict[str, Tensor]]:
    backbone = make_backbone(device, roles=("student", "ema", "previous"))
    if checkpointing == "full":
        backbone.enable_gradient_checkpointing()
    elif checkpointing == "feed_forward":
        backbone.recompute_feed_forward()
    stage = TSCDStage.model_validate(
        {"method": "tscd", "segments": 4, "iterations": 1, "guidance_scale": [3.0, 5.0], "offset_noise": 0.1}
        | ({"teacher": "previous_stage"} if previous else {})
    )
    x, _, cond = inputs(device)
    uncond = {"encoder_hidden_states": torch.zeros(1, 16, 32, device=device)}
    before = TSCDStage.model_validate({"method": "tscd", "segments": 8, "iterations": 1}) if previous else None
    method = TSCD(stage, Context(backbone, PROCESS, uncond, before))
    loss = method.loss(Batch(x, cond), HostDraw((1, 2, 3), x.device))
    loss.backward()
    gradients = {name: p.grad for name, p in backbone.role_parameters("student").items()}
    assert all(p.grad is None for p in backbone.role_parameters("ema").values())
    return loss.detach(), gradients


@pytest.mark.parametrize("checkpointing", ["none", "full", "feed_forward"])
@pytest.mark.parametrize("previous", [False, True])
def test_training_loss_and_gradients_equal_the_cpus(previous, checkpointing):
    """Backward runs in another thread there: what it recomputes must still be the student."""
    expected, own = loss_and_gradients("cpu", previous)
    found, gradients = loss_and_gradients("cuda", previous, checkpointing)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    for name, gradient in gradients.items():
        assert gradient.is_cuda
        close(gradient, own[name], 1e-3)


def make_trainer(
    device: str, folder, dtype: str = "float32", segments: tuple[int, ...] = (4, 1), iterations: int = 3
) -> training.Trainer:
    generator = torch.Generator().manual_seed(0)
    shard = {
        "latents": torch.randn(16, 4, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(16, 16, 32, generator=generator),
    }
    data = LatentDataset([shard], [str(i) for i in range(16)], {"encoder_hidden_states": torch.zeros(1, 16, 32)})
    train = {"batch_size": 4, "learning_rate": 1e-3, "dtype": dtype, "seed": 1, "log_every": 100, "ema_decay": 0.5}
    train |= {"checkpoint_every": 2}
    stages = [{"method": "tscd", "segments": k, "iterations": iterations} for k in segments]
    recipe = Recipe.model_validate({"lora": {"rank": 4, "alpha": 4.0}, "train": train, "stages": stages})
    components = SimpleNamespace(network=make_unet().to(device), scheduler_config=SCHEDULER)
    return training.Trainer(recipe, components, data, folder)


def test_a_seed_starts_from_the_same_adapter_and_leaves_the_gpus_generator_alone(tmp_path):
    before = torch.cuda.get_rng_state()
    one, other = (make_trainer(device, tmp_path).backbone.role_parameters("student") for device in ("cpu", "cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert all(other[name].is_cuda and torch.equal(p, other[name].cpu()) for name, p in one.items())


def test_the_trainer_logs_the_cpus_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Draw", HostDraw)
    logs = {}
    for device in ("cpu", "cuda"):
        make_trainer(device, tmp_path / device).run()
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        logs[device] = [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]
    assert len(logs["cuda"]) == 6
    np.testing.assert_allclose(logs["cuda"][:2], logs["cpu"][:2], rtol=1e-3)  # AdamW then parts what rounding parted
    np.testing.assert_allclose(logs["cuda"], logs["cpu"], rtol=0.1)


def test_bfloat16_training_resumes(tmp_path):
    whole = make_trainer("cuda", tmp_path / "whole", "bfloat16").run()
    started = make_trainer("cuda", tmp_path / "parts", "bfloat16")
    save, count = started._save, iter(range(4))

    def interrupted() -> None:
        save()
        if next(count) == 2:  # after stage one, step 2; its end; stage two, step 2
            raise KeyboardInterrupt

    started._save = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        started.run()
    resumed = make_trainer("cuda", tmp_path / "parts", "bfloat16").run(resume=True)
    assert len((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()) == 6
    for name, parameter in whole.role_parameters("ema").items():
        assert parameter.isfinite().all()
        close(resumed.role_parameters("ema")[name], parameter.cpu(), 0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_does_not_wait_for_the_gpu(tmp_path, monkeypatch, dtype):
    trainer = make_trainer("cuda", tmp_path, dtype, (4,), 8)
    monkeypatch.setattr(trainer, "_save", lambda: None)  # that one does wait
    steps = []
    real = trainer._optimizer_step

    def step(method):
        # the first steps compile kernels, and the allocator grows
        with nothing_waits() if trainer.step >= 4 else contextlib.nullcontext():
            steps.append(trainer.step)
            return real(method)

    trainer._optimizer_step = step  # type: ignore[method-assign]
    trainer.run()
    assert steps == list(range(8))


@pytest.mark.parametrize("guided", [False, True])
def test_sampler_equals_the_cpus(guided):
    table = tcd(PROCESS, lcm_grid(4), eta=0.4)
    table = table.guided(3.0) if guided else table
    results = {}
    for device in ("cpu", "cuda"):
        x_T, _, cond = inputs(device)
        null = {k: torch.zeros_like(v) for k, v in cond.items()} if guided else None
        generators = [torch.Generator().manual_seed(i) for i in range(len(x_T))]
        with torch.no_grad():
            results[device] = sample(denoiser(make_backbone(device), cond, null=null), table, x_T, generator=generators)
    close(results["cuda"], results["cpu"], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [ddim, tcd])
def test_sampling_fits_into_a_graph(make, dtype):
    """All steps, noise included, in one CUDA graph: the same bits as the loop, and new noise at every replay."""
    table = make(PROCESS, trailing(4))
    x_T, _, cond = inputs("cuda")
    denoise = denoiser(make_backbone("cuda", dtype), cond)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sample(denoise, table, x_T)
        with nothing_waits():
            sample(denoise, table, x_T)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(denoise, table, x_T)
    x_T.copy_(torch.randn(x_T.shape, generator=torch.Generator().manual_seed(9)))
    torch.cuda.manual_seed(4)
    graph.replay()
    first = captured.clone()
    torch.cuda.manual_seed(4)
    assert torch.equal(first, sample(denoise, table, x_T))
    graph.replay()
    assert torch.equal(captured, first) is not bool(table.coef[:, 4].any())


def test_backbone_equals_the_cpus():
    for role in ("base", "student"):
        with torch.no_grad():
            x_t, t, cond = inputs("cpu")
            expected = make_backbone("cpu")(x_t, t, cond, role=role)
            x_t, t, cond = inputs("cuda")
            backbone = make_backbone("cuda")
            found = backbone(x_t, t, cond, role=role)
            with backbone.folded():
                close(backbone(x_t, t, cond, role=role), expected)
        close(found, expected)
        low = make_backbone("cuda", torch.bfloat16)
        with torch.no_grad():
            close(low(x_t, t, cond, role=role), expected, 0.03)


def test_a_lora_survives_the_way_to_the_host_and_back():
    one, other = make_backbone("cuda"), make_backbone("cuda", roles=())
    other.load_lora_state_dict(one.lora_state_dict("student"), "loaded", scale=SPEC.scale)
    x_t, t, cond = inputs("cuda")
    with torch.no_grad():
        assert torch.equal(other(x_t, t, cond, role="loaded"), one(x_t, t, cond, role="student"))


def test_prompts_and_pictures_equal_the_cpus(tiny_sd_folder, tiny_sdxl_folder):
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for folder in (tiny_sd_folder, tiny_sdxl_folder):
        cpu, gpu = load_components(folder), load_components(folder, device="cuda")
        for encode in (lambda c: encode_prompts(c, ["a fox", "two apples"]), encode_null):
            expected, found = encode(cpu), encode(gpu)
            for name, value in expected.items():
                assert found[name].is_cuda
                torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4)
        latents = [encode_images(c, pixels.to(c.device), torch.Generator().manual_seed(1)) for c in (cpu, gpu)]
        close(latents[1], latents[0], 1e-3)
        close(decode_latents(gpu, latents[0].cuda()), decode_latents(cpu, latents[0]), 1e-3)


def test_the_judge_says_the_same():
    from hypersd.emoji import evaluators

    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a fox on a blue background"] * 4
    cpu, gpu = (evaluators.load("judge", device) for device in ("cpu", "cuda"))
    for name in ("features", "objects", "preference"):
        close(getattr(gpu, name)(images.cuda()), getattr(cpu, name)(images), 1e-3)
    close(gpu.alignment(images.cuda(), captions), cpu.alignment(images, captions), 1e-2)
    assert next(evaluators.load("judge", "cpu").parameters()).device.type == "cpu"

"""Sampling from folders of SD3 and FLUX equals diffusers' own pipelines: same noise, same pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from hypersd.errors import HypersdError
from hypersd.evaluate.generate import generate, to_uint8
from hypersd.models import (
    DIT_TARGETS,
    Backbone,
    LoraSpec,
    NoiseProcess,
    decode_latents,
    encode_null,
    encode_prompts,
    load_components,
    save_lora,
)
from hypersd.sampling import denoiser, sample, sampler_for, solvers
from hypersd.sampling.sampler import with_guidance
from hypersd.sampling.timesteps import flow_sigmas, trailing
from tests.conftest import FLOW_SCHEDULER, FLUX_SCHEDULER
from tests.models.test_flow_folders import TOKENS, pipeline

CAPTIONS = ["a fox", "an apple on a blue background"]
FLOAT = [(torch.float32, 3e-5), (torch.float64, 3e-7)]  # the pipelines' sigmas are float32 in either case


def noise(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def ours(components, backbone, table, x_T, negative_prompt="", role="base"):
    null = encode_null(components, len(x_T), negative_prompt) if table.is_guided else None
    cond = encode_prompts(components, CAPTIONS)
    return sample(denoiser(backbone, cond, null=null, role=role), table, x_T)


@pytest.mark.parametrize("dtype, tolerance", FLOAT)
@pytest.mark.parametrize("grid", ["diffusers", "trailing"])
def test_sd3(tiny_sd3_folder, grid, dtype, tolerance):
    components = load_components(tiny_sd3_folder, dtype=dtype)
    backbone = Backbone(components.network, roles=())
    process, pipe = components.noise_process(), pipeline(tiny_sd3_folder).to(dtype=dtype)
    x_T = noise((2, 4, 16, 16), dtype)
    metadata = {"steps": "4", "guidance_scale": "4", "solver": "euler" if grid == "diffusers" else "ddim"}
    table = sampler_for(process, metadata)
    sigmas = None if grid == "diffusers" else np.linspace(1, 0.25, 4)
    theirs = pipe(
        CAPTIONS, negative_prompt=["a cat"] * 2, num_inference_steps=4, sigmas=sigmas, guidance_scale=4.0, latents=x_T,
        output_type="latent", max_sequence_length=TOKENS, height=64, width=64,
    ).images  # fmt: skip
    x = ours(components, backbone, table, x_T, "a cat")
    assert (x - theirs).abs().max() < tolerance * theirs.abs().max()
    assert (x - ours(components, backbone, table, x_T)).abs().max() > 1e-3  # the negative prompt counts
    # as the file of a trained LoRA says it: sigmas before the shift
    told = {"steps": "4", "solver": "euler", "sigmas": "[1, 0.75, 0.5, 0.25]", "guidance_scale": "4"}
    if grid == "trailing":
        assert np.allclose(sampler_for(process, told).coef, table.coef, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype, tolerance", FLOAT)
def test_flux(tiny_flux_folder, dtype, tolerance):
    components = load_components(tiny_flux_folder, dtype=dtype)
    components.resolution = (48, 64)
    backbone = Backbone(components.network, roles=())
    process, pipe = components.noise_process(), pipeline(tiny_flux_folder).to(dtype=dtype)
    x_T = noise((2, 4, 12, 16), dtype)
    packed = pipe(
        CAPTIONS, num_inference_steps=4, guidance_scale=2.5, latents=pipe._pack_latents(x_T, 2, 4, 12, 16), height=48,
        width=64, output_type="latent", max_sequence_length=TOKENS,
    ).images  # fmt: skip
    theirs = pipe._unpack_latents(packed, 48, 64, components.vae_scale_factor)
    for solver in ("euler", "ddim"):  # the pipeline's grid is the trailing one here
        x = ours(components, backbone, sampler_for(process, {"solver": solver, "embedded_guidance": "2.5"}, 4), x_T)
        assert (x - theirs).abs().max() < tolerance * theirs.abs().max()
    other = ours(components, backbone, sampler_for(process, {"solver": "ddim"}, 4), x_T)  # told 3.5
    assert (other - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 28])
@pytest.mark.parametrize("config", [FLOW_SCHEDULER, FLUX_SCHEDULER], ids=["static", "dynamic"])
def test_the_grid_is_the_schedulers(config, steps):
    process = NoiseProcess.from_config(config, latent_size=(64, 48))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    sigmas = np.linspace(1.0, 1 / steps, steps) if process.is_dynamic else None
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=np.log(process.shift) if process.is_dynamic else None)
    assert np.allclose(flow_sigmas(process, steps), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    table = solvers.euler(process, flow_sigmas(process, steps))
    assert np.allclose(table.timesteps, scheduler.timesteps, rtol=0, atol=1e-3)
    assert np.allclose(table.coef[:, 1], np.diff(scheduler.sigmas), rtol=0, atol=1e-6)


def test_euler_is_ddim_on_the_process_own_levels():
    process = NoiseProcess.from_config(FLOW_SCHEDULER)
    t = trailing(5)
    by_level, by_timestep = solvers.euler(process, process.at(t)[1]), solvers.ddim(process, t)
    assert np.allclose(by_level.coef, by_timestep.coef, rtol=0, atol=1e-15)
    assert np.array_equal(by_level.timesteps, by_timestep.timesteps)
    for wrong in ([], [0.5, 0.5], [1.2, 0.5], [0.5, 0.0]):
        with pytest.raises(HypersdError, match="sigmas must descend"):
            solvers.euler(process, wrong)
    vp = NoiseProcess.from_config({"beta_schedule": "scaled_linear"})
    with pytest.raises(HypersdError, match="for flow models; use ddim"):
        solvers.euler(vp, [1.0])
    with pytest.raises(HypersdError, match="names solver 'heun'; known are .*euler"):
        sampler_for(process, {"solver": "heun"})


@pytest.mark.parametrize("format", ["peft", "hyper"])
@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_the_pipeline_loads_our_lora(request, tmp_path, shape, format):
    """A file of format "hyper" as its readers use it: weight 0.125, nothing in it that says alpha."""
    folder = request.getfixturevalue(f"tiny_{shape}_folder")
    components = load_components(folder)
    components.resolution = (64, 64)
    backbone = Backbone(components.network, LoraSpec(4, 8.0, DIT_TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(0, 0.05, generator=generator)
    save_lora(tmp_path / "lora.safetensors", backbone, "student", {"solver": "ddim"}, format)
    x_T = noise((2, 4, 16, 16), torch.float32)
    table = sampler_for(components.noise_process(), {"solver": "euler", "embedded_guidance": "3.5"}, 2)
    base, distilled = (ours(components, backbone, table, x_T, role=role) for role in ("base", "student"))
    assert (distilled - base).abs().max() > 0.01

    pipe = pipeline(folder)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="ours")
    if format == "hyper":
        pipe.set_adapters("ours", 0.125)
    latents = x_T if shape == "sd3" else pipe._pack_latents(x_T, 2, 4, 16, 16)
    guidance = {"sd3": 1.0, "flux": 3.5}[shape]
    theirs = pipe(
        CAPTIONS, num_inference_steps=2, guidance_scale=guidance, latents=latents, output_type="latent", height=64,
        width=64, max_sequence_length=TOKENS,
    ).images  # fmt: skip
    theirs = theirs if shape == "sd3" else pipe._unpack_latents(theirs, 64, 64, components.vae_scale_factor)
    assert (distilled - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_generate_tells_the_network_its_guidance(tiny_flux_folder):
    components = load_components(tiny_flux_folder)
    components.resolution = (32, 32)
    backbone = Backbone(components.network, roles=())
    table = with_guidance(solvers.ddim(components.noise_process(), trailing(2)), components.network, 2.0)
    assert table.embedded_guidance == 2.0 and not table.is_guided
    (found,) = generate(components, backbone, table, CAPTIONS, seed=1)
    (again,) = generate(components, backbone, table, CAPTIONS, seed=1)
    (other,) = generate(components, backbone, with_guidance(table, components.network, 30.0), CAPTIONS, seed=1)
    assert found.shape == (2, 32, 32, 3) and np.array_equal(found, again) and not np.array_equal(found, other)
    with torch.no_grad():
        decoded = to_uint8(decode_latents(components, torch.zeros(1, 4, 8, 8)))
    assert decoded.shape == (1, 32, 32, 3)

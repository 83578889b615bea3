"""The sampling loop against hand-written steps and against a diffusers pipeline."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models import Backbone, LoraSpec, NoiseProcess, encode_null, encode_prompts, load_components
from hypersd.sampling import ddim, denoiser, dpmpp_2m, lcm, lcm_grid, sample, sampler_for, tcd, trailing

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
VP = NoiseProcess.from_config(SD)


def test_the_loop_is_the_table():
    table = tcd(VP, lcm_grid(4), eta=0.5)
    x_T = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen, done = [], []

    def denoise(x, t):
        seen.append(t.tolist())
        return (x + t.view(-1, 1, 1, 1)).cos()

    out = sample(denoise, table, x_T, generator=torch.Generator().manual_seed(1), progress=lambda *n: done.append(n))
    x, generator = x_T, torch.Generator().manual_seed(1)
    for row, t in zip(table.coef, table.timesteps, strict=True):
        noise = torch.randn(x.shape, dtype=x.dtype, generator=generator) if row[4] else torch.zeros_like(x)
        x = row[0] * x + row[1] * (x + t).cos() + row[4] * noise
    assert (out - x).abs().max() < 1e-12
    assert seen == [[t, t] for t in lcm_grid(4)] and done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_exact_gaussian_teacher_is_sampled():
    """Data N(0.5, 0.04): 8 DDIM steps of the exact eps come close to its mean and spread; 1 step cannot."""
    mean, variance = 0.5, 0.04

    def denoise(x, t):
        alpha, sigma = (torch.from_numpy(level).view(-1, 1) for level in VP.at(t.numpy()))
        return sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)

    x_T = torch.randn(20000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = {n: sample(denoise, ddim(VP, trailing(n)), x_T) for n in (1, 8, 100)}
    errors = {n: abs(float(x.std()) - variance**0.5) for n, x in results.items()}
    assert abs(float(results[100].mean()) - mean) < 0.01
    assert errors[100] < 0.01 < errors[8] < errors[1]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_dpmpp_2m_is_diffusers(steps, guidance_scale, prediction):
    config = SD | {"prediction_type": prediction}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="trailing", final_sigmas_type="sigma_min", lower_order_final=True
    )
    theirs.set_timesteps(steps)
    table = dpmpp_2m(NoiseProcess.from_config(config), trailing(steps))
    assert theirs.timesteps.tolist() == table.timesteps.tolist()
    x_T = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def both(x, t):
        return (x + t.view(-1, 1, 1, 1) / 500).cos(), (x - t.view(-1, 1, 1, 1) / 300).sin()

    x = x_T
    for t in theirs.timesteps:
        cond, uncond = both(x, t)
        x = theirs.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    if guidance_scale == 1.0:
        ours = sample(lambda x, t: both(x, t)[0], table, x_T)
    else:
        ours = sample(both, table.guided(guidance_scale), x_T)
    # diffusers keeps its sigmas in float32
    assert (ours - x).abs().max() < 2e-5 * x.abs().max()


@pytest.mark.parametrize("process", [VP, NoiseProcess.from_config({"shift": 3.0})], ids=["vp", "flow"])
def test_dpmpp_2m_is_of_second_order(process):
    """Data N(0, v): the exact flow scales x by the ratio of the spreads. With twice the steps the error falls to
    about a third, where DDIM's falls to a half."""
    v = 4.0
    spread = lambda alpha, sigma: np.sqrt(alpha**2 * v + sigma**2)  # noqa: E731

    def denoise(x, t):
        index = np.searchsorted(process.network_timestep(np.arange(1000)), t.numpy() - 1e-6)
        alpha, sigma = (torch.from_numpy(level).view(-1, 1) for level in process.at(index))
        total = alpha**2 * v + sigma**2
        return sigma * x / total if process.kind == "vp" else (sigma - alpha * v) * x / total

    def error(solver, steps):
        last = float(sample(denoise, solver(process, trailing(steps)), torch.ones(1, 1, dtype=torch.float64)))
        return abs(last - spread(*process.at(-1)) / spread(*process.at(999)))

    first, second = ([error(solver, steps) for steps in (10, 20, 40)] for solver in (ddim, dpmpp_2m))
    assert all(5 * a < b for a, b in zip(second, first, strict=True))
    assert 1.8 < first[1] / first[2] < 2.1 and 2.7 < second[1] / second[2] < 4.5


def test_a_list_of_generators_gives_each_sample_its_own_noise():
    table = lcm(VP, lcm_grid(3))
    x_T = torch.randn(2, 4, 2, 2)
    denoise = lambda x, t: x.sin()  # noqa: E731
    both = sample(denoise, table, x_T, generator=[torch.Generator().manual_seed(s) for s in (1, 2)])
    for i, seed in enumerate((1, 2)):
        one = sample(denoise, table, x_T[i : i + 1], generator=[torch.Generator().manual_seed(seed)])
        assert torch.equal(both[i : i + 1], one)


def test_equals_a_pipeline_with_guidance(tiny_sd_folder):
    """The same latents as StableDiffusionPipeline with diffusers' DDIM, both passes in one batch."""
    components = load_components(tiny_sd_folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    x_T = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts = ["a fox", "two red apples"]
    theirs = pipe(prompts, latents=x_T, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images

    backbone = Backbone(components.network, LoraSpec(rank=2, alpha=2))
    calls = []
    handle = components.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    process = NoiseProcess.from_config(components.scheduler_config)
    denoise = denoiser(backbone, encode_prompts(components, prompts), null=encode_null(components, 2), role="base")
    ours = sample(denoise, ddim(process, trailing(4)).guided(3.0), x_T)
    handle.remove()
    assert calls == [4] * 4
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("embedded", [None, 2.5])
def test_the_guidance_of_the_table_reaches_the_network(embedded, guided):
    """Of both passes; where the table has none, what the conditions say stays."""
    told = []

    def backbone(x_t, timestep, cond, *, role):
        told.append(cond["guidance"].tolist())
        return x_t

    cond = {"guidance": torch.tensor([7.0, 8.0])}
    table = replace(ddim(VP, [999, 499]), embedded_guidance=embedded)
    denoise = denoiser(backbone, cond, null=cond if guided else None)
    sample(denoise, table.guided(3.0) if guided else table, torch.randn(2, 4, 2, 2))
    assert told == 2 * [(1 + guided) * ([7.0, 8.0] if embedded is None else [2.5, 2.5])]


def test_nothing_is_read_back_inside_the_loop(monkeypatch):
    def stall(self, *args):
        raise AssertionError("the loop read a tensor back to the host")

    x_T, table = torch.randn(1, 4, 4, 4), tcd(VP, lcm_grid(4)).guided(2.0)
    for method in ("item", "__int__", "__bool__", "__float__", "__index__", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, stall)
    out = sample(lambda x, t: (x, x), table, x_T)
    monkeypatch.undo()
    assert out.isfinite().all()


def test_a_lora_file_says_how_to_sample():
    metadata = {
        "prediction_type": "epsilon",
        "solver": "tcd",
        "steps": "1,2,4,8",
        "eta": "0.5",
        "timesteps": '{"4": [999, 749, 499, 249]}',
        "guidance_scale": "1.0",
    }
    assert np.array_equal(sampler_for(VP, metadata, 4).coef, tcd(VP, [999, 749, 499, 249], eta=0.5).coef)
    assert np.array_equal(sampler_for(VP, metadata).coef, tcd(VP, lcm_grid(8), eta=0.5).coef)
    eight = sampler_for(VP, {"solver": "ddim", "steps": "8", "guidance_scale": "5"})
    assert np.array_equal(eight.coef, ddim(VP, trailing(8)).guided(5.0).coef)
    one = sampler_for(VP, {"solver": "lcm", "timesteps": "[800]"})
    assert np.array_equal(one.coef, lcm(VP, [800]).coef)
    for change, steps, message in [
        ({"prediction_type": "v_prediction"}, None, "v_prediction"),
        ({"solver": "heun"}, None, "heun"),
        ({"eta": "much"}, None, "cannot be read"),
        ({"timesteps": "[999"}, None, "cannot be read"),
        ({"timesteps": "5"}, None, "5 is no list of timesteps"),
        ({"timesteps": '["a"]'}, None, "is no list of timesteps"),
        ({"guidance_scale": "nan"}, None, "cannot be read: guidance_scale = nan"),
        ({"eta": "inf"}, None, "cannot be read: eta = inf"),
        ({"steps": "4,x"}, None, "cannot be read: steps"),
        ({"steps": "0"}, None, "cannot be read: steps = '0'"),
        ({"solver": "perflow", "windows": "0"}, None, "windows = 0"),
        ({}, 3, r"\[1, 2, 4, 8\] steps, not 3"),
    ]:
        with pytest.raises(HypersdError, match=message):
            sampler_for(VP, metadata | change, steps)


def test_a_denoiser_that_does_not_fit_the_table_is_refused():
    x_T, table = torch.randn(1, 4, 2, 2), ddim(VP, [999])
    with pytest.raises(HypersdError, match="one tensor"):
        sample(lambda x, t: (x, x), table, x_T)
    with pytest.raises(HypersdError, match="pair"):
        sample(lambda x, t: x, table.guided(2.0), x_T)

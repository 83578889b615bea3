"""Folders of SD3 and FLUX: they load and agree with diffusers' pipelines; bad ones are refused in one line."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models import Backbone, decode_latents, encode_images, encode_null, encode_prompts, load_components
from tests.conftest import make_flux, write_sd3
from tests.models.test_load import edit_json

CAPTIONS = ["a fox and a red apple on a blue background", "hi"]
TOKENS = 12


def pipeline(folder):
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    has_t5 = name == "FluxPipeline" or (folder / "text_encoder_3").is_dir()
    absent = [] if has_t5 else ["text_encoder_3", "tokenizer_3"]
    pipe = getattr(diffusers, name).from_pretrained(folder, local_files_only=True, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_sd3_conditions_equal_the_pipeline(tiny_sd3_folder):
    components = load_components(tiny_sd3_folder)
    pipe = pipeline(tiny_sd3_folder)
    states, null_states, pooled, null_pooled = pipe.encode_prompt(
        CAPTIONS, None, None, device="cpu", max_sequence_length=TOKENS
    )
    ours, null = encode_prompts(components, CAPTIONS), encode_null(components, 2)
    assert ours.keys() == {"encoder_hidden_states", "pooled_projections"}
    assert ours["encoder_hidden_states"].shape == (2, 16 + TOKENS, 64)
    assert torch.equal(ours["encoder_hidden_states"], states) and torch.equal(ours["pooled_projections"], pooled)
    # a batch of one, repeated
    assert torch.allclose(null["encoder_hidden_states"], null_states, rtol=0, atol=1e-6)
    assert torch.allclose(null["pooled_projections"], null_pooled, rtol=0, atol=1e-6)
    negative = pipe.encode_prompt(["x"], None, None, device="cpu", negative_prompt="a cat", max_sequence_length=TOKENS)
    assert torch.equal(encode_null(components, 1, "a cat")["encoder_hidden_states"], negative[1])
    assert components.latent_shape == (4, 16, 16) and components.pixel_multiple == 8


@torch.no_grad()
def test_sd3_without_t5(tmp_path):
    folder = write_sd3(tmp_path / "model", t5=False)
    components = load_components(folder)
    assert components.text_encoders[2] is None and components.tokenizers[2] is None
    states, _, pooled, _ = pipeline(folder).encode_prompt(
        CAPTIONS, None, None, device="cpu", max_sequence_length=TOKENS
    )
    ours = encode_prompts(components, CAPTIONS)
    assert torch.equal(ours["encoder_hidden_states"], states) and torch.equal(ours["pooled_projections"], pooled)
    assert not ours["encoder_hidden_states"][:, 16:].any()
    edit_json(folder / "model_index.json", max_sequence_length=...)
    assert encode_prompts(load_components(folder), ["hi"])["encoder_hidden_states"].shape == (1, 16 + 256, 64)
    edit_json(folder / "model_index.json", max_sequence_length=0)
    assert encode_prompts(load_components(folder), ["hi"])["encoder_hidden_states"].shape == (1, 16, 64)


@torch.no_grad()
def test_flux_conditions_equal_the_pipeline(tiny_flux_folder):
    components = load_components(tiny_flux_folder)
    states, pooled, _ = pipeline(tiny_flux_folder).encode_prompt(
        CAPTIONS, None, device="cpu", max_sequence_length=TOKENS
    )
    ours = encode_prompts(components, CAPTIONS)
    assert ours.keys() == {"encoder_hidden_states", "pooled_projections"}
    assert torch.equal(ours["encoder_hidden_states"], states) and torch.equal(ours["pooled_projections"], pooled)
    assert components.latent_shape == (4, 128, 128)
    components.resolution = (48, 64)
    assert components.latent_shape == (4, 12, 16)
    for wrong in ((60, 64), (0, 64), (64, 4)):
        components.resolution = wrong
        with pytest.raises(HypersdError, match="multiples of 8"):
            components.latent_shape  # noqa: B018


@pytest.mark.parametrize("size, expected", [((128, 128), 1.15), ((32, 32), 0.5), ((64, 64), 0.63)])
def test_the_dynamic_shift_depends_on_the_number_of_tokens(tiny_flux_folder, size, expected):
    components = load_components(tiny_flux_folder)
    process = components.noise_process(size)
    assert process.is_dynamic and np.log(process.shift) == pytest.approx(expected)
    assert components.noise_process().shift == pytest.approx(np.exp(1.15))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(components.scheduler_config)
    scheduler.set_timesteps(4, sigmas=np.linspace(1, 0.25, 4), mu=np.log(process.shift))
    assert np.allclose(process.at([999, 749, 499, 249])[1], scheduler.sigmas[:4], rtol=0, atol=1e-7)
    assert np.allclose(process.network_timestep([999, 749, 499, 249]), scheduler.timesteps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_latents_are_scaled_and_shifted(request, shape):
    components = load_components(request.getfixturevalue(f"tiny_{shape}_folder"))
    scale, shift = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[shape]
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode = components.vae.encode(images).latent_dist.mode()
    latents = encode_images(components, images)
    assert torch.allclose(latents, (mode - shift) * scale, rtol=0, atol=1e-6) and latents.shape == (2, 4, 8, 16)
    assert (decode_latents(components, latents) - components.vae.decode(mode).sample).abs().max() < 1e-5
    with pytest.raises(HypersdError, match="multiples of 8"):
        encode_images(components, torch.zeros(1, 3, 36, 64))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 2e-14)])
@pytest.mark.parametrize("shape", ["sd3", "flux"])
def test_the_network_is_called_as_the_pipeline_calls_it(request, shape, dtype, tolerance):
    folder = request.getfixturevalue(f"tiny_{shape}_folder")
    components = load_components(folder, dtype=dtype)
    pipe = pipeline(folder).to(dtype=dtype)
    cond = encode_prompts(components, CAPTIONS)
    latents = torch.randn(2, 4, 12, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    timestep = torch.tensor([250.0, 900.0], dtype=dtype)
    if shape == "sd3":
        theirs = pipe.transformer(latents, timestep=timestep, **cond).sample
    else:
        ids = pipe._prepare_latent_image_ids(2, 6, 8, "cpu", dtype)
        packed = pipe._pack_latents(latents, 2, 4, 12, 16)
        guidance = torch.full((2,), 3.5, dtype=dtype)
        text = torch.zeros(TOKENS, 3, dtype=dtype)
        theirs = pipe.transformer(
            packed, timestep=timestep / 1000, guidance=guidance, img_ids=ids, txt_ids=text, **cond
        ).sample
        theirs = pipe._unpack_latents(theirs, 48, 64, components.vae_scale_factor)
    ours = Backbone(components.network, roles=())(latents, timestep, cond)
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


DAMAGE = {
    "no t5": (lambda f: edit_json(f / "model_index.json", text_encoder_2=[None, None]), "lists no text_encoder_2"),
    "no second clip": (lambda f: edit_json(f / "model_index.json", tokenizer_2=...), "lists no tokenizer_2"),
    "no transformer": (lambda f: edit_json(f / "model_index.json", transformer=...), "lists no unet"),
    "other transformer": (
        lambda f: edit_json(f / "model_index.json", transformer=["diffusers", "PixArtTransformer2DModel"]),
        "PixArtTransformer2DModel for transformer, which is not supported",
    ),
    "wrong weights": (
        lambda f: (
            make_flux(num_layers=2).save_pretrained(f / "other")
            or edit_json(f / "transformer/config.json", num_layers=7)
        ),
        "transformer.* missing",
    ),
    "t5 lost": (lambda f: shutil.rmtree(f / "text_encoder_3"), r"text_encoder_3 is missing; .* \[null, null\]"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2 has none of tokenizer.json"),
    "karras": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", use_karras_sigmas=True),
        "use_karras_sigmas = True",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(name, tiny_flux_folder, tiny_sd3_folder, tmp_path):
    damage, message = DAMAGE[name]
    folder = shutil.copytree(
        tiny_sd3_folder if name in ("no second clip", "t5 lost") else tiny_flux_folder, tmp_path / "model"
    )
    damage(folder)
    with pytest.raises(HypersdError, match=message) as error:
        load_components(folder).noise_process()
    assert "\n" not in str(error.value)


def test_text_encoders_that_do_not_fit(tmp_path):
    folder = write_sd3(tmp_path / "model", t5=False)
    edit_json(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    with pytest.raises(HypersdError, match="first text encoder .* no projected"):
        encode_prompts(load_components(folder), ["hi"])
    components = load_components(folder)
    components.network.register_to_config(joint_attention_dim=48)
    components.text_encoders[0] = components.text_encoders[1]
    with pytest.raises(HypersdError, match="width 64 .CLIP. and 48 .T5., the transformer wants 48"):
        encode_prompts(components, ["hi"])
    components.drop_text_encoders()
    with pytest.raises(HypersdError, match="were let go"):
        encode_prompts(components, ["hi"])

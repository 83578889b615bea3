"""Model folders: SD1.5 and SDXL shapes load and agree with diffusers; damaged ones are refused in one line."""

from __future__ import annotations

import json
import shutil
import socket

import diffusers
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models import decode_latents, encode_images, encode_null, encode_prompts, load_components

CAPTIONS = ["a fox and a red apple on a blue background", "hi"]


def test_sd15_conditions_equal_the_pipeline(tiny_sd_folder):
    components = load_components(tiny_sd_folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    theirs, null = pipe.encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=True)
    ours = encode_prompts(components, CAPTIONS)
    assert ours.keys() == {"encoder_hidden_states"} and ours["encoder_hidden_states"].shape == (2, 16, 32)
    assert torch.equal(ours["encoder_hidden_states"], theirs)
    assert torch.equal(encode_null(components, 2)["encoder_hidden_states"], null)
    assert null.abs().max() > 0
    assert components.latent_shape == (4, 16, 16) and components.vae_scale_factor == 4
    assert components.scheduler_config["beta_schedule"] == "scaled_linear"


def test_sdxl_conditions_equal_the_pipeline(tiny_sdxl_folder):
    components = load_components(tiny_sdxl_folder)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder, local_files_only=True)
    states, null_states, pooled, null_pooled = pipe.encode_prompt(CAPTIONS, device="cpu")
    ours, null = encode_prompts(components, CAPTIONS), encode_null(components, 2)
    assert torch.equal(ours["encoder_hidden_states"], states) and torch.equal(ours["text_embeds"], pooled)
    assert ours["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 2
    assert torch.equal(null["encoder_hidden_states"], null_states) and torch.equal(null["text_embeds"], null_pooled)
    assert not null["encoder_hidden_states"].any() and torch.equal(null["time_ids"], ours["time_ids"])


def test_everything_is_frozen_and_in_the_dtype_asked_for(tiny_sdxl_folder):
    components = load_components(tiny_sdxl_folder, dtype=torch.bfloat16)
    parts = (components.network, components.vae, *components.text_encoders)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)
    assert components.dtype == torch.bfloat16
    # the VAE of SDXL overflows in 16 bit and says so
    assert {p.dtype for p in components.vae.parameters()} == {torch.float32}
    assert encode_prompts(components, ["hi"])["encoder_hidden_states"].dtype == torch.bfloat16


def test_latents_round_the_vae_with_shift_and_scale(tiny_sd_folder):
    components = load_components(tiny_sd_folder)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mode = components.vae.encode(images).latent_dist.mode()
    assert torch.equal(encode_images(components, images), mode * 0.18215)
    sampled = [encode_images(components, images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    decoded = decode_latents(components, mode * 0.18215)
    assert (decoded - components.vae.decode(mode).sample).abs().max() < 1e-5
    components.vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(encode_images(components, images), (mode - 0.25) * 0.18215, rtol=0, atol=1e-7)
    assert (decode_latents(components, (mode - 0.25) * 0.18215) - decoded).abs().max() < 1e-5
    # as diffusers' SDXL pipelines apply them, by channel
    mean, std = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 4.0]
    components.vae.register_to_config(latents_mean=mean, latents_std=std)
    with pytest.raises(HypersdError, match="both shift_factor and latents_mean"):
        encode_images(components, images)
    components.vae.register_to_config(shift_factor=None)
    each = (torch.tensor(values)[None, :, None, None] for values in (mean, std))
    scaled = (mode - next(each)) * 0.18215 / next(each)
    assert torch.allclose(encode_images(components, images), scaled, rtol=0, atol=1e-6)
    assert (decode_latents(components, scaled) - decoded).abs().max() < 1e-5
    components.vae.register_to_config(latents_mean=None, latents_std=None)
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 62, 64)):
        with pytest.raises(HypersdError, match="multiples of 4"):
            encode_images(components, torch.zeros(shape))
    with pytest.raises(HypersdError, match="no captions"):
        encode_prompts(components, [])


@pytest.mark.parametrize("shape", ["sd", "sdxl", "sd3", "flux"])
def test_large_batches_are_encoded_in_parts(request, shape, monkeypatch):
    """No part has more pixels or tokens than allowed, and one of each at least; the draw stays that of the whole."""
    from hypersd.models import prompts

    components = load_components(request.getfixturevalue(f"tiny_{shape}_folder"))
    images = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = [f"picture {number}" for number in range(5)]

    def encoded():
        latents = encode_images(components, images, torch.Generator().manual_seed(1))
        return {"latents": latents, **encode_prompts(components, captions)}

    whole, sizes = encoded(), {"vae": [], "text": []}
    encode = components.vae.encode
    monkeypatch.setattr(components.vae, "encode", lambda x: (sizes["vae"].append(len(x)), encode(x))[1])
    hook = components.text_encoders[-1].register_forward_pre_hook(lambda _, ids: sizes["text"].append(len(ids[0])))
    monkeypatch.setattr(prompts, "PIXELS", 2 * 32 * 48 + 1)
    monkeypatch.setattr(prompts, "TOKENS", 2 * (components.max_sequence_length or 16) + 1)
    parts = encoded()
    assert sizes == {"vae": [2, 2, 1], "text": [2, 2, 1]}
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(prompts, "PIXELS", 1)
    monkeypatch.setattr(prompts, "TOKENS", 1)
    encoded()
    assert sizes == {"vae": [2, 2, 1] + [1] * 5, "text": [2, 2, 1] + [1] * 5}
    hook.remove()


def test_loading_opens_no_connection(tiny_sd_folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_components(tiny_sd_folder).folder == tiny_sd_folder


def test_an_fp16_variant_is_found(tiny_sd_folder, tmp_path):
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(
        folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    found, expected = (load_components(f).network.state_dict() for f in (folder, tiny_sd_folder))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (data | changes).items() if v is not ...}))


def as_pickle(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, folder / "unet/diffusion_pytorch_model.bin")


def as_disguised_pickle(folder):
    torch.save({}, folder / "vae/diffusion_pytorch_model.safetensors")


def truncate(folder):
    path = folder / "text_encoder/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json"),
    "bad index": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json cannot be read as JSON"),
    "list index": (lambda f: (f / "model_index.json").write_text("[]"), "does not hold a JSON object"),
    "no unet": (lambda f: edit_json(f / "model_index.json", unet=...), "lists no unet; only text-to-image"),
    "other class": (
        lambda f: edit_json(f / "model_index.json", unet=["diffusers", "UNet9D"]),
        "wants diffusers.UNet9D for unet",
    ),
    "other library": (lambda f: edit_json(f / "model_index.json", vae=["os", "system"]), "wants os.system for vae"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "unet/config.json is missing"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json is missing"),
    "no weights": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae holds no .safetensors"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer has none of tokenizer.json, vocab"),
    "pickle": (as_pickle, "only as a pickle .diffusion_pytorch_model.bin.; convert"),
    "disguised pickle": (as_disguised_pickle, "vae/diffusion_pytorch_model.safetensors is a pickle"),
    "truncated": (truncate, "text_encoder/model.safetensors is truncated or damaged"),
    "other shapes": (lambda f: edit_json(f / "unet/config.json", cross_attention_dim=48), "unet"),
    "missing layers": (lambda f: edit_json(f / "text_encoder/config.json", num_hidden_layers=3), "missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(name, tiny_sd_folder, tmp_path):
    damage, message = DAMAGE[name]
    folder = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(HypersdError, match=message) as error:
        load_components(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_missing_folder(tmp_path):
    with pytest.raises(HypersdError, match="no model folder at .*nowhere"):
        load_components(tmp_path / "nowhere")

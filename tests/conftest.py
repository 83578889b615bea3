"""Tiny random models in the shapes of SD1.5 and SDXL, and nothing that needs a network or a GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def make_unet(**changes):
    """UNet2DConditionModel, about 1 M parameters: 4x16x16 latents, 16 tokens of width 32."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**(config | changes)).requires_grad_(False).eval()


def make_sdxl_unet():
    return make_unet(
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        # 32 pooled + 6 time ids of 8
        projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )


def make_sd3(**changes):
    """SD3Transformer2DModel: 4x16x16 latents, text and pooled text of width 64."""
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 16,
    }
    torch.manual_seed(0)
    return SD3Transformer2DModel(**(config | changes)).requires_grad_(False).eval()


def make_flux(**changes):
    """FluxTransformer2DModel: 4-channel latents of any even size, text of width 32, pooled text of width 32."""
    from diffusers import FluxTransformer2DModel

    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    torch.manual_seed(0)
    return FluxTransformer2DModel(**(config | changes)).requires_grad_(False).eval()


def make_vae(**changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    config = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**(config | changes)).eval()


def make_text_encoder(projected: bool = False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(2 + projected)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def write_tokenizer(folder: Path) -> None:
    """A byte-level CLIP tokenizer in the files of SD1.5: 256 bytes, the same 256 at word end, start and end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    vocab = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, unet, vae, text_encoders: list, pipeline: str, **index) -> Path:
    entries = {"_class_name": pipeline, "_diffusers_version": "0.36.0", **index}
    for name, model, library in [
        ("unet", unet, "diffusers"),
        ("vae", vae, "diffusers"),
        *((f"text_encoder{'_2' * i}", encoder, "transformers") for i, encoder in enumerate(text_encoders)),
    ]:
        model.save_pretrained(folder / name)
        entries[name] = [library, type(model).__name__]
    for i in range(len(text_encoders)):
        name = f"tokenizer{'_2' * i}"
        write_tokenizer(folder / name)
        entries[name] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    entries["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def tiny_unet():
    """A fresh SD1.5-shaped UNet per test; the same weights every time."""
    return make_unet()


@pytest.fixture
def tiny_sdxl_unet():
    """A fresh SDXL-shaped UNet per test (text_embeds and time_ids conditions)."""
    return make_sdxl_unet()


@pytest.fixture
def tiny_batch():
    """(x_t (2, 4, 16, 16), timestep (2,), cond) for tiny_unet."""
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, 4, 16, 16, generator=generator)
    cond = {"encoder_hidden_states": torch.randn(2, 16, 32, generator=generator)}
    return x_t, torch.tensor([10, 900]), cond


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory) -> Path:
    """A model folder shaped like SD1.5; read only, copy it before changing it."""
    folder = tmp_path_factory.mktemp("tiny_sd")
    return write_model(
        folder,
        make_unet(),
        make_vae(),
        [make_text_encoder()],
        "StableDiffusionPipeline",
        safety_checker=[None, None],
        feature_extractor=[None, None],
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory) -> Path:
    """A model folder shaped like SDXL: two text encoders, zeros for the empty prompt, a VAE that wants fp32."""
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    return write_model(
        folder,
        make_sdxl_unet(),
        make_vae(scaling_factor=0.13025, force_upcast=True),
        [make_text_encoder(), make_text_encoder(projected=True)],
        "StableDiffusionXLPipeline",
        force_zeros_for_empty_prompt=True,
    )

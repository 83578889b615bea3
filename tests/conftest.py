"""Tiny random models in the shapes of SD1.5, SDXL, SD3 and FLUX, and nothing that needs a network or a GPU."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


# what takes longest comes first, so that no process is left alone with it at the end
LONGEST = (
    "test_interpreter.py", "test_demo.py", "test_cuda_emulated.py", "test_paper.py", "test_flow.py", "test_parallel.py",
    "test_cpp_mutations.py", "test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _same_numbers():
    """Numbers that a test draws without a generator of its own are the same in every run, whatever ran before it."""
    torch.manual_seed(0)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Inside, no file grows beyond `room` bytes: the writer fails as on a full disk, half way through."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def make_t5(width: int):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(4)
    config = T5Config(vocab_size=260, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval()


def write_t5_tokenizer(folder: Path) -> None:
    """Single letters, in the files of T5's fast tokenizer: padding 0, end 1, unknown 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(i) for i in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "pad_token": "<pad>", "extra_ids": 0}
    config |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX_SCHEDULER = FLOW_SCHEDULER | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def write_model(
    folder: Path, network, vae, text_encoders: list, pipeline: str, scheduler: dict = SCHEDULER, **index
) -> Path:
    entries = {"_class_name": pipeline, "_diffusers_version": "0.36.0", **index}
    kind = "unet" if "UNet" in type(network).__name__ else "transformer"
    for name, model in ((kind, network), ("vae", vae)):
        model.save_pretrained(folder / name)
        entries[name] = ["diffusers", type(model).__name__]
    for i, encoder in enumerate(text_encoders):
        end = f"_{i + 1}" if i else ""
        entries[f"text_encoder{end}"] = entries[f"tokenizer{end}"] = [None, None]
        if encoder is None:
            continue
        encoder.save_pretrained(folder / f"text_encoder{end}")
        is_t5 = "T5" in type(encoder).__name__
        (write_t5_tokenizer if is_t5 else write_tokenizer)(folder / f"tokenizer{end}")
        entries[f"text_encoder{end}"] = ["transformers", type(encoder).__name__]
        entries[f"tokenizer{end}"] = ["transformers", "T5TokenizerFast" if is_t5 else "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    entries["scheduler"] = ["diffusers", scheduler["_class_name"]]
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


def write_sd3(folder: Path, t5: bool = True) -> Path:
    """A model folder shaped like SD3: 4x16x16 latents, a VAE with a shift, T5 with 12 tokens."""
    encoders = [make_text_encoder(projected=True), make_text_encoder(projected=True), make_t5(64) if t5 else None]
    vae = make_vae(scaling_factor=1.5305, shift_factor=0.0609)
    return write_model(
        folder, make_sd3(), vae, encoders, "StableDiffusion3Pipeline", FLOW_SCHEDULER, max_sequence_length=12
    )


@pytest.fixture(scope="session")
def tiny_sd3_folder(tmp_path_factory) -> Path:
    """A model folder shaped like SD3, T5 included; read only."""
    return write_sd3(tmp_path_factory.mktemp("tiny_sd3"))


@pytest.fixture(scope="session")
def tiny_flux_folder(tmp_path_factory) -> Path:
    """A model folder shaped like FLUX.1-dev: dynamic shift, embedded guidance; read only. Name a resolution: FLUX's own
    128x128 latents are a lot for a test."""
    vae = make_vae(scaling_factor=0.3611, shift_factor=0.1159)
    return write_model(
        tmp_path_factory.mktemp("tiny_flux"), make_flux(), vae, [make_text_encoder(), make_t5(32)], "FluxPipeline",
        FLUX_SCHEDULER, max_sequence_length=12,
    )  # fmt: skip

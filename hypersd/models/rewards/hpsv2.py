"""Human Preference Score v2 (Wu et al. 2023): CLIP ViT-H/14 tuned on choices of people; the plain cosine, some 0.2 to
0.35.

The public file has open_clip's names; they are brought to those of transformers here, so open_clip is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersd.models.rewards.clip import ClipScore
from hypersd.models.rewards.files import load_weights, one_file, tokenizer_from

WHAT = (
    "the state dict of HPS_v2.1_compressed.pt (its entry state_dict) as one .safetensors file and the tokenizer of a "
    "CLIP (vocab.json and merges.txt, or tokenizer.json)"
)
# of open_clip's ViT-H-14
VISION = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": 224, "hidden_act": "gelu", "projection_dim": 1024,
}  # fmt: skip
TEXT = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "hidden_act": "gelu", "projection_dim": 1024, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 2,
}  # fmt: skip
_NAMES = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "logit_scale": "logit_scale",
}
_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of open_clip's CLIP with the names of transformers' CLIPModel; unknown names stay."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.?(weight|bias)", name)
        if name in ("visual.proj", "text_projection"):
            side = "visual" if name == "visual.proj" else "text"
            found[f"{side}_projection.weight"] = tensor.T.contiguous()
        elif layer:
            tower = "vision_model" if layer[1] else "text_model"
            prefix, part, kind = f"{tower}.encoder.layers.{layer[2]}", layer[3], layer[4]
            if part == "attn.in_proj_":
                for key, block in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{prefix}.self_attn.{key}_proj.{kind}"] = block.contiguous()
            else:
                found[f"{prefix}.{_LAYER.get(part, part)}.{kind}"] = tensor
        elif name != "attn_mask":  # a buffer of older files
            stem, _, kind = name.rpartition(".")
            found[_NAMES.get(name) or (f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name)] = tensor
    return found


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
) -> ClipScore:
    """From a folder with WHAT. Raises HypersdError where something of it is missing or does not fit."""
    from transformers import CLIPConfig, CLIPModel

    weights = one_file(folder, "*.safetensors", WHAT)
    config = CLIPConfig(
        text_config=dict(text), vision_config=dict(vision), projection_dim=int(vision["projection_dim"])
    )
    model = CLIPModel(config)
    load_weights(model, weights, WHAT, from_open_clip)
    return ClipScore(model, tokenizer_from(folder, WHAT), 1.0).eval().requires_grad_(False).to(device)

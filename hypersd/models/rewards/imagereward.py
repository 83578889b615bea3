"""ImageReward (Xu et al. 2023): BLIP ViT-L with text cross-attention, and five linear layers on its first token.

Scores are normalised to about mean 0 and deviation 1 over its training pictures; ReFL's threshold is 2. The public
file has BLIP's original names; they are brought to those of transformers here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.models.rewards.files import load_weights, one_file, square, tokenizer_from

WHAT = (
    "the state dict of ImageReward.pt as one .safetensors file and the tokenizer of bert-base-uncased (vocab.txt or "
    "tokenizer.json)"
)
MEAN, STD = 0.16717, 1.03334
LENGTH = 35  # tokens of a caption
VISION = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "patch_size": 16, "image_size": 224, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
}  # fmt: skip
# is_decoder gives the layers their cross-attention; no call here is causal
TEXT = {
    "hidden_size": 768, "encoder_hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "vocab_size": 30524, "max_position_embeddings": 512, "is_decoder": True,
}  # fmt: skip
# BLIP's names, in this order, to those of transformers (that of its own conversion of BLIP)
_VISION_NAMES = (
    ("visual_encoder.blocks.", "vision.encoder.layers."),
    ("visual_encoder.norm.", "vision.post_layernorm."),
    ("visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward(nn.Module):
    """(B,) normalised scores of pictures for their captions."""

    def __init__(self, tokenizer: Any, vision: Mapping[str, Any] = VISION, text: Mapping[str, Any] = TEXT) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.tokenizer = tokenizer
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        widths = [int(text["hidden_size"]), 1024, 128, 64, 16, 1]
        # the numbers of the public file's layers; those between are dropout
        numbers = ("0", "2", "4", "6", "7")
        self.mlp = nn.ModuleDict({n: nn.Linear(a, b) for n, a, b in zip(numbers, widths[:-1], widths[1:], strict=True)})

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        seen = self.vision(pixel_values=square(images, int(self.vision.config.image_size))).last_hidden_state
        x = self.text(
            input_ids=tokens.input_ids.to(images.device),
            attention_mask=tokens.attention_mask.to(images.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=images.device),
        ).last_hidden_state[:, 0]
        for layer in self.mlp.values():
            x = layer(x)
        return (x[:, 0] - MEAN) / STD


def from_blip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The public file's state dict with the names of `ImageReward`."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("position_ids"):  # a buffer, not a weight
            continue
        name = re.sub(r"^mlp\.layers\.", "mlp.", name.removeprefix("blip."))
        if name.startswith("visual_encoder."):
            for old, new in _VISION_NAMES:
                name = name.replace(old, new)
        found[re.sub(r"^text_encoder\.", "text.", name)] = tensor
    return found


def load(
    folder: Path,
    device: str | torch.device = "cpu",
    *,
    vision: Mapping[str, Any] = VISION,
    text: Mapping[str, Any] = TEXT,
) -> ImageReward:
    """From a folder with WHAT. Raises HypersdError where something of it is missing or does not fit."""
    weights = one_file(folder, "*.safetensors", WHAT)
    model = ImageReward(tokenizer_from(folder, WHAT), vision, text)
    load_weights(model, weights, WHAT, from_blip)
    return model.eval().requires_grad_(False).to(device)

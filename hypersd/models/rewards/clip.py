"""Preference scores that are a fine-tuned CLIP: a picture is liked as much as it is close to its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.models.rewards.files import square


class ClipScore(nn.Module):
    """(B,): `scale` times the cosine of picture and caption. model: transformers' CLIPModel."""

    def __init__(self, model: nn.Module, tokenizer: Any, scale: float) -> None:
        super().__init__()
        self.model, self.tokenizer, self.scale = model, tokenizer, scale
        config: Any = model.config
        self.size, self.length = int(config.vision_config.image_size), int(config.text_config.max_position_embeddings)

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        output = self.model(
            input_ids=tokens.input_ids.to(images.device),
            attention_mask=tokens.attention_mask.to(images.device),
            pixel_values=square(images, self.size),
        )
        cosine = nn.functional.cosine_similarity(output.image_embeds, output.text_embeds, dim=-1)
        return torch.as_tensor(self.scale * cosine)

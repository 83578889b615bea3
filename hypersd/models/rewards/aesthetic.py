"""LAION's aesthetic predictor (sac+logos+ava1-l14-linearMSE): five linear layers on the unit CLIP ViT-L/14 embedding.

There is no nonlinearity between the layers, so its gradient points the same way wherever it stands in embedding space:
easily overdone. Give it a threshold (real pictures score 5 to 6.5 of 10) and watch an independent reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.models.rewards.files import from_folder, load_weights, square

HEAD = "aesthetic_head.safetensors"
WHAT = (
    f"CLIP ViT-L/14 as transformers saves it (config.json, model.safetensors) and {HEAD}, the predictor's own "
    "state dict (layers.0.weight, ...) as safetensors"
)
WIDTHS = (1024, 128, 64, 16, 1)


class Aesthetic(nn.Module):
    """(B,) scores, about 1 to 10; captions are not looked at."""

    def __init__(self, vision: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.vision, self.head = vision, head
        self.size = int(vision.config.image_size)  # type: ignore[union-attr, arg-type]

    def forward(self, images: Tensor, captions: Sequence[str] = ()) -> Tensor:
        embedding = self.vision(pixel_values=square(images, self.size)).image_embeds
        return self.head(F.normalize(embedding, dim=-1))[:, 0]


class _Head(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        a, b, c, d, e = WIDTHS
        # the numbers of the public file's layers; those between are dropout
        self.layers = nn.ModuleDict(
            {
                "0": nn.Linear(inputs, a),
                "2": nn.Linear(a, b),
                "4": nn.Linear(b, c),
                "6": nn.Linear(c, d),
                "7": nn.Linear(d, e),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def load(folder: Path, device: str | torch.device = "cpu") -> Aesthetic:
    """From a folder with WHAT. Raises HypersdError where something of it is missing or does not fit."""
    from transformers import CLIPVisionModelWithProjection

    vision = from_folder(CLIPVisionModelWithProjection, folder, WHAT)
    head = _Head(int(vision.config.projection_dim))
    load_weights(head, folder / HEAD, WHAT)
    return Aesthetic(vision, head).eval().requires_grad_(False).to(device)

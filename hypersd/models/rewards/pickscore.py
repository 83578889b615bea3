"""PickScore (Kirstain et al. 2023): CLIP ViT-H/14 tuned on half a million choices between two pictures.

The score is the model's own logit scale times the cosine, some 18 to 24; tables often give a hundredth of it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hypersd.models.rewards.clip import ClipScore
from hypersd.models.rewards.files import from_folder, tokenizer_from

WHAT = "PickScore_v1 as published (config.json, model.safetensors) and the tokenizer of its CLIP"


def load(folder: Path, device: str | torch.device = "cpu") -> ClipScore:
    """From a folder with WHAT. Raises HypersdError where something of it is missing or does not fit."""
    from transformers import CLIPModel

    model = from_folder(CLIPModel, folder, WHAT)
    score = ClipScore(model, tokenizer_from(folder, WHAT), float(model.logit_scale.exp()))
    return score.eval().requires_grad_(False).to(device)

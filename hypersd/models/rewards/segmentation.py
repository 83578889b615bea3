"""Any instance segmenter of transformers that is trained by its own forward pass (Mask2Former, MaskFormer), as a
measure of structure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.models.load import _read_json
from hypersd.models.rewards import Instances
from hypersd.models.rewards.files import from_folder

WHAT = "a Mask2Former or MaskFormer as transformers saves it (config.json, model.safetensors, preprocessor_config.json)"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 0  # of the points that Mask2Former compares masks at


class Segmentation(nn.Module):
    """`(images, instances)` is the model's own training loss on pictures (B, 3, H, W) in [-1, 1], a scalar.

    Labels are the model's classes. A picture without instances has no loss and is left out; without any, the loss is 0.
    Mask2Former draws the points it looks at; they come from a fixed seed here, so that equal inputs give equal bits.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, tuple(mean), tuple(std)

    def forward(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        rows = [row for row, each in enumerate(instances) if len(each.labels)]
        if not rows:
            return images.sum() * 0.0
        offset, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (self.mean, self.std))
        pixels = ((images[rows].float() + 1) / 2 - offset) / scale
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            torch.manual_seed(SEED)
            output: Any = self.model(
                pixel_values=pixels,
                mask_labels=[instances[row].masks.to(images.device).float() for row in rows],
                class_labels=[instances[row].labels.to(images.device) for row in rows],
            )
        return output.loss.sum()


def load(folder: Path, device: str | torch.device = "cpu") -> Segmentation:
    """From a folder with WHAT. Raises HypersdError where something of it is missing or does not fit."""
    from transformers import AutoModelForUniversalSegmentation

    try:
        import scipy.optimize  # noqa: F401  the models' matching of masks wants it
    except ModuleNotFoundError:
        raise HypersdError("structure from transformers needs SciPy; pip install hypersd[structure]") from None
    model = from_folder(AutoModelForUniversalSegmentation, folder, WHAT)
    said = _read_json(folder / "preprocessor_config.json")
    segmentation = Segmentation(model, said.get("image_mean", MEAN), said.get("image_std", STD))
    return segmentation.eval().requires_grad_(False).to(device)

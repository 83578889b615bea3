"""Rewards: what is liked about a picture, as differentiable functions of its pixels.

    aesthetic     LAION's aesthetic predictor on CLIP ViT-L/14
    pickscore     PickScore (Kirstain et al. 2023), CLIP ViT-H/14
    hpsv2         Human Preference Score v2 (Wu et al. 2023), CLIP ViT-H/14
    imagereward   ImageReward (Xu et al. 2023), BLIP

Every one is loaded from a local folder, safetensors only. Anything else with this interface works as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models.load import check_safetensors, check_weights


class Reward(Protocol):
    """Pictures (B, 3, H, W), about [-1, 1] and of any size, with their captions -> (B,) float32, higher is better.

    Differentiable in the pictures; its own weights are frozen.
    """

    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True)
class Instances:
    """The objects of one picture: labels (n,) int64 and their visible masks (n, H, W) bool."""

    labels: Tensor
    masks: Tensor


class Segmenter(Protocol):
    """A frozen instance segmenter: its own training loss on pictures (B, 3, H, W) in [-1, 1], a scalar with gradient in
    the pictures."""

    def __call__(self, images: Tensor, instances: Sequence[Instances]) -> Tensor: ...


KINDS = ("aesthetic", "pickscore", "hpsv2", "imagereward")


def check_reward(kind: str, path: str | Path) -> None:
    """What can be told without loading it: raises HypersdError for an unknown kind, a folder that is not there, and
    weights that are missing, pickled or truncated."""
    if kind not in KINDS:
        raise HypersdError(f"reward {kind!r} is unknown; use {', '.join(KINDS)}", exit_code=2)
    _check_folder(kind, Path(path))


def check_segmenter(kind: str, path: str | Path) -> None:
    """As `check_reward`."""
    if kind == "solo":
        check_safetensors(Path(path))
    else:
        _check_folder(f"structure.kind = {kind!r}", Path(path))


def _check_folder(what: str, path: Path) -> None:
    if not path.is_dir():
        raise HypersdError(f"no folder {path}, where the weights of {what} were to be; check its path")
    check_weights(path)


def load_reward(kind: str, path: str | Path, device: str | torch.device = "cpu") -> Reward:
    """The reward of this kind from its folder, frozen, float32, on `device`. Raises HypersdError that says what to put
    there."""
    if kind not in KINDS:
        raise HypersdError(f"reward {kind!r} is unknown; use {', '.join(KINDS)}", exit_code=2)
    load: Callable[[Path, str | torch.device], Reward] = importlib.import_module(f"{__name__}.{kind}").load
    return load(Path(path), device)


def load_segmenter(kind: str, path: str | Path, device: str | torch.device = "cpu") -> Segmenter:
    """ "solo": SOLO from its safetensors file; "transformers": a Mask2Former or MaskFormer from its folder."""
    if kind == "solo":
        from hypersd.models.solo import load_solo

        return load_solo(path, device)
    if kind == "transformers":
        from hypersd.models.rewards import segmentation

        return segmentation.load(Path(path), device)
    raise HypersdError(f"segmenter {kind!r} is unknown; use solo or transformers", exit_code=2)

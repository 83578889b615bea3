"""Weights of rewards from local safetensors, and pictures as their networks want them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.models.load import _loading, check_safetensors, check_weights

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def from_folder(cls: Any, folder: Path, what: str) -> Any:
    """A transformers model of class `cls` from its folder, float32, frozen. Raises HypersdError, naming `what` belongs
    there, for a missing folder, pickled or truncated weights, and weights that lack something."""
    if not (folder / "config.json").is_file():
        raise HypersdError(f"{folder} has no config.json; it must hold {what}")
    check_weights(folder)
    with _loading(folder):
        model, info = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    lacking = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", ())]))
    if lacking:
        raise HypersdError(f"the weights in {folder} do not fit: {lacking[0]} is missing; it must hold {what}")
    return model.eval().requires_grad_(False)


def tokenizer_from(folder: Path, what: str) -> Any:
    """The tokenizer of a folder."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise HypersdError(f"{folder} has no tokenizer (tokenizer.json, vocab.json or vocab.txt); it must hold {what}")
    with _loading(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_weights(
    model: nn.Module,
    path: Path,
    what: str,
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    """Fill a model (on the meta device or not) from one safetensors file whose tensors `rename` brings to its keys.

    Raises HypersdError where the file is missing, no safetensors, or has another model's keys or shapes.
    """
    check_safetensors(path)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    try:
        state = dict(rename(state))
    except KeyError as error:
        raise HypersdError(f"{path} lacks {error.args[0]}; it must be {what}") from None
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            where = "lacks" if name not in state else "holds an unknown"
            raise HypersdError(f"{path} {where} {name}; it must be {what}")
        if own[name].shape != state[name].shape:
            raise HypersdError(
                f"{path}: {name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}; it must be {what}"
            )
    model.load_state_dict(state, assign=True)


def one_file(folder: Path, pattern: str, what: str) -> Path:
    """The only file of this pattern in a folder."""
    if not folder.is_dir():
        raise HypersdError(f"no folder {folder}; it must hold {what}")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise HypersdError(f"{folder} has {len(found) or 'no'} {pattern} files; it must hold {what}")
    return found[0]


def square(images: Tensor, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as (B, 3, size, size), normalised: the shorter side scaled (bicubic, with
    antialiasing), the middle cut out. Differentiable; values outside of [-1, 1] are cut off, as a PNG would."""
    pixels = (images.float().clamp(-1, 1) + 1) / 2
    height, width = pixels.shape[2:]
    factor = size / min(height, width)
    shape = (max(size, round(height * factor)), max(size, round(width * factor)))
    if shape != (height, width):
        pixels = F.interpolate(pixels, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size]
    offset, scale = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mean, std))
    return (pixels - offset) / scale

"""LoRA key layouts: PEFT, diffusers (`unet.<path>.lora_A.weight`) and kohya (`lora_unet_<path>.lora_down.weight`).

"hyper" is the layout of the published Hyper-SD3 and Hyper-FLUX files: PEFT's keys, and nothing that says alpha. They
are made for a weight of 0.125, which is PEFT's own default alpha of 8 over their rank of 64.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hypersd.errors import HypersdError

FORMATS = ("peft", "kohya", "hyper")
UNSAID_SCALE = 0.125


@dataclass
class Layer:
    """One adapter: a (rank, in[, kh, kw]), b (out, rank[, 1, 1]) and scale = alpha / rank."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def alpha(self) -> float:
        return self.scale * self.a.shape[0]


# key ending -> which tensor; the last two are the names of diffusers before it used PEFT
_ENDINGS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_A.default.weight": "a",
    ".lora_B.default.weight": "b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".alpha": "alpha",
}


def encode(layers: Mapping[str, Layer], prefix: str, format: str) -> dict[str, Tensor]:
    """State dict of the layers, keyed by module path, in one of FORMATS. `prefix`: "unet", "transformer"."""
    if format not in FORMATS:
        raise HypersdError(f"LoRA format {format!r} is unknown; use {', '.join(FORMATS)}")
    if format == "kohya" and prefix == "transformer":
        raise HypersdError("kohya's keys of SD3 and FLUX name their layers otherwise; take the format peft")
    state: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if format == "peft":
            state[f"{prefix}.{path}.lora_A.weight"] = layer.a
            state[f"{prefix}.{path}.lora_B.weight"] = layer.b
        elif format == "hyper":
            state[f"{prefix}.{path}.lora_A.weight"] = layer.a
            state[f"{prefix}.{path}.lora_B.weight"] = layer.b * (layer.scale / UNSAID_SCALE)
        else:
            key = f"lora_{prefix}_{path.replace('.', '_')}"
            state[f"{key}.lora_down.weight"] = layer.a
            state[f"{key}.lora_up.weight"] = layer.b
            state[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return state


def is_lora(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the keys of a LoRA, in any known layout, and not those of a whole network."""
    return any(key.endswith(ending) for key in state for ending in _ENDINGS)


def decode(
    state: Mapping[str, Tensor], paths: Iterable[str], prefix: str, *, default_scale: float | None = None
) -> dict[str, Layer]:
    """The layers of a state dict in any known layout, keyed by module path, in the order of `paths`.

    `paths` are the layers of the model. Raises HypersdError for a key of another model, an incomplete pair or an
    empty file. Without alpha the scale is `default_scale`, or 1.
    """
    paths = list(paths)
    by_name = {path: path for path in paths}
    by_name |= {name: path for path, name in _original_names(paths).items()}
    by_name |= {name.replace(".", "_"): path for name, path in by_name.items()}
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if key.startswith(("lora_te", "text_encoder")):
            raise HypersdError(
                f"the LoRA adapts the text encoder, too ({key}), which stays as it is here; load it in a diffusers "
                "pipeline, or write a file without the keys that start with lora_te or text_encoder"
            )
        ending = next((e for e in _ENDINGS if key.endswith(e)), None)
        if ending is None:
            raise HypersdError(
                f"the LoRA does not fit: {key} is not a LoRA key (lora_A, lora_B, lora_down, lora_up, alpha)"
            )
        path = by_name.get(_bare_name(key.removesuffix(ending), prefix))
        if path is None:
            raise HypersdError(f"the LoRA is for another model: {key} names a layer that this one does not have")
        found.setdefault(path, {})[_ENDINGS[ending]] = tensor
    if not found:
        raise HypersdError("the LoRA file holds no tensors")
    layers = {}
    for path in paths:
        if path in found:
            parts = found[path]
            if "a" not in parts or "b" not in parts:
                raise HypersdError(f"the LoRA is incomplete: {path} has only {sorted(parts)} of a (down) and b (up)")
            rank = parts["a"].shape[0]
            scale = (
                float(parts["alpha"]) / rank if "alpha" in parts else 1.0 if default_scale is None else default_scale
            )
            layers[path] = Layer(parts["a"], parts["b"], scale)
    return layers


def check_shapes(path: str, layer: Layer, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    """Raise HypersdError unless a and b have these shapes, up to trailing 1s (linear as 1x1 convolution)."""
    for name, tensor, shape in (("a", layer.a, shape_a), ("b", layer.b, shape_b)):
        if _squeeze(tuple(tensor.shape)) != _squeeze(shape):
            raise HypersdError(
                f"the LoRA is for another model: {path} {name} has shape {tuple(tensor.shape)}, not {shape}"
            )


# parts of a UNet, and of its residual blocks, in the names of the original code
_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_ORIGINAL_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _original_names(paths: Sequence[str]) -> dict[str, str]:
    """diffusers' module path -> name in the original code of SD and SDXL, by which sd-scripts calls the layers of SDXL.

    There the blocks of each side are numbered through: a residual block with its attention is one, a downsampling is
    one, and an upsampling is the last part of the one before.
    """
    names = dict(_ORIGINAL)
    for side, blocks, number in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        found = filter(None, (re.match(rf"{side}\.(\d+)\.(\w+)\.(\d+)\.", path) for path in paths))
        own = {(int(part[1]), part[2], int(part[3])) for part in found}
        for block, kind, layer in sorted(own, key=lambda part: (part[0], part[1] == "downsamplers", part[2])):
            if kind == "resnets":
                has_attention = (block, "attentions", layer) in own
                names[f"{side}.{block}.resnets.{layer}"] = f"{blocks}.{number}.0"
                names[f"{side}.{block}.attentions.{layer}"] = f"{blocks}.{number}.1"
                names[f"{side}.{block}.upsamplers.0"] = f"{blocks}.{number}.{1 + has_attention}"
                number += 1
            elif kind == "downsamplers":
                names[f"{side}.{block}.downsamplers.0.conv"] = f"{blocks}.{number}.0.op"
                number += 1
    originals = {}
    for path in paths:
        for start, name in names.items():
            if path == start or path.startswith(f"{start}."):
                rest = path[len(start) + 1 :]
                originals[path] = ".".join(filter(None, (name, _ORIGINAL_RESNET.get(rest, rest))))
    return originals


def _bare_name(key: str, prefix: str) -> str:
    for start in ("base_model.model.", f"{prefix}.", f"lora_{prefix}_", "diffusion_model.", "lora_unet_"):
        key = key.removeprefix(start)
    return key


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-2] if len(shape) == 4 and shape[-2:] == (1, 1) else shape

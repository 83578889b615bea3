"""LoRA files: safetensors with the sampling schedule in the metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.files import atomic_write
from hypersd.models import formats
from hypersd.models.backbone import Backbone
from hypersd.models.load import check_safetensors

# diffusers reads rank, alpha and targets of a PEFT-keyed file from this entry
_DIFFUSERS_KEY = "lora_adapter_metadata"
_PEFT_START = "base_model.model."


def save_lora(
    path: str | Path, backbone: Backbone, role: str, metadata: Mapping[str, str] | None = None, format: str = "peft"
) -> Path:
    """Write a role, or a sum of roles ("p+q"), as safetensors, atomically, fp32.

    `metadata` (str to str) says how to sample: `prediction_type`, `solver` (ddim, dpmpp_2m, tcd, lcm, perflow, euler),
    `steps` ("1,2,4,8"), `timesteps` (JSON list, or JSON object from step count to list), `eta`, `guidance_scale`; of
    flow models `sigmas`, the same grid as noise levels before the shift, as diffusers' pipelines take them, and
    `embedded_guidance`, for networks that are told it; `resolution`, pixels along a side in training. Added here:
    `rank`, `alpha`, `base_model` (fingerprint), `lora_format`, and `lora_scale` in a file of format "hyper", which has
    no alpha. Raises HypersdError when the file cannot be written.
    """
    layers = backbone.lora_layers(role)
    state = formats.encode(layers, backbone.key_prefix, format)
    ranks = {name: int(layer.a.shape[0]) for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    full = {name: str(value) for name, value in (metadata or {}).items()}
    full.pop("alpha", None)
    full |= {"lora_scale": repr(formats.UNSAID_SCALE)} if format == "hyper" else {"alpha": repr(alpha)}
    full |= {
        "format": "pt",
        "rank": str(rank),
        "base_model": backbone.fingerprint,
        "lora_format": format,
    }
    if format == "peft":
        config = {
            "r": rank,
            "lora_alpha": alpha,
            # PEFT takes a name as the end of a path, and FLUX's proj_out is one of other layers too
            "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
            "target_modules": list(layers),
        }
        full[_DIFFUSERS_KEY] = json.dumps({f"{backbone.key_prefix}.{k}": v for k, v in config.items()}, sort_keys=True)
    return atomic_write(path, lambda temporary: save_file(state, temporary, metadata=full))


def load_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict, metadata) of a LoRA file, any key layout; hand the state to `Backbone.load_lora_state_dict`.

    Raises HypersdError for a missing, truncated or pickled file, or a scale that is no number. Files with alpha only in
    the metadata, or in the adapter_config.json of a folder that PEFT saved, get it back as `.alpha` tensors, so that
    the state alone says the scale.
    """
    path = Path(path)
    metadata = check_safetensors(path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise HypersdError(f"{path} cannot be read ({error}); copy it again") from None
    try:
        finite = math.isfinite(float(metadata.get("lora_scale", 1.0)))
    except ValueError:
        finite = False
    if not finite:
        raise HypersdError(
            f"the LoRA metadata of {path} says lora_scale = {metadata['lora_scale']!r}, which is no number"
        )
    return state | _alphas(state, _config(path, state, metadata)), metadata


def _config(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT knows of the adapter: an entry of the metadata, or the file beside one that PEFT itself saved."""
    where, text = f"the LoRA metadata entry {_DIFFUSERS_KEY}", metadata.get(_DIFFUSERS_KEY, "{}")
    beside = path.with_name("adapter_config.json")
    if _DIFFUSERS_KEY not in metadata and all(key.startswith(_PEFT_START) for key in state) and beside.is_file():
        where, text = str(beside), beside.read_text("utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        raise HypersdError(f"{where} is not a JSON object; export the file again")
    return config


def _alphas(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """`.alpha` entries for the layers to which PEFT's configuration gives a scale other than 1."""
    alphas = {}
    for key, tensor in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name, rank = key.removesuffix(".lora_A.weight"), tensor.shape[0]
        # a pipeline's file says "unet.lora_alpha", a single network's file "lora_alpha"
        prefix, _, path = name.partition(".")
        start, path = (f"{prefix}.", path) if f"{prefix}.lora_alpha" in config else ("", name.removeprefix(_PEFT_START))
        alpha = _of_pattern(config.get(f"{start}alpha_pattern"), path, config.get(f"{start}lora_alpha", rank))
        if config.get(f"{start}use_rslora"):
            alpha *= math.sqrt(rank)
        if alpha != rank:
            alphas[f"{name}.alpha"] = torch.tensor(float(alpha))
    return alphas


def _of_pattern(pattern: Mapping[str, float] | None, path: str, otherwise: float) -> float:
    """The value of the first entry that matches the module path, as PEFT matches it."""
    for name, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({name})$", path):
                return value
        except re.error as error:
            raise HypersdError(
                f"the LoRA metadata has the alpha_pattern {name!r}, which is no regular expression ({error}); "
                "export the file again"
            ) from None
    return otherwise


def _most_common(values: Mapping[str, int] | Mapping[str, float]) -> float | int:
    found = list(values.values())
    return max(set(found), key=found.count)

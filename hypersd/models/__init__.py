"""Noise process, backbone with LoRA roles, model folders and LoRA files. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "NoiseProcess": "noise_process",
    "Backbone": "backbone",
    "FullBackbone": "full",
    "DIT_TARGETS": "networks",
    "LCM_TARGETS": "networks",
    "LoraConv2d": "lora",
    "LoraLinear": "lora",
    "LoraSpec": "lora",
    "Components": "load",
    "load_components": "load",
    "decode_latents": "prompts",
    "encode_images": "prompts",
    "encode_null": "prompts",
    "encode_prompts": "prompts",
    "TextCache": "text_cache",
    "fuse": "fused",
    "unfuse": "fused",
    "load_lora": "export",
    "save_lora": "export",
    "save_network": "full",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hypersd.models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hypersd.models' has no attribute {name!r}")

"""Recipes, data, methods and the trainer. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "parse_recipe": "recipe",
    "LatentDataset": "data",
    "Trainer": "trainer",
    "TSCD": "tscd",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hypersd.distill.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hypersd.distill' has no attribute {name!r}")

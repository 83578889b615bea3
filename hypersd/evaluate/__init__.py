"""Metrics, the few-step evaluation table and the report. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Evaluator": "protocol",
    "FeatureEvaluator": "protocol",
    "Moments": "metrics",
    "frechet_distance": "metrics",
    "kernel_distance": "metrics",
    "diversity": "metrics",
    "object_recall": "metrics",
    "bootstrap_interval": "metrics",
    "effnet_lite0": "effnet",
    "Reference": "run",
    "Evaluation": "run",
    "evaluate": "run",
    "generate": "generate",
    "write_report": "report",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hypersd.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hypersd.evaluate' has no attribute {name!r}")

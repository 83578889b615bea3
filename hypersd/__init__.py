"""hypersd: distil a latent diffusion model into one that samples in 1 to 8 steps, and sample from it.

Importing this package compiles nothing, probes nothing and allocates nothing; subpackages load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "kernels", "models", "sampling", "distill", "evaluate", "emoji"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"hypersd.{name}")
    raise AttributeError(f"module 'hypersd' has no attribute {name!r}")

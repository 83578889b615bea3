"""Speed of the operators, the sampler step and the training step against their peers: `hypersd bench`."""

from __future__ import annotations

from .harness import main

__all__ = ["main"]

"""Speed of the operators, the sampler step and the training step against their peers: `hypersd bench`."""

from __future__ import annotations

from typing import Any


def main(*args: Any, **options: Any) -> int:
    """As bench.run.main, loaded when called."""
    from .run import main as run

    return run(*args, **options)

"""The embedded default: a small text-to-image latent diffusion model of emoji scenes, its data and its evaluators."""

from __future__ import annotations

from pathlib import Path

from hypersd.errors import HypersdError


def model_folder() -> Path:
    """The embedded teacher, a folder in the diffusers layout. Raises HypersdError where its weights are missing."""
    from hypersd.emoji.weights import FOLDER

    if not (FOLDER / "model_index.json").exists():
        raise HypersdError(
            f"the embedded model is missing in {FOLDER}; reinstall hypersd or run python -m hypersd.emoji.train"
        )
    return FOLDER

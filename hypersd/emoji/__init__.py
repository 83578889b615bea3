"""The embedded default: a small text-to-image latent diffusion model of emoji scenes, its data and its evaluators; and
a flow-matching teacher of the same scenes."""

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


def flow_model_folder() -> Path:
    """The flow-matching teacher in the layout of Stable Diffusion 3, put together in the user's cache from its own
    transformer and the embedded model's other parts. Raises HypersdError where the cache cannot be
    written."""
    from hypersd.emoji.flow import assemble

    return assemble()

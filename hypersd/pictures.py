"""Sampled pictures as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from hypersd.evaluate.generate import generate
from hypersd.evaluate.plots import grid
from hypersd.files import atomic_write
from hypersd.models.backbone import Backbone
from hypersd.models.load import Components
from hypersd.sampling.solvers import Table

GRID_ROWS = 16


def sample_to(
    folder: Path,
    components: Components,
    backbone: Backbone,
    table: Table,
    captions: list[str],
    *,
    role: str,
    seed: int,
    negative_prompt: str = "",
) -> None:
    """Write 0000.png, 0001.png, ... and grid.png with the first captions beside their pictures."""
    images: list[np.ndarray] = []
    with backbone.folded():
        for batch in generate(
            components, backbone, table, captions, role=role, seed=seed, batch_size=8, negative_prompt=negative_prompt
        ):
            for image in batch:
                atomic_write(folder / f"{len(images):04d}.png", Image.fromarray(image).save)
                images.append(image)
    steps = len(table)
    name = f"{'student' if role != 'base' else 'undistilled'}/{steps}"
    picture = grid(
        {name: np.stack(images[:GRID_ROWS])}, captions[:GRID_ROWS], {name: steps * (2 if table.is_guided else 1)}
    )
    atomic_write(folder / "grid.png", picture.save)

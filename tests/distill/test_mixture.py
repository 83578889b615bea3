"""The whole method against a teacher that is exact: on a Gaussian mixture both the noise prediction and the ODE map are
known in closed form or to any accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd.distill.recipe import parse_recipe
from hypersd.distill.trainer import Trainer
from tests.distill import toy

ITERATIONS = 150


def distil(stages: list[dict[str, Any]], seed: int, out: Path) -> toy.Mixture:
    common = {"method": "tscd", "guidance_scale": [1.0, 1.0], "offset_noise": 0.0, "t_end": "boundary"}
    train = {"batch_size": 128, "seed": seed, "learning_rate": 3e-3, "checkpoint_every": 10_000}
    recipe = parse_recipe({"train": train, "stages": [common | stage for stage in stages]})
    return Trainer(recipe, toy.COMPONENTS, toy.dataset(), out, backbone=toy.Mixture()).run()


def test_the_exact_map_is_exact() -> None:
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fine, finer = toy.exact_map(x, steps=400), toy.exact_map(x, steps=800)
    torch.testing.assert_close(fine, finer, rtol=0, atol=1e-6)
    # and DDIM with the exact noise prediction converges to it
    model = toy.Mixture(dtype=torch.float64)
    errors = [toy.few_step_error(model, steps, "base") for steps in (50, 200, 1000)]
    assert errors[0] > 1.5 * errors[1] and errors[1] > 10 * errors[2] and errors[2] < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_stages_beat_one_at_equal_iterations(tmp_path: Path, seed: int) -> None:
    """One-step distance to the exact ODE map: stages 8-4-2-1, each taught by the one before over a coarse grid, against
    all iterations spent on one segment (trajectory consistency distillation), same optimizer, batch and network."""
    n = ITERATIONS
    staged = [
        {"segments": 8, "iterations": n, "grid": 40},
        {"segments": 4, "iterations": n, "grid": 16, "teacher": "previous_stage"},
        {"segments": 2, "iterations": n, "grid": 8, "teacher": "previous_stage"},
        {"segments": 1, "iterations": n, "grid": 4, "teacher": "previous_stage"},
    ]
    tscd = distil(staged, seed, tmp_path / "tscd")
    tcd = distil([{"segments": 1, "iterations": 4 * n, "grid": 40}], seed, tmp_path / "tcd")
    undistilled = toy.few_step_error(tscd, 1, "base")
    ours, theirs = toy.few_step_error(tscd, 1), toy.few_step_error(tcd, 1)
    assert ours < 0.85 * theirs < 0.85 * undistilled
    assert ours < 0.4 * undistilled

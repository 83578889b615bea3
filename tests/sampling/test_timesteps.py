"""The published grids, exactly."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

from hypersd.errors import HypersdError
from hypersd.sampling import lcm_grid, leading, linspace, trailing

TRAILING = {
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
    12: [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82],
}
LCM = {
    1: [999],
    2: [999, 499],
    3: [999, 679, 339],
    4: [999, 759, 499, 259],
    5: [999, 799, 599, 399, 199],
    6: [999, 839, 679, 499, 339, 179],
    7: [999, 859, 719, 579, 439, 299, 159],
    8: [999, 879, 759, 639, 499, 379, 259, 139],
}


@pytest.mark.parametrize("grids, function", [(TRAILING, trailing), (LCM, lcm_grid)])
def test_published_tables(grids, function):
    for steps, expected in grids.items():
        grid = function(steps)
        assert grid.tolist() == expected and grid.dtype == np.int64


def test_grids_equal_diffusers_for_every_step_count():
    for spacing, function in (("trailing", trailing), ("leading", leading), ("linspace", linspace)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
        for steps in range(1, 201):
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.tolist()
            # for a few counts (61, 103, ...) a float range there has one entry too many, timestep -1
            assert function(steps).tolist() == [t for t in theirs if t >= 0]
    scheduler = diffusers.LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert lcm_grid(steps).tolist() == scheduler.timesteps.tolist()


def test_grids_descend_and_count():
    for T in (100, 1000):
        for steps in range(1, T + 1):
            grid = trailing(steps, T)
            assert len(grid) == steps and grid[0] == T - 1 and grid[-1] >= 0 and (np.diff(grid) < 0).all()


def test_wrong_counts_are_refused():
    for call, message in [
        (lambda: trailing(0), "1..1000"),
        (lambda: trailing(1001), "1..1000"),
        (lambda: lcm_grid(51), "do not fit a grid of 50"),
        (lambda: lcm_grid(4, original_steps=0), "original_inference_steps"),
        (lambda: lcm_grid(40, strength=0.5), "do not fit a grid of 25"),
    ]:
        with pytest.raises(HypersdError, match=message):
            call()

from __future__ import annotations

import numpy as np
import pytest

from hypersd.distill.segments import SegmentGrid, boundary, grid
from hypersd.sampling.timesteps import trailing

SEGMENTS = (1, 2, 4, 8, 12)
POINTS = (20, 40, 50, 100, 200, 1000)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("policy", ["uniform", "boundary", "mixed"])
def test_no_jump_leaves_its_segment(segments: int, points: int, policy: str) -> None:
    stage = SegmentGrid.build(segments, points)
    # round half to even, as trailing spacing does
    edges = np.array([max(0, round(1000 - i * 1000 / segments) - 1) for i in range(segments, 0, -1)])
    owner = np.searchsorted(edges, stage.t, side="left") - 1  # the last edge strictly below t
    np.testing.assert_array_equal(stage.t_b, edges[owner])
    assert np.all(stage.t_b <= stage.t_prev) and np.all(stage.t_prev < stage.t)
    seen = set()
    for seed in range(20):
        t, t_prev, t_end = stage.sample(np.random.default_rng(seed), 500, policy, 0.25)
        t_b = boundary(t, segments)
        assert np.all(t_b <= t_end) and np.all(t_end <= t_prev) and np.all(t_prev < t)
        seen.update(t.tolist())
    assert seen <= set(stage.t.tolist()) and len(seen) > 0.99 * len(stage.t)  # every grid point is a start point


def test_boundaries_are_the_trailing_timesteps() -> None:
    assert sorted(set(boundary(np.arange(1, 1000), 8)) | {999}) == [0, 124, 249, 374, 499, 624, 749, 874, 999]
    assert sorted(set(boundary(np.arange(1, 1000), 1))) == [0]
    assert boundary(np.array([999, 875, 874, 125, 124, 1]), 8).tolist() == [874, 874, 749, 124, 0, 0]
    assert sorted(set(boundary(np.arange(1, 1000), 12)))[1:] == [82, 166, 249, 332, 416, 499, 582, 666, 749, 832, 916]
    for segments in (3, 7, 12, 16, 64):  # wherever sampling stops, a segment begins, and all of it lies ahead
        stops = trailing(segments)
        assert boundary(stops, segments).tolist() == [*stops[1:].tolist(), 0]


@pytest.mark.parametrize(
    ("points", "segments", "clamped"), [(40, 8, 0), (200, 8, 0), (50, 8, 6), (50, 4, 2), (100, 8, 4)]
)
def test_clamped_targets(points: int, segments: int, clamped: int) -> None:
    """Counts of grid points whose solver step would cross a boundary, the lowest point aside."""
    stage = SegmentGrid.build(segments, points)
    assert int(np.sum(stage.t_prev[1:] != stage.t[:-1])) == clamped


def test_policies_choose_ends() -> None:
    stage = SegmentGrid.build(1, 40)
    rng = np.random.default_rng(0)
    _, _, t_end = stage.sample(rng, 4000, "boundary")
    assert np.all(t_end == 0)
    t, t_prev, t_end = stage.sample(rng, 200_000, "uniform")
    relative = t_end[t == 999] / t_prev[t == 999]
    assert abs(relative.mean() - 0.5) < 0.02 and relative.max() == 1.0 and relative.min() == 0.0
    t, _, t_end = stage.sample(rng, 200_000, "mixed", 0.1)
    assert abs(np.mean(t_end[t == 999] == 0) - 0.1) < 0.02


def test_grid_points() -> None:
    assert grid(50)[:3].tolist() == [19, 39, 59] and grid(50)[-1] == 999
    assert grid(1000).tolist() == list(range(1, 1000))
    assert grid(12).tolist() == [82, 165, 249, 332, 415, 499, 582, 665, 749, 832, 915, 999]
    with pytest.raises(ValueError, match="1000 points"):
        grid(1001)


@pytest.mark.parametrize(("teacher", "segments"), [(8, 4), (4, 2), (2, 1), (12, 8)])
def test_previous_stage_teacher_stays_in_its_own_segments(teacher: int, segments: int) -> None:
    for points in (4 * segments, 40, 50, 1000):
        stage = SegmentGrid.build(segments, max(points, teacher), teacher_segments=teacher)
        assert np.all(stage.t_prev >= boundary(stage.t, teacher)) and np.all(stage.t_prev >= stage.t_b)
        assert np.all(stage.t_prev < stage.t)

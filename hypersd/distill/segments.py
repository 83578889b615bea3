"""Trajectory segments: which timesteps a consistency jump starts from, and how far down it may go.

Hyper-SD (arXiv 2404.13686, eq. 11) cuts the T training timesteps into k segments. The literal formula puts a grid point
that lies on a boundary *at* its own boundary, so that there is nothing to jump to. Here the boundaries are the
timesteps that trailing spacing samples at (k = 8: 999, 874, ..., 124) and 0, a point on a boundary belongs to the
segment below it, and the solver's target is clamped to the segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hypersd.sampling.timesteps import subsample, trailing

EndPolicy = Literal["uniform", "boundary", "mixed"]


def grid(num_points: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """The `num_points` timesteps floor(i T / N) - 1, i = 1..N, ascending, int64; the last is T - 1. Timestep 0 is left
    out (N = T): it is the end of the trajectory and has nowhere to jump to."""
    if not 1 <= num_points <= num_train_timesteps:
        raise ValueError(f"a grid needs between 1 and {num_train_timesteps} points, got {num_points}")
    points = np.arange(1, num_points + 1, dtype=np.int64) * num_train_timesteps // num_points - 1
    return points[points > 0]


def sampling_grids(steps: Iterable[int], num_points: int, num_train_timesteps: int = 1000) -> dict[int, np.ndarray]:
    """For each number of steps that fits: as many points of `grid`, evenly spaced by index from its last, descending.
    So weights are sampled where they were trained, whether the number of points divides T or not."""
    fits = len(grid(num_points, num_train_timesteps))
    points = np.arange(1, num_points + 1, dtype=np.int64) * num_train_timesteps // num_points - 1
    return {n: subsample(points, n) for n in steps if n <= fits}


def boundary(timesteps: np.ndarray, segments: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """t_b, the lowest timestep of the segment that holds t: the nearest timestep below t that trailing spacing samples
    at, or 0. Also where k does not divide T (k = 12: 916, 832, 749, ...): one index off, and a sample would start its
    step with one index left to go."""
    if not 1 <= segments <= num_train_timesteps:
        raise ValueError(f"segments must lie between 1 and {num_train_timesteps}, got {segments}")
    tops = trailing(segments, num_train_timesteps)[::-1]
    bottoms = np.concatenate([[0], tops[:-1]])
    return bottoms[np.searchsorted(tops, np.asarray(timesteps, dtype=np.int64), side="left")]


@dataclass(frozen=True)
class SegmentGrid:
    """The start points of one stage, ascending, all int64 (N,): `t`; `t_prev`, where the teacher's solver step lands;
    `t_b`, the boundary. t_b <= t_prev < t holds for each."""

    t: np.ndarray
    t_prev: np.ndarray
    t_b: np.ndarray

    @classmethod
    def build(
        cls, segments: int, num_points: int, num_train_timesteps: int = 1000, *, teacher_segments: int | None = None
    ) -> SegmentGrid:
        """`teacher_segments`: the teacher is itself only consistent within that many segments (it is the student of an
        earlier stage), so its step is clamped to those boundaries too."""
        t = grid(num_points, num_train_timesteps)
        t_b = boundary(t, segments, num_train_timesteps)
        t_prev = np.maximum(np.concatenate([[0], t[:-1]]), t_b)
        if teacher_segments is not None:
            t_prev = np.maximum(t_prev, boundary(t, teacher_segments, num_train_timesteps))
        return cls(t, t_prev, t_b)

    @classmethod
    def phased(cls, phases: int, num_points: int, num_train_timesteps: int = 1000) -> SegmentGrid:
        """The phases of PCM: phase m begins with grid point floor(m N / k), and ends at the one below it (0)."""
        t = grid(num_points, num_train_timesteps)
        if not 1 <= phases <= len(t):
            raise ValueError(f"phases must lie between 1 and {len(t)}, got {phases}")
        t_prev = np.concatenate([[0], t[:-1]])
        first = np.arange(phases) * len(t) // phases
        return cls(t, t_prev, t_prev[first][np.searchsorted(first, np.arange(len(t)), side="right") - 1])

    def sample(
        self, rng: np.random.Generator, batch: int, policy: EndPolicy = "uniform", mix: float = 0.25
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, t_prev, t_end), each int64 (batch,). t is uniform over the grid; t_end in [t_b, t_prev] is uniform, or
        t_b (`boundary`, the phased objective), or t_b with probability `mix` and uniform otherwise (`mixed`)."""
        n = rng.integers(0, len(self.t), batch)
        t, t_prev, t_b = self.t[n], self.t_prev[n], self.t_b[n]
        if policy == "boundary":
            return t, t_prev, t_b
        t_end = rng.integers(t_b, t_prev + 1)
        if policy == "mixed":
            t_end = np.where(rng.random(batch) < mix, t_b, t_end)
        return t, t_prev, t_end

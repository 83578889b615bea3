"""Timestep grids, int64 and descending: Lin et al. 2024, table 2, the LCM grid of Luo et al. 2023; and sigmas of flow
models."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hypersd.errors import HypersdError
from hypersd.models.noise_process import NoiseProcess, shifted

Steps = NDArray[np.int64]


def trailing(num_steps: int, T: int = 1000) -> Steps:
    """round(T - i T / N) - 1 for i < N: the grid of DDIM-sampled few-step models; starts at T - 1."""
    _check(num_steps, T)
    # as a float range, like diffusers, so that halves round the same way; its spare last entry at some N is cut
    return np.round(np.arange(T, 0, -T / num_steps)[:num_steps]).astype(np.int64) - 1


def leading(num_steps: int, T: int = 1000, steps_offset: int = 0) -> Steps:
    """i (T // N) + offset, from the largest down."""
    _check(num_steps, T)
    return np.arange(num_steps, dtype=np.int64)[::-1] * (T // num_steps) + steps_offset


def linspace(num_steps: int, T: int = 1000) -> Steps:
    """N points spread evenly over [0, T - 1], both ends included."""
    _check(num_steps, T)
    return np.linspace(0, T - 1, num_steps).round()[::-1].astype(np.int64)


def lcm_grid(num_steps: int, T: int = 1000, original_steps: int = 50, *, strength: float = 1.0) -> Steps:
    """N points of the distillation grid {k - 1, 2k - 1, ...}, k = T // original_steps, evenly spaced by index.

    `strength` < 1 keeps only the cleaner part of the grid (image to image).
    """
    _check(num_steps, T)
    if not 1 <= original_steps <= T:
        raise HypersdError(f"original_inference_steps must be in 1..{T}, got {original_steps}")
    return subsample(
        np.arange(1, int(original_steps * strength) + 1, dtype=np.int64) * (T // original_steps) - 1, num_steps
    )


def perflow_grid(num_steps: int, windows: int, T: int = 1000) -> Steps:
    """The steps shared out to PeRFlow's windows, the noisier ones first, and spread evenly in each from its top."""
    _check(num_steps, T)
    if num_steps < windows:
        raise HypersdError(f"{num_steps} steps do not reach all {windows} windows; take at least {windows}")
    edges = np.arange(windows, -1, -1, dtype=np.int64) * T // windows - 1
    shares = [num_steps // windows + (i < num_steps % windows) for i in range(windows)]
    parts = [
        np.linspace(top, bottom, n, endpoint=False)
        for top, bottom, n in zip(edges[:-1], edges[1:], shares, strict=True)
    ]
    return np.floor(np.concatenate(parts)).astype(np.int64)


def flow_sigmas(process: NoiseProcess, num_steps: int) -> NDArray[np.float64]:
    """The noise levels (N,), float64, of diffusers' own pipelines for this flow model.

    With a dynamic shift (FLUX) they are those of `trailing`. With a static one (SD3) the levels between the largest and
    the smallest, which are shifted already, are shifted once more: at N = 4 and shift 3 that is 1, 0.858, 0.602, 0.009,
    so that the last step hardly moves, where `trailing` has 1, 0.9, 0.75, 0.5.
    """
    T = process.num_train_timesteps
    _check(num_steps, T)
    if process.is_dynamic:
        return shifted(np.linspace(1.0, 1.0 / num_steps, num_steps), process.shift)
    return shifted(np.linspace(process.sigma[-1], process.sigma[0], num_steps), process.shift)


def subsample(grid: Steps, num_steps: int) -> Steps:
    """`num_steps` points of an ascending grid, evenly spaced by index from the top, in descending order."""
    if num_steps > len(grid):
        raise HypersdError(f"{num_steps} steps do not fit a grid of {len(grid)}; take fewer steps or more strength")
    index = np.floor(np.linspace(0, len(grid), num_steps, endpoint=False)).astype(np.int64)
    return grid[::-1][index]


def _check(num_steps: int, T: int) -> None:
    if not 1 <= num_steps <= T:
        raise HypersdError(f"the number of steps must be in 1..{T}, got {num_steps}")

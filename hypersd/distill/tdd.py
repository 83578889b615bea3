"""Target-driven distillation (Wang et al. 2024, arXiv 2409.01347): ends only where sampling will stop.

The targets are 0 and the timesteps of every grid that sampling may take (4 to 8 steps by default). From t' the end is
one of those at or below it, not further than `reach` below the nearest, and then moved down by a random share of at
most `target_noise`, as stochastic sampling does. Guidance is decoupled: fixed in the solver, and with a share of empty
captions (data.caption_dropout = 0.2) a moderate scale can be chosen when sampling.
"""

from __future__ import annotations

import numpy as np

from hypersd.distill.competitor_stages import TDDStage
from hypersd.distill.method import Context
from hypersd.distill.parts import Consistency, sampling_metadata
from hypersd.distill.segments import SegmentGrid, sampling_grids
from hypersd.models.noise_process import NoiseProcess


class TDD(Consistency):
    """The loss of one TDD stage."""

    stage: TDDStage

    def __init__(self, stage: TDDStage, context: Context) -> None:
        super().__init__(stage, context)
        trained = self.process.num_train_timesteps
        self.grid = SegmentGrid.build(1, stage.grid, trained)
        self.targets = targets(stage, trained)

    def points(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t, t_prev, _ = self.grid.sample(rng, size, "boundary")
        nearest = np.searchsorted(self.targets, t_prev, side="right") - 1
        lowest = np.searchsorted(self.targets, self.targets[nearest] - self.stage.reach, side="left")
        target = self.targets[rng.integers(lowest, nearest + 1)]
        t_end = np.floor((1.0 - self.stage.target_noise * rng.random(size)) * target).astype(np.int64)
        return t, t_prev, t_end

    @staticmethod
    def metadata(stage: TDDStage, process: NoiseProcess) -> dict[str, str]:
        """The tcd solver on the grids that were trained."""
        grids = trained_grids(stage, process.num_train_timesteps)
        return sampling_metadata("tdd", process, "tcd", grids, eta=stage.eta, guidance=stage.sampling_guidance)


def targets(stage: TDDStage, num_train_timesteps: int = 1000) -> np.ndarray:
    """0 and the timesteps of all sampling grids but the first, ascending, int64."""
    grids = trained_grids(stage, num_train_timesteps).values()
    return np.unique(np.concatenate([[0], *(grid[1:] for grid in grids)]))


def trained_grids(stage: TDDStage, num_train_timesteps: int = 1000) -> dict[int, np.ndarray]:
    """The sampling grids by their number of steps."""
    low, high = stage.sampling_steps
    return sampling_grids(range(low, high + 1), stage.grid, num_train_timesteps)

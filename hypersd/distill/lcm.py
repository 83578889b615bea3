"""Latent consistency distillation, LCM-LoRA (Luo et al. 2023, arXiv 2310.04378 and 2311.05556).

Every map goes to clean data, held to the identity at t = 0 by the boundary scalings of consistency models:

    f(x_t, m, t) = c_skip(t) x_t + c_out(t) x_0(x_t, m),   d = f(x_t, student, t) - f(x_t', target, t')

The guidance scale is drawn anew for each sample; a LoRA is not told it (the full model is, by an embedding).
"""

from __future__ import annotations

import numpy as np

from hypersd.distill.competitor_stages import LCMStage
from hypersd.distill.method import Context
from hypersd.distill.parts import Consistency, sampling_metadata
from hypersd.distill.segments import SegmentGrid, sampling_grids
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.solvers import lcm_denoised


class LCM(Consistency):
    """The loss of one LCM stage."""

    def __init__(self, stage: LCMStage, context: Context) -> None:
        super().__init__(stage, context)
        self.grid = SegmentGrid.build(1, stage.grid, self.process.num_train_timesteps)

    def points(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.grid.sample(rng, size, "boundary")

    def loss_coef(self, t: np.ndarray, t_prev: np.ndarray, t_end: np.ndarray) -> np.ndarray:
        return np.concatenate([lcm_denoised(self.process, t), lcm_denoised(self.process, t_prev)], axis=-1)

    @staticmethod
    def metadata(stage: LCMStage, process: NoiseProcess) -> dict[str, str]:
        """1 to 8 steps of the lcm solver on the training grid, those that fit."""
        grids = sampling_grids((1, 2, 4, 8), stage.grid, process.num_train_timesteps)
        return sampling_metadata("lcm", process, "lcm", grids)

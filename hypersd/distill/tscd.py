"""Trajectory segmented consistency distillation (Hyper-SD, arXiv 2404.13686, section 3.1, algorithm 1).

A start t and an end t_end are drawn within one segment. The teacher takes one solver step from x_t to x_t'; the
student's jump x_t -> t_end must agree with the target network's jump x_t' -> t_end:

    d = Psi(x_t, student, t_end) - Psi(x_t', target, t_end),   Psi(x_t, m, s) = p0 x_t + p1 m   (NoiseProcess.jump)
"""

from __future__ import annotations

import numpy as np

from hypersd.distill.adversarial import AdversarialConsistency
from hypersd.distill.method import BASE, PREVIOUS, Context
from hypersd.distill.parts import sampling_metadata
from hypersd.distill.segments import SegmentGrid
from hypersd.distill.stages import TCDStage, TSCDStage
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing


class TSCD(AdversarialConsistency):
    """The loss of one TSCD stage; with one segment it is TCD's (hypersd.distill.tcd)."""

    stage: TSCDStage | TCDStage

    def __init__(self, stage: TSCDStage | TCDStage, context: Context) -> None:
        super().__init__(stage, context)
        before = context.previous
        self.teacher_role = BASE if before is None else PREVIOUS
        self.grid = SegmentGrid.build(
            stage.segments,
            stage.grid,
            self.process.num_train_timesteps,
            teacher_segments=None if before is None else before.steps,
        )
        # guidance is baked into a previous stage's weights
        self.guided = self.guided and before is None

    def points(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.grid.sample(rng, size, self.stage.t_end, self.stage.t_end_mix)

    def loss_coef(self, t: np.ndarray, t_prev: np.ndarray, t_end: np.ndarray) -> np.ndarray:
        """For weighting = "inv_b2" divided by what the student's jump multiplies the network's output with."""
        coef = super().loss_coef(t, t_prev, t_end)
        if self.stage.weighting == "inv_b2":
            coef /= np.abs(coef[:, 1:2])
        return coef

    @staticmethod
    def metadata(stage: TSCDStage, process: NoiseProcess) -> dict[str, str]:
        """How to sample from the stage's weights: k segments are made for k trailing DDIM steps; the last stage's,
        which jump from anywhere to anywhere, for 1 to 8 TCD steps."""
        trained, guidance = process.num_train_timesteps, stage.sampling_guidance
        if stage.segments == 1:
            grids = {n: trailing(n, trained) for n in range(1, 9)}
            return sampling_metadata("tscd", process, "tcd", grids, eta=0.3, guidance=guidance)
        grids = {stage.segments: trailing(stage.segments, trained)}
        return sampling_metadata("tscd", process, "ddim", grids, eta=0.0, guidance=guidance)

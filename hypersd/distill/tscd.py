"""Trajectory segmented consistency distillation (Hyper-SD, arXiv 2404.13686, section 3.1, algorithm 1).

A start t and an end t_end are drawn within one segment. The teacher takes one solver step from x_t to x_t'; the
student's jump x_t -> t_end must agree with the target network's jump x_t' -> t_end:

    d = Psi(x_t, student, t_end) - Psi(x_t', target, t_end),   Psi(x_t, m, s) = p0 x_t + p1 m   (NoiseProcess.jump)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hypersd.distill.adversarial import Adversary, EncoderAdversary, Ends, FeatureAdversary, adaptive_weight
from hypersd.distill.data import Batch
from hypersd.distill.health import Monitor
from hypersd.distill.method import BASE, PREVIOUS, Auxiliary, Context, Draw
from hypersd.distill.parts import Consistency, Jumps, on_device, sampling_metadata
from hypersd.distill.segments import SegmentGrid
from hypersd.distill.stages import TCDStage, TSCDStage
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing


class TSCD(Consistency):
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
        self.adversary: Adversary | None = None
        self.measures: dict[str, Tensor] = {}
        self.monitors: list[Monitor] = []
        if isinstance(stage, TSCDStage) and stage.weights[1] > 0:
            rate = stage.critic_learning_rate
            if stage.critic == "encoder":
                self.adversary = EncoderAdversary(context, stage.name, rate, stage.unpaired)
            else:
                self.adversary = FeatureAdversary(context, stage.name, rate)
            self.measures, self.monitors = self.adversary.measures, [*self.adversary.monitors]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The distance, and where the stage has a critic its opinion, each by its weight."""
        jumps = self.jumps(batch, draw)
        loss = self.distance(jumps)
        if self.adversary is None or not isinstance(self.stage, TSCDStage):
            return loss
        if draw.progress < self.stage.critic_warmup:
            return self.stage.weights[0] * loss
        opinion = self.adversary.generator_loss(self._ends(jumps), batch.cond, draw)
        weight, adversarial = self.stage.weights
        if self.stage.adaptive:
            self.measures["adaptive_weight"] = factor = adaptive_weight(loss, opinion, jumps.m)
            opinion = factor * opinion
        return weight * loss + adversarial * opinion

    def auxiliaries(self) -> Sequence[Auxiliary]:
        return () if self.adversary is None else [self.adversary.auxiliary(self._critic_loss)]

    def _critic_loss(self, batch: Batch, draw: Draw) -> Tensor:
        assert self.adversary is not None
        with torch.no_grad():
            jumps = self.jumps(batch, draw)
            ends = self._ends(jumps, with_real=True)
        return self.adversary.critic_loss(ends, batch.cond, draw)

    def _ends(self, jumps: Jumps, with_real: bool = False) -> Ends:
        """Where the two jumps land, whatever the distance is measured in."""
        fake, real = self.process.jump(jumps.t, jumps.t_end), self.process.jump(jumps.t_prev, jumps.t_end)
        return Ends(
            jumps.x_t,
            jumps.t,
            jumps.t_end,
            affine_step(jumps.x_t, jumps.m, on_device(fake, jumps.x_t)),
            affine_step(jumps.x_prev, jumps.m_target, on_device(real, jumps.x_t)) if with_real else None,
        )

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

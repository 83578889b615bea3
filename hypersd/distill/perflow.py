"""Piecewise rectified flow (Yan et al. 2024, arXiv 2405.07510): reflow within each of K windows of the trajectory.

From real data diffused to the top s of a window the teacher solves its ODE to the bottom e. Between the two ends lies a
straight line; at a random point of it the student must name the line's direction, as the noise (VP) or velocity (flow)
of the one jump that joins the ends:

    x_e = A x_s + B d,   A = alpha_e / alpha_s,   B = sigma_e - A sigma_s      (flow: A = 1, B = sigma_e - sigma_s)
    x_t = x_s + r (x_e - x_s),   r = (s - t) / (s - e),        loss = |d(x_t, m) - (x_e - A x_s) / B|^2
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hypersd.distill.competitor_stages import PeRFlowStage
from hypersd.distill.data import Batch
from hypersd.distill.method import BASE, STUDENT, Context, Draw
from hypersd.distill.parts import network_time, on_device, sampling_metadata, teacher_step
from hypersd.kernels import affine_step, consistency_loss
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.solvers import chord, direction, perflow_windows
from hypersd.sampling.timesteps import perflow_grid


class PeRFlow:
    """The loss of one PeRFlow stage."""

    def __init__(self, stage: PeRFlowStage, context: Context) -> None:
        self.stage, self.context, self.process = stage, context, context.process
        self.guided = stage.guidance_scale != (1.0, 1.0) and not context.embeds_guidance

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch. latents (B, C, ...), one t and guidance scale per sample."""
        x_0, cond, process = batch.latents, batch.cond, self.process
        t = draw.host.integers(0, process.num_train_timesteps, len(x_0))
        guidance = draw.host.uniform(*self.stage.guidance_scale, len(x_0))
        s, e = perflow_windows(t, self.stage.windows, process.num_train_timesteps)
        x_s = affine_step(x_0, draw.normal(x_0.shape, x_0), on_device(process.diffuse(s), x_0))
        with torch.no_grad():
            x_e = self._solve(x_s, s, e, cond, guidance)
        r = (s - t) / (s - e)
        x_t = affine_step(x_s, x_e, on_device(np.stack([1.0 - r, r], axis=-1), x_0))
        m = self.context.backbone(x_t, network_time(process, t, x_0), cond, role=STUDENT)
        return consistency_loss(m, x_t, x_s, x_e, on_device(self.loss_coef(t, s, e), x_0), kind="mse")

    def loss_coef(self, t: np.ndarray, s: np.ndarray, e: np.ndarray) -> np.ndarray:
        """(B, 4) of x_t, m, x_e, x_s: d(x_t, m) and (x_e - A x_s) / B."""
        scale, length = chord(self.process, s, e)
        return np.concatenate([direction(self.process, t), np.stack([1.0 / length, -scale / length], axis=-1)], axis=-1)

    @staticmethod
    def metadata(stage: PeRFlowStage, process: NoiseProcess) -> dict[str, str]:
        """The perflow solver; one step a window, or two or four."""
        trained = process.num_train_timesteps
        chord(process, *perflow_windows(trained - 1, stage.windows, trained))  # raises at once where it must
        grids = {n * stage.windows: perflow_grid(n * stage.windows, stage.windows, trained) for n in (1, 2, 4)}
        found = sampling_metadata("perflow", process, "perflow", grids, guidance=stage.sampling_guidance)
        return found | {"windows": str(stage.windows)}

    def _solve(self, x: Tensor, s: np.ndarray, e: np.ndarray, cond: dict[str, Tensor], guidance: np.ndarray) -> Tensor:
        """The teacher's DDIM steps from s to e, evenly spaced."""
        steps = self.stage.solver_steps
        times = [np.round(s + (e - s) * i / steps).astype(np.int64) for i in range(steps)] + [e]
        for t, to in zip(times[:-1], times[1:], strict=True):
            x = teacher_step(self.context, BASE, x, t, to, cond, guidance if self.guided else None)
        return x

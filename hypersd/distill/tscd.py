"""Trajectory segmented consistency distillation (Hyper-SD, arXiv 2404.13686, section 3.1, algorithm 1).

A start t and an end t_end are drawn within one segment. The teacher takes one solver step from x_t to x_t'; the
student's jump x_t -> t_end must agree with the target network's jump x_t' -> t_end:

    d = Psi(x_t, student, t_end) - Psi(x_t', target, t_end),   Psi(x_t, m, s) = p0 x_t + p1 m   (NoiseProcess.jump)

Everything that happens to a latent here is one affine_step or the consistency_loss; this file computes coefficients.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from hypersd.distill.data import Batch
from hypersd.distill.method import BASE, EMA, PREVIOUS, STUDENT, Context, Draw
from hypersd.distill.segments import SegmentGrid
from hypersd.distill.stages import TSCDStage
from hypersd.kernels import affine_step, consistency_loss
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing


class TSCD:
    """The loss of one TSCD stage."""

    def __init__(self, stage: TSCDStage, context: Context) -> None:
        self.stage, self.context = stage, context
        self.process = context.process
        before = context.previous
        self.teacher_role = BASE if before is None else PREVIOUS
        self.grid = SegmentGrid.build(
            stage.segments,
            stage.grid,
            self.process.num_train_timesteps,
            teacher_segments=None if before is None else before.steps,
        )
        # guidance is baked into a previous stage's weights
        self.guided = before is None and stage.guidance_scale != (1.0, 1.0)
        self.target_role = EMA if stage.target == "ema" else STUDENT

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch. latents (B, C, ...), one t, t_end and guidance scale per sample."""
        stage, x_0, cond = self.stage, batch.latents, batch.cond
        size = len(x_0)
        t, t_prev, t_end = self.grid.sample(draw.host, size, stage.t_end, stage.t_end_mix)
        guidance = draw.host.uniform(*stage.guidance_scale, size)
        pure = (t == self.process.num_train_timesteps - 1) & (draw.host.random(size) < stage.pure_noise)
        noise = perturbed_noise(x_0, stage.offset_noise, draw)
        x_t = affine_step(x_0, noise, _coef(self.diffuse_coef(t, pure), x_0))
        time = self._time(t, x_0)
        with torch.no_grad():
            x_prev = self._teacher_step(x_t, time, cond, self.teacher_coef(t, t_prev, guidance))
            m_target = self._target(x_prev, t_prev, t_end, cond)
        m = self.context.backbone(x_t, time, cond, role=STUDENT)
        coef = _coef(self.loss_coef(t, t_prev, t_end), x_0)
        return consistency_loss(m, x_t, m_target, x_prev, coef, kind=stage.loss, c=stage.c)

    @staticmethod
    def metadata(stage: TSCDStage, process: NoiseProcess) -> dict[str, str]:
        """How to sample from the stage's weights: k segments are made for k trailing DDIM steps; the last stage's,
        which jump from anywhere to anywhere, for 1 to 8 TCD steps."""
        common = {"method": "tscd", "prediction_type": process.prediction_type, "guidance_scale": "1"}
        trained = process.num_train_timesteps
        if stage.segments == 1:
            grids = {n: trailing(n, trained).tolist() for n in (1, 2, 4, 8)}
            return common | {"solver": "tcd", "steps": "1,2,4,8", "timesteps": json.dumps(grids), "eta": "0.3"}
        grid = json.dumps(trailing(stage.segments, trained).tolist())
        return common | {"solver": "ddim", "steps": str(stage.segments), "timesteps": grid, "eta": "0"}

    def diffuse_coef(self, t: np.ndarray, pure: np.ndarray) -> np.ndarray:
        """(B, 2): x_t = c0 x_0 + c1 noise; (0, 1) where the start is pure noise."""
        return np.where(pure[:, None], np.array([0.0, 1.0]), self.process.diffuse(t))

    def teacher_coef(self, t: np.ndarray, t_prev: np.ndarray, guidance: np.ndarray) -> np.ndarray:
        """(B, 3) of x_t, m_cond, m_uncond: the jump t -> t_prev with m = u + g (c - u)."""
        jump = self.process.jump(t, t_prev)
        if not self.guided:
            guidance = np.ones_like(guidance)
        return np.stack([jump[:, 0], jump[:, 1] * guidance, jump[:, 1] * (1.0 - guidance)], axis=-1)

    def loss_coef(self, t: np.ndarray, t_prev: np.ndarray, t_end: np.ndarray) -> np.ndarray:
        """(B, 4) of x_t, m, x_prev, m_target; divided by |B| of the student's jump for weighting = "inv_b2"."""
        coef = np.concatenate([self.process.jump(t, t_end), self.process.jump(t_prev, t_end)], axis=-1)
        if self.stage.weighting == "inv_b2":
            coef /= np.abs(slope(self.process, t, t_end))[:, None]
        return coef

    def _teacher_step(self, x_t: Tensor, time: Tensor, cond: dict[str, Tensor], coef: np.ndarray) -> Tensor:
        backbone, role = self.context.backbone, self.teacher_role
        if not self.guided:
            return affine_step(x_t, backbone(x_t, time, cond, role=role), _coef(coef[:, :2], x_t))
        both = {k: torch.cat([v, self.context.uncond.get(k, v).expand_as(v)]) for k, v in cond.items()}
        m_cond, m_uncond = backbone(torch.cat([x_t, x_t]), torch.cat([time, time]), both, role=role).chunk(2)
        return affine_step(x_t, m_cond, _coef(coef, x_t), eps_uncond=m_uncond)

    def _target(self, x_prev: Tensor, t_prev: np.ndarray, t_end: np.ndarray, cond: dict[str, Tensor]) -> Tensor:
        """The target network's output where its jump goes anywhere; where t_end = t_prev, its coefficient is 0 and no
        network is asked."""
        rows = np.flatnonzero(t_end < t_prev)
        backbone, role = self.context.backbone, self.target_role
        if len(rows) == len(t_prev):
            return backbone(x_prev, self._time(t_prev, x_prev), cond, role=role)
        m_target = torch.zeros_like(x_prev)
        if len(rows):
            index = torch.from_numpy(rows).to(x_prev.device, non_blocking=True)
            some = {k: v[index] for k, v in cond.items()}
            m = backbone(x_prev[index], self._time(t_prev[rows], x_prev), some, role=role)
            m_target[index] = m.to(m_target.dtype)
        return m_target

    def _time(self, t: np.ndarray, like: Tensor) -> Tensor:
        time = self.process.network_timestep(t)
        return torch.from_numpy(time).to(like.device, like.dtype if time.dtype.kind == "f" else None, non_blocking=True)


def slope(process: NoiseProcess, t: np.ndarray, s: np.ndarray) -> np.ndarray:
    """B of the jump t -> s, (B,): what an error of the network's noise estimate (VP) or velocity (flow) is multiplied
    by. VP: sigma_s - sigma_t alpha_s / alpha_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t), process.at(s)
    if process.kind == "flow":
        return sigma_s - sigma_t
    return sigma_s - sigma_t * alpha_s / alpha_t


def perturbed_noise(like: Tensor, strength: float, draw: Draw) -> Tensor:
    """N(0, I) in the shape of `like`, plus `strength` times one normal number per (sample, channel): offset noise."""
    noise = draw.normal(like.shape, like)
    if strength > 0:
        noise += strength * draw.normal((*like.shape[:2], *[1] * (like.dim() - 2)), like)
    return noise


def _coef(values: np.ndarray, like: Tensor) -> Tensor:
    """A coefficient tensor for the kernels: (B, 5) for the sums (missing terms 0), (B, 4) as it is."""
    if values.shape[1] < 4:
        values = np.pad(values, ((0, 0), (0, 5 - values.shape[1])))
    return torch.from_numpy(values).to(like.device, non_blocking=True)

"""What the methods are made of: noisy starts, one guided step of the teacher, network outputs where they count, and the
loss that all consistency methods have in common.

A method computes coefficients in float64 on the host; what happens to a latent is one affine_step or consistency_loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hypersd.distill.data import Batch
from hypersd.distill.method import BASE, EMA, STUDENT, Context, Draw
from hypersd.distill.stage import BaseStage, ConsistencyStage
from hypersd.kernels import affine_step, consistency_loss
from hypersd.models.networks import DEFAULT_GUIDANCE
from hypersd.models.noise_process import NoiseProcess

Cond = dict[str, Tensor]


@dataclass(frozen=True)
class Jumps:
    """Two jumps to t_end: the student's from x_t, whose network said m, and the target's from x_prev. m_target is 0
    where the target's jump goes nowhere. The timesteps are int64 (B,)."""

    x_t: Tensor
    m: Tensor
    x_prev: Tensor
    m_target: Tensor
    t: np.ndarray
    t_prev: np.ndarray
    t_end: np.ndarray
    coef: np.ndarray  # loss_coef


class Consistency:
    """A consistency method: the student's map from x_t must agree with the target network's map from x_t', where the
    teacher's solver step takes x_t to x_t'.

    A subclass draws the timesteps (`points`) and says what the two maps are (`loss_coef`), jumps unless told.
    """

    teacher_role = BASE

    def __init__(self, stage: ConsistencyStage, context: Context) -> None:
        self.stage, self.context, self.process = stage, context, context.process
        self.guided = stage.guidance_scale != (1.0, 1.0) and not context.embeds_guidance
        self.target_role = EMA if stage.target == "ema" else STUDENT

    def points(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(t, t_prev, t_end), each int64 (size,): a start, where the teacher's step lands, where both maps end."""
        raise NotImplementedError

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch. latents (B, C, ...), one t, t_end and guidance scale per sample."""
        return self.distance(self.jumps(batch, draw))

    def distance(self, jumps: Jumps) -> Tensor:
        """consistency_loss of the two ends."""
        stage, coef = self.stage, on_device(jumps.coef, jumps.x_t)
        return consistency_loss(jumps.m, jumps.x_t, jumps.m_target, jumps.x_prev, coef, kind=stage.loss, c=stage.c)

    def jumps(self, batch: Batch, draw: Draw) -> Jumps:
        """Start, teacher's step and both networks' outputs; only `m` has a gradient."""
        x_t, (t, t_prev, t_end), guidance = self.starts(batch, draw)
        cond, coef = batch.cond, self.loss_coef(t, t_prev, t_end)
        with torch.no_grad():
            scale = guidance if self.guided else None
            x_prev = teacher_step(self.context, self.teacher_role, x_t, t, t_prev, cond, scale)
            m_target = output_where(self.context, self.target_role, x_prev, t_prev, cond, coef[:, 3] != 0)
        return Jumps(x_t, self.student(x_t, t, cond), x_prev, m_target, t, t_prev, t_end, coef)

    def starts(self, batch: Batch, draw: Draw) -> tuple[Tensor, tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
        """x_t, `points`, and the guidance (B,) that the teacher's step is to have."""
        stage, x_0 = self.stage, batch.latents
        t, t_prev, t_end = self.points(draw.host, len(x_0))
        guidance = draw.host.uniform(*stage.guidance_scale, len(x_0))
        pure = (t == self.process.num_train_timesteps - 1) & (draw.host.random(len(x_0)) < stage.pure_noise)
        noise = perturbed_noise(x_0, stage.offset_noise, draw)
        return affine_step(x_0, noise, on_device(self.diffuse_coef(t, pure), x_0)), (t, t_prev, t_end), guidance

    def student(self, x_t: Tensor, t: np.ndarray, cond: Cond) -> Tensor:
        return self.context.backbone(x_t, network_time(self.process, t, x_t), cond, role=STUDENT)

    def diffuse_coef(self, t: np.ndarray, pure: np.ndarray) -> np.ndarray:
        """(B, 2): x_t = c0 x_0 + c1 noise; (0, 1) where the start is pure noise."""
        return np.where(pure[:, None], np.array([0.0, 1.0]), self.process.diffuse(t))

    def loss_coef(self, t: np.ndarray, t_prev: np.ndarray, t_end: np.ndarray) -> np.ndarray:
        """(B, 4) of x_t, m, x_prev, m_target. Where the last is 0 the target is x_prev itself: no network is asked."""
        return np.concatenate([self.process.jump(t, t_end), self.process.jump(t_prev, t_end)], axis=-1)


def guided_coef(jump: np.ndarray, guidance: np.ndarray) -> np.ndarray:
    """(B, 3) of x_t, m_cond, m_uncond from (B, 2) of x_t and m = u + g (c - u); guidance (B,)."""
    return np.stack([jump[:, 0], jump[:, 1] * guidance, jump[:, 1] * (1.0 - guidance)], axis=-1)


def teacher_step(
    context: Context, role: str, x_t: Tensor, t: np.ndarray, to: np.ndarray, cond: Cond, guidance: np.ndarray | None
) -> Tensor:
    """One first-order solver step from t to `to`, with guidance m = u + g (c - u), g (B,): both branches run as one
    batch of 2 B. None: the network's output as it is, of one pass."""
    backbone, time, jump = context.backbone, network_time(context.process, t, x_t), context.process.jump(t, to)
    if guidance is None:
        return affine_step(x_t, backbone(x_t, time, cond, role=role), on_device(jump, x_t))
    both = {k: torch.cat([v, context.uncond.get(k, v).expand_as(v)]) for k, v in cond.items()}
    m_cond, m_uncond = backbone(torch.cat([x_t, x_t]), torch.cat([time, time]), both, role=role).chunk(2)
    return affine_step(x_t, m_cond, on_device(guided_coef(jump, guidance), x_t), eps_uncond=m_uncond)


def output_where(context: Context, role: str, x: Tensor, t: np.ndarray, cond: Cond, needed: np.ndarray) -> Tensor:
    """The network's output in the rows where it is needed, zeros elsewhere; the network sees the former only."""
    rows = np.flatnonzero(needed)
    if len(rows) == len(t):
        return context.backbone(x, network_time(context.process, t, x), cond, role=role)
    output = torch.zeros_like(x)
    if len(rows):
        index = torch.from_numpy(rows).to(x.device, non_blocking=True)
        some = {k: v[index] for k, v in cond.items()}
        m = context.backbone(x[index], network_time(context.process, t[rows], x), some, role=role)
        output[index] = m.to(output.dtype)
    return output


def perturbed_noise(like: Tensor, strength: float, draw: Draw) -> Tensor:
    """N(0, I) in the shape of `like`, plus `strength` times one normal number per (sample, channel): offset noise."""
    noise = draw.normal(like.shape, like)
    if strength > 0:
        noise += strength * draw.normal((*like.shape[:2], *[1] * (like.dim() - 2)), like)
    return noise


def network_time(process: NoiseProcess, t: np.ndarray, like: Tensor) -> Tensor:
    """What the network is fed for the indices t, on the device of `like`."""
    time = process.network_timestep(t)
    return torch.from_numpy(time).to(like.device, like.dtype if time.dtype.kind == "f" else None, non_blocking=True)


def on_device(values: np.ndarray, like: Tensor) -> Tensor:
    """A coefficient tensor for the kernels: (B, 5) for the sums (missing terms 0), (B, 4) as it is."""
    if values.shape[1] < 4:
        values = np.pad(values, ((0, 0), (0, 5 - values.shape[1])))
    return torch.from_numpy(values).to(like.device, non_blocking=True)


def sampling_metadata(
    method: str,
    process: NoiseProcess,
    solver: str,
    grids: Mapping[int, ArrayLike],
    *,
    eta: float | None = None,
    guidance: float = 1.0,
) -> dict[str, str]:
    """The metadata of a LoRA file (see hypersd.models.export); `grids`: number of steps -> timesteps, descending."""
    found = {
        "method": method,
        "prediction_type": process.prediction_type,
        "solver": solver,
        "steps": ",".join(map(str, grids)),
        "timesteps": json.dumps({str(n): np.asarray(grid).tolist() for n, grid in grids.items()}),
        "guidance_scale": f"{guidance:g}",
    }
    if process.kind == "flow":  # before the shift, as diffusers' pipelines take them
        trained = process.num_train_timesteps
        found["sigmas"] = json.dumps({str(n): ((np.asarray(t) + 1) / trained).tolist() for n, t in grids.items()})
    return found if eta is None else found | {"eta": f"{eta:g}"}


def embedded_guidance(stages: Sequence[BaseStage], init: Mapping[str, str]) -> tuple[float, float]:
    """The range of what a network that is told its guidance is told in the last of `stages`: the stage's own or, where
    it has none (feedback), that of the newest before it; else as the LoRA file with the metadata `init` says, or the
    usual."""
    for stage in reversed(stages):
        if hasattr(stage, "guidance_scale"):
            return stage.guidance_scale
    usual = float(init.get("embedded_guidance", DEFAULT_GUIDANCE))
    return usual, usual


def guidances(told: tuple[float, float], key: tuple[int, ...], size: int) -> np.ndarray:
    """What a network that is told its guidance is told in one batch, float32 (size,): drawn from the range `told`."""
    return np.random.default_rng(key).uniform(*told, size).astype(np.float32)


def model_metadata(
    told: tuple[float, float], components: Any, backbone: Any, latent_size: tuple[int, int]
) -> dict[str, str]:
    """What the metadata of a LoRA file says about the model it was trained on: `resolution`, pixels along a side of the
    training pictures where they are square, and `embedded_guidance`, the middle of the range `told`, where the
    network is told its guidance."""
    found = {}
    factor = getattr(components, "vae_scale_factor", None)
    if factor is not None and latent_size[0] == latent_size[1]:
        found["resolution"] = str(factor * latent_size[0])
    if getattr(backbone, "embeds_guidance", False):
        found["embedded_guidance"] = f"{sum(told) / 2:g}"
    return found

"""Score distillation: distribution matching (DMD2, arXiv 2405.14867; Hyper-SD, arXiv 2404.13686, section 3.3).

The student makes x of noise z in one step. At a random noise level a real and a fake score predict the clean sample
from x_t = alpha_t x + sigma_t n; the fake score is trained on the student's own samples meanwhile. x moves along

    g = (x_fake - x_real) / mean |x - x_real|       (score_gradient),   L = 1/2 mean (x - stopgrad(x - g))^2

Hyper-SD starts from the TSCD student and takes it as the real score too; what keeps its 2 to 8 steps working is the
consistency loss of hypersd.distill.tscd on a share of each batch, and the anchor, what its first weights make of z.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm, Health
from hypersd.distill.method import BASE, STUDENT, Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, guided_coef, network_time, on_device, sampling_metadata
from hypersd.distill.stages import DMDStage, TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.kernels import affine_step, score_gradient
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing

FAKE, START = "fake", "start"
COLLAPSED = Alarm(
    "diversity",
    "the student's samples of a batch differ less than half as much as the data",
    'raise the stage\'s anchor or consistency, or take real_score = "base" with less guidance',
    low=0.5,
    patience=20,
)


class DMD:
    """The losses of student and fake score. `measures`: diversity, the spread of the student's samples over the
    data's."""

    def __init__(self, stage: DMDStage, context: Context) -> None:
        self.stage, self.context, self.process = stage, context, context.process
        self.measures: dict[str, Tensor] = {}
        self.monitors = [Health([COLLAPSED], stage.name)]
        last = self.process.num_train_timesteps - 1
        self.start = last if stage.timestep is None else min(stage.timestep, last)
        low, high = stage.t_range
        self.levels = max(0, int(low * last)), min(last, int(high * last))
        joint = {"segments": 1, "grid": stage.grid, "guidance_scale": stage.guidance_scale, "t_end_mix": 0.5}
        joint |= {"method": "tscd", "iterations": 1, "offset_noise": 0.0, "pure_noise": 0.5}
        self.tscd = TSCD(TSCDStage.model_validate(joint), Context(context.backbone, context.process, context.uncond))

    @staticmethod
    def metadata(stage: DMDStage, process: NoiseProcess) -> dict[str, str]:
        """One step from where it was trained; and where the consistency loss kept them, 2 to 8 TCD steps."""
        trained = process.num_train_timesteps
        grids = {1: np.array([trained - 1 if stage.timestep is None else min(stage.timestep, trained - 1)])}
        if stage.consistency > 0:
            grids |= {n: trailing(n, trained) for n in (2, 4, 8)}
        return sampling_metadata(stage.method, process, "tcd", grids, eta=0.3)

    def auxiliaries(self) -> Sequence[Auxiliary]:
        fake = self.context.backbone.role_parameters(FAKE)
        return [Auxiliary(FAKE, fake, self.fake_loss, self.stage.fake_learning_rate, self.stage.fake_updates)]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar: distribution matching and anchor on the first rows of the batch, consistency on the others."""
        stage = self.stage
        joint = round(stage.consistency * len(batch.latents))
        matched, rest = _split(batch, len(batch.latents) - joint)
        loss = batch.latents.new_zeros(())
        if len(matched.latents):
            loss = loss + self._matching_loss(matched, draw)
        if joint:
            loss = loss + stage.consistency_weight * self.tscd.loss(rest, draw)
        return loss

    def _matching_loss(self, batch: Batch, draw: Draw) -> Tensor:
        stage, cond, size = self.stage, batch.cond, len(batch.latents)
        z = draw.normal(batch.latents.shape, batch.latents)
        x = self._one_step(z, cond)
        with torch.no_grad():
            t = draw.host.integers(self.levels[0], self.levels[1] + 1, size)
            guidance = draw.host.uniform(*stage.guidance_scale, size)
            x_t = self._diffuse(x, t, draw)
            role = START if stage.real_score == "tscd" else BASE
            guided = role == BASE and not self.context.embeds_guidance
            x_real = self._clean(x_t, t, cond, role, guidance if guided else None)
            x_fake = self._clean(x_t, t, cond, FAKE)
            goal = x - score_gradient(x, x_real, x_fake)
        if size > 1:
            self.measures["diversity"] = _spread(x.detach()) / _spread(batch.latents).clamp_min(1e-6)
        loss = 0.5 * F.mse_loss(x, goal)
        weight = stage.anchor[0] + draw.progress * (stage.anchor[1] - stage.anchor[0])
        if weight > 0:
            loss = loss + weight * F.mse_loss(x, self._anchor(z, cond))
        return loss

    def fake_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Denoising score matching on the student's samples, over all timesteps, in units of the network's output."""
        with torch.no_grad():
            x = self._one_step(draw.normal(batch.latents.shape, batch.latents), batch.cond)
            t = draw.host.integers(0, self.process.num_train_timesteps, len(x))
            noise = draw.normal(x.shape, x)
            x_t = affine_step(x, noise, on_device(self.process.diffuse(t), x))
            target = affine_step(x, noise, on_device(network_target(self.process, t), x))
        return F.mse_loss(self._network(x_t, t, batch.cond, FAKE), target)

    def _one_step(self, z: Tensor, cond: Cond) -> Tensor:
        return self._clean(z, np.full(len(z), self.start), cond, STUDENT)

    @torch.no_grad()
    def _anchor(self, z: Tensor, cond: Cond) -> Tensor:
        """What the weights of the stage's beginning make of z in a few deterministic steps."""
        timesteps = trailing(self.stage.anchor_steps, self.process.num_train_timesteps)
        x = z
        for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
            at, to = np.full(len(z), t), np.full(len(z), s)
            x = affine_step(x, self._network(x, at, cond, START), on_device(self.process.jump(at, to), x))
        return self._clean(x, np.full(len(z), timesteps[-1]), cond, START)

    def _clean(self, x_t: Tensor, t: np.ndarray, cond: Cond, role: str, guidance: np.ndarray | None = None) -> Tensor:
        """The prediction of x_0, with guidance m = u + g (c - u) where given, g (B,)."""
        coef = self.process.x0(t)
        if guidance is None:
            return affine_step(x_t, self._network(x_t, t, cond, role), on_device(coef, x_t))
        both = {k: torch.cat([v, self.context.uncond.get(k, v).expand_as(v)]) for k, v in cond.items()}
        m_cond, m_uncond = self._network(torch.cat([x_t, x_t]), np.concatenate([t, t]), both, role).chunk(2)
        return affine_step(x_t, m_cond, on_device(guided_coef(coef, guidance), x_t), eps_uncond=m_uncond)

    def _diffuse(self, x: Tensor, t: np.ndarray, draw: Draw) -> Tensor:
        return affine_step(x, draw.normal(x.shape, x), on_device(self.process.diffuse(t), x))

    def _network(self, x_t: Tensor, t: np.ndarray, cond: Cond, role: str) -> Tensor:
        return self.context.backbone(x_t, network_time(self.process, t, x_t), cond, role=role)


def network_target(process: NoiseProcess, t: np.ndarray) -> np.ndarray:
    """(B, 2): what the network ought to say of x_t = alpha_t x_0 + sigma_t n is c0 x_0 + c1 n. From x_0 = a x_t + b m:
    m = (1 - a alpha_t) / b x_0 - a sigma_t / b n."""
    alpha, sigma = process.at(t)
    a, b = process.x0(t).T
    return np.stack([(1.0 - a * alpha) / b, -a * sigma / b], axis=-1)


def _split(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first `count` rows, and the others."""
    parts = [
        Batch(batch.latents[rows], {k: v[rows] for k, v in batch.cond.items()})
        for rows in (slice(count), slice(count, None))
    ]
    return parts[0], parts[1]


def _spread(x: Tensor) -> Tensor:
    """Standard deviation within the batch, all elements together."""
    return (x - x.mean(0)).square().mean().sqrt()

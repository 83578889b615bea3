"""Score distillation of one-step samples as Hyper-SD has it (arXiv 2404.13686, section 3.3; hypersd.distill.matching).

Hyper-SD starts from the TSCD student and takes it as the real score too; what keeps its 2 to 8 steps working is the
consistency loss of hypersd.distill.tscd on a share of each batch, and the anchor, what its first weights (or the base
model, as in DMD) make of the same noise in a few steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm
from hypersd.distill.matching import DistributionMatching
from hypersd.distill.method import BASE, STUDENT, Context, Draw
from hypersd.distill.parts import Cond, on_device, sampling_metadata
from hypersd.distill.stages import DMDStage, TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing

START = "start"
COLLAPSED = Alarm(
    "diversity",
    "the student's samples of a batch differ less than half as much as the data",
    'raise the stage\'s anchor or consistency, or take real_score = "base" with less guidance',
    low=0.5,
    patience=20,
)


class DMD(DistributionMatching):
    """The losses of one DMD stage."""

    def __init__(self, stage: DMDStage, context: Context) -> None:
        super().__init__(stage, context, [COLLAPSED])
        self.stage = stage
        self.real_role = START if stage.real_score == "tscd" else BASE
        self.start = self.process.num_train_timesteps - 1 if stage.timestep is None else stage.timestep
        joint = {"segments": 1, "grid": stage.grid, "guidance_scale": stage.guidance_scale, "t_end_mix": 0.5}
        joint |= {"method": "tscd", "iterations": 1, "offset_noise": 0.0, "pure_noise": 0.5}
        self.tscd = TSCD(TSCDStage.model_validate(joint), Context(context.backbone, context.process, context.uncond))

    @staticmethod
    def metadata(stage: DMDStage, process: NoiseProcess) -> dict[str, str]:
        """One step from where it was trained, to the very x_0 (lcm); or TCD, which ends at timestep 0, where the
        consistency loss kept 2 to 8 steps as well."""
        trained = process.num_train_timesteps
        grids = {1: np.array([trained - 1 if stage.timestep is None else stage.timestep])}
        if stage.consistency == 0:
            return sampling_metadata(stage.method, process, "lcm", grids)
        grids |= {n: trailing(n, trained) for n in range(2, 9)}
        return sampling_metadata(stage.method, process, "tcd", grids, eta=0.3)

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar: distribution matching and anchor on the first rows of the batch, consistency on the others. Over the
        passes of an optimizer step each is the mean over its own samples, however many of them a pass has."""
        stage, size, (turn, turns) = self.stage, len(batch.latents), draw.turn
        before, joint, total = (stage.joint(size * passes) for passes in (turn, turn + 1, turns))
        joint -= before
        matched, rest = _split(batch, size - joint)
        loss = batch.latents.new_zeros(())
        if len(matched.latents):
            share = len(matched.latents) * turns / (size * turns - total)
            loss = loss + share * self._matching_loss(matched, draw)
        if joint:
            loss = loss + joint * turns / total * stage.consistency_weight * self.tscd.loss(rest, draw)
        return loss

    def generate(self, batch: Batch, draw: Draw) -> Tensor:
        return self._one_step(draw.normal(batch.latents.shape, batch.latents), batch.cond)

    def _matching_loss(self, batch: Batch, draw: Draw) -> Tensor:
        stage = self.stage
        z = draw.normal(batch.latents.shape, batch.latents)
        x = self._one_step(z, batch.cond)
        loss = self.matching_loss(x, batch, draw)
        weight = stage.anchor[0] + draw.progress * (stage.anchor[1] - stage.anchor[0])
        if weight > 0:
            loss = loss + weight * F.mse_loss(x, self._anchor(z, batch.cond, draw))
        return loss

    def _one_step(self, z: Tensor, cond: Cond) -> Tensor:
        return self.clean(z, np.full(len(z), self.start), cond, STUDENT)

    @torch.no_grad()
    def _anchor(self, z: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """What the weights of the stage's beginning, or the base model, make of z in a few deterministic steps."""
        if self.stage.anchor_to == "base":
            return self.teacher_end(z, cond, self.stage.anchor_steps, draw)
        timesteps = trailing(self.stage.anchor_steps, self.process.num_train_timesteps)
        x = z
        for t, s in zip(timesteps[:-1], timesteps[1:], strict=True):
            at, to = np.full(len(z), t), np.full(len(z), s)
            x = affine_step(x, self.network(x, at, cond, START), on_device(self.process.jump(at, to), x))
        return self.clean(x, np.full(len(z), timesteps[-1]), cond, START)


def _split(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first `count` rows, and the others."""
    parts = [
        Batch(batch.latents[rows], {k: v[rows] for k, v in batch.cond.items()})
        for rows in (slice(count), slice(count, None))
    ]
    return parts[0], parts[1]

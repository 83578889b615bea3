"""Reward-guided latent consistency distillation (Li et al. 2024, arXiv 2403.11027): LCM with a taste.

The clean sample that the student's single jump ends in is decoded, and what rewards say of the picture is added:

    L = L_LCM - sum_d w_d E[r_d(decode(f(x_t, student, t)), c)]

Nothing bounds the rewards here, so they can be driven too far: a reward with weight 0 only watches, and when it falls
while the others rise the run says so (hypersd.distill.watch). Decoding and rewards are no network evaluations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd.distill.competitor_stages import RGLCDStage
from hypersd.distill.data import Batch
from hypersd.distill.lcm import LCM
from hypersd.distill.method import Context, Draw
from hypersd.distill.parts import on_device
from hypersd.distill.watch import Watch
from hypersd.errors import HypersdError
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess


class RGLCD(LCM):
    """The loss of one RG-LCD stage. `measures`: every reward's mean in the newest batch, watched ones too."""

    stage: RGLCDStage

    def __init__(self, stage: RGLCDStage, context: Context) -> None:
        super().__init__(stage, context)
        if context.decode is None:
            raise HypersdError("an rg_lcd stage needs a model whose latents can be decoded to pictures")
        missing = [term.kind for term in stage.rewards if term.kind not in context.rewards]
        if missing:
            raise HypersdError(f"the stage wants {', '.join(missing)}, but no such reward was handed over")
        optimised, watched = (
            [term.kind for term in stage.rewards if (term.weight > 0) is wanted] for wanted in (True, False)
        )
        self.monitors = [Watch(optimised, watched, stage.check_every, stage.name)]
        self.measures: dict[str, Tensor] = {}

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch; the student's jump is the consistency loss's own."""
        jumps = self.jumps(batch, draw)
        loss = self.distance(jumps)
        assert self.context.decode is not None
        images = self.context.decode(affine_step(jumps.x_t, jumps.m, on_device(jumps.coef[:, :2], jumps.x_t)))
        for term in self.stage.rewards:
            with torch.set_grad_enabled(term.weight > 0):
                reward = self.context.rewards[term.kind](images, batch.captions)
            if term.weight > 0:
                loss = loss - term.weight * reward.float().mean()
            self.measures[term.kind] = reward.detach().float().mean()
        return loss

    @staticmethod
    def metadata(stage: RGLCDStage, process: NoiseProcess) -> dict[str, str]:  # type: ignore[override]
        """As an LCM is sampled."""
        return LCM.metadata(stage, process) | {"method": "rg_lcd"}

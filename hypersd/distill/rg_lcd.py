"""Reward-guided latent consistency distillation (Li et al. 2024, arXiv 2403.11027): LCM with a taste.

The clean sample that the student's single jump ends in is decoded, and what rewards say of the picture is added:

    L = L_LCM - sum_d w_d E[r_d(decode(f(x_t, student, t)), c)]

Nothing bounds the rewards here, so they can be driven too far: a reward with weight 0 only watches, and when it falls
while the others rise the run says so (hypersd.distill.watch). The paper's remedy, against the fine noise that such
pictures get, is a latent proxy (section 4.2): the student climbs p, a network's opinion of latents, which is trained
beside the student to prefer as the rewards r = sum_d w_d r_d do. Of each caption there are the student's end, the
target's and the data's, and of each pair of the three

    L_p = KL(s((r_i - r_j) / tau) || s(p_i - p_j)),   L = L_LCM - tau E[p(f(x_t, student, t), c)]

with the logistic function s: where L_p is 0, tau p is r up to a constant of the caption. The paper's p is pretrained
on pictures and captions; here it is heads on the features of the frozen network (hypersd.models.critic), which knows
both. Decoding and rewards are no network evaluations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.competitor_stages import RGLCDStage
from hypersd.distill.data import Batch
from hypersd.distill.lcm import LCM
from hypersd.distill.method import Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, Jumps, network_time, on_device
from hypersd.distill.watch import Watch
from hypersd.errors import HypersdError
from hypersd.kernels import affine_step
from hypersd.models.critic import Critic
from hypersd.models.noise_process import NoiseProcess


class RGLCD(LCM):
    """The loss of one RG-LCD stage. `measures`: every reward's mean in the newest batch, watched ones too."""

    stage: RGLCDStage

    def __init__(self, stage: RGLCDStage, context: Context) -> None:
        super().__init__(stage, context)
        if context.decode is None:
            raise HypersdError("an rg_lcd stage needs a model whose latents can be decoded to pictures")
        found = {term.kind: context.reward_of(term) for term in stage.rewards}
        self.rewards = {kind: reward for kind, reward in found.items() if reward is not None}
        missing = [kind for kind in found if kind not in self.rewards]
        if missing:
            raise HypersdError(f"the stage wants {', '.join(missing)}, but no such reward was handed over")
        optimised, watched = (
            [term.kind for term in stage.rewards if (term.weight > 0) is wanted] for wanted in (True, False)
        )
        if not watched:
            logging.getLogger("hypersd").warning(
                "stage %s: nobody watches the rewards, so that over-optimisation will not be told; add an independent "
                "reward with weight = 0",
                stage.name,
            )
        self.monitors = [Watch(optimised, watched, stage.check_every, stage.name)]
        self.measures: dict[str, Tensor] = {}
        self.proxy = Critic(context.backbone) if stage.proxy else None  # type: ignore[arg-type]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch; the student's jump is the consistency loss's own."""
        jumps = self.jumps(batch, draw)
        loss, end = self.distance(jumps), self._end(jumps)
        if self.proxy is not None:
            return loss - self.stage.proxy_temperature * self._opinion(end, batch.cond).mean()
        return loss - self._reward(end, batch.captions).mean()

    def auxiliaries(self) -> Sequence[Auxiliary]:
        if self.proxy is None:
            return ()
        parameters = dict(self.proxy.named_parameters())
        return [Auxiliary("proxy", parameters, self._proxy_loss, self.stage.proxy_learning_rate)]

    def _proxy_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar, the three pairs' mean: how far the proxy's preferences are from those of the rewards."""
        with torch.no_grad():
            jumps = self.jumps(batch, draw)
            target = affine_step(jumps.x_prev, jumps.m_target, on_device(jumps.coef[:, 2:], jumps.x_t))
            ends = [batch.latents, target, self._end(jumps)]  # the student's is the last that is measured
            rewards = [self._reward(end, batch.captions) / self.stage.proxy_temperature for end in ends]
        opinions = [self._opinion(end, batch.cond) for end in ends]
        losses = [
            preference_loss(rewards[i] - rewards[j], opinions[i] - opinions[j]) for i, j in combinations(range(3), 2)
        ]
        return torch.stack(losses).mean()

    def _end(self, jumps: Jumps) -> Tensor:
        """x_0 of the student's jump."""
        return affine_step(jumps.x_t, jumps.m, on_device(jumps.coef[:, :2], jumps.x_t))

    def _reward(self, x_0: Tensor, captions: Sequence[str]) -> Tensor:
        """sum_d w_d r_d of the decoded pictures, (B,); each reward's mean is measured."""
        assert self.context.decode is not None
        images = self.context.decode(x_0)
        total = images.new_zeros(len(images))
        for term in self.stage.rewards:
            with torch.set_grad_enabled(term.weight > 0 and torch.is_grad_enabled()):
                reward = self.rewards[term.kind](images, captions).float()
            if term.weight > 0:
                total = total + term.weight * reward
            self.measures[term.kind] = reward.detach().mean()
        return total

    def _opinion(self, x_0: Tensor, cond: Cond) -> Tensor:
        """p of clean latents, (B,): the mean over heads and places."""
        assert self.proxy is not None
        scores = self.proxy(x_0, network_time(self.process, np.zeros(len(x_0), np.int64), x_0), cond)
        return torch.stack([score.flatten(1).mean(1) for score in scores]).mean(0)

    @staticmethod
    def metadata(stage: RGLCDStage, process: NoiseProcess) -> dict[str, str]:  # type: ignore[override]
        """As an LCM is sampled."""
        return LCM.metadata(stage, process) | {"method": "rg_lcd"}


def preference_loss(wanted: Tensor, opinion: Tensor) -> Tensor:
    """KL(s(wanted) || s(opinion)) of the two-way preferences with these differences, the mean of (B,)."""
    p = torch.sigmoid(wanted)
    cross = F.binary_cross_entropy_with_logits(opinion, p)
    return cross - F.binary_cross_entropy_with_logits(wanted, p)

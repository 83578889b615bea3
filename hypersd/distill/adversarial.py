"""The adversarial part of TSCD: the student's jump must look like the target's to a critic (hypersd.models.critic).

Both ends lie at t_end. They are diffused again, with a noise each, to one t_a in [t_end, t], variance exact
(NoiseProcess.renoise), for a critic of nearly clean latents would win at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm, Health
from hypersd.distill.method import Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, Jumps, network_time, on_device
from hypersd.distill.stages import TSCDStage
from hypersd.kernels import affine_step
from hypersd.models.critic import Critic, accuracy, critic_loss, generator_loss

WINS = Alarm(
    "critic_accuracy",
    "the critic tells nearly every sample right, so that it has nothing left to teach",
    "lower the stage's critic_learning_rate or raise adversarial_weight",
    high=0.97,
    patience=100,
)


class Adversary:
    """Critic, its loss and the student's. `measures`: the critic's accuracy in its newest step."""

    def __init__(self, stage: TSCDStage, context: Context) -> None:
        self.stage, self.process = stage, context.process
        self.critic = Critic(context.backbone)  # type: ignore[arg-type]
        self.measures: dict[str, Tensor] = {}
        self.health = Health([WINS], stage.name)

    def auxiliary(self, loss: Callable[[Batch, Draw], Tensor]) -> Auxiliary:
        """What the trainer is to train; `loss` calls `critic_loss` with jumps of its own."""
        parameters = dict(self.critic.named_parameters())
        return Auxiliary("critic", parameters, loss, self.stage.critic_learning_rate, betas=(0.0, 0.999))

    def generator_loss(self, jumps: Jumps, cond: Cond, draw: Draw) -> Tensor:
        """-E[D(x_a)] of the student's end; the gradient goes through the frozen network into the student."""
        coef = self.process.jump(jumps.t, jumps.t_end)
        fake = affine_step(jumps.x_t, jumps.m, on_device(coef, jumps.x_t))
        t_a = self._level(jumps, draw)
        return generator_loss(self._scores(fake, jumps.t_end, t_a, cond, draw))

    def critic_loss(self, jumps: Jumps, cond: Cond, draw: Draw) -> Tensor:
        """Hinge; real is the target's end, fake the student's. Neither has a gradient."""
        with torch.no_grad():
            fake = affine_step(jumps.x_t, jumps.m, on_device(self.process.jump(jumps.t, jumps.t_end), jumps.x_t))
            coef = on_device(self.process.jump(jumps.t_prev, jumps.t_end), jumps.x_t)
            real = affine_step(jumps.x_prev, jumps.m_target, coef)
        t_a = self._level(jumps, draw)
        scores = [self._scores(x, jumps.t_end, t_a, cond, draw) for x in (real, fake)]
        self.measures["critic_accuracy"] = accuracy(*scores)
        return critic_loss(*scores)

    def after_step(self, step: int, measures: Mapping[str, float]) -> str | None:
        """A warning where the critic always wins, else None."""
        return self.health.add(step, measures)

    def _level(self, jumps: Jumps, draw: Draw) -> np.ndarray:
        return draw.host.integers(jumps.t_end, jumps.t + 1)

    def _scores(self, x: Tensor, t_end: np.ndarray, t_a: np.ndarray, cond: Cond, draw: Draw) -> list[Tensor]:
        x_a = affine_step(x, draw.normal(x.shape, x), on_device(self.process.renoise(t_end, t_a), x))
        return self.critic(x_a, network_time(self.process, t_a, x_a), cond)

"""The adversarial part of TSCD, PCM and SDXL-Lightning: the student's jump must end where the teacher's could, to a
critic.

FeatureAdversary (PCM's critic, hypersd.models.critic): both ends are diffused again, with a noise each, to one t_a in
[t_end, t] (PCM: anywhere above t_end in the phase), variance exact (NoiseProcess.renoise), for a critic of nearly clean
latents would win at once; hinge losses.
EncoderAdversary (SDXL-Lightning's, hypersd.models.encoder_critic): the critic is told where the jump started, D(x_t,
x_end), and towards the end of the stage no longer, D'(x_end), so that the student may leave the teacher's trajectory
where it cannot follow; log losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hypersd.distill.competitor_stages import PCMStage
from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm, Health, Monitor
from hypersd.distill.method import Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, Consistency, Jumps, network_time, on_device
from hypersd.distill.stages import TCDStage, TSCDStage
from hypersd.kernels import affine_step
from hypersd.models.critic import Critic, accuracy, critic_loss, generator_loss
from hypersd.models.encoder_critic import EncoderCritic, log_critic_loss, log_generator_loss

WINS = Alarm(
    "critic_accuracy",
    "the critic tells nearly every sample right, so that it has nothing left to teach",
    "lower the stage's critic_learning_rate or raise adversarial_weight",
    high=0.97,
    patience=100,
)


@dataclass(frozen=True)
class Ends:
    """Jumps from x_t at t to t_end: `fake` is where the student's ends, `real` the teacher's, None where nobody asks.
    The timesteps are int64 (B,); t_end may be -1, the final point. `top`: the noisiest level at which the critic may
    see an end; None: t."""

    x_t: Tensor
    t: np.ndarray
    t_end: np.ndarray
    fake: Tensor
    real: Tensor | None = None
    top: np.ndarray | None = None


class Adversary:
    """Critic, its loss and the student's. `measures`: the critic's accuracy in its newest step."""

    critic: nn.Module
    betas = (0.0, 0.999)

    def __init__(self, context: Context, stage_name: str, learning_rate: float | None) -> None:
        self.process, self.learning_rate = context.process, learning_rate
        self.measures: dict[str, Tensor] = {}
        self.monitors = [Health([WINS], stage_name)]

    def generator_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """What the student minimises; the gradient goes through the critic into `fake`."""
        raise NotImplementedError

    def critic_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """What the critic minimises; neither end has a gradient."""
        raise NotImplementedError

    def auxiliary(self, loss: Callable[[Batch, Draw], Tensor]) -> Auxiliary:
        """What the trainer is to train; `loss` calls `critic_loss` with jumps of its own."""
        parameters = dict(self.critic.named_parameters())
        return Auxiliary("critic", parameters, loss, self.learning_rate, betas=self.betas)


class FeatureAdversary(Adversary):
    """Heads on the features of the frozen network."""

    def __init__(self, context: Context, stage_name: str, learning_rate: float | None) -> None:
        super().__init__(context, stage_name, learning_rate)
        self.critic = Critic(context.backbone)  # type: ignore[arg-type]

    def generator_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """-E[D(x_a)]."""
        return generator_loss(self._scores(ends.fake, ends.t_end, self._level(ends, draw), cond, draw))

    def critic_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """Hinge."""
        assert ends.real is not None
        t_a = self._level(ends, draw)
        scores = [self._scores(x, ends.t_end, t_a, cond, draw) for x in (ends.real, ends.fake)]
        self.measures["critic_accuracy"] = accuracy(*scores)
        return critic_loss(*scores)

    def _level(self, ends: Ends, draw: Draw) -> np.ndarray:
        return draw.host.integers(ends.t_end, (ends.t if ends.top is None else ends.top) + 1)

    def _scores(self, x: Tensor, t_end: np.ndarray, t_a: np.ndarray, cond: Cond, draw: Draw) -> list[Tensor]:
        x_a = affine_step(x, draw.normal(x.shape, x), on_device(self.process.renoise(t_end, t_a), x))
        return self.critic(x_a, network_time(self.process, t_a, x_a), cond)


class EncoderAdversary(Adversary):
    """A trained copy of the encoder. unpaired: the last part of the stage, in which it sees the ends alone. levels:
    parts of T, one of which is drawn for each sample; an end below it is diffused to it first (none: as they are)."""

    betas = (0.0, 0.99)
    critic: EncoderCritic

    def __init__(
        self,
        context: Context,
        stage_name: str,
        learning_rate: float | None,
        unpaired: float,
        levels: Sequence[float] = (),
    ) -> None:
        super().__init__(context, stage_name, learning_rate)
        self.critic = EncoderCritic(context.backbone)  # type: ignore[arg-type]
        self.unpaired = unpaired
        self.levels = np.array([round(level * (self.process.num_train_timesteps - 1)) for level in levels], np.int64)

    def generator_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """-E[log s(D(x_t, x_end))]."""
        with torch.no_grad():
            start = self._start(ends, cond, draw)
        return log_generator_loss(self._score(ends.fake, ends.t_end, self._level(ends, draw), start, cond, draw))

    def critic_loss(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor:
        """-E[log s(D(x_t, real))] - E[log(1 - s(D(x_t, fake)))]."""
        assert ends.real is not None
        start, t_a = self._start(ends, cond, draw), self._level(ends, draw)
        scores = [self._score(x, ends.t_end, t_a, start, cond, draw) for x in (ends.real, ends.fake)]
        self.measures["critic_accuracy"] = accuracy([scores[0]], [scores[1]])
        return log_critic_loss(*scores)

    def _start(self, ends: Ends, cond: Cond, draw: Draw) -> Tensor | None:
        if draw.progress >= 1.0 - self.unpaired:
            return None
        return self.critic.features(ends.x_t, network_time(self.process, ends.t, ends.x_t), cond)

    def _level(self, ends: Ends, draw: Draw) -> np.ndarray:
        if not len(self.levels):
            return ends.t_end
        return np.maximum(ends.t_end, draw.host.choice(self.levels, len(ends.t_end)))

    def _score(
        self, x: Tensor, t_end: np.ndarray, t_a: np.ndarray, start: Tensor | None, cond: Cond, draw: Draw
    ) -> Tensor:
        if len(self.levels):
            x = affine_step(x, draw.normal(x.shape, x), on_device(self.process.renoise(t_end, t_a), x))
        # the final point is the cleanest that a network knows
        return self.critic.score(
            self.critic.features(x, network_time(self.process, np.maximum(t_a, 0), x), cond), start
        )


class AdversarialConsistency(Consistency):
    """A consistency method that may have a critic: `weights` of its stage are those of the distance and of the critic's
    opinion of the student's ends."""

    stage: TSCDStage | TCDStage | PCMStage

    def __init__(self, stage: TSCDStage | TCDStage | PCMStage, context: Context) -> None:
        super().__init__(stage, context)
        self.adversary: Adversary | None = None
        self.measures: dict[str, Tensor] = {}
        self.monitors: list[Monitor] = []
        if not isinstance(stage, TCDStage) and stage.weights[1] > 0:
            rate = stage.critic_learning_rate
            if isinstance(stage, TSCDStage) and stage.critic == "encoder":
                self.adversary = EncoderAdversary(context, stage.name, rate, stage.unpaired)
            else:
                self.adversary = FeatureAdversary(context, stage.name, rate)
            self.measures, self.monitors = self.adversary.measures, [*self.adversary.monitors]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The distance, and where the stage has a critic its opinion, each by its weight."""
        jumps = self.jumps(batch, draw)
        loss = self.distance(jumps)
        if self.adversary is None or isinstance(self.stage, TCDStage):
            return loss
        weight, adversarial = self.stage.weights
        if draw.progress < self.stage.critic_warmup:
            return weight * loss
        opinion = self.adversary.generator_loss(self.ends(jumps), batch.cond, draw)
        if self.stage.adaptive:
            self.measures["adaptive_weight"] = factor = adaptive_weight(loss, opinion, jumps.m)
            opinion = factor * opinion
        return weight * loss + adversarial * opinion

    def auxiliaries(self) -> Sequence[Auxiliary]:
        return () if self.adversary is None else [self.adversary.auxiliary(self._critic_loss)]

    def ends(self, jumps: Jumps, with_real: bool = False) -> Ends:
        """Where the two jumps land, whatever the distance is measured in."""
        return Ends(
            jumps.x_t,
            jumps.t,
            jumps.t_end,
            self._land(jumps.x_t, jumps.m, jumps.t, jumps.t_end),
            self._land(jumps.x_prev, jumps.m_target, jumps.t_prev, jumps.t_end) if with_real else None,
        )

    @torch.no_grad()
    def _pictured(self, batch: Batch, draw: Draw) -> Ends:
        """The student's ends, and the data diffused to t_end."""
        x_t, (t, _, t_end), _ = self.starts(batch, draw)
        noise = draw.normal(x_t.shape, x_t)
        real = affine_step(batch.latents, noise, on_device(self.process.diffuse(t_end), x_t))
        return Ends(x_t, t, t_end, self._land(x_t, self.student(x_t, t, batch.cond), t, t_end), real)

    def _critic_loss(self, batch: Batch, draw: Draw) -> Tensor:
        assert self.adversary is not None
        if isinstance(self.stage, TSCDStage) and self.stage.critic_real == "data":
            return self.adversary.critic_loss(self._pictured(batch, draw), batch.cond, draw)
        with torch.no_grad():
            ends = self.ends(self.jumps(batch, draw), with_real=True)
        return self.adversary.critic_loss(ends, batch.cond, draw)

    def _land(self, x: Tensor, m: Tensor, t: np.ndarray, t_end: np.ndarray) -> Tensor:
        return affine_step(x, m, on_device(self.process.jump(t, t_end), x))


def adaptive_weight(distance: Tensor, opinion: Tensor, m: Tensor) -> Tensor:
    """|d distance / d m| / |d opinion / d m| within [0.01, 10], no gradient (CTM, Kim et al. 2023, arXiv 2310.02279).
    There the gradients are those of the last layer's weight; it is frozen here, and its output m stands for it."""
    norms = [torch.autograd.grad(loss, m, retain_graph=True)[0].norm() for loss in (distance, opinion)]
    return (norms[0] / norms[1].clamp_min(1e-12)).clamp(0.01, 10.0)

"""Distribution matching (DMD2, Yin et al. 2024, arXiv 2405.14867): what students of one step and of several share.

The student makes x. At a random noise level a real and a fake score predict the clean sample from x_t = alpha_t x +
sigma_t n; the fake score is trained on the student's own samples meanwhile, on a clock of its own. x moves along

    g = (x_fake - x_real) / mean |x - x_real|       (score_gradient),   L = 1/2 mean (x - stopgrad(x - g))^2

A GAN head on the fake network's bottleneck may tell diffused samples from diffused real pictures; its log loss is added
to the fake score's, and -log s(D(x_t)) to the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm, Health
from hypersd.distill.method import BASE, Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, guided_coef, network_time, on_device, teacher_step
from hypersd.distill.stage import MatchingStage
from hypersd.kernels import affine_step, score_gradient
from hypersd.models.critic import accuracy
from hypersd.models.encoder_critic import BottleneckCritic, log_critic_loss, log_generator_loss
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing

FAKE = "fake"
WINS = Alarm(
    "critic_accuracy",
    "the GAN head tells nearly every sample right, at every noise level, so that it has nothing left to teach",
    "lower the stage's critic_weight or raise adversarial_weight",
    high=0.97,
    patience=100,
)


class DistributionMatching:
    """The losses of student and fake score; a subclass makes the samples. `measures`: diversity, the spread of the
    student's samples over the data's, and the GAN head's accuracy where there is one."""

    real_role = BASE

    def __init__(self, stage: MatchingStage, context: Context, alarms: Sequence[Alarm]) -> None:
        self.matching, self.context, self.process = stage, context, context.process
        self.measures: dict[str, Tensor] = {}
        self.monitors = [Health([*alarms, WINS], stage.name)]
        last = self.process.num_train_timesteps - 1
        low, high = stage.t_range
        self.levels = max(0, int(low * last)), min(last, int(high * last))
        self.guided = stage.score_passes == 2 and not context.embeds_guidance
        self.critic: BottleneckCritic | None = None
        if stage.adversarial_weight > 0:
            self.critic = BottleneckCritic(context.backbone, FAKE)  # type: ignore[arg-type]

    def generate(self, batch: Batch, draw: Draw) -> Tensor:
        """Samples x of the student for the batch's captions, shape of its latents, with the gradient of one step."""
        raise NotImplementedError

    def auxiliaries(self) -> Sequence[Auxiliary]:
        trained = dict(self.context.backbone.role_parameters(FAKE))
        if self.critic is not None:
            trained |= dict(self.critic.named_parameters())
        return [Auxiliary(FAKE, trained, self.fake_loss, self.matching.fake_learning_rate, self.matching.fake_updates)]

    def matching_loss(self, x: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """Scalar, of samples x with gradient; the batch's latents only tell how much they ought to differ."""
        cond, size = batch.cond, len(x)
        with torch.no_grad():
            t = draw.host.integers(self.levels[0], self.levels[1] + 1, size)
            guidance = draw.host.uniform(*self.matching.score_guidance, size)
            x_t = self.diffuse(x, t, draw)
            x_real = self.clean(x_t, t, cond, self.real_role, guidance if self.real_role == BASE else None)
            x_fake = self.clean(x_t, t, cond, FAKE)
            goal = x - score_gradient(x, x_real, x_fake)
        if size > 1:
            self.measures["diversity"] = _spread(x.detach()) / _spread(batch.latents).clamp_min(1e-6)
        loss = 0.5 * F.mse_loss(x, goal)
        if self.critic is not None:
            loss = loss + self.matching.adversarial_weight * log_generator_loss(self._score(x, cond, draw))
        return loss

    def fake_loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Denoising score matching on the student's samples, over all timesteps, in units of the network's output; and
        the GAN head's loss by its weight, real pictures being the batch's."""
        with torch.no_grad():
            x = self.generate(batch, draw)
            t = draw.host.integers(0, self.process.num_train_timesteps, len(x))
            noise = draw.normal(x.shape, x)
            x_t = affine_step(x, noise, on_device(self.process.diffuse(t), x))
            target = affine_step(x, noise, on_device(network_target(self.process, t), x))
        loss = F.mse_loss(self.network(x_t, t, batch.cond, FAKE), target)
        if self.critic is not None:
            scores = [self._score(picture, batch.cond, draw) for picture in (batch.latents, x)]
            self.measures["critic_accuracy"] = accuracy(scores[:1], scores[1:])
            loss = loss + self.matching.critic_weight * log_critic_loss(*scores)
        return loss

    def clean(self, x_t: Tensor, t: np.ndarray, cond: Cond, role: str, guidance: np.ndarray | None = None) -> Tensor:
        """The prediction of x_0, with guidance m = u + g (c - u) where given and of use, g (B,)."""
        coef = self.process.x0(t)
        if guidance is None or not self.guided:
            return affine_step(x_t, self.network(x_t, t, cond, role), on_device(coef, x_t))
        both = {k: torch.cat([v, self.context.uncond.get(k, v).expand_as(v)]) for k, v in cond.items()}
        m_cond, m_uncond = self.network(torch.cat([x_t, x_t]), np.concatenate([t, t]), both, role).chunk(2)
        return affine_step(x_t, m_cond, on_device(guided_coef(coef, guidance), x_t), eps_uncond=m_uncond)

    @torch.no_grad()
    def teacher_end(self, z: Tensor, cond: Cond, steps: int, draw: Draw) -> Tensor:
        """x_0 of the base model's deterministic path from the noise z in so many steps, with the real score's
        guidance: the pairs of noise and picture that a one-step student may regress on (DMD)."""
        guidance = draw.host.uniform(*self.matching.score_guidance, len(z))
        grid = [np.full(len(z), t) for t in trailing(steps, self.process.num_train_timesteps)]
        x, scale = z, guidance if self.guided else None
        for t, to in pairwise(grid):
            x = teacher_step(self.context, BASE, x, t, to, cond, scale)
        return self.clean(x, grid[-1], cond, BASE, scale)

    def diffuse(self, x: Tensor, t: np.ndarray, draw: Draw) -> Tensor:
        return affine_step(x, draw.normal(x.shape, x), on_device(self.process.diffuse(t), x))

    def network(self, x_t: Tensor, t: np.ndarray, cond: Cond, role: str) -> Tensor:
        return self.context.backbone(x_t, network_time(self.process, t, x_t), cond, role=role)

    def _score(self, x: Tensor, cond: Cond, draw: Draw) -> Tensor:
        """The GAN head's, at random noise levels."""
        assert self.critic is not None
        t = draw.host.integers(0, self.process.num_train_timesteps, len(x))
        return self.critic(self.diffuse(x, t, draw), network_time(self.process, t, x), cond)


def network_target(process: NoiseProcess, t: np.ndarray) -> np.ndarray:
    """(B, 2): what the network ought to say of x_t = alpha_t x_0 + sigma_t n is c0 x_0 + c1 n. From x_0 = a x_t + b m:
    m = (1 - a alpha_t) / b x_0 - a sigma_t / b n."""
    alpha, sigma = process.at(t)
    a, b = process.x0(t).T
    return np.stack([(1.0 - a * alpha) / b, -a * sigma / b], axis=-1)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation within the batch, all elements together."""
    return (x - x.mean(0)).square().mean().sqrt()

"""Progressive adversarial distillation (SDXL-Lightning, Lin et al. 2024, arXiv 2402.13929).

The student's one jump from x_t must end where n steps of the teacher end, the student of the stage before (in the first
the base model with guidance). By the mean square error at first (Salimans & Ho 2022); in later stages by a critic's
opinion, which lets a student that cannot follow the teacher's curve end elsewhere on the same distribution:

    x_end = Psi(x_t, student, t_end),     x*_end = Psi(... Psi(x_t, teacher, p_1) ..., t_end)
    L = w_mse mean (x_end - x*_end)^2  +  w_adv E[-log s(D(x_t, x_end))],     later D'(x_end)

Starts at the last timestep are pure noise, as when sampling. With 2 and 1 steps the paper also starts from the steps of
the 4-step student (`starts`), and diffuses what the critic sees to one of several levels (`critic_levels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.adversarial import EncoderAdversary, Ends
from hypersd.distill.competitor_stages import LightningStage
from hypersd.distill.data import Batch
from hypersd.distill.health import Monitor
from hypersd.distill.method import BASE, PREVIOUS, STUDENT, Auxiliary, Context, Draw
from hypersd.distill.parts import Cond, network_time, on_device, sampling_metadata, teacher_step
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.timesteps import trailing


class Lightning:
    """The losses of one stage. `measures`: the critic's accuracy, where there is one."""

    def __init__(self, stage: LightningStage, context: Context) -> None:
        self.stage, self.context, self.process = stage, context, context.process
        trained = self.process.num_train_timesteps
        self.starts = trailing(stage.starts or stage.student_steps, trained)
        # ascending, from the final point
        self.ends, self.path = (
            np.append(-1, trailing(steps, trained)[::-1]) for steps in (stage.student_steps, stage.teacher_steps)
        )
        self.teacher = BASE if stage.teacher == "base" else PREVIOUS
        self.guided = stage.teacher_passes == 2 and not context.embeds_guidance
        self.adversary: EncoderAdversary | None = None
        self.measures: dict[str, Tensor] = {}
        self.monitors: list[Monitor] = []
        if stage.adversarial_weight > 0:
            rate, levels = stage.critic_learning_rate, stage.critic_levels
            self.adversary = EncoderAdversary(context, stage.name, rate, stage.unconditional, levels)
            self.measures, self.monitors = self.adversary.measures, [*self.adversary.monitors]

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch. latents (B, C, ...), one start and guidance scale per sample."""
        stage = self.stage
        ends = self._jumps(batch, draw, with_real=stage.mse_weight > 0)
        loss = batch.latents.new_zeros(())
        if ends.real is not None:
            loss = loss + stage.mse_weight * F.mse_loss(ends.fake, ends.real)
        if self.adversary is not None:
            loss = loss + stage.adversarial_weight * self.adversary.generator_loss(ends, batch.cond, draw)
        return loss

    def auxiliaries(self) -> Sequence[Auxiliary]:
        return () if self.adversary is None else [self.adversary.auxiliary(self._critic_loss)]

    @staticmethod
    def metadata(stage: LightningStage, process: NoiseProcess) -> dict[str, str]:
        """The student's trailing DDIM steps."""
        grid = trailing(stage.student_steps, process.num_train_timesteps)
        return sampling_metadata("lightning", process, "ddim", {stage.student_steps: grid}, eta=0.0)

    def _critic_loss(self, batch: Batch, draw: Draw) -> Tensor:
        assert self.adversary is not None
        with torch.no_grad():
            ends = self._jumps(batch, draw, with_real=True)
        return self.adversary.critic_loss(ends, batch.cond, draw)

    def _jumps(self, batch: Batch, draw: Draw, with_real: bool) -> Ends:
        """From random starts: the student's jump, and the teacher's steps where asked for."""
        x_0, cond, size = batch.latents, batch.cond, len(batch.latents)
        t = draw.host.choice(self.starts, size)
        t_end = self.ends[np.searchsorted(self.ends, t) - 1]
        guidance = draw.host.uniform(*self.stage.guidance_scale, size)
        pure = (t == self.process.num_train_timesteps - 1) & (draw.host.random(size) < self.stage.pure_noise)
        coef = np.where(pure[:, None], np.array([0.0, 1.0]), self.process.diffuse(t))
        x_t = affine_step(x_0, draw.normal(x_0.shape, x_0), on_device(coef, x_0))
        real = self._teach(x_t, t, t_end, cond, guidance) if with_real else None
        m = self.context.backbone(x_t, network_time(self.process, t, x_0), cond, role=STUDENT)
        return Ends(x_t, t, t_end, affine_step(x_t, m, on_device(self.process.jump(t, t_end), x_t)), real)

    @torch.no_grad()
    def _teach(self, x: Tensor, t: np.ndarray, t_end: np.ndarray, cond: Cond, guidance: np.ndarray) -> Tensor:
        """The teacher's steps from t over the points of its own grid to t_end; who has arrived costs nothing more."""
        x, t = x.clone(), t.copy()
        while len(rows := np.flatnonzero(t > t_end)):
            to = np.maximum(self.path[np.searchsorted(self.path, t[rows]) - 1], t_end[rows])
            index = torch.from_numpy(rows).to(x.device, non_blocking=True)
            some = {name: value[index] for name, value in cond.items()}
            scale = guidance[rows] if self.guided else None
            x[index] = teacher_step(self.context, self.teacher, x[index], t[rows], to, some, scale)
            t[rows] = to
        return x

"""DMD2 (Yin et al. 2024, arXiv 2405.14867): distribution matching with a GAN for one step or several.

A student of several steps is trained on what it will be given when sampling. Its own samples are made up to a random
step without a gradient (backward simulation), and that step has one:

    x_{t_1} = z,    x = x_0(x_{t_i}, student),    x_{t_{i+1}} = alpha x + sigma n

The real score is the base model with guidance, real pictures for the GAN are the data's (hypersd.distill.matching).

A student of one step that is fed its noise at an earlier timestep than the last knows nothing at first of what it is
to do with it: in the first part of the stage it learns what the base model's path makes of the same noise. The distance
is the mean square of latents here, LPIPS of pictures there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.competitor_stages import DMD2Stage
from hypersd.distill.data import Batch
from hypersd.distill.health import Alarm
from hypersd.distill.matching import DistributionMatching
from hypersd.distill.method import STUDENT, Context, Draw
from hypersd.distill.parts import sampling_metadata
from hypersd.models.noise_process import NoiseProcess

COLLAPSED = Alarm(
    "diversity",
    "the student's samples of a batch differ less than half as much as the data",
    "lower the stage's guidance_scale, or raise adversarial_weight or fake_updates",
    low=0.5,
    patience=50,  # the first samples, a network's means, are alike
)


class DMD2(DistributionMatching):
    """The losses of one DMD2 stage."""

    def __init__(self, stage: DMD2Stage, context: Context) -> None:
        super().__init__(stage, context, [COLLAPSED])
        self.stage = stage
        self.timesteps = np.array(stage.timesteps, np.int64)

    @staticmethod
    def metadata(stage: DMD2Stage, process: NoiseProcess) -> dict[str, str]:
        """x_0, diffused again to the next timestep: what the lcm solver does."""
        return sampling_metadata("dmd2", process, "lcm", {stage.steps: np.array(stage.timesteps)})

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar mean over the batch; its latents are not used but to be compared with."""
        if draw.progress < self.stage.regression:
            z = draw.normal(batch.latents.shape, batch.latents)
            goal = self.teacher_end(z, batch.cond, self.stage.regression_steps, draw)
            return F.mse_loss(self.clean(z, np.full(len(z), self.timesteps[0]), batch.cond, STUDENT), goal)
        return self.matching_loss(self.generate(batch, draw), batch, draw)

    def generate(self, batch: Batch, draw: Draw) -> Tensor:
        """Each sample stops at a step of its own; every step has its share of the batch."""
        steps, size = len(self.timesteps), len(batch.latents)
        last = (np.arange(size) + draw.host.integers(steps)) % steps
        x_t = draw.normal(batch.latents.shape, batch.latents)
        with torch.no_grad():
            for i in range(steps - 1):
                rows = np.flatnonzero(last > i)
                if not len(rows):  # the batch is smaller than the number of steps
                    break
                index = torch.from_numpy(rows).to(x_t.device, non_blocking=True)
                some = {name: value[index] for name, value in batch.cond.items()}
                x = self.clean(x_t[index], np.full(len(rows), self.timesteps[i]), some, STUDENT)
                x_t[index] = self.diffuse(x, np.full(len(rows), self.timesteps[i + 1]), draw)
        return self.clean(x_t, self.timesteps[last], batch.cond, STUDENT)

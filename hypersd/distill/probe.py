"""A look at the weights that are being trained: a few captions, each sampled from the same few noises every time.

    variety = spread(now) / spread(at the stage's beginning),   spread^2 = E_caption Var_noise[x_0]
    drift   = Frechet(r(now), r(at the beginning)) / tr Cov r(at the beginning)

r is what the frozen model would still change about a sample, its mean in each cell of a coarse grid: a sample that has
left what the model was trained on, as those of an over-optimised reward do, shows there first. As both sides start
from the same noise, the Frechet distance of Gaussians (Dowson & Landau 1982) of few samples has no bias to speak of.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hypersd.distill.data import LatentDataset
from hypersd.distill.health import Alarm
from hypersd.distill.method import BASE, Denoiser
from hypersd.distill.stage import BaseStage
from hypersd.distill.stages import FeedbackStage
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import denoiser, offered_steps, sample, sampler_for

CAPTIONS, NOISES = 4, 4
STEPS = 4  # or what the file offers next to it
LEVEL = 0.1  # of all timesteps: where the frozen model is asked
CELLS = 4  # a side
LEAST_VARIETY = 0.5


class Probe:
    """Samples by the rules of the stage's own file, in four steps or the number next to it, of `role`.

    backbone, process, uncond: see method.Context. metadata: what the stage's LoRA file says about sampling.
    `start` is what `look` compares with; it belongs into a checkpoint. Raises nothing of its own.
    """

    def __init__(
        self,
        backbone: Denoiser,
        process: NoiseProcess,
        dataset: LatentDataset,
        uncond: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        *,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.backbone, self.process, self.batch_size, self.device = backbone, process, batch_size, device
        steps = min(offered_steps(metadata), key=lambda number: abs(number - STEPS))
        self.table = sampler_for(process, metadata, steps)
        self.seed, count = seed, min(CAPTIONS, len(dataset))
        batch = dataset.batch(0, count, seed=seed)
        self.cond = {name: values.to(device).repeat_interleave(NOISES, 0) for name, values in batch.cond.items()}
        self.null = {name: uncond.get(name, values[:1]).to(device) for name, values in self.cond.items()}
        self.shape = (count * NOISES, *batch.latents.shape[1:])
        self.start: dict[str, Tensor] = {}

    def begin(self, role: str) -> None:
        """Look at what the stage begins with."""
        self.start = self._look(role)

    def look(self, role: str) -> dict[str, Tensor]:
        """The measures, 0-d; none where `start` was not kept."""
        if not self.start:
            return {}
        now, start = self._look(role), self.start
        centred = start["correction"] - start["correction"].mean(0)
        variance = centred.square().sum() / (len(centred) - 1)
        distance = frechet(now["correction"], start["correction"])
        return {
            "variety": now["spread"] / start["spread"].clamp_min(1e-6),
            "drift": distance / variance.clamp_min(1e-12),
        }

    @torch.no_grad()
    def _look(self, role: str) -> dict[str, Tensor]:
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        found = [self._samples(noise[rows], rows, role) for rows in _slices(len(noise), self.batch_size)]
        x_0, correction = (torch.cat(parts) for parts in zip(*found, strict=True))
        by_caption = x_0.reshape(-1, NOISES, *x_0.shape[1:])
        return {"spread": by_caption.var(1).mean().sqrt(), "correction": correction}

    def _samples(self, noise: Tensor, rows: slice, role: str) -> tuple[Tensor, Tensor]:
        cond = {name: values[rows] for name, values in self.cond.items()}
        null = {name: values.expand_as(cond[name]) for name, values in self.null.items()}
        generator = torch.Generator(self.device).manual_seed(self.seed + rows.start)
        denoise = denoiser(self.backbone, cond, null=null if self.table.is_guided else None, role=role)  # type: ignore[arg-type]
        x_0 = sample(denoise, self.table, noise, generator=generator)
        return x_0, self._correction(x_0, cond)

    def _correction(self, x_0: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """(B, D) float64: what the frozen model makes of alpha x_0, less x_0."""
        t = np.full(len(x_0), round(LEVEL * (self.process.num_train_timesteps - 1)))
        x_t = float(self.process.at(t)[0][0]) * x_0
        time = self.process.network_timestep(t)
        kind = x_0.dtype if time.dtype.kind == "f" else None
        m = self.backbone(x_t, torch.from_numpy(time).to(self.device, kind), cond, role=BASE).to(x_0.dtype)
        coef = torch.tensor([*self.process.x0(t)[0], 0.0, 0.0, 0.0], dtype=torch.float64)
        change = affine_step(x_t, m, coef) - x_0
        return (F.adaptive_avg_pool2d(change, CELLS) if change.dim() == 4 else change).flatten(1).double()


def alarms(stage: BaseStage) -> list[Alarm]:
    """What must not happen to the measures. Feedback alone is to stay near to where it began."""
    less = "guidance_scale"
    if isinstance(stage, FeedbackStage):
        less = "the rewards' weights or thresholds, or raise the stage's anchor"
    says = "samples of one caption have become alike, with less than half of the spread that the stage began with"
    found = [Alarm("variety", says, f"lower learning_rate or {less}", low=LEAST_VARIETY, patience=1)]
    if isinstance(stage, FeedbackStage):
        says = "the samples leave what the model was trained on: over-optimisation"
        found.append(Alarm("drift", says, f"stop earlier, or lower {less}", high=stage.max_drift, patience=1))
    return found


def frechet(first: Tensor, second: Tensor) -> Tensor:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) of (N, D) samples, in float64. With centred X and Y the last
    trace is the sum of the singular values of X Y^T / (N - 1): N x N, however many features there are."""
    first, second = first.double(), second.double()
    x, y = first - first.mean(0), second - second.mean(0)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    spread = (x.square().sum() + y.square().sum() - 2 * cross) / (len(x) - 1)
    return ((first.mean(0) - second.mean(0)).square().sum() + spread).clamp_min(0)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]

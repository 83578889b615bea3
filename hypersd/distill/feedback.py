"""Human feedback learning on the few-step roll-out (Hyper-SD, arXiv 2404.13686, section 3.2; ReFL, Xu et al. 2023).

A picture is sampled in as many steps as the weights are made for. One of the steps has a gradient, those before it
have none, and the picture x_0' is read off at that step instead of sampling on:

    L = sum_d w_d E[max(0, threshold_d - r_d(x_0', c))]  +  w_s L_instance(x_0')  +  w_a E[(x_0' - x_0'')^2]

The structure term starts from a real picture, diffused half way, and asks a frozen segmenter for that picture's own
instances. The anchor compares with x_0'', what the weights before would have made of the same step. Once a reward has
reached its threshold its gradient is exactly zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hypersd.distill.data import Batch
from hypersd.distill.method import BASE, PREVIOUS, STUDENT, Context, Draw
from hypersd.distill.parts import sampling_metadata
from hypersd.distill.stages import FeedbackStage, StructureTerm
from hypersd.distill.watch import Watch
from hypersd.errors import HypersdError
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import sample
from hypersd.sampling.solvers import Table, ddim, tcd
from hypersd.sampling.timesteps import trailing


class Feedback:
    """The loss of one feedback stage. `measures`: every reward's mean in the newest batch, watched ones too."""

    def __init__(self, stage: FeedbackStage, context: Context) -> None:
        self.stage, self.context, self.process = stage, context, context.process
        if context.decode is None:
            raise HypersdError("a feedback stage needs a model whose latents can be decoded to pictures")
        found = {term.kind: context.reward_of(term) for term in stage.rewards}
        self.rewards = {kind: reward for kind, reward in found.items() if reward is not None}
        self.structure = None if stage.structure is None else context.structure_of(stage.structure)
        missing = [kind for kind in found if kind not in self.rewards]
        if missing or (stage.structure is not None and self.structure is None):
            raise HypersdError(
                f"the stage wants {', '.join(missing) or 'structure'}, but no such reward was handed over"
            )
        self.role = f"{PREVIOUS}+{STUDENT}" if stage.is_separate else STUDENT
        self.before = PREVIOUS if stage.needs_previous else BASE
        if stage.needs_previous:
            for parameter in context.backbone.role_parameters(PREVIOUS).values():
                parameter.requires_grad_(False)
        self.tables = {steps: self._table(trailing(steps, self.process.num_train_timesteps)) for steps in stage.rollout}
        if stage.structure is not None:
            starts = {n: grid_below(g, stage.structure.start, self.process) for n, (g, _) in self.tables.items()}
            self.structure_tables = {steps: self._table(grid) for steps, grid in starts.items()}
        optimised = [term.kind for term in stage.rewards if term.weight > 0]
        watched = [term.kind for term in stage.rewards if term.weight == 0]
        self.monitors = [Watch(optimised, watched, stage.check_every, stage.name)]
        self.measures: dict[str, Tensor] = {}

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Scalar. The captions are the batch's; its pictures matter to the structure term alone."""
        stage, total = self.stage, batch.latents.new_zeros(())
        steps = int(draw.host.choice(stage.rollout))
        if stage.rewards:
            x_T = draw.normal(batch.latents.shape, batch.latents)
            x_0, before = self._roll_out(x_T, *self.tables[steps], batch, draw)
            images = self._decode(x_0)
            for term in stage.rewards:
                with torch.set_grad_enabled(term.weight > 0):
                    reward = self.rewards[term.kind](images, batch.captions)
                if term.weight > 0:
                    total = total + term.weight * hinge(reward, term.threshold)  # type: ignore[arg-type]
                self.measures[term.kind] = reward.detach().float().mean()
            total = total + self._anchor(x_0, before)
        if stage.structure is not None:
            total = total + self._structure_loss(stage.structure, steps, batch, draw)
        return total

    @staticmethod
    def metadata(stage: FeedbackStage, process: NoiseProcess) -> dict[str, str]:
        """How to sample from the improved weights: as they were sampled when the rewards saw them and, with TCD, whose
        jumps end anywhere, by every number of steps in between."""
        numbers = sorted(set(stage.rollout))
        if stage.solver == "tcd":
            numbers = list(range(numbers[0], numbers[-1] + 1))
        grids = {n: trailing(n, process.num_train_timesteps) for n in numbers}
        eta = stage.eta if stage.solver == "tcd" else 0.0
        return sampling_metadata("feedback", process, stage.solver, grids, eta=eta)

    def _structure_loss(self, term: StructureTerm, steps: int, batch: Batch, draw: Draw) -> Tensor:
        """Of the batch's own pictures, diffused to the first step below start T and sampled on from there."""
        grid, table = self.structure_tables[steps]
        noise = draw.normal(batch.latents.shape, batch.latents)
        x_t = affine_step(batch.latents, noise, _coef(self.process.diffuse(grid[0])))
        x_0, before = self._roll_out(x_t, grid, table, batch, draw)
        assert self.structure is not None
        loss = self.structure(self._decode(x_0), batch.indices)
        self.measures["structure"] = -loss.detach().float()
        return term.weight * loss + self._anchor(x_0, before)

    def _roll_out(
        self, x: Tensor, grid: np.ndarray, table: Table, batch: Batch, draw: Draw
    ) -> tuple[Tensor, Tensor | None]:
        """x at grid[0] to x_0', with gradient in one network call; and x_0'' for the anchor."""
        chosen = int(draw.host.integers(self.stage.earliest(len(grid)), len(grid)))
        backbone, cond = self.context.backbone, batch.cond
        part = Table(table.timesteps[:chosen], table.coef[:chosen])
        x = sample(lambda x_t, t: backbone(x_t, t, cond, role=self.role), part, x, generator=draw.generator)
        kind = x.dtype if table.timesteps.dtype.kind == "f" else torch.int64
        time = torch.full((len(x),), table.timesteps[chosen].item(), dtype=kind, device=x.device)
        jump = _coef(self.process.jump(grid[chosen], -1))
        x_0 = affine_step(x, backbone(x, time, cond, role=self.role), jump)
        if not self.stage.anchor:
            return x_0, None
        with torch.no_grad():
            return x_0, affine_step(x, backbone(x, time, cond, role=self.before), jump)

    def _table(self, grid: np.ndarray) -> tuple[np.ndarray, Table]:
        stage = self.stage
        return grid, ddim(self.process, grid) if stage.solver == "ddim" else tcd(self.process, grid, eta=stage.eta)

    def _anchor(self, x_0: Tensor, before: Tensor | None) -> Tensor | float:
        return 0.0 if before is None else self.stage.anchor * (x_0 - before).square().mean()

    def _decode(self, x_0: Tensor) -> Tensor:
        assert self.context.decode is not None
        return self.context.decode(x_0)


def hinge(reward: Tensor, threshold: float) -> Tensor:
    """E[max(0, threshold - reward)], a scalar; a reward at or above its threshold has no gradient."""
    return torch.relu(threshold - reward.float()).mean()


def grid_below(grid: np.ndarray, start: float, process: NoiseProcess) -> np.ndarray:
    """The steps of a roll-out below start T: enough of a picture diffused to the first of them is left to be found
    again. Where there is none (one step), start T itself, from where weights of one segment jump as well."""
    below = grid[grid < start * process.num_train_timesteps]
    return below if len(below) else np.array([max(1, round(start * process.num_train_timesteps) - 1)])


def _coef(pair: np.ndarray) -> Tensor:
    """(5,) for affine_step from the two coefficients of x and m."""
    return torch.tensor([*pair.tolist(), 0.0, 0.0, 0.0], dtype=torch.float64)

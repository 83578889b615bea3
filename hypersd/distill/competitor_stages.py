"""The stages of the methods that Hyper-SD is compared with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hypersd.distill.stage import ConsistencyStage, GuidedStage, Positive, Probability, Range


class LCMStage(ConsistencyStage):
    """Latent consistency distillation (hypersd.distill.lcm)."""

    method: Literal["lcm"]
    guidance_scale: Range = (4.0, 16.0)
    target: Literal["ema", "online"] = "online"

    @property
    def steps(self) -> int:
        return 4


class PCMStage(ConsistencyStage):
    """Phased consistency model with `phases` phases (hypersd.distill.pcm)."""

    method: Literal["pcm"]
    phases: Positive
    guidance_scale: Range = (5.0, 6.0)
    target: Literal["ema", "online"] = "online"

    @model_validator(mode="after")
    def _consistent(self) -> PCMStage:
        if self.grid < self.phases:
            raise ValueError(f"grid = {self.grid} has fewer points than there are phases ({self.phases})")
        return self

    @property
    def name(self) -> str:
        return f"{self.method}-{self.phases}"

    @property
    def steps(self) -> int:
        return self.phases


class TDDStage(ConsistencyStage):
    """Target-driven distillation (hypersd.distill.tdd).

    `sampling_steps`: the fewest and the most steps that sampling will take; their grids are the targets. `reach`: how
    far below the nearest target another may lie, in timesteps. `target_noise`: a target t is moved down to as little as
    (1 - target_noise) t. `sampling_guidance`: g of the sampler, above 1 only useful with data.caption_dropout.
    """

    method: Literal["tdd"]
    grid: Positive = 250
    guidance_scale: Range = (4.5, 4.5)
    target: Literal["ema", "online"] = "online"
    sampling_steps: Annotated[tuple[Positive, Positive], Field(strict=False)] = (4, 8)
    reach: Positive = 260
    target_noise: Probability = 0.3
    eta: Probability = 0.2  # of the sampler
    sampling_guidance: Annotated[float, Field(ge=1)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> TDDStage:
        low, high = self.sampling_steps
        if not low <= high <= self.grid:
            raise ValueError(f"sampling_steps {[low, high]} is not a range within 1 to grid ({self.grid})")
        return self

    @property
    def steps(self) -> int:
        return self.sampling_steps[1]


class PeRFlowStage(GuidedStage):
    """Piecewise rectified flow over `windows` windows (hypersd.distill.perflow).

    `solver_steps`: DDIM steps of the teacher through one window. `sampling_guidance`: g of the sampler, for a teacher
    without guidance ([1, 1]).
    """

    method: Literal["perflow"]
    windows: Positive = 4
    solver_steps: Positive = 8
    sampling_guidance: Annotated[float, Field(ge=1)] = 1.0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.windows}"

    @property
    def steps(self) -> int:
        return self.windows

    @property
    def network_evaluations(self) -> float:
        return self.solver_steps * self.teacher_passes + 3

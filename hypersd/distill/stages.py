"""The stages of a recipe: one class per method, every option typed and bounded.

A new method adds its class here and one file, with its loss, beside tscd.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BaseStage(Section):
    """What every method has."""

    iterations: Positive
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: train's

    @property
    def name(self) -> str:
        """For the log and the progress bar."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """The number of sampling steps that the stage's weights are made for; names its LoRA file."""
        raise NotImplementedError

    @property
    def needs_previous(self) -> bool:
        """Whether the weights that the stage before ended with are kept as role "previous"."""
        return False


class TSCDStage(BaseStage):
    """Trajectory segmented consistency distillation with `segments` segments (hypersd.distill.tscd).

    `guidance_scale`: range that g is drawn from, per sample, in the convention of diffusers, u + g (c - u); the
    consistency-model papers' w is g - 1. [1, 1] is no guidance and one teacher pass less.
    `teacher`: "base" is the undistilled model with guidance; "previous_stage" the EMA weights that the stage before
    ended with, in which guidance is already baked (in the first stage there is none before it: "base").
    `t_end`: where the two jumps of the loss meet, in [t_b, t_prev]: "uniform", "boundary", or "mixed", which is the
    boundary with probability `t_end_mix`.
    `weighting`: "inv_b2" measures the distance in units of the network's eps error (it divides by the jump's own factor
    B), so that high noise levels do not drown the others.
    """

    method: Literal["tscd"]
    segments: Positive
    grid: Positive = 40
    teacher: Literal["base", "previous_stage"] = "base"
    guidance_scale: Annotated[tuple[float, float], Field(strict=False)] = (7.0, 9.0)
    t_end: Literal["uniform", "boundary", "mixed"] = "mixed"
    t_end_mix: Probability = 0.25
    loss: Literal["mse", "huber", "pseudo_huber", "l1"] = "pseudo_huber"
    c: Annotated[float, Field(gt=0)] = 1e-3
    weighting: Literal["none", "inv_b2"] = "none"
    target: Literal["ema", "online"] = "ema"
    offset_noise: Annotated[float, Field(ge=0)] = 0.1
    pure_noise: Probability = 0.0  # chance that a start at the last timestep is pure noise, as it is when sampling

    @model_validator(mode="after")
    def _consistent(self) -> TSCDStage:
        if self.guidance_scale[0] > self.guidance_scale[1]:
            raise ValueError(
                f"guidance_scale {list(self.guidance_scale)} is not a range; the smaller value comes first"
            )
        if self.grid < self.segments:
            raise ValueError(f"grid = {self.grid} has fewer points than there are segments ({self.segments})")
        return self

    @property
    def name(self) -> str:
        return f"{self.method}-{self.segments}"

    @property
    def steps(self) -> int:
        return self.segments

    @property
    def needs_previous(self) -> bool:
        return self.teacher == "previous_stage"


# With the second method: Annotated[TSCDStage | OtherStage, Field(discriminator="method")].
Stage = TSCDStage

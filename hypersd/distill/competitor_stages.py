"""The stages of the methods that Hyper-SD is compared with."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from hypersd.distill.stage import (
    BaseStage,
    ConsistencyStage,
    GuidedStage,
    MatchingStage,
    NonNegative,
    Positive,
    Probability,
    Range,
    Section,
    paired_critic_evaluations,
)


class LCMStage(ConsistencyStage):
    """Latent consistency distillation (hypersd.distill.lcm)."""

    method: Literal["lcm"]
    guidance_scale: Range = (4.0, 16.0)
    target: Literal["ema", "online"] = "online"

    @model_validator(mode="after")
    def _has_the_steps(self) -> LCMStage:
        if self.grid < self.steps:
            raise ValueError(f"grid = {self.grid} has fewer points than the {self.steps} steps the weights are for")
        return self

    @property
    def steps(self) -> int:
        return 4


class PCMStage(ConsistencyStage):
    """Phased consistency model with `phases` phases (hypersd.distill.pcm).

    `adversarial_weight`: of what a critic, heads on the frozen network's features, says of the ends; 0.1 is the
    authors'. Their LoRAs of many phases have none.
    """

    critic_warmup: ClassVar[float] = 0.0
    adaptive: ClassVar[bool] = False

    method: Literal["pcm"]
    phases: Positive
    adversarial_weight: NonNegative = 0.0
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    guidance_scale: Range = (5.0, 6.0)
    target: Literal["ema", "online"] = "online"

    @model_validator(mode="after")
    def _consistent(self) -> PCMStage:
        if self.grid < self.phases:
            raise ValueError(f"grid = {self.grid} has fewer points than there are phases ({self.phases})")
        if self.adversarial_weight == 0:
            self._belong("adversarial_weight above 0", "critic_learning_rate")
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """Of the distance and of the critic's opinion."""
        return 1.0, self.adversarial_weight

    @property
    def name(self) -> str:
        return f"{self.method}-{self.phases}"

    @property
    def steps(self) -> int:
        return self.phases

    @property
    def network_evaluations(self) -> float:
        """The critic looks at the student's end with a gradient, and in its own step, with jumps of its own, at two."""
        own = super().network_evaluations
        return own + 3 + self.teacher_passes + 2 + 2 if self.adversarial_weight > 0 else own


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

    @model_validator(mode="after")
    def _consistent(self) -> PeRFlowStage:
        self._guided_once()
        return self

    @property
    def name(self) -> str:
        return f"{self.method}-{self.windows}"

    @property
    def steps(self) -> int:
        return self.windows

    @property
    def wants(self) -> dict[str, int]:
        return {"windows": 4 * self.windows}  # the file says how to take as many as four steps in each

    @property
    def network_evaluations(self) -> float:
        return self.solver_steps * self.teacher_passes + 3


class LightningStage(GuidedStage):
    """Progressive adversarial distillation of `teacher_steps` steps to `student_steps` (hypersd.distill.lightning).

    `teacher`: "base", the undistilled model with guidance, or "previous_stage", which was made for `teacher_steps`.
    `mse_weight`: of the distance; `adversarial_weight`: of the opinion of a critic, new in each stage, a trained copy
    of the encoder, which in the last part `unconditional` of the stage no longer sees where a jump started.
    `critic_learning_rate` None: the student's. `critic_levels`: parts of T, to one of which, drawn for each sample, an
    end is diffused before the critic sees it. `starts`: number of trailing steps that jumps start from, a multiple of
    `student_steps` (None: those). `pure_noise`: chance that a start at the last timestep is pure noise.
    """

    method: Literal["lightning"]
    student_steps: Positive
    teacher_steps: Positive
    teacher: Literal["base", "previous_stage"] = "previous_stage"
    mse_weight: NonNegative = 1.0
    adversarial_weight: NonNegative = 0.0
    unconditional: Probability = 0.25
    critic_learning_rate: Annotated[float, Field(gt=0)] | None = None
    critic_levels: Annotated[tuple[Probability, ...], Field(strict=False)] = ()
    starts: Positive | None = None
    pure_noise: Probability = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> LightningStage:
        if self.teacher_steps <= self.student_steps or self.teacher_steps % self.student_steps:
            raise ValueError(
                f"teacher_steps = {self.teacher_steps} must be a multiple of student_steps ({self.student_steps})"
            )
        if self.starts is not None and self.starts % self.student_steps:
            raise ValueError(f"starts = {self.starts} must be a multiple of student_steps ({self.student_steps})")
        if self.mse_weight == self.adversarial_weight == 0:
            raise ValueError("nothing to learn from: mse_weight and adversarial_weight are both 0")
        if self.adversarial_weight == 0:
            self._belong("adversarial_weight above 0", "unconditional", "critic_learning_rate", "critic_levels")
        return self

    @property
    def name(self) -> str:
        return f"{self.method}-{self.teacher_steps}-{self.student_steps}"

    @property
    def steps(self) -> int:
        return self.student_steps

    @property
    def wants(self) -> dict[str, int]:
        return {"teacher_steps": self.teacher_steps, "starts": self.starts or 1}

    @property
    def improves(self) -> bool:
        return self.needs_previous

    @property
    def alone(self) -> str:
        return 'teacher = "base"'

    @property
    def copies_encoder(self) -> bool:
        return self.adversarial_weight > 0

    @property
    def path(self) -> float:
        """Steps of the teacher in one of the student's jumps, the mean over the starts."""
        starts = self.starts or self.student_steps
        each = self.teacher_steps // self.student_steps
        # start i / starts lies in the student's jump number j, which ends at j / student_steps
        jumps = [(-(-i * self.student_steps // starts) - 1, i) for i in range(1, starts + 1)]
        return sum(-(-i * self.teacher_steps // starts) - j * each for j, i in jumps) / starts

    @property
    def network_evaluations(self) -> float:
        taught = self.path * self.teacher_passes
        student = 3 + (taught if self.mse_weight > 0 else 0)
        if self.adversarial_weight == 0:
            return student
        return student + taught + 1 + paired_critic_evaluations(self.unconditional)

    def follow(self, before: BaseStage) -> None:
        if before.method not in (self.method, "tscd") or before.steps != self.teacher_steps:
            raise ValueError(
                f"a teacher of {self.teacher_steps} steps must be a lightning or tscd stage made for as many, "
                f"not {before.name}"
            )


class DMD2Stage(MatchingStage):
    """Distribution matching with a GAN for sampling at `timesteps` (hypersd.distill.dmd2); the real score is the base
    model with guidance, real pictures are the data's.

    `regression`: the first part of the stage, in which a student of one step only learns where the base model's path of
    `regression_steps` steps ends: the warm-up of the authors' one-step model, whose timesteps are [399].
    """

    method: Literal["dmd2"]
    timesteps: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] = (
        999,
        749,
        499,
        249,
    )
    adversarial_weight: NonNegative = 5e-3
    regression: Probability = 0.0
    regression_steps: Positive = 20

    @model_validator(mode="after")
    def _consistent(self) -> DMD2Stage:
        if self.regression > 0 and self.steps > 1:
            raise ValueError(f"regression is for one timestep, here are {self.steps}")
        if self.regression == 0:
            self._belong("regression above 0", "regression_steps")
        if any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError(f"timesteps {list(self.timesteps)} must descend")
        return self

    @property
    def name(self) -> str:
        return f"{self.method}-{self.steps}"

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def wants(self) -> dict[str, int]:
        return {"timesteps": self.timesteps[0] + 1, "regression_steps": self.regression_steps}

    @property
    def roles(self) -> tuple[str, ...]:
        return ("fake",)

    @property
    def network_evaluations(self) -> float:
        student, fake = self.matching_evaluations((self.steps - 1) / 2, self.teacher_passes)
        warm = self.regression_steps * self.teacher_passes + 3
        return self.regression * warm + (1 - self.regression) * student + fake


class LinearReward(Section):
    """`weight` times the mean of minus the reward; `weight = 0` only watches it. `kind` and `path` as in a feedback
    stage's rewards."""

    kind: str
    path: str | None = None
    weight: NonNegative = 1.0


class RGLCDStage(LCMStage):
    """Reward-guided latent consistency distillation (hypersd.distill.rg_lcd): LCM, and `rewards` of the pictures that
    the student's single jumps end in. `check_every`: steps in each of the means that over-optimisation is told from.
    `proxy`: the student asks not the rewards but a network that is trained to prefer latents as they do;
    `proxy_temperature`: a difference of the weighted sum of rewards at which the preference is e to 1;
    `proxy_learning_rate` None: the student's."""

    method: Literal["rg_lcd"]  # type: ignore[assignment]
    rewards: list[LinearReward]
    check_every: Positive = 25
    proxy: bool = False
    proxy_temperature: Annotated[float, Field(gt=0)] = 0.01
    proxy_learning_rate: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _has_a_reward(self) -> RGLCDStage:
        kinds = [reward.kind for reward in self.rewards]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"reward {twice[0]} is there twice")
        if not any(reward.weight > 0 for reward in self.rewards):
            raise ValueError('no reward to learn from: give one with a weight, or use method = "lcm"')
        return self

    @property
    def drops_captions(self) -> bool:
        return False  # a reward is asked about a picture and its caption

    @property
    def network_evaluations(self) -> float:
        """The proxy looks at the student's end with a gradient, and in its own step at three ends without; that step
        has jumps of its own."""
        own = super().network_evaluations
        return own + 3 + self.teacher_passes + 2 + 3 if self.proxy else own

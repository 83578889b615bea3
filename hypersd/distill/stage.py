"""What the stages of every method have: typed and bounded options, and what the trainer asks of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
Range = Annotated[tuple[float, float], Field(strict=False)]

ENCODER = 1 / 3  # of a network evaluation: 26 % of the work and 34 % of the time of the embedded UNet


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def _belong(self, to: str, *options: str) -> None:
        """Raises ValueError where one of these was set although it has no effect. The default is no request: what was
        written down says every option."""
        for name in options:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to {to}; set that too, or leave {name} out")


class BaseStage(Section):
    """What every method has."""

    method: str
    iterations: Positive
    learning_rate: Annotated[float, Field(gt=0)] | None = None  # None: train's

    @property
    def name(self) -> str:
        """For the log and the progress bar."""
        return self.method

    @property
    def steps(self) -> int:
        """The number of sampling steps that the stage's weights are made for."""
        raise NotImplementedError

    @property
    def file(self) -> str:
        """Name of the LoRA file that the stage ends with."""
        return f"lora-{self.steps}step"

    @property
    def needs_previous(self) -> bool:
        """Whether the weights that the stage before ended with are kept as role "previous"."""
        return False

    @property
    def roles(self) -> tuple[str, ...]:
        """Further adapters that the stage needs. Each begins as a copy of the student's, and goes when it ends."""
        return ()

    @property
    def copies_encoder(self) -> bool:
        """Whether a copy of the network's encoder is trained beside the student, as a critic."""
        return False

    @property
    def is_separate(self) -> bool:
        """Whether the stage trains a new adapter on top of those weights, instead of going on with them."""
        return False

    @property
    def drops_captions(self) -> bool:
        """Whether data.caption_dropout applies."""
        return True

    @property
    def improves(self) -> bool:
        """Whether the stage cannot begin with nothing: it wants a stage before it, or train.init."""
        return False

    @property
    def alone(self) -> str:
        """The option that lets such a stage begin with nothing, where there is one."""
        return ""

    @property
    def network_evaluations(self) -> float:
        """What one sample costs in one optimizer step, at most, and on average where draws or the stage's progress
        decide: a forward pass is 1, a backward pass 2. A UNet's encoder and middle block are ENCODER of it, and so
        is the first half of a transformer here."""
        raise NotImplementedError

    @property
    def wants(self) -> dict[str, int]:
        """Options that not every model can serve, and how many timesteps each wants it to have."""
        return {}

    def fit(self, timesteps: int) -> None:
        """Raises ValueError where a model of so many timesteps cannot serve the stage."""
        for key, least in self.wants.items():
            if least > timesteps:
                value = self.model_dump(mode="json")[key]
                raise ValueError(f"{key} = {value} wants a model of {least} timesteps, this one has {timesteps}")

    def check(self, samples: int) -> None:
        """Raises ValueError where `samples`, those of one optimizer step, are too few."""

    def follow(self, before: BaseStage) -> None:
        """Raises ValueError where this stage cannot be taught by what `before` trains; asked if it needs_previous."""


class GuidedStage(BaseStage):
    """`guidance_scale`: range that the teacher's g is drawn from, per sample, in the convention of diffusers,
    u + g (c - u); the consistency-model papers' w is g - 1. [1, 1] is no guidance and half the teacher's passes.
    Where a method offers `teacher`, "previous_stage" has guidance in its weights."""

    guidance_scale: Range = (7.0, 9.0)

    @model_validator(mode="after")
    def _range(self) -> GuidedStage:
        for name in ("guidance_scale", "real_guidance_scale"):
            low, high = getattr(self, name, None) or (1.0, 1.0)
            if low > high:
                raise ValueError(f"{name} {[low, high]} is not a range; the smaller value comes first")
            if low < 1:
                raise ValueError(
                    f"{name} {[low, high]} goes below 1, towards the empty caption; use [1, 1] for no guidance"
                )
        return self

    def _guided_once(self) -> None:
        """Raises ValueError where the sampler is to guide what the teacher's guidance has taught already."""
        sampled = getattr(self, "sampling_guidance", 1.0)
        if sampled > 1 and self.guidance_scale != (1.0, 1.0):
            raise ValueError(
                f"sampling_guidance = {sampled:g} would guide twice what guidance_scale = {list(self.guidance_scale)} "
                "has taught; set guidance_scale = [1, 1]"
            )

    @property
    def needs_previous(self) -> bool:
        return getattr(self, "teacher", "base") == "previous_stage"

    @property
    def teacher_passes(self) -> int:
        """Network evaluations of one solver step of the teacher."""
        return 1 if self.needs_previous or self.guidance_scale == (1.0, 1.0) else 2


class ConsistencyStage(GuidedStage):
    """What the consistency methods have in common (hypersd.distill.parts).

    `grid`: the number of timesteps that a start is drawn from. `target`: the network at the other end of the loss, the
    EMA weights or the student's own.
    """

    grid: Positive = 50
    loss: Literal["mse", "huber", "pseudo_huber", "l1"] = "pseudo_huber"
    c: Annotated[float, Field(gt=0)] = 1e-3
    target: Literal["ema", "online"] = "ema"
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    pure_noise: Probability = 0.0  # chance that a start at the last timestep is pure noise, as it is when sampling

    @property
    def wants(self) -> dict[str, int]:
        return {"grid": self.grid}

    @property
    def network_evaluations(self) -> float:
        return self.teacher_passes + 1 + 3


class MatchingStage(GuidedStage):
    """Distribution matching (hypersd.distill.matching): a real and a fake score, compared at timesteps within `t_range`
    (parts of all), say where to move the student's samples.

    The fake score is an adapter of its own that learns those samples, `fake_updates` steps for each one of the student.
    `adversarial_weight` above 0: of what a GAN head on the fake network's bottleneck says of them; `critic_weight`: of
    the head's own loss beside the fake score's. Learning rate None: the student's.
    """

    guidance_scale: Range = (8.0, 8.0)
    t_range: Annotated[tuple[Probability, Probability], Field(strict=False)] = (0.02, 0.98)
    fake_updates: Positive = 5
    fake_learning_rate: Annotated[float, Field(gt=0)] | None = None
    adversarial_weight: NonNegative = 0.0
    critic_weight: NonNegative = 1e-2

    @model_validator(mode="after")
    def _levels(self) -> MatchingStage:
        if self.t_range[0] > self.t_range[1]:
            raise ValueError(f"t_range {list(self.t_range)} is not a range; the smaller value comes first")
        if self.adversarial_weight == 0:
            self._belong("adversarial_weight above 0", "critic_weight")
        return self

    @property
    def score_guidance(self) -> tuple[float, float]:
        """That of the base model as the real score."""
        return self.guidance_scale

    @property
    def score_passes(self) -> int:
        return 1 if self.score_guidance == (1.0, 1.0) else 2

    def matching_evaluations(self, simulated: float, real: float) -> tuple[float, float]:
        """Of the student's step, with both scores, and of all the fake score's steps, where a sample takes `simulated`
        passes before its last. The GAN head looks at one picture in the former, and at two in each of the latter."""
        look = 3 * ENCODER if self.adversarial_weight > 0 else 0.0
        return simulated + 3 + real + 1 + look, self.fake_updates * (simulated + 1 + 3 + 2 * look)


def paired_critic_evaluations(unpaired: float) -> float:
    """What an encoder critic costs a sample, on average over a stage whose last part `unpaired` shows it no starts: the
    student's end with a gradient and the start without; in the critic's step both ends and the start, with one."""
    return ENCODER * ((3 + 2 * 3) + (1.0 - unpaired) * (1 + 3))

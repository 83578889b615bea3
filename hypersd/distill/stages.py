"""The stages of a recipe: one class per method, every option typed and bounded; those of Hyper-SD itself, and the list.

A new method adds its class here or in competitor_stages.py and one file, with its loss, beside tscd.py.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from hypersd.distill.competitor_stages import (
    DMD2Stage,
    LCMStage,
    LightningStage,
    PCMStage,
    PeRFlowStage,
    RGLCDStage,
    TDDStage,
)
from hypersd.distill.stage import (
    ENCODER,
    BaseStage,
    ConsistencyStage,
    MatchingStage,
    NonNegative,
    Positive,
    Probability,
    Range,
    Section,
    paired_critic_evaluations,
)


class TSCDStage(ConsistencyStage):
    """Trajectory segmented consistency distillation with `segments` segments (hypersd.distill.tscd).

    `teacher`: "base" is the undistilled model with guidance; "previous_stage" the EMA weights that the stage before
    ended with, in which guidance is already baked (in the first stage there is none before it: "base").
    `t_end`: where the two jumps of the loss meet, in [t_b, t_prev]: "uniform", "boundary", or "mixed", which is the
    boundary with probability `t_end_mix`.
    `weighting`: "inv_b2" measures the distance in units of the network's own error (it divides by the factor B that the
    jump multiplies the network's output with), so that high noise levels do not drown the others.
    `adversarial_weight`: of a critic's opinion of the student's ends (hypersd.distill.adversarial), 0 for none;
    `consistency_weight`: of the distance beside it. `staged_weights` takes both from STAGED, by the number of segments.
    `adaptive` multiplies the critic's opinion by the ratio of the two gradients (CTM), within [0.01, 10].
    `critic`: "features", heads on the frozen network; "encoder", a trained copy of its encoder that sees the start as
    well, but not in the last part `unconditional` of the stage (None: 0.25 with 1 or 2 segments, else 0).
    `critic_warmup`: the first part of the stage, in which the critic learns and has no say (CTM).
    `critic_real`: what it is to tell the student's ends from, those of the target network's jumps ("teacher") or, with
    one segment, pictures of the data diffused to t_end ("data"), which leave the teacher's trajectories behind.
    `sampling_guidance`: g of the sampler, for weights that keep guidance and negative prompts: taught with
    guidance_scale = [1, 1], data.caption_dropout of 0.1 to 0.2, and no fewer than 8 segments.
    """

    STAGED: ClassVar[dict[int, tuple[float, float]]] = {8: (1.0, 0.0), 4: (1.0, 0.1), 2: (0.5, 0.2), 1: (0.25, 0.3)}

    method: Literal["tscd"]
    consistency_weight: NonNegative = 1.0
    adversarial_weight: NonNegative = 0.0
    staged_weights: bool = False
    adaptive: bool = False
    critic: Literal["features", "encoder"] = "features"
    unconditional: Probability | None = None
    critic_warmup: Probability = 0.0
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    critic_real: Literal["teacher", "data"] = "teacher"
    segments: Positive
    grid: Positive = 40
    teacher: Literal["base", "previous_stage"] = "base"
    t_end: Literal["uniform", "boundary", "mixed"] = "mixed"
    t_end_mix: Probability = 0.25
    weighting: Literal["none", "inv_b2"] = "none"
    offset_noise: Annotated[float, Field(ge=0)] = 0.1
    sampling_guidance: Annotated[float, Field(ge=1)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> TSCDStage:
        if self.grid < self.segments:
            raise ValueError(f"grid = {self.grid} has fewer points than there are segments ({self.segments})")
        for name, default in (("consistency_weight", 1.0), ("adversarial_weight", 0.0)):
            if self.staged_weights and getattr(self, name) != default:
                raise ValueError(f"{name} and staged_weights = true exclude each other; leave one out")
        if not any(self.weights):
            raise ValueError("nothing to learn from: consistency_weight and adversarial_weight are both 0")
        if self.adversarial_weight == 0 and not self.staged_weights:
            of_the_critic = ("critic", "adaptive", "unconditional", "critic_warmup", "critic_learning_rate")
            self._belong("adversarial_weight above 0 or staged_weights", *of_the_critic, "critic_real")
        self._guided_once()
        if self.critic_real == "data" and self.segments > 1:
            raise ValueError(f'critic_real = "data" is for one segment, not {self.segments}: elsewhere ends are noisy')
        if self.critic == "features":
            self._belong('critic = "encoder"', "unconditional")
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """Of the distance and of the critic's opinion."""
        if not self.staged_weights:
            return self.consistency_weight, self.adversarial_weight
        return self.STAGED[min(self.STAGED, key=lambda k: abs(math.log(k / self.segments)))]

    @property
    def unpaired(self) -> float:
        """The last part of the stage, in which an encoder critic sees the ends alone."""
        if self.unconditional is not None:
            return self.unconditional
        return 0.25 if self.segments <= 2 else 0.0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.segments}"

    @property
    def steps(self) -> int:
        return self.segments

    @property
    def copies_encoder(self) -> bool:
        return self.critic == "encoder" and self.weights[1] > 0

    @property
    def network_evaluations(self) -> float:
        if self.weights[1] == 0:
            return super().network_evaluations
        jumps = 1 if self.critic_real == "data" else self.teacher_passes + 2  # of the critic's own step
        if self.critic == "encoder":
            look = paired_critic_evaluations(self.unpaired)
        else:
            look = 3 + 2  # at the student's end with a gradient; at two ends without
        if self.adaptive:  # its gradient once more
            look += 2 * (ENCODER if self.critic == "encoder" else 1)
        return super().network_evaluations + jumps + look - self._unasked

    @property
    def _unasked(self) -> float:
        """What the critic's silence saves: its looks at the student's ends, and at the starts where it sees those."""
        end = 3 + 2 * self.adaptive
        if self.critic == "features":
            return self.critic_warmup * end
        return ENCODER * (self.critic_warmup * end + min(self.critic_warmup, 1.0 - self.unpaired))

    def follow(self, before: BaseStage) -> None:
        if not isinstance(before, TSCDStage | TCDStage):
            raise ValueError(f'teacher = "previous_stage" needs a stage of tscd or tcd before it, not {before.name}')
        if self.grid < before.segments:
            raise ValueError(
                f"grid = {self.grid}, but one step of a teacher with {before.segments} segments "
                f"must not leave a segment: grid >= {before.segments}"
            )


class TCDStage(ConsistencyStage):
    """Trajectory consistency distillation (hypersd.distill.tcd): TSCD with one segment, as its authors trained it."""

    segments: ClassVar[int] = 1
    teacher: ClassVar[Literal["base"]] = "base"
    t_end: ClassVar[Literal["uniform"]] = "uniform"
    t_end_mix: ClassVar[float] = 0.0
    weights: ClassVar[tuple[float, float]] = (1.0, 0.0)

    method: Literal["tcd"]
    guidance_scale: Range = (3.0, 15.0)
    weighting: Literal["none", "inv_b2"] = "none"
    eta: Probability = 0.3  # of the sampler

    @property
    def steps(self) -> int:
        return self.segments


class DMDStage(MatchingStage):
    """Distribution matching on the student's one-step samples (hypersd.distill.dmd).

    The student, fed noise at `timestep` (None: the last one), makes x_0. `real_score`: "tscd" is the student as it was
    when the stage began, "base" the undistilled model with guidance: `real_guidance_scale` or, where none is given,
    `guidance_scale`, which is what the consistency loss is taught with.
    `anchor`: weight at the beginning and at the end of the stage, linear in between, of the mean square distance to
    what others make of the same noise in `anchor_steps` steps. `anchor_to`: the weights that the stage began with
    ("start"), or the base model with the real score's guidance ("base"; DMD's pairs; 20 steps or more).
    `consistency`: the share of each optimizer step's samples that trains on the one-segment consistency loss instead
    (hypersd.distill.tscd on `grid` points, taught by the base model), so that 2 to 8 steps keep working;
    `consistency_weight` is its weight. Of either loss a step takes the mean over its own samples.
    """

    method: Literal["dmd"]
    timestep: Annotated[int, Field(ge=1)] | None = None
    real_score: Literal["tscd", "base"] = "tscd"
    real_guidance_scale: Range | None = None
    anchor: Annotated[tuple[NonNegative, NonNegative], Field(strict=False)] = (0.25, 0.05)
    anchor_steps: Positive = 4
    anchor_to: Literal["start", "base"] = "start"
    consistency: Probability = 0.3
    consistency_weight: NonNegative = 1.0
    grid: Positive = 40

    @model_validator(mode="after")
    def _consistent(self) -> DMDStage:
        if self.real_score == "tscd" and self.anchor_to == "start":
            self._belong('real_score = "base" or anchor_to = "base"', "real_guidance_scale")
        if not any(self.anchor):
            self._belong("anchor above 0", "anchor_steps", "anchor_to")
        if self.consistency == 0:
            self._belong("consistency above 0", "consistency_weight")
            if self.real_score == "tscd":
                self._belong('real_score = "base" or consistency above 0', "grid")
            if self.real_score == "tscd" and self.anchor_to == "start":
                self._belong('real_score = "base" or consistency above 0 or anchor_to = "base"', "guidance_scale")
        return self

    @property
    def score_guidance(self) -> tuple[float, float]:
        return self.real_guidance_scale or self.guidance_scale

    def joint(self, samples: int) -> int:
        """How many of the first `samples` of an optimizer step train on the consistency loss."""
        return round(self.consistency * samples)

    def check(self, samples: int) -> None:
        joint = self.joint(samples)
        if 0 < self.consistency < 1 and joint in (0, samples):
            raise ValueError(
                f"consistency = {self.consistency:g} of a step's {samples} sample(s) is {'all' if joint else 'none'} "
                f"of them; raise train.batch_size or train.accumulation, or set consistency = {int(joint > 0)}"
            )

    @property
    def steps(self) -> int:
        return 1

    @property
    def wants(self) -> dict[str, int]:
        return {"timestep": (self.timestep or 0) + 1, "anchor_steps": self.anchor_steps, "grid": self.grid}

    @property
    def file(self) -> str:
        return "lora-dmd"  # a TSCD stage before it may have written lora-1step

    @property
    def roles(self) -> tuple[str, ...]:
        started = self.improves or (any(self.anchor) and self.anchor_to == "start")
        return ("fake", "start") if started else ("fake",)

    @property
    def improves(self) -> bool:
        return self.real_score == "tscd"

    @property
    def alone(self) -> str:
        return 'real_score = "base"'

    @property
    def network_evaluations(self) -> float:
        student, fake = self.matching_evaluations(0, 1 if self.real_score == "tscd" else self.score_passes)
        if any(self.anchor):
            student += self.anchor_steps * (self.score_passes if self.anchor_to == "base" else 1)
        joint = self.teacher_passes + 1 + 3
        return (1 - self.consistency) * student + self.consistency * joint + fake


class RewardTerm(Section):
    """One reward: `weight` times the mean of max(0, threshold - reward).

    `weight = 0` only watches it: an independent reward that falls while the others rise tells over-optimisation.
    `kind` says which (hypersd.models.rewards; those that begin with "scene_" belong to the embedded model), `path` the
    folder of its weights.
    """

    kind: str
    path: str | None = None
    weight: NonNegative = 1.0
    threshold: float | None = None

    @model_validator(mode="after")
    def _has_a_threshold(self) -> RewardTerm:
        if self.weight > 0 and self.threshold is None:
            raise ValueError(
                f"{self.kind} needs a threshold, the reward at which it stops pulling (or weight = 0: only watched)"
            )
        return self


class StructureTerm(Section):
    """Structure: a frozen instance segmenter must find a real picture's own instances in what the student makes of it.

    The picture is diffused to the first step of the roll-out below `start` T. `kind`: "scenes" (embedded model), "solo"
    (`path`: its safetensors file) or "transformers" (`path`: a model folder); `annotations`: COCO's JSON of instances.
    """

    kind: Literal["scenes", "solo", "transformers"]
    path: str | None = None
    annotations: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1e-3
    start: Annotated[float, Field(gt=0, le=1)] = 0.5


class FeedbackStage(BaseStage):
    """Human feedback learning on the few-step roll-out (hypersd.distill.feedback).

    `rollout`: step counts, one drawn for each batch; `solver` and `eta` are those of the weights it improves.
    `gradient_step`: the one step that has a gradient, drawn from the last half of the steps, from all, or the last.
    `adapter`: "separate" trains a LoRA of its own on top of the frozen weights so far, and exports it alone and merged;
    "continue" goes on with those weights. `anchor` times the squared latent distance to what the weights before would
    have made of the same step keeps the roll-out where it was.
    `check_every`: steps in each of the means that over-optimisation is told from; `max_drift`: how far the samples may
    move away from those of the beginning before there is a warning (hypersd.distill.probe).
    """

    method: Literal["feedback"]
    rewards: list[RewardTerm] = []
    structure: StructureTerm | None = None
    rollout: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (1, 2, 4, 8)
    solver: Literal["ddim", "tcd"] = "tcd"
    eta: Probability = 0.3
    gradient_step: Literal["last_half", "any", "last"] = "last_half"
    adapter: Literal["separate", "continue"] = "separate"
    anchor: NonNegative = 0.0
    check_every: Positive = 25
    max_drift: Annotated[float, Field(gt=0)] = 3.0

    @model_validator(mode="after")
    def _consistent(self) -> FeedbackStage:
        kinds = [reward.kind for reward in self.rewards]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            raise ValueError(f"reward {twice[0]} is there twice")
        if self.structure is None and not any(reward.weight > 0 for reward in self.rewards):
            raise ValueError("nothing to learn from: give a reward with a weight, or structure")
        if self.solver == "ddim" and self.eta > 0:
            self._belong('solver = "tcd"', "eta")
        return self

    @property
    def steps(self) -> int:
        return max(self.rollout)

    @property
    def wants(self) -> dict[str, int]:
        return {"rollout": self.steps}

    @property
    def file(self) -> str:
        return "lora-feedback"

    @property
    def needs_previous(self) -> bool:
        return self.adapter == "separate" or self.anchor > 0

    @property
    def is_separate(self) -> bool:
        return self.adapter == "separate"

    @property
    def improves(self) -> bool:
        return True

    def earliest(self, steps: int) -> int:
        """Of the steps of a roll-out, from 0, the first that may have the gradient; the others are those after it."""
        return {"any": 0, "last_half": steps - max(1, steps // 2), "last": steps - 1}[self.gradient_step]

    @property
    def network_evaluations(self) -> float:
        """The mean over the roll-outs; those of the structure term have the steps below its start alone."""

        def mean(lengths: list[int]) -> float:
            before = sum((self.earliest(n) + n - 1) / 2 for n in lengths) / len(lengths)
            return before + 3 + (self.anchor > 0)

        total = mean(list(self.rollout)) if self.rewards else 0.0
        if self.structure is not None:
            total += mean([max(1, math.floor(n * self.structure.start)) for n in self.rollout])
        return total

    @property
    def drops_captions(self) -> bool:
        return False  # a reward is asked about a picture and its caption


Competitors = TCDStage | LCMStage | PCMStage | TDDStage | PeRFlowStage | LightningStage | DMD2Stage | RGLCDStage
AnyStage = TSCDStage | Competitors | DMDStage | FeedbackStage
Stage = Annotated[AnyStage, Field(discriminator="method")]
STAGES: dict[str, type[BaseStage]] = {get_args(c.model_fields["method"].annotation)[0]: c for c in get_args(AnyStage)}

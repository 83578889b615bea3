"""What the trainer asks of a distillation method, and what a method may ask of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hypersd.distill.data import Batch
from hypersd.distill.stage import BaseStage
from hypersd.models.noise_process import NoiseProcess
from hypersd.models.rewards import Reward

STUDENT, EMA, PREVIOUS, BASE = "student", "ema", "previous", "base"


class Denoiser(Protocol):
    """One frozen network with an adapter per role, or a copy: hypersd.models' Backbone and FullBackbone, or anything
    that acts like them."""

    def __call__(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor: ...
    def role_parameters(self, role: str) -> dict[str, nn.Parameter]: ...
    def add_role(self, role: str, like: str | None = None) -> None: ...
    def drop_role(self, role: str) -> None: ...
    def copy_role(self, src: str, dst: str) -> None: ...
    def lerp_role(self, dst: str, src: str, weight: float) -> None: ...


class Draw:
    """All the randomness of one forward pass: a host and a device generator, both seeded by the same key of integers,
    so that a resumed run draws what an unbroken one would have drawn. `progress`: the part of the stage that is done,
    in [0, 1). `turn`: (p, n) of pass p of the n that make one optimizer step."""

    def __init__(
        self, key: tuple[int, ...], device: torch.device, progress: float = 0.0, turn: tuple[int, int] = (0, 1)
    ) -> None:
        self.progress, self.turn = progress, turn
        self.host = np.random.default_rng(key)
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
        """N(0, I) with the dtype and device of `like`."""
        return torch.randn(shape, generator=self.generator, dtype=like.dtype, device=like.device)


StructureLoss = Callable[[Tensor, np.ndarray], Tensor]


def asked_for(term: Any) -> str:
    """The name under which a stage's reward or structure term finds its own: the kind, and the files where it names
    some, so that stages may ask for the same kind with other weights."""
    named = (term.kind, term.path, getattr(term, "annotations", None))
    return ":".join(part for part in named if part is not None)


@dataclass(frozen=True)
class Context:
    """What a stage stands on. `uncond`: conditions of the empty prompt, each (1, ...); those it lacks are the same with
    and without a prompt. `previous`: the stage before, whose weights are role "previous"; None where they are not kept.
    `rewards`: by `asked_for`, or by kind alone; `structure`: likewise by `asked_for`, or one for all stages.
    """

    backbone: Denoiser
    process: NoiseProcess
    uncond: dict[str, Tensor]
    previous: BaseStage | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    structure: StructureLoss | Mapping[str, StructureLoss] | None = None

    def reward_of(self, term: Any) -> Reward | None:
        """Of a stage's reward term; None where there is none."""
        return self.rewards.get(asked_for(term), self.rewards.get(term.kind))

    def structure_of(self, term: Any) -> StructureLoss | None:
        """Of a stage's structure term; None where there is none."""
        return self.structure.get(asked_for(term)) if isinstance(self.structure, Mapping) else self.structure

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told its guidance: every batch then has the condition `guidance`, drawn from the
        stage's guidance_scale, for teacher, student and target alike, and no one needs a second pass."""
        return bool(getattr(self.backbone, "embeds_guidance", False))


@dataclass(frozen=True)
class Auxiliary:
    """What a method trains beside the student, a critic or the adapter of another role, by its own loss and clock.

    After each step of the student `updates` steps are taken on `loss`, each with batches and draws of its own; the
    student stands still meanwhile, as do these parameters in the student's step. All are fp32 and on the model's
    device. The name stands in the log (`<name>_loss`) and the checkpoint.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    loss: Callable[[Batch, Draw], Tensor]
    learning_rate: float | None = None  # None: the student's
    updates: int = 1
    betas: tuple[float, float] = (0.9, 0.999)


class Method(Protocol):
    """One stage of one method. It may have more than what stands here:

    measures: dict[str, Tensor]             what the newest `loss` found out, 0-d and without gradient: for the log
    monitors: Sequence[Monitor]             what looks at these, and at the auxiliaries' losses, for trouble (health.py)
    auxiliaries() -> Sequence[Auxiliary]    what is trained beside the student; asked for once, when the stage begins

    Random initial values come from torch's global generator, which the trainer has seeded.
    """

    def __init__(self, stage: Any, context: Context) -> None: ...

    @staticmethod
    def metadata(stage: Any, process: NoiseProcess) -> dict[str, str]:
        """What the stage's LoRA file says about sampling (see hypersd.models.export). Raises HypersdError or ValueError
        for a process that cannot serve the stage: the trainer asks before it begins."""
        ...

    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The scalar to minimise over the student's adapter; `batch` is on the model's device."""
        ...

"""The embedded model's rewards and its structure loss: the evaluator set "reward", never the set "judge".

The judge's scores can be watched, which tells over-optimisation, and nothing more: they are refused as something to
optimise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hypersd.emoji import evaluators
from hypersd.emoji.scenes import render
from hypersd.errors import HypersdError
from hypersd.models.rewards import Reward

KINDS = ("scene_alignment", "scene_preference")
WATCHED = ("judge_alignment", "judge_preference")


def check(kind: str, weight: float) -> None:
    """Raises HypersdError for an unknown kind, and for a judge with a weight."""
    if kind not in (*KINDS, *WATCHED):
        known = ", ".join((*KINDS, *WATCHED))
        raise HypersdError(f"reward {kind!r} is unknown; the embedded model has {known}", exit_code=2)
    if kind in WATCHED and weight > 0:
        raise HypersdError(f"{kind} judges and is never optimised; watch it with weight = 0", exit_code=2)


def load(kind: str, weight: float, device: str | torch.device = "cpu") -> Reward:
    """The reward of this kind; HypersdError as by `check`."""
    check(kind, weight)
    evaluator = evaluators.load("judge" if kind in WATCHED else "reward", torch.device(device))
    if kind.endswith("alignment"):
        return lambda images, captions: evaluator.alignment(images.float(), list(captions))
    return lambda images, captions: evaluator.preference(images.float())


def structure(seed: int, device: str | torch.device = "cpu") -> Callable[[Tensor, np.ndarray], Tensor]:
    """The small SOLO's loss on pictures of training scenes: (pictures, scene numbers) -> scalar. Their masks are drawn
    again, exactly."""
    evaluator = evaluators.load("reward", torch.device(device))

    def loss(images: Tensor, indices: np.ndarray | Sequence[int]) -> Tensor:
        scenes = [render(seed, 1, "train", int(index)) for index in indices]
        masks = torch.from_numpy(np.concatenate([scene.masks for scene in scenes])).to(images.device)
        return evaluator.structure_loss(images.float(), [scene.objects[0] for scene in scenes], masks)

    return loss

"""What judges pictures: any object with these methods. Images are (N, 3, H, W) float32 in [-1, 1] throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Evaluator(Protocol):
    """A judge of pictures. Only `features` is needed; a missing method leaves its column of the table empty."""

    def features(self, images: Tensor) -> Tensor:
        """(N, D): the space in which distances between sets of pictures are measured."""

    def alignment(self, images: Tensor, captions: list[str]) -> Tensor:
        """(N,): how well each picture fits its caption, higher is better."""

    def preference(self, images: Tensor) -> Tensor:
        """(N,): how much a picture is preferred whatever its caption, higher is better."""

    def objects(self, images: Tensor) -> Tensor:
        """(N, num_objects): logits of the presence of each known object."""


class FeatureEvaluator:
    """Only the distance columns, from any module that maps (N, 3, H, W) in [-1, 1] to (N, D)."""

    def __init__(self, module: nn.Module | Callable[[Tensor], Tensor]) -> None:
        self.module = module.eval() if isinstance(module, nn.Module) else module

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(N, D) float32."""
        return self.module(images).flatten(1).float()

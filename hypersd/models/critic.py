"""A critic of noisy latents: small trainable heads on the features of the frozen network (PCM, arXiv 2405.18407).

Every block of a UNet (down, middle, up), and of a transformer HEADS of its blocks at most, spread evenly, gives a
feature map, and each map has a head that scores it patch by patch. A pair of losses, both hinge: the critic's
E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))], and -E[D(fake)] for who makes the fakes; the heads are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.models.backbone import Backbone
from hypersd.models.networks import blocks, feature_map

HEADS = 24  # as many blocks as SD3 medium has; FLUX has 57
HIDDEN = 64


class Critic(nn.Module):
    """Heads on the blocks of `backbone`'s network, UNet, SD3 or FLUX. Its parameters are the heads' alone, float32; the
    backbone stays as it is, but gradients flow through it to the latents. Raises HypersdError for other networks."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        found, widths = blocks(getattr(backbone, "network", None))
        self._backbone = (backbone,)  # in a tuple: no submodule
        count = min(len(found), HEADS)
        chosen = [round((i + 1) * len(found) / count) - 1 for i in range(count)]  # the last block is among them
        self._blocks = [found[index] for index in chosen]
        self.heads = nn.ModuleList(_head(widths[index]) for index in chosen)
        self.to(backbone.device)

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Scores (B, 1, h, w) of each head, float32; real is above 0. x_t (B, C, H, W), timestep (B,)."""
        backbone = self._backbone[0]
        found: dict[int, Tensor] = {}

        def keep(index: int, module: nn.Module, inputs: Any, output: Any) -> None:
            found[index] = feature_map(backbone.network, output, x_t)

        hooks = [block.register_forward_hook(partial(keep, index)) for index, block in enumerate(self._blocks)]
        try:
            backbone(x_t, timestep, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return [head(found[index]) for index, head in enumerate(self.heads)]


def critic_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The hinge loss that the critic minimises, a scalar."""
    pairs = zip(real, fake, strict=True)
    return torch.stack([torch.relu(1.0 - r).mean() + torch.relu(1.0 + f).mean() for r, f in pairs]).mean()


def generator_loss(fake: list[Tensor]) -> Tensor:
    """What the maker of the fakes minimises, a scalar."""
    return -torch.stack([scores.mean() for scores in fake]).mean()


def accuracy(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The part of the samples that the critic tells right by its mean score, in [0, 1]."""

    def mean(scores: list[Tensor]) -> Tensor:
        return torch.stack([s.detach().flatten(1).mean(1) for s in scores]).mean(0)

    return 0.5 * ((mean(real) > 0).float().mean() + (mean(fake) < 0).float().mean())


def _head(width: int) -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(math.gcd(32, width), width),
        nn.Conv2d(width, HIDDEN, 3, padding=1),
        nn.GroupNorm(8, HIDDEN),
        nn.LeakyReLU(0.2),
        nn.Conv2d(HIDDEN, 1, 1),
    )

"""A critic of noisy latents: small trainable heads on the features of the frozen UNet (PCM, arXiv 2405.18407).

Every block of the frozen network (down, middle, up) gives a feature map, and each map has a head that scores it patch
by patch. A pair of losses, both hinge: the critic's E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))], and -E[D(fake)]
for who makes the fakes; the heads are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone

HIDDEN = 64


class Critic(nn.Module):
    """One head per block of `backbone`'s UNet. Its parameters are the heads' alone, float32; the backbone stays as it
    is, but gradients flow through it to the latents. Raises HypersdError for a network that is not a UNet."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        network: Any = getattr(backbone, "network", None)
        if not all(hasattr(network, name) for name in ("down_blocks", "mid_block", "up_blocks")):
            raise HypersdError("a critic needs a UNet: set the stages' adversarial_weight = 0 for this model")
        self._backbone = (backbone,)  # in a tuple: no submodule
        widths = list(network.config.block_out_channels)
        self._blocks = (*network.down_blocks, network.mid_block, *network.up_blocks)
        self.heads = nn.ModuleList(_head(width) for width in (*widths, widths[-1], *reversed(widths)))
        self.to(backbone.device)

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> list[Tensor]:
        """Scores (B, 1, h, w) of each head, float32; real is above 0. x_t (B, C, H, W), timestep (B,)."""
        found: dict[int, Tensor] = {}

        def keep(index: int, output: Any) -> None:  # a down block also gives what the skips need
            output = output[0] if isinstance(output, tuple) else output
            # a copy at once, for later layers may work in place; contiguous, for torch's group norm crashes in
            # backward on a channels-last input that needs no gradient
            found[index] = output.float().contiguous()

        hooks = [
            block.register_forward_hook(lambda module, inputs, output, index=index: keep(index, output))
            for index, block in enumerate(self._blocks)
        ]
        try:
            self._backbone[0](x_t, timestep, cond)
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

"""Ways of spoiling a picture, to teach a preference for clean ones: blur, noise, coarse pixels, blotches, torn parts"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blur(images: Tensor, strength: float) -> Tensor:
    sigma = 0.4 + 1.6 * strength
    offsets = torch.arange(-4, 5, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(F.pad(images, (4, 4, 0, 0), "replicate"), kernel, groups=images.shape[1])
    return F.conv2d(F.pad(rows, (0, 0, 4, 4), "replicate"), kernel.mT, groups=images.shape[1])


def noise(images: Tensor, strength: float) -> Tensor:
    return images + (0.03 + 0.3 * strength) * torch.randn_like(images)


def coarse(images: Tensor, strength: float) -> Tensor:
    side = max(8, round(images.shape[-1] * (0.75 - 0.5 * strength)))
    return F.interpolate(
        F.interpolate(images, side, mode="area"), images.shape[-1], mode="bilinear", align_corners=False
    )


def blotches(images: Tensor, strength: float) -> Tensor:
    """Smooth colour noise, as a poor sampler leaves."""
    low = torch.randn(len(images), 3, 8, 8, device=images.device, dtype=images.dtype)
    return images + (0.05 + 0.3 * strength) * F.interpolate(low, images.shape[-1], mode="bicubic", align_corners=False)


def torn(images: Tensor, strength: float) -> Tensor:
    """Patches of other pictures of the batch."""
    pieces = torch.rand(len(images), 1, 8, 8, device=images.device) < 0.08 + 0.3 * strength
    pieces = F.interpolate(pieces.float(), images.shape[-1], mode="nearest")
    return torch.where(pieces > 0, images.roll(1, 0), images)


def mixed(images: Tensor, strength: float) -> Tensor:
    """Two pictures at once: the average that an unfinished sample shows."""
    return images.lerp(images.roll(1, 0), 0.1 + 0.4 * strength)


KINDS = (blur, noise, coarse, blotches, torn, mixed)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every eighth of the batch spoiled in its own way and strength; (N, 3, H, W) in and out."""
    parts = []
    for part in images.split(max(1, len(images) // 8)):
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        parts.append(kind(part, float(torch.rand((), generator=generator))))
    return torch.cat(parts).clamp(-1, 1)

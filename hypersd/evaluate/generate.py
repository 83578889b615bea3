"""Captions to pictures as uint8 arrays: what a PNG would hold is what gets judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hypersd.models.backbone import Backbone
from hypersd.models.load import Components
from hypersd.models.prompts import decode_latents, encode_null, encode_prompts
from hypersd.sampling.sampler import denoiser, sample
from hypersd.sampling.solvers import Table


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def generate(
    components: Components,
    backbone: Backbone,
    table: Table,
    captions: Sequence[str],
    *,
    role: str = "base",
    seed: int = 0,
    batch_size: int = 64,
    negative_prompt: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Sample one picture per caption; yields (B, H, W, 3) uint8 batches.

    Picture i starts from noise that depends on `seed` and i alone, and solvers that add noise draw it per picture too:
    tables, roles and batch sizes share it. `negative_prompt`: what guided tables lead away from.
    """
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        cond = encode_prompts(components, part)
        null = encode_null(components, len(part), negative_prompt) if table.is_guided else None
        denoise = denoiser(backbone, cond, null=null, role=role)
        generators = [_generator(seed, start + index) for index in range(len(part))]
        x_T = torch.stack([torch.randn(components.latent_shape, generator=each) for each in generators])
        latents = sample(denoise, table, x_T.to(backbone.device), generator=generators)
        yield to_uint8(decode_latents(components, latents))
        if progress is not None:
            progress(start + len(part), len(captions))


def _generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on these integers alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))

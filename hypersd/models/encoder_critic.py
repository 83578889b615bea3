"""Critics that see a noisy latent as the network's first part sees it, and give one score.

That part is a UNet's encoder and middle block, and the first half of a transformer's blocks. EncoderCritic,
SDXL-Lightning's (Lin et al. 2024, arXiv 2402.13929): a trainable copy of it looks at where a jump started and at where
it ended, one after the other, and a small head at both findings. BottleneckCritic, DMD2's (arXiv 2405.14867): a head
alone, on what one role of the shared network finds.

Both are trained by the log losses: -log s(D(real)) - log(1 - s(D(fake))) for the critic, -log s(D(fake)) for who makes
the fakes (non-saturating), s the sigmoid.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hypersd.models.backbone import Backbone, allow_all
from hypersd.models.lora import LoraSlot
from hypersd.models.networks import blocks, feature_map, first_half, kind, patch_size, predict

HIDDEN = 128


class EncoderCritic(nn.Module):
    """The copy is float32 on the device of `backbone`, without adapters, and starts with its weights; the backbone
    itself is left alone. Raises HypersdError for other networks than UNet, SD3 and FLUX."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = _width(backbone)
        self.network = _trainable_copy(backbone.network)
        self.head = _head(backbone.network, 2 * width)
        self.to(backbone.device)

    def features(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(B, C, h, w) float32. x_t (B, C, H, W), timestep (B,)."""
        return bottleneck(self.network, x_t, timestep, cond)

    def score(self, end: Tensor, start: Tensor | None) -> Tensor:
        """(B, 1) from the features of the jump's end and start; real is above 0. None: of the end alone, D'(x_end)."""
        return self.head(torch.cat([torch.zeros_like(end) if start is None else start, end], dim=1))


class BottleneckCritic(nn.Module):
    """A head on the first part of `backbone` as `role` has it; gradients flow into both that want one, and
    into the latents. Its parameters are the head's alone, float32. Raises HypersdError for other networks than UNet,
    SD3 and FLUX."""

    def __init__(self, backbone: Backbone, role: str) -> None:
        super().__init__()
        self._backbone = (backbone,)  # in a tuple: no submodule
        self.role = role
        width = _width(backbone)
        self.head = _head(backbone.network, width).to(backbone.device)

    def forward(self, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(B, 1); real is above 0. x_t (B, C, H, W), timestep (B,)."""
        with self._backbone[0].network_of(self.role) as network, first_half(network):
            found = bottleneck(network, x_t, timestep, cond)
        return self.head(found)


def bottleneck(network: Any, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """(B, C, h, w) float32: what a UNet's middle block gives, without running those on the way up, or the last block
    of a transformer."""
    unet = kind(network) == "unet"
    dtype = (network.conv_in if unet else network.proj_out).weight.dtype
    x = x_t.to(dtype)
    cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
    if not unet:
        return _last_block(network, x, timestep, cond)
    emb = network.time_embedding(network.get_time_embed(sample=x, timestep=timestep))
    text = cond["encoder_hidden_states"]
    added = network.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=cond)
    emb = emb if added is None else emb + added
    text = network.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=cond)
    x = network.conv_in(x)
    for block in network.down_blocks:
        words = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        x, _ = block(hidden_states=x, temb=emb, **words)
    words = {"encoder_hidden_states": text} if getattr(network.mid_block, "has_cross_attention", False) else {}
    return feature_map(network, network.mid_block(x, emb, **words), x_t)


def _last_block(network: Any, x: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    found: list[Tensor] = []
    hook = blocks(network)[0][-1].register_forward_hook(
        lambda module, inputs, output: found.append(feature_map(network, output, x))
    )
    try:
        predict(network, x, timestep, cond)
    finally:
        hook.remove()
    return found[0]


def log_critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the critic minimises, a scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def log_generator_loss(fake: Tensor) -> Tensor:
    """What the maker of the fakes minimises, a scalar."""
    return F.softplus(-fake).mean()


def _width(backbone: Backbone) -> int:
    """Channels of what `bottleneck` gives."""
    _, widths = blocks(getattr(backbone, "network", None))
    return widths[len(widths) // 2]


def _trainable_copy(network: Any) -> Any:
    """The first part of the network, as it was before adapters, all weights float32 and trainable."""
    left_out = ("up_blocks", "conv_norm_out", "conv_act", "conv_out") if kind(network) == "unet" else ()
    memo: dict[int, Any] = {id(getattr(network, name)): None for name in left_out}
    for module in network.modules():
        if isinstance(module, LoraSlot):
            memo |= {id(adapters): nn.ParameterDict() for adapters in (module.a, module.b)}
    with first_half(network):
        found = copy.deepcopy(network, memo)
    for path, module in list(found.named_modules()):
        if isinstance(module, LoraSlot):
            found.set_submodule(path, module.base)
    for module in found.modules():  # a forward that recomputes belongs to the original
        vars(module).pop("forward", None)
    allow_all(found)
    return found.float().requires_grad_(True)


class _Halving(nn.Sequential):
    """Its layers, or nothing where a picture smaller than the network's usual ones is a single pixel already."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if min(x.shape[-2:]) > 1 else x


def _head(network: Any, width: int) -> nn.Module:
    """Convolutions that halve the picture until 2x2 pixels are left, then one number."""
    size = network.config.get("sample_size") or 128  # FLUX does not say
    size = size if isinstance(size, int) else max(size)
    unet = kind(network) == "unet"
    side = size / (2 ** (len(network.config.block_out_channels) - 1) if unet else patch_size(network))
    layers: list[nn.Module] = []
    for _ in range(max(1, math.ceil(math.log2(side)) - 1)):
        layers.append(_Halving(nn.Conv2d(width, HIDDEN, 4, stride=2, padding=1), nn.GroupNorm(32, HIDDEN), nn.SiLU()))
        width = HIDDEN
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

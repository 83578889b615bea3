"""How each kind of network is called and what a LoRA adapts in it: here UNet, SD3 and FLUX are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from hypersd.errors import HypersdError

# The layers that the LCM-LoRA training scripts adapt: attention, feed-forward and all convolutions of residual blocks.
LCM_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
# Every linear layer of the blocks of SD3 and FLUX but those of the norms; embedders stay as they are, too, so that a
# LoRA also fits variants of the network with a wider input (depth, fill, ...).
DIT_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
)
# what a guidance-distilled FLUX is told where the conditions do not say it
DEFAULT_GUIDANCE = 3.5

# conditions that UNet2DConditionModel wants packed into one dict (SDXL)
_ADDED_CONDITIONS = ("text_embeds", "time_ids")


def kind(network: nn.Module) -> str:
    """ "sd3", "flux", or "unet" for everything else."""
    if isinstance(network, SD3Transformer2DModel):
        return "sd3"
    return "flux" if isinstance(network, FluxTransformer2DModel) else "unet"


def check_network(network: Any, taker: str) -> None:
    """Raises TypeError for what is no network, of what `taker` takes."""
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"{taker} takes a network (UNet2DConditionModel, SD3Transformer2DModel, FluxTransformer2DModel or another "
            f"torch.nn.Module), not {type(network).__name__}; of a pipeline take its unet, transformer or vae"
        )


def default_targets(network: nn.Module) -> tuple[str, ...]:
    """The layers that get a LoRA unless a recipe or a spec names others."""
    return LCM_TARGETS if kind(network) == "unet" else DIT_TARGETS


def latent_channels(network: Any) -> int:
    """Channels of a latent; FLUX sees 2x2 pixels of it as one token."""
    channels = int(network.config.in_channels)
    return channels // 4 if kind(network) == "flux" else channels


def patch_size(network: Any) -> int:
    """Latent pixels along a side of what the network sees as one token; 1 where it sees pixels."""
    match kind(network):
        case "sd3":
            return int(network.config.patch_size)
        case "flux":
            return 2
        case _:
            return 1


def blocks(network: Any) -> tuple[list[nn.Module], list[int]]:
    """(the blocks in the order in which they run, their widths): down, middle and up blocks of a UNet, all blocks of a
    transformer. Raises HypersdError for a network that has neither, and for a UNet without a middle block."""
    if kind(network) != "unet":
        found = [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", ())]
        return found, [int(network.inner_dim)] * len(found)
    if not all(hasattr(network, name) for name in ("down_blocks", "mid_block", "up_blocks")):
        raise HypersdError(f"a critic needs a UNet or a transformer of SD3 or FLUX, not {type(network).__name__}")
    if network.mid_block is None:
        raise HypersdError("a critic needs a UNet with a middle block, and this one's mid_block_type is null")
    widths = [int(width) for width in network.config.block_out_channels]
    found = [*network.down_blocks, network.mid_block, *network.up_blocks]
    return found, [*widths, widths[-1], *reversed(widths)]


def feature_map(network: nn.Module, output: Any, x_t: Tensor) -> Tensor:
    """(B, C, h, w) float32 of what one of `blocks` gives for x_t (B, C, H, W).

    A copy, for later layers may work in place; contiguous, for torch's group norm crashes in backward on a
    channels-last input that needs no gradient.
    """
    if kind(network) == "unet":  # a down block also gives what the skips need
        output = output[0] if isinstance(output, tuple) else output
        return output.float().contiguous()
    height, width = (side // patch_size(network) for side in x_t.shape[-2:])
    tokens = output[-1] if isinstance(output, tuple) else output  # the text is before them
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)).float().contiguous()


@contextmanager
def first_half(network: Any) -> Iterator[None]:
    """Inside, a transformer has but the first half of its blocks and runs no others; a UNet stays as it is."""
    lists = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(network, name)]
    whole = {name: getattr(network, name) for name in lists}
    left = (sum(map(len, whole.values())) + 1) // 2
    try:
        for name, found in whole.items():
            setattr(network, name, found[:left])
            left -= len(getattr(network, name))
        yield
    finally:
        for name, found in whole.items():
            setattr(network, name, found)


def embeds_guidance(network: Any) -> bool:
    """Whether the network is told a guidance scale (guidance-distilled FLUX) instead of being run twice."""
    return kind(network) == "flux" and bool(network.config.guidance_embeds)


def predict(network: nn.Module, x_t: Tensor, timestep: Tensor | float, cond: Mapping[str, Any]) -> Tensor:
    """The output of the network in the shape of x_t (B, C, H, W).

    Conditions go by the names of the network's arguments. SDXL's `text_embeds` and `time_ids` are packed into
    `added_cond_kwargs`. For FLUX latents (H and W even) become tokens and back, position ids are made, the timestep is
    divided by 1000, and `guidance` (B,) is DEFAULT_GUIDANCE where a network wants it and has none; tokens (B, n, C) are
    handed on as they are, with the timestep in the network's own units and ids among the conditions.
    """
    arguments = dict(cond)
    if not embeds_guidance(network):
        arguments.pop("guidance", None)
    if kind(network) == "unet":
        if "added_cond_kwargs" not in arguments and "time_ids" in arguments:
            arguments["added_cond_kwargs"] = {k: arguments.pop(k) for k in _ADDED_CONDITIONS if k in arguments}
        return network(x_t, timestep=timestep, **arguments, return_dict=False)[0]
    timestep = torch.as_tensor(timestep, device=x_t.device).expand(len(x_t))
    if kind(network) == "sd3" or x_t.dim() == 3:
        return network(x_t, timestep=timestep, **arguments, return_dict=False)[0]
    if embeds_guidance(network):
        arguments.setdefault("guidance", torch.full((len(x_t),), DEFAULT_GUIDANCE, device=x_t.device))
    height, width = x_t.shape[-2:]
    text = arguments["encoder_hidden_states"]
    arguments.setdefault("txt_ids", x_t.new_zeros(text.shape[1], 3))
    arguments.setdefault("img_ids", _positions(height, width, x_t))
    m = network(_tokens(x_t), timestep=timestep / 1000, **arguments, return_dict=False)[0]
    return _picture(m, height, width)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 W/2, 4 C): a token holds 2x2 pixels, channel first."""
    b, c, height, width = x.shape
    if height % 2 or width % 2:
        raise HypersdError(f"FLUX latents have even height and width, got {height} x {width}")
    x = x.reshape(b, c, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, height // 2 * (width // 2), 4 * c)


def _picture(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `_tokens`."""
    b, _, c = tokens.shape
    x = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def _positions(height: int, width: int, like: Tensor) -> Tensor:
    """(H/2 W/2, 3): 0, row and column of each token."""
    rows = torch.arange(height // 2, device=like.device, dtype=like.dtype)
    columns = torch.arange(width // 2, device=like.device, dtype=like.dtype)
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((torch.zeros_like(grid[0]), *grid), dim=-1).flatten(0, 1)

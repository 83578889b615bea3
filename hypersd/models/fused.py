"""A diffusers network on the fused operators: GroupNorm with its SiLU, GEGLU, attention; fewer passes over memory.

Only classes of layers change, in place: weights, state dict, LoRA keys, module paths and attention processors stay
what they are, and layers that were wrapped meanwhile (LoRA slots) are found by their names as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from hypersd.errors import HypersdError
from hypersd.kernels import geglu, group_norm_silu
from hypersd.models import networks
from hypersd.models.attention import FusedAttention, FusedFluxAttention, fused_class


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm by the fused operator."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class FusedGroupNormSiLU(nn.GroupNorm):
    """GroupNorm (of x + shift) and the SiLU after it; the activation that followed is an `Applied`."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, shift=shift)


class Applied(nn.SiLU):
    """A SiLU that the layer before has applied already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedGEGLU(GEGLU):
    """The first layer of a feed-forward block: projection, then value * gelu(gate)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return geglu(self.proj(hidden_states))


class FusedResnetBlock2D(ResnetBlock2D):
    """norm1, SiLU, conv1, norm2 of + time embedding, SiLU, conv2, + shortcut. Its norms are FusedGroupNormSiLU."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        hidden, shift = self.conv1(self.norm1(input_tensor)), None
        if self.time_emb_proj is not None:
            temb = temb if self.skip_time_act else self.nonlinearity(temb)
            shift = self.time_emb_proj(temb).expand(hidden.shape[0], -1)
        elif temb is not None and self.time_embedding_norm == "default":
            hidden = hidden + temb
        hidden = self.conv2(self.dropout(self.norm2(hidden, shift)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = _add(self.conv2, hidden, input_tensor)
        return output if self.output_scale_factor == 1.0 else output / self.output_scale_factor


class FusedTransformer2DModel(Transformer2DModel):
    """Tokens become a picture again without being moved: they are its pixels, channels last."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not residual.is_contiguous(memory_format=torch.channels_last):
            plain = super()._get_output_for_continuous_inputs
            return plain(hidden_states, residual, batch_size, height, width, inner_dim)

        def picture(tokens: Tensor) -> Tensor:
            return tokens.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)

        if self.use_linear_projection:
            return picture(self.proj_out(hidden_states)) + residual  # in place of a view costs backward a copy
        return _add(self.proj_out, self.proj_out(picture(hidden_states)), residual)


def _add(layer: nn.Module, output: Tensor, residual: Tensor) -> Tensor:
    """Their sum, in place of `output`, that of a linear or convolution layer, which keeps its inputs alone for the
    gradient: at the widest point of a step there is one picture less. Not where the sum would have another dtype, and
    not where a hook may have kept or replaced the output."""
    if output.dtype != residual.dtype or torch.compiler.is_compiling() or _is_hooked(layer):
        return output + residual
    return output.add_(residual)


def _is_hooked(layer: nn.Module) -> bool:
    own = any(m._forward_hooks or m._backward_hooks or m._backward_pre_hooks for m in layer.modules())
    return own or _has_any_global_hook()


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    FusedGroupNorm: nn.GroupNorm,
    FusedGroupNormSiLU: nn.GroupNorm,
    Applied: nn.SiLU,
    FusedGEGLU: GEGLU,
    FusedResnetBlock2D: ResnetBlock2D,
    FusedTransformer2DModel: Transformer2DModel,
    FusedAttention: Attention,
    FusedFluxAttention: FluxAttention,
}
# what a layer becomes by itself, whatever is beside it
_ALONE = {_PLAIN[cls]: cls for cls in (FusedGroupNorm, FusedGEGLU, FusedTransformer2DModel)}


def fuse(network: nn.Module) -> nn.Module:
    """Put the fused operators into a diffusers UNet, VAE, SD3 or FLUX transformer, in place; returns `network`.

    UNet and VAE: residual blocks get GroupNorm + SiLU (those that resample inside or scale by the time embedding stay
    as they are), and so does the norm before the last convolution; the other GroupNorms and the GEGLU layers of
    feed-forward blocks follow; transformers leave channels-last pictures as they lie.
    UNet, SD3Transformer2DModel, FluxTransformer2DModel: attention runs in `hypersd.kernels.attention`, which hands to
    torch's what torch does best. The modulated norms and GELU feed-forward layers of SD3 and FLUX, and masked or
    unusual attention layers, stay diffusers'; so do those that get another processor, and all of them under another
    attention backend, for as long as they have it.

    Outputs agree to rounding (those of norms that took in their SiLU are after it); state dict and LoRA keys do not
    change. Do it before or after Backbone wraps the network, with or without gradient checkpointing, once or twice.
    Raises HypersdError, and changes nothing, where a hook stands in place of the forward of a layer that would change
    (offloading of diffusers and accelerate); TypeError for what is no network.
    """
    networks.check_network(network, "fuse")
    classes: dict[Any, type[nn.Module]] = {}
    for module in network.modules():
        if type(module) is ResnetBlock2D and _is_plain(module):
            classes |= {module: FusedResnetBlock2D, module.norm1: FusedGroupNormSiLU, module.norm2: FusedGroupNormSiLU}
        last, activation = getattr(module, "conv_norm_out", None), getattr(module, "conv_act", None)
        if type(last) is nn.GroupNorm and type(activation) is nn.SiLU:
            classes |= {last: FusedGroupNormSiLU, activation: Applied}
    for module in network.modules():
        if type(module) in _ALONE:
            classes.setdefault(module, _ALONE[type(module)])
        elif attention := fused_class(module):
            classes[module] = attention
    _change(network, classes)
    return network


def unfuse(network: nn.Module) -> nn.Module:
    """Undo `fuse`, in place; returns `network`. Raises as `fuse`."""
    networks.check_network(network, "unfuse")
    _change(network, {module: _PLAIN[type(module)] for module in network.modules() if type(module) in _PLAIN})
    return network


def is_fused(network: nn.Module) -> bool:
    """Whether any layer of the network runs on the fused operators."""
    return any(type(module) in _PLAIN for module in network.modules())


def _change(network: nn.Module, classes: Mapping[nn.Module, type[nn.Module]]) -> None:
    for path, module in network.named_modules():
        if module in classes and "forward" in vars(module):
            raise HypersdError(
                f"{path} ({type(module).__name__}) has a hook in place of its forward (offloading?), which would go on "
                "calling what it has now; remove the hooks, or fuse and unfuse before they are set"
            )
    for module, cls in classes.items():
        module.__class__ = cls


def _is_plain(block: ResnetBlock2D) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm != "scale_shift"
        and type(block.nonlinearity) is nn.SiLU
        and type(block.norm1) is type(block.norm2) is nn.GroupNorm
    )

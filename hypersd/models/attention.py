"""Attention of a diffusers network by the fused operator, on CPUs: torch's own takes up to six times as long there for
the short sequences of a small latent, and its backward in 16 bit. GPUs and unusual layers keep their processor.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from hypersd.kernels import attention


class FusedAttention:
    """A processor for diffusers' Attention: softmax(q k^T / sqrt(d)) v by the operator; masked, or on a GPU,
    `otherwise`."""

    def __init__(self, otherwise: AttnProcessor2_0) -> None:
        self.otherwise = otherwise

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None or hidden_states.device.type != "cpu" or hidden_states.dim() != 3:
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

        def heads(t: Tensor) -> Tensor:  # (batch, tokens, heads * d) -> (batch, heads, tokens, d)
            return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        out = attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def install(network: nn.Module) -> None:
    """Put FusedAttention around the processors of the layers that it can compute."""
    for attn in _attentions(network):
        plain = (
            attn.spatial_norm is None
            and attn.group_norm is None
            and attn.norm_q is None
            and attn.norm_k is None
            and not attn.norm_cross
            and not attn.residual_connection
            and attn.rescale_output_factor == 1.0
        )
        if plain and type(attn.processor) is AttnProcessor2_0:
            attn.processor = FusedAttention(attn.processor)


def remove(network: nn.Module) -> None:
    """Undo `install`."""
    for attn in _attentions(network):
        if isinstance(attn.processor, FusedAttention):
            attn.processor = attn.processor.otherwise


def _attentions(network: nn.Module) -> list[Attention]:
    return [module for module in network.modules() if isinstance(module, Attention)]

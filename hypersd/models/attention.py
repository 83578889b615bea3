"""Attention of short sequences on a CPU: a head at a time in C++, or plain products, where torch's fused kernel is slow.

At 64 queries and 16 to 64 keys the fused CPU kernel takes 1.3 to 2 times as long in float32 and, with its backward, up
to six times as long in bfloat16. Longer sequences, GPUs and unusual layers keep the processor that they have.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hypersd.kernels import _native

SHORT = 64 * 64  # queries times keys; the products hold that many weights for each head


class _Attend(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v over heads side by side in the last dimension; backward computes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.heads, ctx.scale = heads, (q.shape[-1] // heads) ** -0.5
        return torch.ops.hypersd._short_attention(q, k, v, heads, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.hypersd._short_attention_backward(
            grad.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.scale
        )
        return *grads, None


class ShortAttention:
    """A processor for diffusers' Attention: softmax(q k^T / sqrt(d)) v written out where short, else `otherwise`."""

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
        if attention_mask is not None or not self.is_short(hidden_states, context):
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        batch, queries, _ = hidden_states.shape
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)

        if q.dtype in _native.lora_dtypes() and q.shape[-1] % (2 * attn.heads) == 0:
            out = _Attend.apply(q.contiguous(), k.contiguous(), v.contiguous(), attn.heads)
            return attn.to_out[1](attn.to_out[0](out))

        def heads(t: Tensor) -> Tensor:  # (batch, tokens, heads * d) -> (batch * heads, tokens, d)
            return t.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)

        q, k, v = heads(q), heads(k), heads(v)
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
        out = torch.bmm(scores.softmax(-1), v)
        out = out.unflatten(0, (batch, attn.heads)).transpose(1, 2).reshape(batch, queries, -1)
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def is_short(x: Tensor, context: Tensor) -> bool:
        return x.device.type == "cpu" and x.dim() == 3 and x.shape[1] * context.shape[1] <= SHORT


def install(network: nn.Module) -> None:
    """Put ShortAttention around the processors of the layers that it can compute."""
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
            attn.processor = ShortAttention(attn.processor)


def remove(network: nn.Module) -> None:
    """Undo `install`."""
    for attn in _attentions(network):
        if isinstance(attn.processor, ShortAttention):
            attn.processor = attn.processor.otherwise


def _attentions(network: nn.Module) -> list[Attention]:
    return [module for module in network.modules() if isinstance(module, Attention)]

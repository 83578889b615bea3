"""Attention of a diffusers network by the operator, which picks what is fastest where it runs: its own kernels, or
torch's scaled_dot_product_attention. Projections, norms and rotary positions stay the network's.

The layers change, their processors stay diffusers' own. So what diffusers and its users do with processors goes on
working, and a layer that is masked, or whose processor or attention backend is another than the usual, computes as
diffusers does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from hypersd.kernels import attention


class FusedAttention(Attention):
    """The layers of a UNet and of SD3."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ours = _OURS.get(type(self.processor))
        is_usual = attention_mask is None and not kwargs and hidden_states.dim() == 3 and not _is_backend_chosen()
        if ours is None or not is_usual:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        return ours(self, hidden_states, encoder_hidden_states)


class FusedFluxAttention(FluxAttention):
    """FLUX: text and picture attend to both, in that order, with rotary positions; single blocks see one sequence."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        x, text, processor = hidden_states, encoder_hidden_states, self.processor
        if (
            type(processor) is not FluxAttnProcessor
            or attention_mask is not None
            or kwargs
            or self.fused_projections
            or processor._attention_backend is not None
            or processor._parallel_config is not None
            or _is_backend_chosen()
        ):
            return super().forward(x, text, attention_mask, image_rotary_emb, **kwargs)
        q, k, v = (_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            text_q, text_k, text_v = (_heads(project(text), self.heads) for project in projections)
            pairs = ((self.norm_added_q(text_q), q), (self.norm_added_k(text_k), k), (text_v, v))
            q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        out = _attend(q, k, v)
        if text is None:
            return out
        words, picture = out.split_with_sizes([text.shape[1], x.shape[1]], dim=1)
        return self.to_out[1](self.to_out[0](picture)), self.to_add_out(words)


def fused_class(layer: nn.Module) -> type[nn.Module] | None:
    """What the layer becomes; None for a layer that no fused class computes."""
    if type(layer) is FluxAttention:
        return FusedFluxAttention
    if (
        type(layer) is Attention
        and layer.spatial_norm is None
        and layer.group_norm is None
        and not layer.norm_cross
        and not layer.residual_connection
        and layer.rescale_output_factor == 1.0
    ):
        return FusedAttention
    return None


def has_joined_projections(network: nn.Module) -> bool:
    """Whether `fuse_qkv_projections` had the network compute q, k and v by one layer."""
    for layer in network.modules():
        if isinstance(layer, FluxAttention) and layer.fused_projections:
            return True
        # that of Attention goes on saying so when it is over
        if isinstance(layer, Attention) and type(layer.processor).__name__.startswith("Fused"):
            return True
    return False


def _of_unet(attn: Attention, x: Tensor, text: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, keys and values of the picture or of the text."""
    context = x if text is None else text
    q, k, v = (_heads(t, attn.heads) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
    return attn.to_out[1](attn.to_out[0](_attend(_normed(q, attn.norm_q), _normed(k, attn.norm_k), v)))


def _of_sd3(attn: Attention, x: Tensor, text: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Picture and text attend to both; a layer without text is the picture's own."""
    q, k, v = (_heads(project(x), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
    q, k = _normed(q, attn.norm_q), _normed(k, attn.norm_k)
    if text is None:
        return attn.to_out[1](attn.to_out[0](_attend(q, k, v)))
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    text_q, text_k, text_v = (_heads(project(text), attn.heads) for project in projections)
    text_q, text_k = _normed(text_q, attn.norm_added_q), _normed(text_k, attn.norm_added_k)
    pairs = ((q, text_q), (k, text_k), (v, text_v))
    out = _attend(*(torch.cat(pair, dim=1) for pair in pairs))
    picture, words = out.split_with_sizes([x.shape[1], text.shape[1]], dim=1)
    if not attn.context_pre_only:
        words = attn.to_add_out(words)
    return attn.to_out[1](attn.to_out[0](picture)), words


# what is computed for each processor that is known here
_OURS: dict[type, Callable[..., Any]] = {AttnProcessor2_0: _of_unet, JointAttnProcessor2_0: _of_sd3}


def _is_backend_chosen() -> bool:
    """Whether diffusers' `attention_backend`, `set_attention_backend` or environment variable names a backend."""
    return _AttentionBackendRegistry.get_active_backend()[0] != AttentionBackendName.NATIVE


def _heads(t: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * d) -> (batch, tokens, heads, d)."""
    return t.unflatten(-1, (heads, -1))


def _normed(t: Tensor, norm: nn.Module | None) -> Tensor:
    return t if norm is None else norm(t)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, tokens, heads, d) each -> (batch, queries, heads * d), no tensor moved."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

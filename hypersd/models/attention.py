"""Attention of a diffusers network by the operator, which picks what is fastest where it runs: its own kernels, or
torch's scaled_dot_product_attention. Projections, norms and rotary positions stay the network's. Layers that are masked
or unusual keep their processor.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from hypersd.kernels import attention


class FusedProcessor:
    """Stands before the processor `otherwise`, which takes over whatever this one cannot compute: a plain one unless
    given, for diffusers makes processors of the class that it finds (IP-Adapters)."""

    plain: type

    def __init__(self, otherwise: Any = None) -> None:
        self.otherwise = self.plain() if otherwise is None else otherwise


def _of_otherwise(name: str) -> property:
    return property(lambda self: getattr(self.otherwise, name, None), lambda self, v: setattr(self.otherwise, name, v))


class FusedAttention(FusedProcessor):
    """UNet: softmax(q k^T / sqrt(d)) v, keys and values of the picture or of the text."""

    plain = AttnProcessor2_0

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
        if attention_mask is not None or hidden_states.dim() != 3:
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        q, k, v = (_heads(t, attn.heads) for t in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
        return attn.to_out[1](attn.to_out[0](_attend(q, k, v)))


class FusedJointAttention(FusedProcessor):
    """SD3: picture and text attend to both; a layer without text is the picture's own."""

    plain = JointAttnProcessor2_0

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        x, text = hidden_states, encoder_hidden_states
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


class FusedFluxAttention(FusedProcessor):
    """FLUX: text and picture attend to both, in that order, with rotary positions; single blocks see one sequence."""

    plain = FluxAttnProcessor
    # chosen by the network's user, now or later: then `otherwise` computes
    _attention_backend, _parallel_config = _of_otherwise("_attention_backend"), _of_otherwise("_parallel_config")

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        x, text = hidden_states, encoder_hidden_states
        is_chosen = self._attention_backend is not None or self._parallel_config is not None
        if attention_mask is not None or is_chosen or getattr(attn, "fused_projections", False):
            return self.otherwise(attn, x, text, attention_mask, image_rotary_emb)
        q, k, v = (_heads(project(x), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(project(text), attn.heads) for project in projections)
            pairs = ((attn.norm_added_q(text_q), q), (attn.norm_added_k(text_k), k), (text_v, v))
            q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        out = _attend(q, k, v)
        if text is None:
            return out
        words, picture = out.split_with_sizes([text.shape[1], x.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(words)


_FUSED: dict[type, type[FusedProcessor]] = {
    fused.plain: fused for fused in (FusedAttention, FusedJointAttention, FusedFluxAttention)
}


def install(network: nn.Module) -> None:
    """Put the fused processors before those of the layers that they can compute."""
    for layer in _attentions(network):
        fused = _FUSED.get(type(layer.processor))
        if fused is not None and _is_plain(layer):
            layer.processor = fused(layer.processor)


def remove(network: nn.Module) -> None:
    """Undo `install`."""
    for layer in _attentions(network):
        if isinstance(layer.processor, FusedProcessor):
            layer.processor = layer.processor.otherwise


def is_installed(network: nn.Module) -> bool:
    return any(isinstance(layer.processor, FusedProcessor) for layer in _attentions(network))


def _attentions(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, Attention | FluxAttention)]


def _is_plain(layer: Any) -> bool:
    if isinstance(layer, FluxAttention):
        return True
    is_joint = type(layer.processor) is JointAttnProcessor2_0
    return (
        layer.spatial_norm is None
        and layer.group_norm is None
        and (is_joint or (layer.norm_q is None and layer.norm_k is None))
        and not layer.norm_cross
        and not layer.residual_connection
        and layer.rescale_output_factor == 1.0
    )


def _heads(t: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * d) -> (batch, tokens, heads, d)."""
    return t.unflatten(-1, (heads, -1))


def _normed(t: Tensor, norm: nn.Module | None) -> Tensor:
    return t if norm is None else norm(t)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, tokens, heads, d) each -> (batch, queries, heads * d), no tensor moved."""
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)

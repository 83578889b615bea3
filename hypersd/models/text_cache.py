"""Text keys and values projected once per prompt instead of once per step.

In a UNet the text goes into every cross-attention layer as it is, whatever the timestep: over a sampling run, to_k and
to_v of those layers give the same tensors at every step. In SD3 and FLUX each block changes the text together with the
picture, so nothing there can be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from hypersd.models.lora import is_folding, route, stamp, use_role

if TYPE_CHECKING:
    from hypersd.models.backbone import Backbone

# the entry of a condition dict that carries the projections
PROJECTED = "projected_text"
_TEXT = "encoder_hidden_states"


class TextCache:
    """The conditions of one batch of prompts for one role, with the text projected. Call it for each network call:

        conditions = backbone.text_cache(cond, role="student")
        m = backbone(x_t, timestep, conditions(), role="student")

    The first call projects, with the role's adapter; later calls hand out the same tensors, so outputs have the bits
    that they have without the cache. What was changed since, in place or by replacement (an adapter, a weight, the
    text), is projected again. Inference tensors do not say when they are changed: where the text, a weight or an
    adapter is one, nothing is kept. With gradients enabled the conditions come as they were given: the projection is
    part of what is differentiated. `reason` says why nothing is kept, and is empty where something is.
    """

    def __init__(self, backbone: Backbone, cond: Mapping[str, Any], *, role: str | Sequence[str]) -> None:
        self.backbone, self.cond, self.role = backbone, cond, role
        self.slots = {path: slot for path, slot in backbone.text_slots.items() if slot.layer is slot.base}
        self._never = why_not(backbone.network) or ("" if self.slots else "every text layer has a PEFT adapter inside")
        self._key: tuple[Any, ...] | None = None
        self._projected: dict[str, Tensor] = {}

    @property
    def reason(self) -> str:
        text = self.cond.get(_TEXT)
        if not self._never and text is not None and text.is_inference():
            return f"{_TEXT} is an inference tensor, whose changes cannot be seen"
        if not self._never and any(slot.is_unseen(self.role) for slot in self.slots.values()):
            return "a text layer or its adapter is an inference tensor, whose changes cannot be seen"
        return self._never

    def __call__(self) -> Mapping[str, Any]:
        if torch.is_grad_enabled() or _TEXT not in self.cond or self.reason:
            return self.cond
        text = self.cond[_TEXT]
        kind = text.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        versions = [slot.version(self.role) for slot in self.slots.values()]
        key = (stamp(text), self.backbone.dtype, autocast, is_folding(), *versions)
        if key != self._key:
            with use_role(route(self.role, text.device)):
                text = text.to(self.backbone.dtype)
                self._projected = {path: slot(text) for path, slot in self.slots.items()}
            self._key = key
        return {**self.cond, PROJECTED: self._projected}


def text_layers(network: nn.Module) -> list[str]:
    """Paths of the linear layers whose only input is the text, as it comes: to_k and to_v of cross-attention."""
    if not isinstance(network, UNet2DConditionModel) or network.config.dual_cross_attention:
        return []
    paths = []
    for path, block in network.named_modules():
        if isinstance(block, BasicTransformerBlock):
            for name in ("attn1", "attn2"):
                layer = getattr(block, name, None)
                if layer is not None and layer.is_cross_attention and not layer.norm_cross:
                    paths += [f"{path}.{name}.to_k", f"{path}.{name}.to_v"]
    return paths


def why_not(network: nn.Module) -> str:
    """Why the text is projected anew in every call of this network; empty where it is kept."""
    if not isinstance(network, UNet2DConditionModel):
        return f"the text tokens of {type(network).__name__} change with the timestep"
    paths = text_layers(network)
    if not paths:
        return "the network has no cross-attention layer that sees the text as it comes"
    if network.encoder_hid_proj is not None:
        return "the network changes the text before its layers see it"
    layers = {path.rpartition(".")[0] for path in paths}
    processors = {type(network.get_submodule(layer).processor) for layer in layers}
    strange = processors - {AttnProcessor, AttnProcessor2_0}
    return f"{next(iter(strange)).__name__} may treat the text in its own way" if strange else ""

"""Whole networks as roles: student, EMA, fake score, ... with all weights of their own; and their files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.files import atomic_write
from hypersd.kernels._lora import fold_weight
from hypersd.models import formats, fused, networks
from hypersd.models.backbone import fingerprint_of, recompute_feed_forward
from hypersd.models.lora import BASE, check_role_name, checkpoint, make_slot


class FullBackbone(nn.Module):
    """A frozen diffusers network, role "base", and for every other role a copy of the whole of it: what Backbone does
    with adapters, for students whose every weight is trained (Hyper-SD's one-step UNet, arXiv 2404.13686, section 3.3).

    A copy is float32, float64 beside a float64 network, and computes in the dtype of the network, by autocast where
    that has 16 bit. It takes 4 bytes a parameter, 16 with the gradient and the two moments of one that is trained:
    score distillation of SDXL (2.6 G parameters; student and fake score are trained, the EMA is not) 92 GB beside the
    network's own 5. Raises HypersdError where the network has PEFT adapters inside, and for unknown roles and sums of
    roles.
    """

    def __init__(self, network: nn.Module, roles: Sequence[str] = ("student",)) -> None:
        super().__init__()
        networks.check_network(network, "FullBackbone")
        if any(".lora_" in name for name, _ in network.named_parameters()):
            raise HypersdError(
                f"the {type(network).__name__} has PEFT adapters inside; merge or unload them before all weights are "
                "trained"
            )
        self.network = network.requires_grad_(False)
        self.copies = nn.ModuleDict()
        self.fingerprint = fingerprint_of(network)
        self._recomputes = False
        for role in roles:
            self.add_role(role)

    def forward(self, x_t: Tensor, timestep: Tensor | float, cond: Mapping[str, Any], *, role: str = BASE) -> Tensor:
        """The raw network output m, shape and dtype of x_t; the arguments are Backbone's, but for sums of roles."""
        arguments = {k: v.to(self.dtype) if _is_float(v) else v for k, v in cond.items()}
        with self.network_of(role) as network:
            output = networks.predict(network, x_t.to(self.dtype), timestep, arguments)
        return output.to(x_t.dtype)

    @contextmanager
    def network_of(self, role: str) -> Iterator[nn.Module]:
        """The network of the role, which inside computes in the dtype of the frozen one."""
        network = self.network if role == BASE else self._copy_of(role)
        cast = next(network.parameters()).dtype != self.dtype
        # a weight is used once in a pass: there is nothing to gain from keeping its 16-bit form
        with torch.autocast(self.device.type, self.dtype if cast else None, enabled=cast, cache_enabled=False):
            yield network

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the frozen weights."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told a guidance scale (guidance-distilled FLUX)."""
        return networks.embeds_guidance(self.network)

    # roles

    @property
    def roles(self) -> list[str]:
        return list(self.copies)

    def add_role(self, role: str, like: str | None = None) -> None:
        """A new copy, of role `like` or of the frozen network."""
        self._check_new(role)
        source = self.network if like is None else self._copy_of(like)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        found = self._duplicate(source)
        # not found.to(): that of diffusers warns about every cast. One memory format: a resumed run must have the same
        nn.Module.to(found, dtype=dtype, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.copies[role] = found.requires_grad_(True)

    def drop_role(self, role: str) -> None:
        self._copy_of(role)
        del self.copies[role]

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's weights in module order, by diffusers' names."""
        return dict(self._copy_of(role).named_parameters())

    @torch.no_grad()
    def copy_role(self, src: str, dst: str) -> None:
        """dst := src, in place (the tensors of dst stay the same objects)."""
        torch._foreach_copy_(self._weights(dst), self._weights(src))

    @torch.no_grad()
    def lerp_role(self, dst: str, src: str, weight: float) -> None:
        """dst += weight * (src - dst), in place: an EMA update with decay 1 - weight."""
        torch._foreach_lerp_(self._weights(dst), self._weights(src), weight)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """As Backbone's: there is nothing to fold."""
        yield

    # files

    @property
    def key_prefix(self) -> str:
        """What diffusers calls such a network: "unet" or "transformer"."""
        return "unet" if networks.kind(self.network) == "unet" else "transformer"

    @torch.no_grad()
    def load_lora_state_dict(self, state: Mapping[str, Tensor], role: str, *, scale: float | None = None) -> None:
        """W += scale b a in the layers of a LoRA in any known key layout; an unknown role is created first.

        Without alpha in the file `scale` (default 1) applies. Raises HypersdError, naming the first key or shape that
        does not fit, before anything is changed.
        """
        modules = {p: m for p, m in self.network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        layers = formats.decode(state, list(modules), self.key_prefix, default_scale=scale)
        shapes = {}
        for path, layer in layers.items():
            slot = make_slot(modules[path])
            assert slot is not None
            shapes[path] = slot.adapter_shapes(layer.a.shape[0])
            formats.check_shapes(path, layer, *shapes[path])
        if role not in self.copies:
            self.add_role(role)
        for path, layer in layers.items():
            weight: Any = self._copy_of(role).get_submodule(path).weight
            a, b = (
                p.to(weight.device, weight.dtype).reshape(shape)
                for p, shape in zip((layer.a, layer.b), shapes[path], strict=True)
            )
            weight.copy_(fold_weight(weight, a, b, layer.scale))

    def network_state_dict(self, role: str) -> dict[str, Tensor]:
        """The role by diffusers' names, as detached CPU copies in the dtype of the frozen network."""
        state = self._copy_of(role).state_dict()
        return {name: tensor.to("cpu", self.dtype, copy=True).contiguous() for name, tensor in state.items()}

    def load_network_state_dict(self, state: Mapping[str, Tensor], role: str) -> None:
        """A new role with these weights, by diffusers' names: one to sample with, frozen, in the dtype of the network.

        Raises HypersdError, naming the first key that does not fit, before anything is changed.
        """
        self._check_new(role)
        own = self.network.state_dict()
        for name in [*own, *state]:
            if name not in own or name not in state:
                where = "the file lacks" if name in own else "this model has no"
                raise HypersdError(f"the weights are for another model: {where} {name}")
            if own[name].shape != state[name].shape:
                found, wanted = (tuple(weights[name].shape) for weights in (state, own))
                raise HypersdError(f"the weights are for another model: {name} has shape {found}, not {wanted}")
        weights = self._duplicate(self.network)
        weights.load_state_dict(state)
        self.copies[role] = weights

    # the networks

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward."""
        for network in self._all():
            network.enable_gradient_checkpointing(checkpoint)  # type: ignore[operator]

    def fuse(self) -> None:
        """Compute norms, activations and attention by the fused operators: faster, in another order of the sums."""
        for network in self._all():
            fused.fuse(network)

    def recompute_feed_forward(self) -> None:
        """Recompute only the feed-forward layers of the transformer blocks."""
        self._recomputes = True
        for network in self._all():
            recompute_feed_forward(network)

    def _all(self) -> list[nn.Module]:
        return [self.network, *self.copies.values()]

    def _weights(self, role: str) -> list[Tensor]:
        return list(self._copy_of(role).parameters())

    def _duplicate(self, network: nn.Module) -> nn.Module:
        found = copy.deepcopy(network)
        for module in found.modules():  # a forward that recomputes belongs to the original
            vars(module).pop("forward", None)
        if self._recomputes:
            recompute_feed_forward(found)
        return found

    def _copy_of(self, role: str) -> nn.Module:
        if role not in self.copies:
            why = "; roles that are whole networks have no sum" if "+" in role else ""
            raise HypersdError(f"the backbone has no role {role!r}; it has {[BASE, *self.copies]}{why}")
        return self.copies[role]

    def _check_new(self, role: str) -> None:
        check_role_name(role)
        if role in self.copies:
            raise HypersdError(f"the backbone already has a role {role!r}")


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def save_network(
    path: str | Path, backbone: FullBackbone, role: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a role as safetensors, atomically, by diffusers' names, in the dtype of the frozen network: 16 bit unless
    the training was in float32. As diffusion_pytorch_model.safetensors beside the model's config.json it is a model.

    `metadata` says how to sample, as of `save_lora`; `base_model` (fingerprint) is added. Raises HypersdError when the
    file cannot be written.
    """
    full = {name: str(value) for name, value in (metadata or {}).items()}
    full |= {"format": "pt", "base_model": backbone.fingerprint}
    state = backbone.network_state_dict(role)
    return atomic_write(path, lambda temporary: save_file(state, temporary, metadata=full))

"""One frozen network, many roles: teacher, student, EMA target, ... are LoRA slots on one copy of the weights."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.models import attention, formats, fused, networks, text_cache
from hypersd.models.lora import (
    BASE,
    LoraSlot,
    LoraSpec,
    check_role_name,
    checkpoint,
    folded_weights,
    make_slot,
    plain_layer,
    projected_text,
    route,
    use_role,
)
from hypersd.models.text_cache import TextCache


class Backbone(nn.Module):
    """A frozen diffusers network whose layers in `spec.targets` hold one LoRA adapter per role.

    The network is changed in place (its target layers are wrapped) until `release()` hands it back. Adapters that it
    already carries through PEFT stay part of the base. Calls read their role from their argument alone, so teacher,
    student and target calls may be mixed freely, also between a checkpointed forward and its backward.
    Meanwhile those of its methods refuse that would take wrapped layers for diffusers' own (saving, PEFT, joining q, k
    and v). Raises HypersdError when no layer matches one of the targets, q, k and v are joined already or a role is
    unknown; TypeError for what is no network.
    """

    def __init__(self, network: nn.Module, spec: LoraSpec | None = None, roles: Sequence[str] = ("student",)) -> None:
        super().__init__()
        networks.check_network(network, "Backbone")
        self.spec = spec or LoraSpec(targets=networks.default_targets(network))
        self.network = network
        self.slots: dict[str, LoraSlot] = {}
        self.text_slots: dict[str, LoraSlot] = {}  # around the layers of text_cache, adapted or not
        self.roles: list[str] = []
        self._requires_grad = {_bare(name): p.requires_grad for name, p in network.named_parameters()}
        self._is_fused = fused.is_fused(network)
        self._checkpointing = bool(getattr(network, "is_gradient_checkpointing", False))
        self.fingerprint = fingerprint_of(network)
        network.requires_grad_(False)
        paths = [path for path, module in network.named_modules() if self.spec.matches(path) and _can_wrap(module)]
        # the usual lists name layers that only some networks have
        is_usual = self.spec.targets in (networks.LCM_TARGETS, networks.DIT_TARGETS)
        unmatched = [] if is_usual else self.spec.unmatched(paths)
        if attention.has_joined_projections(network):
            raise HypersdError(
                f"this {type(network).__name__} computes q, k and v by joined layers, which take no LoRA; call its "
                "unfuse_qkv_projections first"
            )
        if not paths or unmatched:
            raise HypersdError(
                f"no linear or convolution layer of {type(network).__name__} matches the LoRA targets "
                f"{', '.join(unmatched or self.spec.targets)}; check lora.targets"
            )
        for method in _REFUSED:
            if hasattr(network, method):
                vars(network)[method] = functools.partial(_refuse, method)
        for path in paths:
            self._wrap(path)
        for path in text_cache.text_layers(network):
            self._wrap_text(path)
        for role in roles:
            self.add_role(role)
        if self._checkpointing:
            self.enable_gradient_checkpointing()

    def forward(
        self, x_t: Tensor, timestep: Tensor | float, cond: Mapping[str, Any], *, role: str | Sequence[str] = BASE
    ) -> Tensor:
        """The raw network output m, shape and dtype of x_t.

        x_t (B, C, H, W); timestep a number or a tensor of shape () or (B,), of 1000 for all networks (NoiseProcess's
        `network_timestep`); cond the network's further keyword arguments (`encoder_hidden_states`, ...), see
        `networks.predict`, or what a `text_cache` made of them. Floating inputs are cast to the dtype of the network.
        `role` may be a sum, "previous+student": both adapters at once; or a sequence of B roles, one for each sample,
        of which neighbours with the same are cheapest. Raises HypersdError for an unknown role or another number.
        """
        if not isinstance(role, str) and len(role) != len(x_t):
            raise HypersdError(f"{len(role)} roles for {len(x_t)} samples; give one role, or one for each")
        self._check_roles(role)
        dtype = self.dtype
        arguments = {k: v.to(dtype) if _is_float(v) else v for k, v in cond.items()}
        projected = arguments.pop(text_cache.PROJECTED, None)
        with use_role(route(role, x_t.device)), projected_text(projected):
            output = networks.predict(self.network, x_t.to(dtype), timestep, arguments)
        return output.to(x_t.dtype)

    def text_cache(self, cond: Mapping[str, Any], *, role: str | Sequence[str] = BASE) -> TextCache:
        """`cond` for many calls of this role, or these: text keys and values are projected once, not in every call."""
        return TextCache(self, cond, role=role)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the frozen weights."""
        return next(iter(self.slots.values())).weight.dtype

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told a guidance scale (guidance-distilled FLUX)."""
        return networks.embeds_guidance(self.network)

    @property
    def device(self) -> torch.device:
        return next(iter(self.slots.values())).weight.device

    @contextmanager
    def network_of(self, role: str) -> Iterator[nn.Module]:
        """The network, which inside runs with the adapter of the role, or sum of roles. Raises HypersdError for an
        unknown one."""
        if not isinstance(role, str):
            raise TypeError(f"network_of takes the name of a role (str), got {type(role).__name__}")
        self._check_roles(role)
        with use_role(role):
            yield self.network

    # roles

    def add_role(self, role: str, like: str | None = None, *, generator: torch.Generator | None = None) -> None:
        """A new adapter set: a copy of role `like`, or a ~ Kaiming uniform and b = 0 (starts as the base model)."""
        check_role_name(role)
        if role in self.roles:
            raise HypersdError(f"the backbone already has a role {role!r}")
        if like is not None:
            self._require(like)
        for slot in self.slots.values():
            if like is None:
                slot.add(role, self.spec.rank, self.spec.scale, generator)
            elif like in slot.scale:
                slot.set(role, slot.a[like].detach().clone(), slot.b[like].detach().clone(), slot.scale[like])
        self.roles.append(role)

    def drop_role(self, role: str) -> None:
        self._require(role)
        for slot in self.slots.values():
            slot.drop(role)
        self.roles.remove(role)

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """The role's fp32 adapter tensors in module order: `<path>.lora_A.weight`, `<path>.lora_B.weight`."""
        named = {}
        for path, slot in self.role_slots(role).items():
            named[f"{path}.lora_A.weight"], named[f"{path}.lora_B.weight"] = slot.a[role], slot.b[role]
        return named

    def role_slots(self, role: str) -> dict[str, LoraSlot]:
        """The layers that the role (or any role of a sum) adapts, by module path, in module order."""
        parts = role.split("+")
        for part in parts:
            self._require(part)
        return {path: slot for path, slot in self.slots.items() if any(part in slot.scale for part in parts)}

    def role_scales(self, role: str) -> list[float]:
        """What the role's update is multiplied by, layer by layer, in module order."""
        return [slot.scale[role] for slot in self.role_slots(role).values()]

    def set_role_scales(self, role: str, scales: Sequence[float]) -> None:
        """Undo `role_scales`."""
        for slot, scale in zip(self.role_slots(role).values(), scales, strict=True):
            slot.scale[role] = float(scale)

    @torch.no_grad()
    def copy_role(self, src: str, dst: str) -> None:
        """dst := src, in place (the tensors of dst stay the same objects)."""
        new, old = self._pair(src, dst)
        torch._foreach_copy_(old, new)
        for slot in self.role_slots(src).values():
            slot.scale[dst] = slot.scale[src]

    @torch.no_grad()
    def lerp_role(self, dst: str, src: str, weight: float) -> None:
        """dst += weight * (src - dst), in place: an EMA update with decay 1 - weight."""
        new, old = self._pair(src, dst)
        for path, slot in self.role_slots(src).items():
            if slot.scale[src] != slot.scale[dst]:
                raise HypersdError(f"roles {src!r} and {dst!r} have different LoRA scales at {path}")
        torch._foreach_lerp_(old, new, weight)

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Inside, fp32 and fp64 calls without gradient keep W + scale b a per layer and role: base speed.

        Costs one more copy of the adapted weights per role used. An adapter that changes is folded again.
        """
        try:
            with folded_weights():
                yield
        finally:
            for slot in self.slots.values():
                slot.clear_folded()

    # files

    @property
    def key_prefix(self) -> str:
        """First part of the LoRA keys of diffusers: "unet" or "transformer"."""
        return "unet" if "UNet" in type(self.network).__name__ else "transformer"

    def lora_state_dict(self, role: str, format: str = "peft") -> dict[str, Tensor]:
        """The role as `unet.<path>.lora_A.weight` ("peft", diffusers) or `lora_unet_<path>.lora_down.weight` ("kohya").

        Tensors are detached CPU copies, fp32. Kohya keys carry alpha; the PEFT format keeps it in the file's metadata.
        Raises HypersdError for kohya keys of SD3 and FLUX, whose layers their readers know by other names.
        A sum of roles, "p+q", is their exact merge: ranks side by side.
        """
        return formats.encode(self.lora_layers(role), self.key_prefix, format)

    @torch.no_grad()
    def lora_layers(self, role: str) -> dict[str, formats.Layer]:
        """The role, or sum of roles, as detached CPU copies by module path."""
        layers = {}
        for path, slot in self.role_slots(role).items():
            a, b, scale = slot.adapter(role)  # type: ignore[misc]
            a, b = (p.detach().cpu().clone(memory_format=torch.contiguous_format) for p in (a, b))
            layers[path] = formats.Layer(a, b, scale)
        return layers

    def load_lora_state_dict(self, state: Mapping[str, Tensor], role: str, *, scale: float | None = None) -> None:
        """Set a role from PEFT, diffusers or kohya keys; without alpha in the file `scale` (default 1) applies.

        An unknown role is created with the ranks and layers of the file; layers outside of `spec.targets` are wrapped.
        A known role must fit exactly and keeps its parameter objects. Raises HypersdError, naming the first key or
        shape that does not fit, before anything is changed.
        """
        layers = formats.decode(state, [path for path, _ in self._base_modules()], self.key_prefix, default_scale=scale)
        self.load_lora_layers(layers, role)

    def load_lora_layers(self, layers: Mapping[str, formats.Layer], role: str) -> None:
        """Undo `lora_layers`; as `load_lora_state_dict`, for layers by module path."""
        check_role_name(role)
        wrappable = dict(self._base_modules())
        for path, layer in layers.items():
            slot = self.slots.get(path) or make_slot(wrappable[path])
            assert slot is not None
            formats.check_shapes(path, layer, *slot.adapter_shapes(layer.a.shape[0]))
        if role in self.roles:
            self._load_into(layers, role)
            return
        for path, layer in layers.items():
            slot = self.slots.get(path) or self._wrap(path)
            like = slot.weight
            dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
            shapes = slot.adapter_shapes(layer.a.shape[0])
            a, b = (
                p.detach().to(device=like.device, dtype=dtype, copy=True).reshape(shape)
                for p, shape in zip((layer.a, layer.b), shapes, strict=True)
            )
            slot.set(role, a, b, layer.scale)
        self.roles.append(role)

    @torch.no_grad()
    def _load_into(self, layers: Mapping[str, formats.Layer], role: str) -> None:
        own = self.role_slots(role)
        for path in [*own, *layers]:
            if path not in layers or path not in own:
                where = "the file lacks" if path not in layers else f"role {role!r} lacks"
                raise HypersdError(f"the LoRA does not fit: {where} layer {path}; check lora.targets")
            if own[path].a[role].shape[0] != layers[path].a.shape[0]:
                raise HypersdError(
                    f"the LoRA does not fit: {path} has rank {layers[path].a.shape[0]} in the file and "
                    f"{own[path].a[role].shape[0]} in role {role!r}; set lora.rank to the file's"
                )
        for path, slot in own.items():
            slot.a[role].copy_(layers[path].a.reshape(slot.a[role].shape))
            slot.b[role].copy_(layers[path].b.reshape(slot.b[role].shape))
            slot.scale[role] = layers[path].scale

    # the network

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, each block with the role that its forward pass had."""
        self.network.enable_gradient_checkpointing(checkpoint)  # type: ignore[operator]

    def fuse(self) -> None:
        """Compute norms, activations and attention by the fused operators: faster, in another order of the sums."""
        fused.fuse(self.network)

    def recompute_feed_forward(self) -> None:
        """Recompute only the feed-forward layers of the transformer blocks: their wide hidden states are a quarter of
        what a UNet keeps for backward, and cost little to compute again."""
        recompute_feed_forward(self.network)

    def release(self) -> nn.Module:
        """The original network, bit for bit and with its own requires_grad flags; this backbone is empty afterwards.

        It stays fused if it came so. Raises HypersdError as `unfuse`.
        """
        if not self._is_fused:
            fused.unfuse(self.network)
        for path, slot in {**self.text_slots, **self.slots}.items():
            self.network.set_submodule(path, slot.base)
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(_bare(name), parameter.requires_grad))
        for module in self.network.modules():
            if isinstance(module, FeedForward):
                vars(module).pop("forward", None)
        allow_all(self.network)
        if getattr(self.network, "is_gradient_checkpointing", False):
            self.network.disable_gradient_checkpointing()  # type: ignore[operator]
            if self._checkpointing:
                self.network.enable_gradient_checkpointing()  # type: ignore[operator]
        self.slots, self.text_slots, self.roles = {}, {}, []
        return self.network

    def _wrap(self, path: str) -> LoraSlot:
        slot = self.text_slots.get(path) or make_slot(self.network.get_submodule(path))
        assert slot is not None
        self.network.set_submodule(path, slot)
        self.slots[path] = slot
        return slot

    def _wrap_text(self, path: str) -> None:
        slot = self.slots.get(path) or make_slot(self.network.get_submodule(path))
        if slot is not None:
            self.network.set_submodule(path, slot)
            self.text_slots[path], slot.path = slot, path

    def _base_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every layer of the original network that can take an adapter, whether wrapped already or not."""
        for path, module in self.network.named_modules():
            if any(parent in self.slots or parent in self.text_slots for parent in _parents(path)):
                continue
            module = module.base if isinstance(module, LoraSlot) else module
            if _can_wrap(module):
                yield path, module

    def _pair(self, src: str, dst: str) -> tuple[list[Tensor], list[Tensor]]:
        new, old = self.role_parameters(src), self.role_parameters(dst)
        if [(k, p.shape) for k, p in new.items()] != [(k, p.shape) for k, p in old.items()]:
            raise HypersdError(f"roles {src!r} and {dst!r} adapt different layers or ranks")
        return list(new.values()), list(old.values())

    def _check_roles(self, role: str | Sequence[str]) -> None:
        for part in (part for each in ([role] if isinstance(role, str) else role) for part in each.split("+")):
            if part != BASE and part not in self.roles:
                raise HypersdError(f"the backbone has no role {part!r}; it has {[BASE, *self.roles]}")

    def _require(self, role: str) -> None:
        if role not in self.roles:
            raise HypersdError(f"the backbone has no role {role!r}; it has {self.roles}")


def fingerprint_of(network: nn.Module) -> str:
    """Class and a hash of all weight names and shapes, PEFT adapters aside: equal for models that can share a LoRA."""
    names = (
        f"{_bare(name)}:{tuple(parameter.shape)}"
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    )
    return f"{type(network).__name__}-{hashlib.sha256(chr(10).join(sorted(names)).encode()).hexdigest()[:16]}"


def _bare(name: str) -> str:
    """The name that a parameter has without PEFT adapters."""
    return name.replace(".base_layer", "")


def recompute_feed_forward(network: nn.Module) -> None:
    """See Backbone's method."""
    for module in network.modules():
        if isinstance(module, FeedForward) and "forward" not in vars(module):
            module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            return checkpoint(functools.partial(forward, **kwargs), *args)
        return forward(*args, **kwargs)

    return run


# methods of a network that do not know wrapped layers: what to do instead
_REFUSED = {
    "save_pretrained": "write a role by hypersd.models.save_lora(path, backbone, role), or save what release() returns",
    "load_lora_adapter": "use backbone.load_lora_state_dict(hypersd.models.load_lora(path)[0], role) instead",
    "add_adapter": "use backbone.add_role, or add it before",
    "fuse_qkv_projections": "release() the network first; joined layers take no LoRA",
}


def _refuse(method: str, *args: Any, **kwargs: Any) -> None:
    raise HypersdError(f"{method} does not know the layers of a network inside a Backbone: {_REFUSED[method]}")


def allow_all(network: nn.Module) -> None:
    """The network's own methods again, where a Backbone made them refuse."""
    for method in _REFUSED:
        vars(network).pop(method, None)


def _can_wrap(module: nn.Module) -> bool:
    return isinstance(plain_layer(module), nn.Linear | nn.Conv2d)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _parents(path: str) -> list[str]:
    """'a.b.c' -> ['a', 'a.b']."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]

"""LoRA slots: one frozen layer, one low-rank adapter (a, b) per role, the role chosen by the call.

y = layer(x) + scale * b (a x), scale = alpha / rank (Hu et al. 2021). Which adapter runs is read from a context, never
from state that a caller switches: a recomputation during backward may happen long after the caller moved on to another
role, and must still see the role of its own forward (`checkpoint` below carries it there).
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from hypersd.errors import HypersdError
from hypersd.kernels import lora_conv2d, lora_linear, lora_linear_routed
from hypersd.kernels._lora import fold_weight
from hypersd.models.networks import LCM_TARGETS

BASE = "base"


class Routes(NamedTuple):
    """A role for each sample: `runs` of neighbours with the same, as (role, its samples), and what
    `lora_linear_routed` reads: the place of each sample's role among `own`, or -1 for the base, and n ones."""

    runs: tuple[tuple[str, slice], ...]
    own: tuple[str, ...]
    slots: Tensor
    ones: Tensor


class _Active(threading.local):
    """What the running call set, per thread. torch.compile can follow these attributes; a ContextVar it cannot."""

    def __init__(self) -> None:
        self.role: str | Routes = BASE
        self.folding = False
        self.text: Mapping[str, Tensor] | None = None  # outputs of layers that see only the text, by module path


_active = _Active()


@dataclass(frozen=True)
class LoraSpec:
    """Rank, alpha (scale = alpha / rank) and the layers to adapt, named by the end of their module path."""

    rank: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = LCM_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise HypersdError(f"the LoRA rank must be at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise HypersdError(f"the LoRA alpha must be positive, got {self.alpha}")
        object.__setattr__(self, "targets", tuple(self.targets))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def matches(self, path: str) -> bool:
        """True where the module path is a target or ends in '.' + a target."""
        return any(_is_at(target, path) for target in self.targets)

    def unmatched(self, paths: Sequence[str]) -> list[str]:
        """The targets that none of the module paths is or ends in."""
        return [target for target in self.targets if not any(_is_at(target, path) for path in paths)]


def _is_at(target: str, path: str) -> bool:
    return path == target or path.endswith("." + target)


def current_role() -> str | Routes:
    return _active.role


def route(role: str | Sequence[str], device: torch.device) -> str | Routes:
    """What `use_role` takes, of one role or one for each sample. Nothing is copied from the host."""
    if isinstance(role, str):
        return role
    if len(set(role)) < 2:
        return role[0] if role else BASE
    starts = [i for i in range(len(role)) if i == 0 or role[i] != role[i - 1]]
    runs = tuple((role[i], slice(i, stop)) for i, stop in zip(starts, [*starts[1:], len(role)], strict=True))
    own = tuple(dict.fromkeys(each for each in role if each != BASE))
    places = [(rows.stop - rows.start, own.index(each) if each in own else -1) for each, rows in runs]
    slots = torch.cat([torch.full((n,), place, dtype=torch.int64, device=device) for n, place in places])
    return Routes(runs, own, slots, torch.ones(len(own), device=device))


def is_folding() -> bool:
    return _active.folding


@contextmanager
def use_role(role: str | Routes) -> Iterator[None]:
    """Every slot called inside runs with this role's adapter ("base": none), or each sample with its own's."""
    before, _active.role = _active.role, role
    try:
        yield
    finally:
        _active.role = before


@contextmanager
def folded_weights() -> Iterator[None]:
    """Inside, calls without gradient keep W + scale b a of fp32 and fp64 layers: base speed, one more weight each."""
    before, _active.folding = _active.folding, True
    try:
        yield
    finally:
        _active.folding = before


@contextmanager
def projected_text(outputs: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Inside, the slot at a path of `outputs` gives that tensor and computes nothing (see text_cache)."""
    before, _active.text = _active.text, outputs
    try:
        yield
    finally:
        _active.text = before


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Activation checkpointing that recomputes with the role of the forward pass, whatever role is active by then."""
    role = current_role()

    def run(*inputs: Any) -> Any:
        with use_role(role):
            return function(*inputs)

    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


def check_role_name(role: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", role) or role == BASE or hasattr(nn.ParameterDict, role):
        raise HypersdError(f"role name {role!r} cannot be used; take letters, digits, '_' or '-', and not 'base'")


class LoraSlot(nn.Module):
    """Common part of LoraLinear and LoraConv2d: `base` (frozen, left as it is) and adapters a[role], b[role].

    Adapters are fp32 masters (fp64 for an fp64 base); the kernels cast them to the layer's dtype. A role without an
    entry here leaves the layer as it is.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        # the plain layer, also under a PEFT adapter that the model already carried; in a tuple: not a submodule of ours
        self._layer = (plain_layer(base),)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        # role -> (key, W + scale b a); see folded_weights
        self._folded: dict[str, tuple[Any, Tensor]] = {}
        self._pooled: tuple[Any, tuple[Tensor, Tensor]] | None = None  # see LoraLinear
        self.path = ""  # in the network, where its input is the text alone

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias  # type: ignore[return-value]

    @property
    def is_bare(self) -> bool:
        """Whether the layer's weight is all of it. Else our adapter is added to its output: the layer carries one of
        PEFT's, in whatever form, or a hook in place of its forward, which fetches or casts the weight (offloading)."""
        return self.layer is self.base and "forward" not in self.layer.__dict__

    def adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and b at this rank."""
        raise NotImplementedError

    def add(self, role: str, rank: int, scale: float, generator: torch.Generator | None = None) -> None:
        """A new adapter: a ~ Kaiming uniform (as PEFT), b = 0, so that it starts as no change."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        shape_a, shape_b = self.adapter_shapes(rank)
        device = self.weight.device
        # drawn on the host: a seed gives the same adapter on every device
        a = torch.empty(shape_a, dtype=dtype, device="meta" if device.type == "meta" else "cpu")
        # kaiming_uniform_(a=sqrt(5)): bound 1 / sqrt(fan_in)
        a.uniform_(-1.0, 1.0, generator=generator).div_(math.sqrt(a[0].numel()))
        self.set(role, a.to(device), torch.zeros(shape_b, dtype=dtype, device=device), scale)

    def set(self, role: str, a: Tensor, b: Tensor, scale: float) -> None:
        self.a[role], self.b[role] = nn.Parameter(a), nn.Parameter(b)
        self.scale[role] = scale

    def drop(self, role: str) -> None:
        self._folded.pop(role, None)
        self._pooled = None
        if role in self.a:
            del self.a[role], self.b[role], self.scale[role]

    def adapter(self, role: str) -> tuple[Tensor, Tensor, float] | None:
        """(a, b, scale) of a role, None where the layer has none.

        A sum of roles, "p+q", is one adapter with their ranks side by side, a = [a_p; a_q], b = [s_p b_p, s_q b_q]:
        exactly the sum of both updates (the scales move into b), with gradient to every part that wants one.
        """
        parts = [part for part in role.split("+") if part in self.scale]
        if not parts:
            return None
        if len(parts) == 1:
            return self.a[parts[0]], self.b[parts[0]], self.scale[parts[0]]
        b = torch.cat([self.scale[part] * self.b[part] for part in parts], dim=1)
        return torch.cat([self.a[part] for part in parts]), b, 1.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        text = _active.text
        if text is not None and self.path in text:
            return text[self.path]
        role = _active.role
        if isinstance(role, str):
            return self._one(x, role, *args, **kwargs)
        if len(x) != len(role.slots):
            raise HypersdError(f"{len(role.slots)} roles for a layer that sees {len(x)} samples; give one for each")
        return self._each(x, role, *args, **kwargs)

    def _each(self, x: Tensor, routes: Routes, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([self._one(x[rows], role, *args, **kwargs) for role, rows in routes.runs])

    def _one(self, x: Tensor, role: str, *args: Any, **kwargs: Any) -> Tensor:
        adapter = self.adapter(role)
        if adapter is None:
            return self.base(x, *args, **kwargs)
        a, b, scale = adapter
        if not self.is_bare:
            if a.is_meta:
                raise HypersdError(
                    "the adapters of a Backbone are offloaded layer by layer, which only calls of those layers undo; "
                    "offload by model (enable_model_cpu_offload) or in groups (enable_group_offload)"
                )
            y = self.base(x, *args, **kwargs)
            return y + scale * self._low_rank(x.to(y.dtype), a.to(y.dtype), b.to(y.dtype))
        if _active.folding and role in self.scale and self._can_fold(x, role):
            return self._plain(x, self._fold(role))
        return self._adapted(x, a, b, scale)

    def _can_fold(self, x: Tensor, role: str) -> bool:
        # in 16 bit the rounded W' would lose small updates
        exact = x.dtype == self.weight.dtype and x.dtype.itemsize >= 4 and not torch.is_autocast_enabled(x.device.type)
        return exact and not torch.is_grad_enabled() and not self.is_unseen(role)

    def _fold(self, role: str) -> Tensor:
        key, known = self.version(role), self._folded.get(role)
        if known is None or known[0] != key:
            weight = fold_weight(self.weight, self.a[role], self.b[role], self.scale[role])
            known = self._folded[role] = (key, weight)
        return known[1]

    def version(self, role: str | Sequence[str]) -> tuple[Any, ...]:
        """Another tuple after every change of weight or adapter, in place (but through .data) or by replacement."""
        scales = (self.scale[part] for part in self._parts(role))
        return (*map(stamp, self._read(role)), *scales)

    def is_unseen(self, role: str | Sequence[str]) -> bool:
        """Whether `version` misses changes in place: inference tensors do not count them."""
        return any(t.is_inference() for t in self._read(role))

    def _read(self, role: str | Sequence[str]) -> list[Tensor]:
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [t for part in self._parts(role) for t in (self.a[part], self.b[part])]

    def _parts(self, role: str | Sequence[str]) -> list[str]:
        """The roles of a sum, or of one for each sample, that have an adapter here."""
        roles = dict.fromkeys((role,) if isinstance(role, str) else role)
        return [part for each in roles for part in each.split("+") if part in self.scale]

    def clear_folded(self) -> None:
        self._folded.clear()

    def _adapted(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        raise NotImplementedError

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError


class LoraLinear(LoraSlot):
    """x (..., in) -> (..., out); a[role] is (rank, in), b[role] is (out, rank)."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    def _each(self, x: Tensor, routes: Routes, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_bare:
            return super()._each(x, routes, *args, **kwargs)
        if not self._parts(routes.own):
            return self.base(x, *args, **kwargs)
        a, b = self._pool(routes.own)
        return lora_linear_routed(x, self.weight, self.bias, a, b, routes.slots, routes.ones)

    def _pool(self, roles: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """a (n, r, in) and scale b (n, out, r) of the roles, smaller ranks filled up with zeros. Without gradient they
        are kept until a role changes."""
        lives = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.is_unseen(roles)
        key = None if lives else (roles, self.version(roles))
        if key is not None and self._pooled is not None and self._pooled[0] == key:
            return self._pooled[1]
        like = self.a[self._parts(roles)[0]]
        none = like.new_zeros(0, self.in_features), like.new_zeros(self.out_features, 0), 1.0
        adapters = [self.adapter(role) or none for role in roles]
        rank = max(a.shape[0] for a, _, _ in adapters)
        pool = (
            torch.stack([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _, _ in adapters]),
            torch.stack([F.pad(scale * b, (0, rank - b.shape[1])) for _, b, scale in adapters]),
        )
        if key is not None:
            self._pooled = (key, pool)
        return pool

    def _adapted(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return lora_linear(x, self.weight, self.bias, a, b, scale)

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.linear(x, a), b)


class LoraConv2d(LoraSlot):
    """x (B, in, H, W) -> (B, out, H', W'); a[role] is (rank, in, kh, kw), b[role] is (out, rank, 1, 1)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        conv: Any = self.layer
        plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        if not plain or isinstance(conv.padding, str):
            raise HypersdError(f"{conv} cannot take a LoRA: groups, dilation and padding modes are not supported")
        self.stride: tuple[int, int] = conv.stride
        self.padding: tuple[int, int] = conv.padding

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    def adapter_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, *self.weight.shape[1:]), (self.out_channels, rank, 1, 1)

    def _adapted(self, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return lora_conv2d(x, self.weight, self.bias, a, b, scale, self.stride, self.padding)

    def _plain(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    def _low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, a, None, self.stride, self.padding), b)


@dataclass(frozen=True)
class Stamp:
    """Unlike the one before once the tensor was changed in place or is another one; see `stamp`."""

    address: int
    layout: tuple[Any, ...]
    version: int
    memory: Tensor = field(compare=False, repr=False)


def stamp(t: Tensor) -> Stamp:
    """What tells a tensor from others and from what it was before. It keeps the memory, so that no other tensor comes
    to lie there. Inference tensors do not count changes."""
    version = -1 if t.is_inference() else t._version
    return Stamp(t.data_ptr(), (t.dtype, t.shape, t.stride()), version, t.detach())


def plain_layer(module: nn.Module) -> nn.Module:
    """The layer itself, also where PEFT has wrapped it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]


def make_slot(module: nn.Module) -> LoraSlot | None:
    """A slot around a linear or 2-D convolution layer, also one that already carries a PEFT adapter; else None."""
    layer = plain_layer(module)
    if isinstance(layer, nn.Linear):
        return LoraLinear(module)
    if isinstance(layer, nn.Conv2d):
        return LoraConv2d(module)
    return None

"""A role's adapter in one flat buffer, its tensors views of it; and the optimizer that steps such buffers.

What torch does tensor by tensor (clip, AdamW, EMA: hundreds of small passes) becomes two passes over a few arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hypersd.distill import parallel
from hypersd.errors import HypersdError
from hypersd.kernels import adamw_ema_, clip_coefficient

ALIGN = 16  # elements: every tensor starts at a multiple of 64 bytes, as products of matrices like it


class Flat:
    """Moves parameters into one buffer, `data`; each keeps its identity and becomes a view of its part.

    All must have one dtype and device, else HypersdError. The parts follow each other in the mapping's order; the gaps
    between them are zeros.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) != 1:
            raise HypersdError(f"a flat buffer needs parameters of one dtype and device, got {sorted(map(str, kinds))}")
        self.parameters = dict(parameters)
        self.spans: dict[str, tuple[int, torch.Size]] = {}
        size = 0
        for name, parameter in self.parameters.items():
            self.spans[name] = size, parameter.shape
            size += -(-parameter.numel() // ALIGN) * ALIGN
        ((dtype, device),) = kinds
        self.data = torch.zeros(size, dtype=dtype, device=device)
        for name, view in self.views(self.data).items():
            view.copy_(self.parameters[name].detach())
            self.parameters[name].data = view

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The part of each parameter in a buffer of the size of `data`, in the parameter's shape."""
        return {n: buffer[first : first + shape.numel()].view(shape) for n, (first, shape) in self.spans.items()}

    def touch(self) -> None:
        """Tell autograd and caches that `data` was written: a parameter counts versions apart from its buffer."""
        torch.autograd.graph.increment_version(self.parameters.values())


class FlatAdamW:
    """clip_grad_norm_, torch.optim.AdamW and an EMA of the weights, in two passes over flat buffers.

    parameters are trained; ema, where given, holds their moving average, under the same names and shapes. Both are
    moved into flat buffers. Gradients are gathered into one only for the length of a step, when the activations of a
    forward pass are gone: no memory is kept for them while those are there. Several processes each leave a part of the
    gradient (parallel.py), and all take the same step. `clip` 0 only measures the gradient's norm.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        ema: Mapping[str, nn.Parameter] | None = None,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        ema_decay: float = 0.0,
        clip: float = 0.0,
    ) -> None:
        if ema is not None and _shapes(parameters) != _shapes(ema):
            raise HypersdError("the parameters and their moving average have different names or shapes")
        self.weights, self.ema = Flat(parameters), None if ema is None else Flat(ema)
        self.betas, self.eps, self.weight_decay, self.ema_decay = betas, eps, weight_decay, ema_decay
        self.clip = clip or math.inf
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.weights.data), torch.zeros_like(self.weights.data)
        self.steps = 0
        self.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.weights.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float | Tensor) -> Tensor:
        """One step, which uses the gradients up: every `.grad` is None after it, and one that was None counts as zero.
        Returns the norm of the gradient before clipping, a 0-d tensor on the device.

        A step whose norm is not finite changes nothing.
        """
        self.steps += 1
        grad = self._gathered()
        norm, factor = clip_coefficient(grad, self.clip)
        # an average that nobody asked for goes where the gradient was
        average = grad if self.ema is None else self.ema.data
        adamw_ema_(
            self.weights.data, grad, self.exp_avg, self.exp_avg_sq, average, self.steps, lr, self.betas,
            self.eps, self.weight_decay, self.ema_decay, clip=factor,
        )  # fmt: skip
        self.weights.touch()
        if self.ema is not None:
            self.ema.touch()
        return norm

    def _gathered(self) -> Tensor:
        """The gradients of all processes in one buffer, laid out as the weights are; every `.grad` is None after it."""
        grad = torch.zeros_like(self.weights.data)
        views, grads = [], []
        for parameter, view in zip(self.weights.parameters.values(), self.weights.views(grad).values(), strict=True):
            if parameter.grad is not None:
                views.append(view)
                grads.append(parameter.grad)
        if grads:
            torch._foreach_copy_(views, grads)
        self.zero_grad()
        return parallel.sum_(grad)

    def state_dict(self) -> dict[str, Tensor]:
        """`exp_avg/<name>` and `exp_avg_sq/<name>`, views of the state; `steps` is the caller's to keep."""
        buffers = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{key}/{n}": v for key, buffer in buffers.items() for n, v in self.weights.views(buffer).items()}

    def load_state_dict(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on after step `steps` from the tensors of state_dict(); HypersdError where one lacks or does not fit."""
        own = self.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                raise HypersdError(f"the optimizer state does not fit: {name} is missing or has another shape")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.steps = steps


def _shapes(parameters: Mapping[str, nn.Parameter]) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in parameters.items()]

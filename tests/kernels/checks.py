"""The generic checks: every operator of the registry, held to its float64 definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd.kernels import use
from hypersd.kernels._op import Case, Op

CUDA = pytest.param(
    "cuda", id="cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
)
DEVICES = (pytest.param("cpu", id="cpu"), CUDA)
SMALL_FLOPS = 1.5e8  # larger cases belong to the benchmark, which checks them before it times them


def small(op: Op, dtype: torch.dtype = torch.float32) -> list[Case]:
    return [case for case in op.cases if op.cost is None or op.cost(**case.inputs(dtype)).flops <= SMALL_FLOPS]


def smallest(op: Op, **wanted: Any) -> Case:
    """The smallest case with elements (whose inputs hold `wanted`)."""
    sizes = {
        case: sum(v.numel() for v in case.inputs().values() if isinstance(v, Tensor))
        for case in op.cases
        if all(v.numel() for v in case.inputs().values() if isinstance(v, Tensor))
        and all(case.inputs().get(key) == value for key, value in wanted.items())
    }
    return min(sizes, key=lambda case: sizes[case])


def numbers(name: str, value: Any) -> bool:
    """Whether an input is a tensor of latents or weights, not a host table of coefficients."""
    return isinstance(value, Tensor) and value.is_floating_point() and name not in ("coef", "weight_per_sample")


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def evaluate(op: Op, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The value and every gradient under a fixed upstream gradient."""
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = {k: inputs[k].requires_grad_() for k in op.differentiable if isinstance(inputs.get(k), Tensor)}
    out = op.function(**inputs)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    found = {"out": out.detach()}
    if leaves:
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def check(op: Op, inputs: dict[str, Any]) -> list[str]:
    """What is wrong with the value and gradients that `op` computes now; empty when all is well.

    Truth is the reference in float64 on the same inputs. Per tensor, the largest error, the RMS error and the bias may
    be at most twice those of the reference in the inputs' dtype, plus one rounding.
    """
    found = evaluate(op, inputs)
    with use("reference"):
        eager, truth = evaluate(op, inputs), evaluate(op, widened(inputs))
    wrong = []
    for name, exact in truth.items():
        own, plain = found[name], eager[name]
        if own.shape != exact.shape or own.dtype != plain.dtype:
            wrong.append(f"{name}: {own.dtype} {tuple(own.shape)}, expected {plain.dtype} {tuple(exact.shape)}")
            continue
        if not exact.numel():
            continue
        rounding = torch.finfo(own.dtype).eps
        error, eager_error = own.double() - exact, plain.double() - exact
        for measure, of in (
            ("largest error", lambda e: e.abs().max()),
            ("rms error", lambda e: e.square().mean().sqrt()),
            ("bias", lambda e: e.mean().abs()),
        ):
            # the bias of an unbiased rounding is a random walk: one rounding of the typical size stays its allowance
            allowed = 2 * of(eager_error) + rounding * of(exact.abs())
            if not (of(error) <= allowed or (exact.isnan().all() and own.isnan().all())):
                wrong.append(f"{name}: {measure} {of(error):.2e}, allowed {allowed:.2e}")
    return wrong


def layouts(inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same numbers in other memory orders, tensor by tensor and all at once; and batch-expanded ones."""

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    def sliced(t: Tensor) -> Tensor:
        padded = t.new_full([size + 3 for size in t.shape], float("nan"))
        view = padded[tuple(slice(1, 1 + size) for size in t.shape)]
        view.copy_(t)
        return view

    def reversed_strides(t: Tensor) -> Tensor:
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))

    def expanded(t: Tensor) -> Tensor:
        return t[:1].expand_as(t)

    changes = (transposed, channels_last, sliced, reversed_strides, expanded)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim() >= 2]
    names = [name for name in names if numbers(name, inputs[name])]
    for change in changes:
        yield f"all {change.__name__}", inputs | {name: change(inputs[name]) for name in names}
    for index, name in enumerate(names):
        change = changes[index % len(changes)]
        yield f"{name} {change.__name__}", inputs | {name: change(inputs[name])}


class Recorder(TorchDispatchMode):
    """Records the calls of hypersd operators that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "hypersd":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

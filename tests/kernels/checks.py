"""The generic checks: every operator of the registry, held to its float64 definition."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hypersd.kernels import use
from hypersd.kernels._op import Case, Op

CUDA = pytest.param(
    "cuda", id="cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
)
DEVICES = (pytest.param("cpu", id="cpu"), CUDA)
SMALL_FLOPS, SMALL_ELEMENTS = 1.5e8, 2e6  # larger cases are the benchmark's, which checks them before it times them


@cache
def shapes(op: Op, case: Case) -> dict[str, Any]:
    """The inputs of a case without their numbers."""
    with FakeTensorMode():
        return case.inputs()


def elements(op: Op, case: Case) -> int:
    return sum(v.numel() for v in shapes(op, case).values() if isinstance(v, Tensor))


def small(op: Op) -> list[Case]:
    return [
        case
        for case in op.cases
        if elements(op, case) <= SMALL_ELEMENTS and (not op.cost or op.cost(**shapes(op, case)).flops <= SMALL_FLOPS)
    ]


def smallest(op: Op, **wanted: Any) -> Case:
    """The smallest case with elements (whose inputs hold `wanted`)."""
    sizes = {
        case: elements(op, case)
        for case in op.cases
        if all(v.numel() for v in shapes(op, case).values() if isinstance(v, Tensor))
        and all(shapes(op, case).get(key) == value for key, value in wanted.items())
    }
    return min(sizes, key=lambda case: sizes[case])


def kinds(op: Op) -> list[Case]:
    """The smallest case with elements of each kind: which tensors are given, with how many dimensions, contiguous or
    not. What torch has to be told about an operator may differ between them."""
    found: dict[Any, Case] = {}
    for case in sorted(small(op), key=lambda case: elements(op, case)):
        tensors = {k: v for k, v in shapes(op, case).items() if isinstance(v, Tensor)}
        if all(t.numel() for t in tensors.values()):
            found.setdefault(tuple((k, t.dim(), t.is_contiguous()) for k, t in tensors.items()), case)
    return list(found.values())


def numbers(name: str, value: Any) -> bool:
    """Whether an input is a tensor of latents or weights, not a host table of coefficients."""
    return isinstance(value, Tensor) and value.is_floating_point() and name not in ("coef", "weight_per_sample")


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def copied(t: Tensor) -> Tensor:
    """Other memory with the same numbers, at the same place in its storage."""
    if torch.compiler.is_compiling():  # which knows no storages
        return t.clone()
    return t.new_empty(0).set_(t.untyped_storage().clone(), t.storage_offset(), t.shape, t.stride())


def results(op: Op, inputs: dict[str, Any], function: Any = None) -> dict[str, Tensor]:
    """What one call returns, by name; for an operator that works in place, what it left in copies of its arguments."""
    copies = {k: copied(inputs[k]) for k in op.mutated if inputs.get(k) is not None}
    value = (function or op.function)(**(inputs | copies))
    if copies:
        assert value is None
        return copies
    values = (value,) if isinstance(value, Tensor) else value
    return {"out" if i == 0 else f"out {i}": one for i, one in enumerate(values)}


def leaves_of(op: Op, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The differentiable inputs, which now ask for gradients."""
    return {k: inputs[k].requires_grad_() for k in op.differentiable if isinstance(inputs.get(k), Tensor)}


def upstreams(found: dict[str, Tensor]) -> list[Tensor]:
    """A fixed upstream gradient for each result."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in found.values()]


def evaluate(op: Op, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every result, and every gradient under fixed upstream gradients."""
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = leaves_of(op, inputs)
    outs = results(op, inputs)
    found = {name: out.detach() for name, out in outs.items()}
    if leaves:
        grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), upstreams(outs))
        found |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return found


def tampered(op: Op, run: Any, change: Any) -> Any:
    """`run`, an implementation of `op`, with its first result (or the first argument it writes to) changed."""

    def wrong(*args: Any) -> Any:
        value = run(*args)
        if value is None:
            args[0].copy_(change(args[0]))
            return None
        return change(value) if isinstance(value, Tensor) else (change(value[0]), *value[1:])

    return wrong


def check(op: Op, inputs: dict[str, Any], rounding: float = 0.0) -> list[str]:
    """What is wrong with the results and gradients that `op` computes now; empty when all is well.

    Truth is the reference in float64 on the same inputs. Per tensor, the largest error, the RMS error and the bias may
    be at most twice those of the reference in the inputs' dtype, plus one rounding. For inputs so small that the errors
    of the reference are a matter of luck, `rounding` of the largest number of all is allowed beside.
    """
    found = evaluate(op, inputs)
    with use("reference"):
        eager, truth = evaluate(op, inputs), evaluate(op, widened(inputs))
    wrong = []
    largest = max((float(exact.nan_to_num().abs().max()) for exact in truth.values() if exact.numel()), default=0.0)
    for name, exact in truth.items():
        own, plain = found[name], eager[name]
        if own.shape != exact.shape or own.dtype != plain.dtype:
            wrong.append(f"{name}: {own.dtype} {tuple(own.shape)}, expected {plain.dtype} {tuple(exact.shape)}")
            continue
        if not exact.numel():
            continue
        error, eager_error = own.double() - exact, plain.double() - exact
        for measure, of in (
            ("largest error", lambda e: e.abs().max()),
            ("rms error", lambda e: e.square().mean().sqrt()),
            ("bias", lambda e: e.mean().abs()),
        ):
            # the bias of an unbiased rounding is a random walk: one rounding of the typical size stays its allowance
            allowed = 2 * of(eager_error) + torch.finfo(own.dtype).eps * of(exact.abs())
            allowed = allowed + rounding * largest
            if not (of(error) <= allowed or (exact.isnan().all() and own.isnan().all())):
                wrong.append(f"{name}: {measure} {of(error):.2e}, allowed {allowed:.2e}")
    return wrong


def accepts(op: Op, inputs: dict[str, Any]) -> bool:
    """Whether the operator's checks let these inputs pass."""
    try:
        with torch.no_grad(), use("reference"):
            results(op, inputs)
    except (TypeError, ValueError):
        return False
    return True


def odd(op: Op) -> list[Case]:
    return [case for case in small(op) if case.name.startswith("odd")] or [smallest(op)]


def with_nan(inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The inputs with one number of one tensor replaced by nan, tensor by tensor."""
    for name, value in inputs.items():
        if numbers(name, value) and value.dim():
            planted = value.clone()
            planted[tuple(size // 2 for size in value.shape)] = float("nan")
            yield name, inputs | {name: planted}


def check_nan(op: Op, inputs: dict[str, Any]) -> list[str]:
    """The results and gradients that are nan elsewhere than the reference's in float64 (in bfloat16 its products spread
    one on some CPUs). Ours may spread one too: 0 nan is nan."""
    found = evaluate(op, inputs)
    with use("reference"):
        expected = evaluate(op, widened(inputs))
    masks = {name: (value.isnan(), found[name].isnan()) for name, value in expected.items()}
    return [name for name, (of, own) in masks.items() if (of & ~own if op.plan else of ^ own).any()]


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

    def stepped(t: Tensor) -> Tensor:
        view = t.new_full((*t.shape, 2), float("nan"))[..., 0]
        view.copy_(t)
        return view

    changes = (transposed, channels_last, sliced, reversed_strides, expanded, stepped)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.dim()]
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

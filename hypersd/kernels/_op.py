"""The registry: an `Op` ties one definition to its implementations and hands it to torch.library.

Two dispatcher names per op. `hypersd::NAME` has fake and autograd registered and is what torch.compile, export and
callers of `torch.ops` see. `hypersd::_NAME` is the same kernel with autograd left out: registered autograd costs some
5 us a call even without gradients, so the eager path calls this one, inside a thin autograd.Function when needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from hypersd.kernels import _native
from hypersd.kernels._cost import Cost, ceiling
from hypersd.kernels._rows import as_real, autocast, is_integer
from hypersd.kernels._tune import Config, Program, interpreted, triton_missing

LIBRARY = torch.library.Library("hypersd", "FRAGMENT")
OPS: dict[str, Op] = {}
IMPLEMENTATIONS = ("auto", "reference", "cpp", "triton", "cuda")
_uses: list[_Use] = []  # the blocks of `use` that are open, by when they were entered
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled  # looked up once: each call counts
_is_transforming = torch._C._are_functorch_transforms_active
KINDS = {"IntType": int, "BoolType": bool, "FloatType": float, "ListType": list}  # what a schema has beside tensors
EXPECTED = {int: "an integer", bool: "True or False", list: "a list of integers"}


@dataclass(frozen=True)
class Case:
    """Named inputs of a public function. Tests run every case; the benchmark those with `bench`.

    `make_inputs(dtype, device, generator)` returns the keyword arguments of the public function, gradients off.
    """

    name: str
    make_inputs: Callable[[torch.dtype, torch.device, torch.Generator], dict[str, Any]]
    bench: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0) -> dict:
        device = torch.device(device)
        return self.make_inputs(dtype, device, torch.Generator(device).manual_seed(seed))


@dataclass(eq=False)
class Op:
    """One operator. All callables take the schema's arguments by position; `check` raises TypeError or ValueError.

    `reference` is the definition: plain torch, differentiable, exact in float64. `fallback` is what the dispatcher
    runs where no kernel is (default: the reference); it differs when the op also returns what backward needs.
    `backward(ctx, *grads)` returns a gradient or None per argument; `setup_context(ctx, inputs, output)` saves for it.
    `plan` says which ATen products the fallback composes for the public function's keywords; `native` whether it calls
    a C++ kernel among them; `aten` why ATen runs instead of the GPU kernels (empty: it does not); `elsewhere` why the
    public function calls torch's own operator for them instead of this one (empty: it does not). `autocast` names the
    arguments that the public function casts inside torch.autocast. `arguments` makes the schema's arguments from the
    public function's keywords (default: those of the same names).
    An op whose schema writes to arguments, `Tensor(a!)`, returns nothing, and neither does its reference.
    `result` takes the public value out of what the op returns. `cost` and `config` take the public function's keywords,
    and so does `backward_cost`, of the gradients of all `differentiable` ones that are given.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    check: Callable[..., None] = lambda *args: None
    fallback: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    cuda: Callable[..., Any] | None = None
    cpp: bool = False
    differentiable: tuple[str, ...] = ()
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None
    result: Callable[[Any], Any] | None = None
    cases: tuple[Case, ...] = ()
    cost: Callable[..., Cost] | None = None
    backward_cost: Callable[..., Cost] | None = None
    config: Callable[..., Config] | None = None
    autocast: tuple[str, ...] = ()
    arguments: Callable[..., tuple[Any, ...]] | None = None
    plan: Callable[..., object] | None = None
    native: Callable[..., bool] | None = None
    aten: Callable[..., str] | None = None
    elsewhere: Callable[..., str] | None = None
    programs: Callable[[], list[Program]] | None = None
    function: Callable[..., Any] = field(init=False)
    mutated: tuple[str, ...] = field(init=False)  # arguments that the op writes to

    def __post_init__(self) -> None:
        self.fallback = self.fallback or self.reference
        names = [self.name, f"_{self.name}"] if self.backward else [self.name]
        for name in names:
            LIBRARY.define(f"{name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
            LIBRARY.impl(name, self._checked(self.fallback), "CompositeExplicitAutograd")
            if self.triton and not triton_missing():
                LIBRARY.impl(name, self._checked(self.triton), "CUDA")
            elif self.cuda:
                LIBRARY.impl(name, self._checked(self._without_triton), "CUDA")
            torch.library.register_fake(f"hypersd::{name}", self._checked(self.fake), lib=LIBRARY)
        if self.backward:
            run_backward = _once(self.name, self.backward)
            torch.library.register_autograd(
                f"hypersd::{self.name}", run_backward, setup_context=self.setup_context, lib=LIBRARY
            )
        LIBRARY.impl(names[-1], torch.library.fallthrough_kernel, "Autograd")
        self.compiled = getattr(torch.ops.hypersd, self.name).default
        if self.backward:
            self._node = _make_node(self, run_backward)
        arguments = self._names = [argument.name for argument in self.compiled._schema.arguments]
        written = [i for i, a in enumerate(self.compiled._schema.arguments) if a.alias_info and a.alias_info.is_write]
        self.mutated = tuple(arguments[i] for i in written)
        if written:
            LIBRARY.impl(names[-1], _counting(self.compiled, written), "ADInplaceOrView", with_keyset=True)
        self._scalars = list(_scalars(self.compiled._schema.arguments))
        self._leaves = [arguments.index(name) for name in self.differentiable if self.backward]
        self.raw = getattr(torch.ops.hypersd, names[-1]).default._op  # the C++ callable inside: 0.3 us less a call

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.check(*args)
            return function(*args)

        return run

    def _without_triton(self, *args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        run = self.fallback if self.unavailable("cuda", device) else self.cuda
        return run(*args)  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        """Run on the schema's arguments, all given by position; under torch.func's transforms and forward-mode AD, for
        which only the definition has rules, as the definition."""
        for index, types in self._scalars:
            if type(args[index]) not in types:
                args = self._converted(args)
                break
        if _is_transforming() or forward_ad._current_level >= 0:
            return self._reference(*args)
        if _is_compiling():
            return self._reference(*args) if asked_for() == "reference" else self._take(self.compiled(*args))
        if _uses and (forced := asked_for()) != "auto":
            return self._run_forced(forced, *args)
        try:
            if _is_grad_enabled():
                for index in self._leaves:
                    if args[index] is not None and args[index].requires_grad:
                        return self._node.apply(*args)
            output = self.raw(*args)
            return self.result(output) if self.result else output
        except (RuntimeError, AttributeError):
            self.check(*args)  # C++ knows only RuntimeError: say it with the argument's name where we can
            raise

    def _converted(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with every scalar in its type, or TypeError: C++ would take a number for a bool, and a bool or
        a tensor for a number."""
        values = list(args)
        for index, (kind, *optional) in self._scalars:
            value, name = values[index], self._names[index]
            if kind is float and not (optional and value is None):
                values[index] = as_real(name, value)
            elif not (is_integer(value) if kind is int else isinstance(value, (kind, *optional))):
                raise TypeError(f"{name}: got {value!r}, expected {EXPECTED[kind]}")
        return tuple(values)

    def _take(self, output: Any) -> Any:
        return self.result(output) if self.result else output

    def _reference(self, *args: Any) -> Any:
        self.check(*args)
        return self.reference(*args)

    def _run_forced(self, forced: str, *args: Any) -> Any:
        if forced == "reference":
            return self._reference(*args)
        self.check(*args)
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        reason = self.unavailable(forced, device, self._named(args))
        if reason:
            raise RuntimeError(f"use({forced!r}): {self.name} cannot run so on {device}: {reason}")
        if self.backward and _is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._node.apply(*args)
        return self._take(self.run(*args))

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The keywords of the public function among the schema's arguments."""
        known = inspect.signature(self.function).parameters
        return {name: value for name, value in zip(self._names, args, strict=True) if name in known}

    def arguments_of(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The schema's arguments of this call of the public function, which is not made."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        make = self.arguments or (lambda **keywords: tuple(keywords[name] for name in self._names))
        return self._converted(make(**bound.arguments))

    def run(self, *args: Any) -> Any:
        """The kernel below autograd, honouring `use`. Backward functions call their helper ops through this."""
        forced = asked_for()
        if forced == "triton" and self.triton:
            return self.triton(*args)
        if forced == "cuda" and self.cuda:
            return self.cuda(*args)
        return self.fallback(*args) if forced == "reference" else self.raw(*args)  # type: ignore[misc]

    def unavailable(self, implementation: str, device: torch.device, inputs: Mapping[str, Any] | None = None) -> str:
        """Why `implementation` cannot run on `device` (the public function's keywords being `inputs`); or nothing."""
        if implementation == "reference":
            return ""
        if implementation == "cpp":
            if not self.cpp and not (self.native and inputs):
                return "it has no C++ kernel"
            if device.type != "cpu":
                return "C++ kernels run on the CPU"
            if not _native.available():
                return _native.status()
            chosen = self.cpp or (self.native and inputs and self.native(**inputs))
            return "" if chosen else "the C++ kernel does not take this layer, or costs more"
        if implementation == "triton" and self.triton:
            if triton_missing():
                return triton_missing()
            runs = device.type == "cuda" or interpreted()
            return "" if runs else "Triton needs a GPU (or TRITON_INTERPRET=1 at start, for tests)"
        if implementation == "cuda" and self.cuda:
            return _native.cuda_missing(device)
        return f"it has no {implementation} kernel"

    def is_elsewhere(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the public function is to call torch's own operator: `elsewhere` says so, `use` does not object."""
        return asked_for() == "auto" and self.elsewhere is not None and bool(self.elsewhere(*args, **kwargs))

    def choose(self, device: torch.device, inputs: Mapping[str, Any] | None = None) -> tuple[str, str]:
        """(implementation, why) that a call on `device` takes now, the public function's keywords being `inputs`."""
        forced = asked_for()
        if forced != "auto":
            reason = self.unavailable(forced, device, inputs)
            return forced, f"asked for by use({forced!r})" + (f", but it cannot run: {reason}" if reason else "")
        wanted = {"cpu": "cpp", "cuda": "triton"}.get(device.type)
        if wanted == "triton" and self.cuda and (triton_missing() or not self.triton):
            wanted = "cuda"
        if wanted is None:
            return "reference", f"no kernel for device type {device.type}"
        reason = self.unavailable(wanted, device, inputs)
        if reason and self.plan:
            return "aten", f"products of ATen, their order chosen by cost; {reason}"
        if reason:
            return "reference", reason
        if self.native and wanted == "cpp":
            return wanted, "the form that costs least; backward as listed"
        return wanted, f"the kernel for {device.type} tensors"

    def public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator of the one public function: puts the op into the registry."""
        self.function = function
        OPS[self.name] = self
        return function


def _scalars(arguments: list[Any]) -> Iterator[tuple[int, tuple[type, ...]]]:
    """(position, types) of those arguments of a schema that are no tensors."""
    for index, argument in enumerate(arguments):
        of = argument.type.getElementType() if (optional := argument.type.kind() == "OptionalType") else argument.type
        if kind := KINDS.get(of.kind()):
            yield index, (kind, type(None)) if optional else (kind,)


def _counting(overload: Any, written: list[int]) -> Callable[..., Any]:
    """Raises the version counters of the arguments written to, as torch's own in-place operators do, then goes on."""

    def run(keyset: Any, *args: Any) -> Any:
        for index in written:
            if args[index] is not None:
                torch.autograd.graph.increment_version(args[index])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return run


class _Raises(torch.autograd.Function):
    """The first `count` tensors as they are; to differentiate them by any of the others raises."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.message = message
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(ctx.message)


def _once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` without a graph of its own: where one is asked for (create_graph), differentiating what it returns
    raises, also where the incoming gradients are constants, as y.sum() sends them."""
    twice = f"{name}: trying to differentiate twice what is differentiable once; use('reference') is at any order"

    def run_backward(ctx: Any, *grads: Any) -> Any:
        device = next((grad.device.type for grad in grads if grad is not None), "meta")
        if device != "meta" and torch.is_autocast_enabled(device):  # the dtypes of backward are those of its forward
            with torch.autocast(device, enabled=False):
                return run_backward(ctx, *grads)
        if not _is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        saved = [t for t in (*ctx.saved_tensors, *grads) if isinstance(t, torch.Tensor) and t.requires_grad]
        if saved and not torch._C._are_functorch_transforms_active():
            given = [grad for grad in found if grad is not None]
            raising = iter(_Raises.apply(twice, len(given), *given, *saved))  # type: ignore[no-untyped-call]
            return tuple(None if grad is None else next(raising) for grad in found)
        marked = torch._C._functions.DelayedError(twice, len(found))
        return marked(*(None if grad is None else grad.detach().requires_grad_() for grad in found))  # type: ignore[arg-type]

    return run_backward


def _make_node(op: Op, run_backward: Callable[..., Any]) -> type[torch.autograd.Function]:
    """The eager call's node. What an op returns for backward alone is saved and no output: wrapping one costs 2 us."""
    absent = (None,) * (len(op.compiled._schema.returns) - 1) if op.result else ()

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = op.run(*args)
            op.setup_context(ctx, args, output)  # type: ignore[misc]
            return op.result(output) if op.result else output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return run_backward(ctx, *grads, *absent)

    Node.__name__ = Node.__qualname__ = op.name
    return Node


class _Use:
    """One open block of `use`, equal to itself alone."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Force one implementation inside the block, process-wide; for debugging and comparison.

    "reference" is the plain torch definition; "cpp", "triton" and "cuda" raise RuntimeError at the call when the op
    cannot run so; "auto" is the default. Of blocks that threads hold open at once the one entered last counts. What
    torch.compile traces and what runs under torch.func or forward-mode AD heeds "reference" alone. Raises ValueError
    for another name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: got {implementation!r}, expected one of {IMPLEMENTATIONS}")
    own = _Use(implementation)
    _uses.append(own)
    try:
        yield
    finally:
        _uses.remove(own)


def asked_for() -> str:
    """The implementation that `use` forces here, or "auto"."""
    last = _uses[-1:]  # at once: another thread may leave its block
    return last[0].implementation if last else "auto"


@dataclass(frozen=True)
class Explanation:
    """What one call runs and the least it can cost. `seconds` is None where the device's ceiling is unknown."""

    op: str
    device: str
    implementation: str
    why: str
    config: object | None
    cost: Cost | None
    seconds: float | None
    ceiling: str

    def __str__(self) -> str:
        lines = [f"{self.op} on {self.device}: {self.implementation} ({self.why})"]
        if self.config:
            lines.append(f"  config  {self.config}")
        if self.cost:
            lines += [f"  bytes   {self.cost.bytes:,.0f}", f"  flops   {self.cost.flops:,.0f}"]
            lines += [f"  kernels {self.cost.launches}"]
        bound = "unknown" if self.seconds is None else f"{self.seconds * 1e6:.2f} us at best"
        return "\n".join([*lines, f"  time    {bound} ({self.ceiling})"])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which implementation `function(*args, **kwargs)` would run, and why; nothing is run.

    `function` is a public function of hypersd.kernels. Raises TypeError for any other, and for arguments that it does
    not take what the call itself raises.
    """
    op = next((op for op in OPS.values() if op.function is function), None)
    if op is None:
        raise TypeError(f"function: got {function!r}, expected a public function of hypersd.kernels: {sorted(OPS)}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    inputs: dict[str, Any] = bound.arguments
    if op.autocast and isinstance(inputs[op.autocast[0]], torch.Tensor):
        inputs = inputs | dict(zip(op.autocast, autocast(*(inputs[name] for name in op.autocast)), strict=True))
    op.check(*op.arguments_of(**inputs))
    first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    implementation, why = op.choose(first.device, inputs)
    runs = implementation in ("triton", "cuda") and not op.unavailable(implementation, first.device)
    if runs and op.aten and op.aten(**inputs):
        implementation, why = "aten", op.aten(**inputs)
    if op.is_elsewhere(**inputs):
        implementation, why = "torch", op.elsewhere(**inputs)  # type: ignore[misc]
    cost = op.cost(**inputs) if op.cost else None
    choice = {"triton": op.config, "aten": op.plan, "cpp": op.plan}.get(implementation)
    config = choice(**inputs) if choice else None
    roof = ceiling(first.device)
    seconds = roof.seconds(cost, first.dtype) if roof and cost else None
    source = roof.provenance if roof else f"no ceiling known for {first.device.type}"
    return Explanation(op.name, str(first.device), implementation, why, config, cost, seconds, source)


_native.available()

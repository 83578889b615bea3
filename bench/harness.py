"""Correctness first, then time: every provider is judged against float64, and only what passes is timed.

Providers of one case run interleaved in one process, so that a busy machine slows all alike; figures are the 20th, 50th
and 80th percentile of single calls, and the ratio of medians is what may be quoted. Modes: "fwd" without gradients,
"bwd" the backward alone, "full" the forward that keeps what backward needs, and the backward. On a GPU these are calls
as a program makes them, "fwd graph" and "full graph" the GPU's work alone: see gpu.py.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels._cost import Ceiling, Cost
from hypersd.kernels._op import OPS, Op, use

from . import gpu
from .memory import peak_bytes

OURS, EAGER = "hypersd", "eager"
MIN_ROUNDS = 7
ILL_POSED = 0.1  # relative error from which a yardstick is none
Call = Callable[[], Any]
Step = Callable[[], Call]  # does what is not timed, and returns what is


@dataclass
class Runner:
    """One provider, ready to be called. `leaves` are the differentiable inputs, named as the op names them; `same` is
    False where it computes something else on purpose (the layer without its adapter), as context for the others;
    `implementation` is forced around the call and its backward; `work` is what it does in a mode where that is not the
    operator's own cost."""

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    same: bool = True
    implementation: str = "auto"
    work: dict[str, Cost] = field(default_factory=dict)


@dataclass
class Result:
    """One row."""

    op: str
    case: str
    dtype: str
    mode: str
    provider: str
    verdict: str
    error: float | None
    eager_error: float | None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    rounds: int = 0
    over_ours: float | None = None
    bytes: float | None = None
    flops: float | None = None
    of_roofline: float | None = None  # the least time that the device needs for the work, over ours or a peer's
    launches: int | None = None  # of our kernels, by cost()
    peak_bytes: int | None = None  # held at once during one call, above what was held before
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def green(self) -> bool:
        return self.verdict != "red" and not self.verdict.startswith("red:")


# ---- correctness ------------------------------------------------------------------------------------------------


def outputs(runner: Runner, backward: bool) -> dict[str, Tensor]:
    """y, and the gradients of all leaves under a fixed upstream gradient."""
    with nullcontext() if runner.implementation == "auto" else use(runner.implementation):
        return _outputs(runner, backward)


def _outputs(runner: Runner, backward: bool) -> dict[str, Tensor]:
    with torch.set_grad_enabled(backward):
        y = runner.call()
    values = (y,) if isinstance(y, Tensor) else y
    found = named(values)
    if backward:
        for leaf in runner.leaves.values():
            leaf.grad = None
        torch.autograd.backward(values, _upstreams(values))
        found |= {name: leaf.grad for name, leaf in runner.leaves.items() if leaf.grad is not None}
    return found


def named(values: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a call returned, by name."""
    values = (values,) if isinstance(values, Tensor) else values
    return {"y" if i == 0 else f"y{i}": value.detach() for i, value in enumerate(values)}


def _upstreams(values: tuple[Tensor, ...]) -> list[Tensor]:
    """Random numbers in the memory order of each value, as the gradient of what follows it in a network is."""
    generator = torch.Generator().manual_seed(1)
    return [torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator)) for y in values]


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The largest relative L2 distance over y and the gradients; infinite for a missing or misshapen one, or a NaN."""
    worst = 0.0
    for name, truth in exact.items():
        value = found.get(name)
        if value is None or value.shape != truth.shape:
            return float("inf")
        distance = float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def verdict(own: float, eager: float, dtype: torch.dtype) -> str:
    """Green when the error is at most twice eager's plus one rounding; nothing is where eager itself is far off."""
    if not eager <= ILL_POSED:  # NaN neither
        return f"red: ill-posed case, the error of what it is judged by is {eager:.1e}"
    limit = 2 * eager + torch.finfo(dtype).eps
    return "green" if own <= limit else f"red: error {own:.1e}, allowed {limit:.1e}"


# ---- time -------------------------------------------------------------------------------------------------------


def interleaved(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Microseconds of single calls, the providers taking turns until `seconds` have passed."""
    for prepare in steps.values():
        prepare()()
        prepare()()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    stop = time.perf_counter() + seconds
    while order and (len(samples[order[0]]) < MIN_ROUNDS or time.perf_counter() < stop):
        for name in order:
            call = steps[name]()
            start = time.perf_counter_ns()
            call()
            samples[name].append((time.perf_counter_ns() - start) / 1e3)
        order.append(order.pop(0))  # nobody always runs after the same neighbour
    return samples


def step(runner: Runner, mode: str) -> Step:
    """What is timed. A "fwd" or "full" call returns the values, one of backward the gradients of all leaves."""
    if runner.implementation != "auto":
        return _forced(runner, mode)
    if mode == "fwd":
        forward = torch.no_grad()(runner.call)
        return lambda: forward
    first = runner.call()
    upstream = _upstreams((first,) if isinstance(first, Tensor) else first)
    leaves = list(runner.leaves.values())

    def backward(y: Any) -> Any:
        return torch.autograd.grad((y,) if isinstance(y, Tensor) else y, leaves, upstream)

    def full() -> Any:
        y = runner.call()
        backward(y)
        return y

    def after_forward() -> Call:
        y = runner.call()
        return lambda: backward(y)

    return after_forward if mode == "bwd" else lambda: full


def _forced(runner: Runner, mode: str) -> Step:
    """The same under `use`, a microsecond a call: compare rows of graphs, which do not have it."""
    forced = use(runner.implementation)
    prepare = forced(step)(replace(runner, implementation="auto"), mode)
    return lambda: forced(forced(prepare)())


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return round(p20, 2), round(statistics.median(ordered), 2), round(p80, 2)


def compare(
    name: str,
    case: str,
    dtype: torch.dtype,
    mode: str,
    exact: dict[str, Tensor],
    runners: dict[str, Runner],
    *,
    seconds: float = 0.5,
    cost: Cost | None = None,
    device: str = "cpu",
    yardstick: str = EAGER,
    copies: Sequence[dict[str, Runner]] = (),
    graphs: bool = True,
    roof: Callable[[Cost], Ceiling] | None = None,
) -> list[Result]:
    """The rows of one case and mode: all runners are judged against `exact` (float64) by the error of `yardstick`, and
    the green ones timed together.

    On a GPU: `copies` are the same runners over other memory, taken in turns; `graphs` adds the rows of graph replay.
    """
    backward = mode != "fwd"
    errors: dict[str, float] = {}
    why: dict[str, str] = {}
    for provider, runner in runners.items():
        try:
            errors[provider] = error(outputs(runner, backward), exact) if runner.same else 0.0
        except (RuntimeError, TypeError, ValueError) as failure:
            if provider == OURS:
                raise
            why[provider] = f"red: it failed ({_first_line(failure)})"
    eager = errors.get(yardstick, math.inf)
    rows = []
    for provider, runner in runners.items():
        own = errors.get(provider)
        said = why[provider] if own is None else verdict(own, eager, dtype)
        said = "other" if said == "green" and not runner.same else said
        dtype_name = str(dtype).removeprefix("torch.")
        rows.append(Result(name, case, dtype_name, mode, provider, said, own if runner.same else None, eager))
    green = [row.provider for row in rows if row.green]
    if device == "cpu":
        samples = interleaved({name: step(runners[name], mode) for name in green}, seconds)
    else:
        steps = {name: [step(each[name], mode) for each in (runners, *copies)] for name in green}
        samples = gpu.calls(steps, seconds)
        if graphs and mode != "bwd":  # a backward belongs to the stream of its forward
            rows += _graphs(rows, steps, samples, exact, eager, dtype, seconds)
    for row in rows:
        timed = samples.get(row.provider + row.mode.removeprefix(mode), [])
        if timed and row.green:
            row.p20, row.p50, row.p80 = percentiles(timed)
            row.rounds = len(timed)
            if row.mode == mode and mode != "bwd":
                row.peak_bytes = peak_bytes(step(runners[row.provider], mode)(), device)
    for row in rows:
        ours = next((r.p50 for r in rows if r.provider == OURS and r.mode == row.mode), None)
        row.over_ours = round(row.p50 / ours, 3) if row.p50 and ours else None
        work = runners[row.provider].work.get(mode, cost)
        if work is not None:
            row.bytes, row.flops = work.bytes, work.flops
            row.launches = work.launches if row.provider == OURS else None
            least = roof(work).seconds(work, dtype) if roof else None
            row.of_roofline = round(1e6 * least / row.p50, 3) if least and row.p50 else None
    return rows


def _first_line(failure: Exception) -> str:
    return (str(failure) or type(failure).__name__).splitlines()[0][:120]


def _graphs(
    rows: list[Result],
    steps: dict[str, list[Step]],
    samples: dict[str, list[float]],
    exact: dict[str, Tensor],
    eager: float,
    dtype: torch.dtype,
    seconds: float,
) -> list[Result]:
    """The same rows by replay of a graph of their steps, judged anew; fills `samples` under "<provider> graph"."""
    made, found = {}, []
    exact = {name: value for name, value in exact.items() if name.startswith("y")}
    for row in rows:
        if not row.green:
            found.append(replace(row, mode=f"{row.mode} graph"))
            continue
        said, own = "red: it does not fit into a graph", None
        try:
            captured, values = gpu.graph([prepare() for prepare in steps[row.provider]])
            if row.error is not None and not getattr(OPS.get(row.op), "mutated", ()):  # in place: changed by now
                captured.replay()
                own = error(named(values), exact)
            said = row.verdict if own is None else verdict(own, eager, dtype)
            made[f"{row.provider} graph"] = (lambda replay=captured.replay: replay, len(steps[row.provider]))
        except RuntimeError as failure:
            said += f" ({_first_line(failure)})"
        found.append(replace(row, mode=f"{row.mode} graph", verdict=said, error=own))
    samples |= gpu.microseconds(made, seconds)
    return found


# ---- operators --------------------------------------------------------------------------------------------------


def schema_arguments(op: Op, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What the public function hands to the reference for these inputs."""
    with use("reference"):
        return op.arguments_of(**inputs)


def written(op: Op, inputs: dict[str, Any], value: Any) -> Any:
    """What a call returned, or for an operator that works in place the arguments that it wrote to."""
    return tuple(inputs[name] for name in op.mutated if inputs.get(name) is not None) if op.mutated else value


def with_leaves(op: Op, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inputs with fresh leaves in place of the differentiable ones, and copies of what the op writes to."""
    inputs = inputs | {name: inputs[name].clone() for name in op.mutated if inputs.get(name) is not None}
    leaves = {
        name: inputs[name].detach().clone().requires_grad_()
        for name in op.differentiable
        if inputs.get(name) is not None
    }
    return inputs | leaves, leaves


def measure_op(
    op: Op,
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    shapes: tuple[str, ...],
    peers: Sequence[str] | None,
    seconds: float,
    roof: Callable[[Cost], Ceiling] | None = None,
) -> Iterable[list[Result]]:
    """The cases whose names start with one of `shapes`: forward, and where differentiable backward and both."""
    from .peers import eager, runners_for

    for case in op.cases:
        if not case.bench or not case.name.startswith(shapes):
            continue
        for dtype in dtypes:
            inputs = case.inputs(dtype, device)
            if device == "cuda":  # the tables too, as graphs want them
                inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
            wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
            exact = outputs(eager(op, wide), bool(op.backward))
            cost = op.cost(**inputs) if op.cost else None
            work = {"fwd": cost, **_with_gradients(op, inputs)}
            more = gpu.copies(cost.bytes) - 1 if cost and device == "cuda" else 0
            for mode in ("fwd", "bwd", "full") if op.backward else ("fwd",):
                runners = runners_for(op, inputs, peers)
                copies = [runners_for(op, gpu.cloned(inputs), peers) for _ in range(more)]
                truth = {k: v for k, v in exact.items() if mode != "fwd" or k.startswith("y")}
                yield compare(
                    op.name, case.name, dtype, mode, truth, runners, seconds=seconds, cost=work[mode], device=device,
                    copies=copies, roof=roof,
                )  # fmt: skip


def _with_gradients(op: Op, inputs: dict[str, Any]) -> dict[str, Cost | None]:
    """The work of "bwd", and of "full": a forward that keeps what backward needs, and the backward."""
    if op.cost is None or op.backward_cost is None:
        return {"bwd": None, "full": None}
    changed, _ = with_leaves(op, inputs)
    with torch.enable_grad():
        backward = op.backward_cost(**changed)
        return {"bwd": backward, "full": op.cost(**changed) + backward}

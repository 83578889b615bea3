"""Every operator of the registry against its float64 definition: nothing here knows an operator by name."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd.kernels import _native, explain, use
from hypersd.kernels._op import OPS, Case, Op
from tests.kernels import checks

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
IMPLEMENTATIONS = (*_native.ISA_LEVELS, "fallback")
RUNS = [
    pytest.param(op, case, name, id=f"{op.name}-{case.name}-{name}")
    for op in OPS.values()
    for case in checks.small(op)
    for name in (IMPLEMENTATIONS if op.cpp else ("fallback",))
]
EVERY = [pytest.param(op, id=op.name) for op in OPS.values()]
DIFFERENTIABLE = [pytest.param(op, id=op.name) for op in OPS.values() if op.differentiable]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case", "implementation"), RUNS, indirect=["implementation"])
def test_error_at_most_twice_eagers(op, case, implementation, dtype, poisoned, monkeypatch):
    if implementation == "fallback":  # what runs on a machine without the C++ kernels
        monkeypatch.setattr(op, "raw", op.fallback)
    assert checks.check(op, case.inputs(dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_any_memory_order(op, dtype, poisoned):
    case = next((c for c in checks.small(op) if c.name.startswith("odd")), checks.smallest(op))
    inputs = case.inputs(dtype)
    for name, changed in checks.layouts(inputs):
        assert checks.check(op, changed) == [], name


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_strided_and_expanded_upstream_gradients(op):
    inputs = checks.smallest(op).inputs(torch.float64)
    leaves = list(checks.leaves_of(op, inputs).values())
    for out in checks.results(op, inputs).values():
        if out.dim() == 0:
            upstreams = [torch.tensor(2.5, dtype=out.dtype)]
        else:
            base = torch.randn(*out.shape, 2, dtype=out.dtype)
            upstreams = [base[..., 0], torch.ones((), dtype=out.dtype).expand_as(out)]
        for upstream in upstreams:
            plain = upstream.clone(memory_format=torch.contiguous_format)
            found, expected = (
                torch.autograd.grad(out, leaves, u, retain_graph=True, allow_unused=True) for u in (upstream, plain)
            )
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op):
    inputs = checks.widened(checks.smallest(op).inputs())
    names = [k for k in op.differentiable if isinstance(inputs.get(k), Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        return op.function(**(inputs | dict(zip(names, tensors, strict=True))))

    leaves = [inputs[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    with use("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_raise(op):
    inputs = checks.smallest(op).inputs()
    leaves = [inputs[k].requires_grad_() for k in op.differentiable if isinstance(inputs.get(k), Tensor)]
    out = sum(value.square().sum() for value in checks.results(op, inputs).values())
    grads = torch.autograd.grad(out, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(g.sum() for g in grads).backward()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_same_bits_on_any_number_of_threads(op, dtype):
    case = max(checks.small(op), key=lambda c: checks.elements(op, c))
    inputs, before = case.inputs(dtype), torch.get_num_threads()
    first = checks.evaluate(op, inputs)
    try:
        for threads in (before, 2, 1, 3):
            if not op.cpp and threads != before:
                continue  # ATen's own products promise the same bits at the same number of threads only
            torch.set_num_threads(threads)
            for name, value in checks.evaluate(op, inputs).items():
                assert torch.equal(value, first[name]), (name, threads)
    finally:
        torch.set_num_threads(before)


def recorded(op: Op, inputs: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that one forward and backward calls, with its arguments."""
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = list(checks.leaves_of(op, inputs).values())
    with checks.Recorder() as record:
        outs = checks.results(op, inputs)
        if leaves:
            torch.autograd.grad(sum(out.sum() for out in outs.values()), leaves)
    return record.calls


@pytest.mark.parametrize("op", EVERY)
def test_opcheck(op):
    calls = recorded(op, checks.smallest(op).inputs())
    assert calls and calls[0][0].__name__.startswith(f"_{op.name}" if op.differentiable else op.name)
    for func, args in calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)
    leaves = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls[0][1])
    torch.library.opcheck(op.compiled, leaves)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def dynamic_group(op: Op) -> list[dict[str, Any]]:
    """The inputs of those cases that differ in sizes alone; torch specialises on 0 and 1, so these must agree."""
    groups: dict[Any, list[Case]] = {}
    for case in op.cases:
        inputs = checks.shapes(op, case)
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        if all(t.numel() for t in tensors.values()):
            key = tuple((k, tuple(n == 1 for n in v.shape) if k in tensors else v) for k, v in inputs.items())
            groups.setdefault(key, []).append(case)
    group = sorted(max(groups.values(), key=len), key=lambda case: checks.elements(op, case))
    return [case.inputs() for case in group[:4]]


@pytest.mark.parametrize("op", EVERY)
def test_compiles_whole_with_dynamic_shapes(op):
    group = dynamic_group(op)
    assert len(group) >= 3, "give the operator three cases that differ in sizes alone"
    torch._dynamo.reset()
    compiled = torch.compile(partial(checks.results, op), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):  # one recompilation; a second raises
        for inputs in group:
            leaves = list(checks.leaves_of(op, inputs).values())
            out, plain = compiled(inputs), checks.results(op, inputs)
            torch.testing.assert_close(out, plain)
            if leaves:
                found, expected = (
                    torch.autograd.grad(list(y.values()), leaves, checks.upstreams(y)) for y in (out, plain)
                )
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", EVERY)
def test_exports_as_one_operator(op):
    inputs = checks.smallest(op).inputs()

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return checks.results(op, inputs | tensors)

    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    program = torch.export.export(Module(), (tensors,))
    called = [str(node.target) for node in program.graph.nodes if "hypersd" in str(node.target)]
    assert called == [f"hypersd.{op.name}.default"]
    assert_equal(program.module()(tensors), checks.results(op, inputs))


@pytest.mark.parametrize("op", EVERY)
def test_inductor_compiles_it(op):
    inputs = checks.smallest(op).inputs()
    torch._dynamo.reset()

    def twice() -> dict[str, Tensor]:
        return {name: value * 2 for name, value in checks.results(op, inputs).items()}

    assert_equal(torch.compile(twice, fullgraph=True)(), twice())


@pytest.mark.parametrize("op", EVERY)
def test_inputs_stay_untouched(op):
    inputs = checks.smallest(op).inputs()
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, Tensor)}
    op.function(**inputs)
    assert all(torch.equal(inputs[k], v) for k, v in before.items() if k not in op.mutated)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.mutated], ids=lambda op: op.name)
def test_what_is_written_counts_as_changed(op):
    """Autograd and every cache that asks for the version of a tensor see the write."""
    inputs = checks.smallest(op).inputs()
    before = {k: inputs[k]._version for k in op.mutated if inputs.get(k) is not None}
    op.function(**inputs)
    assert before and all(inputs[k]._version > version for k, version in before.items())


@pytest.mark.parametrize("op", EVERY)
def test_explain_names_what_runs(op):
    inputs = checks.smallest(op).inputs()
    said = explain(op.function, **inputs)
    cost = op.cost(**inputs)
    assert (said.cost.bytes, said.cost.flops) == (cost.bytes, cost.flops) and cost.bytes > 0
    if op.cpp and _native.available():
        assert said.implementation == "cpp"
    assert f"{cost.bytes:,.0f}" in str(said) and op.name in str(said)
    with use("reference"):
        assert explain(op.function, **inputs).implementation == "reference"


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.cpp], ids=lambda op: op.name)
def test_declared_bytes_are_those_of_the_arguments(op):
    """The roofline contract: `cost` declares what one dispatcher call reads and writes, coefficients aside."""
    inputs = checks.smallest(op).inputs()
    with checks.Recorder() as record, torch.no_grad():
        op.function(**inputs)
    ((_, args),) = record.calls
    tensors = [a for a in args if isinstance(a, Tensor) and a.dtype != torch.float64 and a.dim()]
    written = op.raw(*args)
    written = [written] if isinstance(written, Tensor) else list(written or ())
    written += [inputs[k] for k in op.mutated if inputs.get(k) is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors + [w for w in written if w.dim()])
    assert op.cost(**inputs).bytes == moved


def test_use_says_what_cannot_run():
    op = OPS["affine_step"]
    inputs = op.cases[0].inputs()
    with pytest.raises(ValueError, match="'fast'.*auto"), use("fast"):
        pass
    with pytest.raises(RuntimeError, match="no cuda kernel"), use("cuda"):
        op.function(**inputs)
    with pytest.raises(RuntimeError, match="GPU"), use("triton"):
        op.function(**inputs)
    with pytest.raises(TypeError, match="print"):
        explain(print)


# ------------------------------------------------------------------------------- the suite must catch a wrong kernel


def last_element_missing(value: Tensor) -> Tensor:
    broken = torch.empty_like(value)
    broken.view(-1)[:-1] = value.reshape(-1)[:-1]
    return broken


MUTATIONS = {
    "a factor 1.00001": lambda out: (out.double() * 1.00001).to(out.dtype),
    "an offset": lambda out: out + 3e-6 * out.abs().max(),
    "one element wrong": lambda out: out.flatten().index_fill(0, torch.tensor([0]), 7.0).reshape(out.shape),
    "16-bit arithmetic": lambda out: out.bfloat16().to(out.dtype),
    "an element forgotten": lambda out: last_element_missing(out) if out.numel() > 1 else out * float("nan"),
    "transposed": lambda out: out.flip(0) if out.dim() else -out,
    "another dtype": lambda out: out.double(),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("op", EVERY)
def test_a_wrong_kernel_turns_the_suite_red(op, mutation, poisoned, monkeypatch):
    if op.mutated and mutation == "another dtype":
        return  # what is written in place keeps its own
    inputs = next(c for c in checks.small(op) if c.name.startswith(("emoji_b32", "odd"))).inputs()
    assert checks.check(op, inputs) == []
    monkeypatch.setattr(op, "raw", checks.tampered(op, op.raw, MUTATIONS[mutation]))
    try:
        findings = checks.check(op, inputs)
    except RuntimeError:  # a backward that refuses the wrong dtype is red too
        return
    assert any(not finding.startswith("grad ") for finding in findings)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_a_wrong_gradient_turns_the_suite_red(op, monkeypatch):
    inputs = checks.smallest(op).inputs()
    right = op._node.backward

    def wrong(ctx: Any, *grads: Any) -> Any:
        return tuple(None if g is None else g * 1.0001 for g in right(ctx, *grads))

    monkeypatch.setattr(op._node, "backward", staticmethod(wrong))
    assert any(finding.startswith("grad") for finding in checks.check(op, inputs))

"""Every operator of the registry against its float64 definition: nothing here knows an operator by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd.kernels import _native, explain, use
from hypersd.kernels._op import OPS, Case, Op, asked_for
from tests.kernels import checks

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def implementations(op: Op, device: str) -> tuple[str, ...]:
    """What can run there, for the `implementation` fixture."""
    if device == "cpu":
        return (*_native.ISA_LEVELS, "fallback") if op.cpp or op.native else ("fallback",)
    own = tuple(name for name, kernel in (("triton", op.triton), ("cuda", op.cuda)) if kernel)
    return ("auto", *own, "fallback") if own else ("auto",)


RUNS = [
    pytest.param(op, case, *device.values, name, id=f"{op.name}-{case.name}-{device.id}-{name}", marks=device.marks)
    for op in OPS.values()
    for case in checks.small(op)
    for device in checks.DEVICES
    for name in implementations(op, *device.values)
]
WAYS = [
    pytest.param(op, *device.values, name, id=f"{op.name}-{device.id}-{name}", marks=device.marks)
    for op in OPS.values()
    for device in checks.DEVICES
    for name in implementations(op, *device.values)
]
EVERY = [pytest.param(op, id=op.name) for op in OPS.values()]
KINDS = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS.values() for case in checks.kinds(op)]
DIFFERENTIABLE = [pytest.param(op, id=op.name) for op in OPS.values() if op.differentiable]
on_devices = pytest.mark.parametrize("device", checks.DEVICES)
OWN = {"cpu": torch.float32, "cuda": torch.bfloat16}  # what no operator leaves to torch's


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case", "device", "implementation"), RUNS, indirect=["implementation"])
def test_error_at_most_twice_eagers(op, case, device, implementation, dtype, poisoned):
    assert checks.check(op, case.inputs(dtype, device)) == []


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("op", "device", "implementation"), WAYS, indirect=["implementation"])
def test_nan_comes_out_where_the_definition_has_it(op, device, implementation, dtype):
    for case in checks.odd(op):
        for name, changed in checks.with_nan(case.inputs(dtype, device)):
            if checks.accepts(op, changed):
                assert checks.check_nan(op, changed) == [], (case.name, name)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("op", "device", "implementation"), WAYS, indirect=["implementation"])
def test_any_memory_order(op, device, implementation, dtype, poisoned):
    for case in checks.odd(op):
        for name, changed in checks.layouts(case.inputs(dtype, device)):
            if op.mutated and not checks.accepts(op, changed):
                continue  # buffers written to may have to be contiguous
            assert checks.check(op, changed) == [], (case.name, name)


@on_devices
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_strided_and_expanded_upstream_gradients(op, device):
    dtype, tolerance = (torch.float64, 1e-12) if device == "cpu" else (OWN[device], 1e-2)
    inputs = checks.smallest(op).inputs(dtype, device)
    leaves = list(checks.leaves_of(op, inputs).values())
    for out in checks.results(op, inputs).values():
        if out.dim() == 0:
            upstreams = [out.new_tensor(2.5)]
        else:
            base = torch.randn(*out.shape, 2, dtype=out.dtype, device=device)
            upstreams = [base[..., 0], out.new_ones(()).expand_as(out)]
        for upstream in upstreams:
            plain = upstream.clone(memory_format=torch.contiguous_format)
            found, expected = (
                torch.autograd.grad(out, leaves, u, retain_graph=True, allow_unused=True) for u in (upstream, plain)
            )
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@on_devices
@pytest.mark.parametrize(("op", "case"), [kind for kind in KINDS if kind.values[0].differentiable])
def test_gradcheck(op, case, device):
    inputs = checks.widened(case.inputs(device=device))
    names = [k for k in op.differentiable if isinstance(inputs.get(k), Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        return op.function(**(inputs | dict(zip(names, tensors, strict=True))))

    leaves = [inputs[k].clone().requires_grad_() for k in names]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    with use("reference"):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@on_devices
@pytest.mark.parametrize(("forward_inside", "backward_inside"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast(op, forward_inside, backward_inside, device):
    """The dtypes of the definition, gradients in those of their leaves, and numbers that are right to 16 bits."""
    inputs = checks.smallest(op).inputs(torch.float32, device)
    with use("reference"):
        truth = checks.evaluate(op, checks.widened(inputs))
        with torch.autocast(device, torch.bfloat16, enabled=forward_inside):
            plain = checks.results(op, inputs)
    leaves = checks.leaves_of(op, inputs)
    with torch.autocast(device, torch.bfloat16, enabled=forward_inside):
        found = checks.results(op, inputs)
    with torch.autocast(device, torch.bfloat16, enabled=backward_inside):
        grads = torch.autograd.grad(list(found.values()), list(leaves.values()), checks.upstreams(found))
    assert {name: value.dtype for name, value in found.items()} == {n: value.dtype for n, value in plain.items()}
    assert all(grad.dtype == torch.float32 for grad in grads)
    for name, value in [*found.items(), *((f"grad {k}", g) for k, g in zip(leaves, grads, strict=True))]:
        assert float((value.double() - truth[name]).norm()) < 0.03 * float(truth[name].norm()), name


@on_devices
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast_leaves_float64_and_integers(op, device):
    inputs = checks.widened(checks.smallest(op).inputs(device=device))
    plain = checks.results(op, inputs)
    with torch.autocast(device, torch.bfloat16):
        assert_equal(checks.results(op, inputs), plain)
        for name, value in inputs.items():
            if checks.numbers(name, value) and value.dim():
                with pytest.raises(TypeError, match=f"{name}(:| has)"):
                    op.function(**inputs | {name: value.to(torch.int8)})


@on_devices
@pytest.mark.parametrize("constant", [False, True])  # the incoming gradient, as a penalty on y.sum() has it
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_raise(op, constant, device):
    inputs = checks.smallest(op).inputs(OWN[device], device)
    leaves = [inputs[k].requires_grad_() for k in op.differentiable if isinstance(inputs.get(k), Tensor)]
    out = sum((value if constant else value.square()).sum() for value in checks.results(op, inputs).values())
    grads = torch.autograd.grad(out, leaves, create_graph=True)
    if not constant or op.name != "affine_step":  # which is linear
        with pytest.raises(RuntimeError, match="twice"):
            torch.autograd.grad(sum(g.sum() for g in grads), leaves, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(g.sum() for g in grads).backward()


@on_devices
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_transforms_are_those_of_the_definition(op, compiled, device):
    """Tangents of a forward pass, and gradients through vmap over a new first dimension: neither is zero in silence."""
    inputs = checks.smallest(op).inputs(OWN[device], device)
    names = [k for k in op.differentiable if isinstance(inputs.get(k), Tensor)]
    leaves = tuple(inputs[k] for k in names)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(checks.results(op, inputs | dict(zip(names, tensors, strict=True))).values())

    def tangents(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(function, tensors, tensors)[1]

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        def total(*batched: Tensor) -> Tensor:
            return sum(out.square().sum() for out in torch.vmap(function)(*batched))

        return torch.func.grad(total, tuple(range(len(names))))(*(t[None] for t in tensors))

    for wanted in (tangents, gradients):
        torch._dynamo.reset()
        run = torch.compile(wanted, fullgraph=True, backend="aot_eager") if compiled else wanted
        found = run(*leaves)
        with use("reference"):
            expected = wanted(*leaves)
        assert all(value.abs().sum() > 0 for value in expected)
        torch.testing.assert_close(found, expected)


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


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_same_bits_in_twenty_runs(op, dtype, device, monkeypatch):
    if not op.triton:  # then the products are ATen's, whose fastest routines on a GPU promise no order of their sums
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    largest = max(checks.small(op), key=lambda case: checks.elements(op, case))
    for case in (checks.smallest(op), largest)[: 1 if device == "cpu" else 2]:
        inputs = case.inputs(dtype, device)
        if device == "cuda" and op.is_elsewhere(**inputs):
            continue  # torch's own operator, which promises no order of its sums
        first = checks.evaluate(op, inputs)
        for _ in range(19):
            assert_equal(checks.evaluate(op, inputs), first)


def gpu_step(op: Op, inputs: dict[str, Any]) -> Callable[[], dict[str, Tensor]]:
    """Results and gradients of these inputs, warm: compiled, with every library's scratch memory at hand."""
    leaves = checks.leaves_of(op, inputs)

    def step() -> dict[str, Tensor]:
        outs = checks.results(op, inputs)
        ones = [torch.ones_like(out) for out in outs.values()]
        grads = torch.autograd.grad(list(outs.values()), list(leaves.values()), ones) if leaves else ()
        return {k: v.detach() for k, v in outs.items()} | {f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch.cuda.graph wants it
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return step


@pytest.mark.parametrize("device", [checks.CUDA])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", EVERY)
def test_graph_replay_has_the_bits_of_the_call(op, dtype, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    case = checks.smallest(op)
    names = [k for k, v in checks.shapes(op, case).items() if isinstance(v, Tensor)]
    inputs = case.inputs(dtype, device)
    inputs |= {k: inputs[k].to(device) for k in names}  # a host table is a copy at every call, which no graph holds
    step = gpu_step(op, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):  # other numbers in the same memory, and other adapters for the samples
        with torch.no_grad():
            for name, value in case.inputs(dtype, device, seed).items():
                if name in names:
                    inputs[name].copy_(value.flip(0) if name == "slots" and seed == 2 else value)
        for value in captured.values():
            value.fill_(float("nan"))
        graph.replay()
        assert_equal({name: value.clone() for name, value in captured.items()}, step())


@pytest.mark.parametrize("device", [checks.CUDA])
@pytest.mark.parametrize("tables", ["host", "device"])
@pytest.mark.parametrize("op", EVERY)
def test_nothing_waits_for_the_gpu(op, tables, device):
    inputs = checks.smallest(op).inputs(OWN[device], device)
    if tables == "device":
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    step = gpu_step(op, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", [checks.CUDA])
@pytest.mark.parametrize("op", EVERY)
def test_runs_on_the_stream_it_is_called_on(op, device):
    """Inputs that arrive late on a stream of their own: a kernel launched elsewhere would read them too early."""
    case = checks.smallest(op)
    inputs, late = (case.inputs(OWN[device], device, seed) for seed in (0, 1))
    expected = checks.results(op, late)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        arriving = {k: v.copy_(late[k]) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_cuda}
        found = checks.results(op, late | arriving)
    stream.synchronize()
    assert_equal(found, expected)


def recorded(op: Op, inputs: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that one forward and backward calls, with its arguments; not the questions without any that are
    asked once, of what the machine can do."""
    inputs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    leaves = list(checks.leaves_of(op, inputs).values())
    with checks.Recorder() as record:
        outs = checks.results(op, inputs)
        if leaves:
            torch.autograd.grad(sum(out.sum() for out in outs.values()), leaves)
    return [(func, args) for func, args in record.calls if args]


@on_devices
@pytest.mark.parametrize(("op", "case"), KINDS)
def test_opcheck(op, case, device):
    calls = recorded(op, case.inputs(OWN[device], device))
    assert calls and calls[0][0].__name__.startswith(f"_{op.name}" if op.differentiable else op.name)
    for func, args in calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)
    leaves = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in calls[0][1])
    torch.library.opcheck(op.compiled, leaves)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def dynamic_group(op: Op, device: str) -> list[dict[str, Any]]:
    """The inputs of those cases that differ in sizes alone; torch specialises on 0 and 1, so these must agree."""
    groups: dict[Any, list[Case]] = {}
    for case in op.cases:
        inputs = checks.shapes(op, case)
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        if all(t.numel() for t in tensors.values()):
            key = tuple((k, tuple(n == 1 for n in v.shape) if k in tensors else v) for k, v in inputs.items())
            groups.setdefault(key, []).append(case)
    group = sorted(max(groups.values(), key=len), key=lambda case: checks.elements(op, case))
    return [case.inputs(OWN[device], device) for case in group[:4]]


@on_devices
@pytest.mark.parametrize("op", EVERY)
def test_compiles_whole_with_dynamic_shapes(op, device):
    group = dynamic_group(op, device)
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


@on_devices
@pytest.mark.parametrize(("op", "case"), KINDS)
def test_exports_as_one_operator(op, case, device):
    inputs = case.inputs(OWN[device], device)

    class Module(torch.nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return checks.results(op, inputs | tensors)

    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    program = torch.export.export(Module(), (tensors,))
    called = [str(node.target) for node in program.graph.nodes if "hypersd" in str(node.target)]
    assert called == [f"hypersd.{op.name}.default"]
    assert_equal(program.module()(tensors), checks.results(op, inputs))


@on_devices
@pytest.mark.parametrize("op", EVERY)
def test_inductor_compiles_it(op, device):
    inputs = checks.smallest(op).inputs(OWN[device], device)
    torch._dynamo.reset()

    def twice() -> dict[str, Tensor]:
        return {name: value * 2 for name, value in checks.results(op, inputs).items()}

    assert_equal(torch.compile(twice, fullgraph=True)(), twice())


@on_devices
@pytest.mark.parametrize("op", EVERY)
def test_inputs_stay_untouched(op, device):
    inputs = checks.smallest(op).inputs(device=device)
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


@on_devices
@pytest.mark.parametrize("op", EVERY)
def test_explain_names_what_runs(op, device):
    inputs = checks.smallest(op).inputs(OWN[device], device)
    said = explain(op.function, **inputs)
    cost = op.cost(**inputs)
    assert (said.cost.bytes, said.cost.flops) == (cost.bytes, cost.flops) and cost.bytes > 0
    if device == "cuda":
        runs = "triton" if op.triton else "aten" if op.plan else "reference"
        assert said.implementation == runs and (said.config is not None) is (runs != "reference")
    elif op.cpp and _native.available():
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


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.differentiable], ids=lambda op: op.name)
def test_declared_bytes_of_backward_are_those_of_its_arguments(op):
    """As above, of what one backward call of the dispatcher reads and writes; LoRA layers compose theirs of several."""
    inputs = checks.smallest(op).inputs()
    leaves = {k: inputs[k].requires_grad_() for k in op.differentiable if inputs.get(k) is not None}
    y = op.function(**inputs)
    values = [y] if isinstance(y, Tensor) else list(y)
    with checks.Recorder() as record:
        torch.autograd.backward(values, [torch.ones_like(value) for value in values])
    moved = [leaf.grad for leaf in leaves.values()]
    if op.name.startswith("lora"):
        rank = inputs["a"].shape[op.name == "lora_linear_routed"]
        s = y.new_empty(y.numel() // inputs["weight"].shape[0], rank)
        moved += [y, s, inputs["weight"], *leaves.values()]
    else:
        ((_, args),) = record.calls
        moved += [a for a in args if isinstance(a, Tensor) and a.dtype != torch.float64 and a.dim()]
    cost = op.backward_cost(**inputs)
    assert cost.bytes == sum(t.numel() * t.element_size() for t in moved) and cost.flops > 0


def test_use_says_what_cannot_run():
    op = OPS["affine_step"]
    inputs = op.cases[0].inputs()
    with pytest.raises(ValueError, match="'fast'.*auto"), use("fast"):
        pass
    with pytest.raises(RuntimeError, match="CUDA kernels run on a GPU"), use("cuda"):
        op.function(**inputs)
    with use("cuda"):
        assert "it cannot run: CUDA kernels run on a GPU" in explain(op.function, **inputs).why
    without = OPS["lora_linear"]
    with pytest.raises(RuntimeError, match="no cuda kernel"), use("cuda"):
        without.function(**checks.smallest(without).inputs())
    with pytest.raises(RuntimeError, match="GPU"), use("triton"):
        op.function(**inputs)
    with pytest.raises(TypeError, match="print"):
        explain(print)


def test_the_last_open_block_of_use_counts():
    """Blocks of several threads close in any order; what one opened ends with it."""
    blocks = {name: use(name) for name in ("reference", "cpp", "triton")}
    for name, block in blocks.items():
        block.__enter__()
        assert asked_for() == name
    for name, then in (("cpp", "triton"), ("triton", "reference"), ("reference", "auto")):
        blocks[name].__exit__(None, None, None)
        assert asked_for() == then


def test_compiled_code_heeds_the_reference_in_any_block_of_use():
    x = OPS["geglu"].cases[0].inputs()["x"]
    graphs: list[str] = []

    def listing(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(str(module.graph))
        return module

    torch._dynamo.reset()
    compiled = torch.compile(OPS["geglu"].function, fullgraph=True, backend=listing)
    compiled(x)
    for _ in range(10):  # one compilation for all
        with use("reference"):
            compiled(x)
    assert ["hypersd.geglu" in graph for graph in graphs] == [True, False]


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

"""Every argument of every operator replaced by what does not fit: one line that names it, or the right answer.

Nothing here knows an operator by name. What an operator says in its own words is in its own test file.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hypersd.kernels import explain, use
from hypersd.kernels._op import OPS, Op
from tests.kernels import checks

EVERY = [pytest.param(op, id=op.name) for op in OPS.values()]
ROUNDING = 0.05  # a wrong answer is wrong by more
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1.5, 99)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool)


def planted(t: Tensor, value: float) -> Tensor:
    """`t` with another last number."""
    return torch.cat([t.flatten()[:-1], t.new_tensor([value])]).view(t.shape)


def longer(t: Tensor, dim: int) -> Tensor:
    return torch.cat([t, t.narrow(dim, 0, 1)], dim)


def changes_of(op: Op, name: str, value: Any, alone: bool) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {} if isinstance(value, bool) else {repr(number): number for number in NUMBERS}
    found: dict[str, Any] = {"no tensor": 1.5, "a list": [1.0], "nothing": None, "sparse": value.to_sparse()}
    found |= {str(dtype): value.to(dtype) for dtype in (*DTYPES, *OTHERS) if dtype != value.dtype}
    if not alone:
        found["another device"] = value.to("meta")
    found["a dimension more"] = value[None]
    if value.dim():
        found["a single number"] = value.flatten()[0]
        found |= {"a dimension less": value[0], "none of it": value[:0]}
        found["every other"] = torch.stack([value, value], -1)[..., 0]
    found |= {f"longer in {dim}": longer(value, dim) for dim in range(value.dim())}
    if not value.is_floating_point():
        found |= {f"with a {number}": planted(value, number) for number in (-2, 10**6)}
    elif name == "coef":
        found |= {f"with a {number}": planted(value, number) for number in (math.nan, math.inf)}
    return found


MUST = (
    "no tensor",
    "a list",
    "sparse",
    "another device",
    "nan",
    *(str(dtype) for dtype in OTHERS[:3]),
)


# what is no value of a scalar argument, by its annotation; first what torch.compile is tried with too
WRONG: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "bool": ((1, None), (0, 1.0, math.nan, "True", 2**70, torch.tensor(True), np.True_, [True])),
    "int": ((True, "1"), (2**70, 1.0, 1.5, math.nan, None, b"1", torch.tensor(1), np.int64(1), [1])),
    "float": ((True, "1", math.nan), (math.inf, None, b"1", 1j, 10**400, np.True_, np.array(1.0), [1.0], object())),
    "str": ((1, "other"), (None, True, b"mse", ["mse"], torch.tensor(1))),
    "Tensor": ((), (torch.tensor([1.0, 1.0]), torch.tensor(1), torch.tensor(True))),  # beside a number
    "tuple[int, int]": (((True, 1), (1, 2**70)), ((1.0, 1.0), ("1", "1"), (1,), (1, 1, 1), (None, 1), "11")),
    "tuple[float, float]": ((("0.9", "0.9"), (True, 0.9)), ((0.9,), (0.9, None), (math.nan, 0.9), "09", 0.9, None)),
}
UNBOUNDED = ("max_norm",)  # infinity is a value of it


def scalars(op: Op) -> dict[str, list[str]]:
    """The annotations of the arguments of the public function that are not tensors alone."""
    found = {name: p.annotation.split(" | ") for name, p in inspect.signature(op.function).parameters.items()}
    return {name: kinds for name, kinds in found.items() if set(kinds) - {"Tensor", "None"}}


def wrong_values(name: str, kinds: list[str], compiled: bool) -> list[Any]:
    values = [value for kind in kinds if kind != "None" for of in WRONG[kind][: 1 if compiled else 2] for value in of]
    if "Tensor" not in kinds and not compiled:
        values.append(torch.tensor(1.0))
    return [
        value
        for value in values
        if not (value is None and "None" in kinds)
        and not (name in UNBOUNDED and isinstance(value, (int, float)) and value > 1)
    ]


SCALARS = [
    pytest.param(op, name, kinds, id=f"{op.name}-{name}")
    for op in OPS.values()
    for name, kinds in scalars(op).items()
]  # fmt: skip


@pytest.mark.parametrize("way", ["called", "explained", "reference", "compiled"])
@pytest.mark.parametrize(("op", "name", "kinds"), SCALARS)
def test_a_scalar_of_the_wrong_kind_is_named(op: Op, name: str, kinds: list[str], way: str) -> None:
    """C++ would take a number for a bool, and a bool or a tensor for a number, without a word."""
    inputs = checks.smallest(op).inputs()
    form = re.compile(rf"(^|\W){name}(:| has| is) .*expected .+")
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != name}

    def call(tensors: dict[str, Tensor], value: Any) -> Any:
        return op.function(**inputs | tensors | {name: value})

    run = {"explained": lambda tensors, value: explain(op.function, **inputs | {name: value})}.get(way, call)
    taken = []
    for value in wrong_values(name, kinds, way == "compiled"):
        if way == "compiled":
            torch._dynamo.reset()
            run = torch.compile(call, backend="eager")
        try:
            with torch.no_grad(), use("reference" if way == "reference" else "auto"):
                run(tensors, value)
            taken.append(repr(value))
        except Exception as error:
            plain = isinstance(error, (TypeError, ValueError)) and "\n" not in str(error)
            if not form.search(str(error)) or not (plain or way == "compiled"):
                taken.append(f"{value!r}: {type(error).__name__}: {error}"[:300])
    assert not taken, "\n".join(taken)


@pytest.mark.parametrize(("op", "name", "kinds"), [case for case in SCALARS if "float" in case.values[2]])
def test_any_real_number_is_taken_for_a_float(op: Op, name: str, kinds: list[str]) -> None:
    inputs = checks.smallest(op).inputs()
    for way in ("auto", "reference"):
        with use(way):
            expected = checks.results(op, inputs | {name: 1.0})
            for value in (1, np.float32(1.0), np.float64(1.0), np.int64(1)):
                found = checks.results(op, inputs | {name: value})
                assert all(torch.equal(found[key], plain) for key, plain in expected.items()), (value, way)


def said_of(function: Callable[..., Any], inputs: dict[str, Any]) -> str:
    """What a call refuses with; empty where it answers."""
    try:
        with torch.no_grad():
            function(**inputs)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("op", EVERY)
def test_bad_arguments_are_named(op: Op) -> None:
    case = next(c for c in checks.small(op) if c.name.startswith(("odd", "matrix")) and c.inputs())
    names = list(inspect.signature(op.function).parameters)
    form = re.compile(rf"^({op.name}: )?({'|'.join(names)})(:| has| is) .*expected .+")
    wrong, refused = [], 0
    alone = sum(isinstance(v, Tensor) for v in case.inputs().values()) == 1
    for name, value in case.inputs().items():
        for what, changed in changes_of(op, name, value, alone).items():
            inputs = case.inputs() | {name: changed}
            try:
                said = said_of(op.function, inputs)
            except Exception as error:
                wrong.append(f"{name}, {what}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            refused += bool(said)
            if said and (not form.match(said) or "\n" in said):
                wrong.append(f"{name}, {what}: {said}")
            if not said and what in MUST:
                wrong.append(f"{name}, {what}: taken")
            if not said and what not in MUST and (errors := checks.check(op, inputs, ROUNDING)):
                wrong.append(f"{name}, {what}: {errors}")
    assert not wrong, "\n".join(wrong)
    assert refused > 5


@pytest.mark.parametrize("op", EVERY)
def test_explain_refuses_what_the_call_refuses(op: Op) -> None:
    case = next(c for c in checks.small(op) if c.name.startswith(("odd", "matrix")) and c.inputs())
    alone = sum(isinstance(v, Tensor) for v in case.inputs().values()) == 1
    for name, value in case.inputs().items():
        for what, changed in changes_of(op, name, value, alone).items():
            inputs = case.inputs() | {name: changed}
            said = said_of(lambda **given: explain(op.function, **given), inputs)
            assert said == said_of(op.function, inputs), (name, what)


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.mutated], ids=lambda op: op.name)
def test_explain_runs_nothing(op: Op) -> None:
    inputs, untouched = (checks.smallest(op).inputs() for _ in range(2))
    explain(op.function, **inputs)
    assert all(torch.equal(inputs[key], untouched[key]) for key in op.mutated if key in inputs)


@pytest.mark.parametrize("op", EVERY)
def test_explain_without_a_tensor_is_a_type_error(op: Op) -> None:
    with pytest.raises(TypeError, match="required|expected"):
        explain(op.function)
    numbers = {n: 1.0 for n, p in inspect.signature(op.function).parameters.items() if p.default is p.empty}
    with pytest.raises(TypeError, match="(:| is a) .*expected"):
        explain(op.function, **numbers)

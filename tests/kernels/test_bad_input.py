"""Every argument of every operator replaced by what does not fit: one line that names it, or the right answer.

Nothing here knows an operator by name. What an operator says in its own words is in its own test file.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd.kernels._op import OPS, Op
from tests.kernels import checks

EVERY = [pytest.param(op, id=op.name) for op in OPS.values()]
ROUNDING = 0.05  # a wrong answer is wrong by more
NUMBERS = (math.nan, math.inf, -math.inf, -1, 0, 1.5, 99, None, "text", "1.5", [1, 2])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.float8_e4m3fn, torch.int64, torch.complex64, torch.bool)


def planted(t: Tensor, value: float) -> Tensor:
    """`t` with another last number."""
    return torch.cat([t.flatten()[:-1], t.new_tensor([value])]).view(t.shape)


def longer(t: Tensor, dim: int) -> Tensor:
    return torch.cat([t, t.narrow(dim, 0, 1)], dim)


def changes_of(op: Op, name: str, value: Any, alone: bool) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"'1.5'": "1.5"} if isinstance(value, bool) else {repr(number): number for number in NUMBERS}
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
    "'text'",
    "'1.5'",
    *(str(dtype) for dtype in OTHERS[:3]),
)


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

"""The C++ product over rows (csrc/cpu/lora.cpp) on its own, above all float32 in three parts on the tile unit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hypersd.kernels import _lora_rows, _native

EPSILON = 2.0**-24


@pytest.fixture(params=["avx512", "amx"])
def instructions(request):
    if not _native.available():
        pytest.skip(_native.status())
    try:
        yield _native.isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        _native.isa("auto")


def draw(*shape: int, seed: int, spread: int = 0) -> Tensor:
    """Normal numbers times powers of two from 2^-spread to 2^spread, each element its own."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-spread, spread + 1, shape, generator=generator)
    return torch.randn(shape, generator=generator) * 2.0**powers


def layer(m: int, k: int, n: int, r: int, spread: int = 0) -> dict[str, Tensor]:
    sizes = {"x": (m, k), "weight": (n, k), "a": (r, k), "b": (n, r), "dy": (m, n)}
    return {name: draw(*size, seed=i, spread=spread) for i, (name, size) in enumerate(sizes.items())}


def forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, fold: bool = False, **others: Tensor) -> Tensor:
    return _lora_rows.forward(x, weight, None, a, b, 0.5, (1, 1), (0, 0), not fold, fold)[0]


def backward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    return _lora_rows.backward(dy, x, x.new_empty(0), weight, a, b, 0.5, (1, 1), (0, 0), True, True)


@pytest.mark.parametrize("spread", [0, 12])
@pytest.mark.parametrize("sizes", [(70, 32, 16, 4), (97, 50, 70, 6), (64, 4096, 24, 2), (700, 96, 130, 34)], ids=str)
def test_float32_keeps_its_digits(instructions, sizes, spread):
    """Each sum against float64, as a share of its products' magnitudes: at most twice what torch's own product loses
    there, or ten roundings."""
    inputs = layer(*sizes, spread=spread)
    x, weight, a, b, dy = (inputs[name].double() for name in ("x", "weight", "a", "b", "dy"))
    folded = weight + 0.5 * b @ a
    update = weight.abs() + 0.5 * b.abs() @ a.abs()
    cases = [
        (forward(**inputs), x @ folded.T, x.abs() @ update.T),
        (forward(**inputs, fold=True), x @ folded.T, x.abs() @ update.T),
        (backward(**inputs)[0], dy @ folded, dy.abs() @ update),
    ]
    eager = ((inputs["x"] @ inputs["weight"].T - x @ weight.T).abs() / (x.abs() @ weight.abs().T)).max().item()
    for found, exact, magnitude in cases:
        lost = ((found - exact).abs() / magnitude).max().item()
        assert lost <= max(2 * eager, 10 * EPSILON)
        assert not torch.equal(found, torch.zeros_like(found))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row(instructions, value):
    inputs = layer(64, 70, 48, 4)
    expected = forward(**inputs)
    inputs["x"][17, 33] = value
    y = forward(**inputs)
    assert not y[17].isfinite().any()
    rest = torch.arange(64) != 17
    assert torch.equal(y[rest], expected[rest])


def test_numbers_near_the_ends_of_the_range(instructions):
    inputs = layer(64, 32, 16, 2)
    for factor in (2.0**-100, 2.0**100):
        scaled = inputs | {"x": inputs["x"] * factor}
        expected = (
            inputs["x"].double() @ (inputs["weight"].double() + 0.5 * inputs["b"].double() @ inputs["a"].double()).T
        )
        torch.testing.assert_close(forward(**scaled).double() / factor, expected, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_how_many_there_are(instructions):
    """By panels or by blocks, in tiles full or not: each row is summed alike."""
    inputs = layer(2000, 160, 96, 8)
    whole = forward(**inputs)
    for count in (64, 333):
        assert torch.equal(forward(**inputs | {"x": inputs["x"][:count]}), whole[:count])

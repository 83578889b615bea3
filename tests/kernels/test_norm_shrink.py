"""What is peculiar to norm_shrink: it is two operators, and layers that share y stack their adapters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hypersd.kernels import lora_linear, norm_shrink, use

pytestmark = pytest.mark.usefixtures("device")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_s_is_the_product_of_the_rounded_y(dtype):
    """What a LoRA layer computes from y itself: the same rounding points, so the same numbers."""
    x, a = draw(3, 5, 48, dtype=dtype), draw(4, 48, dtype=dtype, seed=1)
    y, s = norm_shrink(x, None, None, 1e-5, a)
    assert y.shape == x.shape and s.shape == (3, 5, 4) and y.dtype == s.dtype == dtype
    exact = F.linear(y.double(), a.double())
    assert float((s.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_stacked_adapters_are_those_of_the_layers():
    x, stacked = draw(7, 32), draw(9, 32, seed=1)
    y, s = norm_shrink(x, None, None, 1e-5, stacked)
    for part, a in zip(s.split(3, -1), stacked.split(3), strict=True):
        alone = norm_shrink(x, None, None, 1e-5, a)
        torch.testing.assert_close(part, alone[1])
        assert torch.equal(y, alone[0])


def test_gradients_are_those_of_layer_norm_and_a_lora_layer():
    """y and S used as a LoRA layer uses them: x W^T + b S^T, every gradient as autograd finds it for the two."""
    inputs = {"x": draw(6, 24), "gain": draw(24, seed=1), "shift": draw(24, seed=2), "a": draw(3, 24, seed=3)}
    wide = {name: value.double() for name, value in inputs.items()}
    weight, b = draw(10, 24, seed=4).double(), draw(10, 3, seed=5).double()

    def gradients(fused: bool) -> tuple[torch.Tensor, ...]:
        x, gain, shift, a = leaves = [value.detach().clone().requires_grad_() for value in wide.values()]
        if fused:
            y, s = norm_shrink(x, gain, shift, 1e-5, a)
            out = F.linear(y, weight) + 0.5 * F.linear(s, b)
        else:
            out = lora_linear(F.layer_norm(x, (24,), gain, shift, 1e-5), weight, None, a, b, 0.5)
        return torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel()).to(out)).view_as(out))

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("used", ["y", "s"])
def test_one_result_alone_has_gradients(used):
    x, a = draw(5, 16).double().requires_grad_(), draw(2, 16, seed=1).double().requires_grad_()
    result = norm_shrink(x, None, None, 1e-5, a)[used == "s"].square().sum()
    dx, da = torch.autograd.grad(result, (x, a), allow_unused=True)
    with use("reference"):
        result = norm_shrink(x, None, None, 1e-5, a)[used == "s"].square().sum()
        expected = torch.autograd.grad(result, (x, a), allow_unused=True)
    torch.testing.assert_close(dx, expected[0], rtol=1e-10, atol=1e-10)
    assert (da is None) is (used == "y")
    if da is not None:
        torch.testing.assert_close(da, expected[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_far_mean_costs_no_digits(dtype):
    """Deviations are squared, not squares subtracted: rows around 1000 have the y of rows around 0."""
    x, a = torch.cat([draw(4, 64) * 8]).to(dtype), draw(3, 64, dtype=dtype, seed=1)
    near, far = (norm_shrink(t, None, None, 1e-5, a)[0].double() for t in (x.float(), x.float() + 1000.0))
    assert float((near - far).abs().max()) < 1e-3


def test_a_constant_row_is_the_bias():
    x, shift, a = torch.full((2, 16), 3.0), draw(16), torch.eye(16)[:4]
    y, s = norm_shrink(x, None, shift, 1e-5, a)
    assert torch.equal(y, shift.expand(2, 16)) and torch.allclose(s, shift[:4].expand(2, 4))


def test_an_adapter_of_another_dtype_is_cast():
    x, a = draw(5, 16, dtype=torch.bfloat16), draw(2, 16, seed=1).requires_grad_()
    _, s = norm_shrink(x, None, None, 1e-5, a)
    s.sum().backward()
    assert s.dtype == torch.bfloat16 and a.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"x": torch.zeros(3, 16, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: got shape \(3, 0\)"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got a 0-d tensor"),
        ({"weight": torch.zeros(15)}, ValueError, r"weight: got shape \(15,\), expected \(16,\)"),
        ({"bias": torch.zeros(16, dtype=torch.int64)}, TypeError, "bias: got torch.int64"),
        ({"a": torch.zeros(2, 15)}, ValueError, r"a: got shape \(2, 15\), expected \(r, 16\)"),
        ({"a": torch.zeros(16)}, ValueError, r"a: got shape \(16,\)"),
        ({"a": torch.zeros(2, 16, device="meta")}, ValueError, "a: got device meta"),
    ],
)
def test_what_does_not_fit_is_named(change, error, word):
    inputs = {"x": torch.zeros(3, 16), "weight": None, "bias": None, "eps": 1e-5, "a": torch.zeros(2, 16)}
    if change.keys() & inputs.keys() and torch.get_default_device().type == "cuda":
        change = {name: value.cuda() if value.device.type == "cpu" else value for name, value in change.items()}
    with pytest.raises(error, match=word):
        norm_shrink(**inputs | change)

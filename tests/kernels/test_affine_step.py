"""What is peculiar to affine_step: its identities, its coefficient forms, what it refuses."""

from __future__ import annotations

import pytest
import torch

from hypersd.kernels import affine_step

pytestmark = pytest.mark.usefixtures("device")
NAMES = ("x", "eps_cond", "eps_uncond", "history", "noise")


def tensors(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape, dtype=dtype) for name in NAMES}


def test_by_hand():
    values = {name: torch.full((2, 1), float(10**i), dtype=torch.float64) for i, name in enumerate(NAMES)}
    coef = torch.tensor([[1.0, 2, 3, 4, 5], [5, 4, 3, 2, 1]], dtype=torch.float64)
    assert affine_step(**values, coef=coef).tolist() == [[54321.0], [12345.0]]


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 5, 7, 11), (2, 4, 33, 32)])
def test_one_row_for_all_equals_the_row_repeated(shape):
    values = tensors(*shape, dtype=torch.float32)
    coef = torch.randn(5, dtype=torch.float64)
    assert torch.equal(affine_step(**values, coef=coef), affine_step(**values, coef=coef.expand(shape[0], 5)))
    assert torch.equal(affine_step(**values, coef=coef), affine_step(**values, coef=coef.repeat(shape[0], 1)))


def test_a_term_left_out_does_not_count():
    values, coef = tensors(2, 3, 5), torch.randn(2, 5, dtype=torch.float64)
    without = {name: values[name] for name in ("x", "eps_cond", "history")}
    zeros = {name: torch.zeros_like(values["x"]) for name in ("eps_uncond", "noise")}
    torch.testing.assert_close(affine_step(**without, coef=coef), affine_step(**without, **zeros, coef=coef))


def test_linear_in_every_tensor():
    one, coef = tensors(2, 3, 40), torch.randn(2, 5, dtype=torch.float64)
    for name in NAMES:
        other = torch.randn_like(one[name])
        merged = affine_step(**(one | {name: one[name] + 2 * other}), coef=coef)
        alone = affine_step(**{n: other if n == name else torch.zeros_like(other) for n in NAMES}, coef=coef)
        torch.testing.assert_close(merged, affine_step(**one, coef=coef) + 2 * alone)


def test_guidance_is_a_split_of_one_coefficient():
    values, k = tensors(2, 4, 8, 8), torch.tensor([0.9, -0.3, 0, 0, 0], dtype=torch.float64)
    guided = values["eps_uncond"] + 7.5 * (values["eps_cond"] - values["eps_uncond"])
    split = torch.tensor([0.9, -0.3 * 7.5, -0.3 * (1 - 7.5), 0, 0], dtype=torch.float64)
    found = affine_step(values["x"], values["eps_cond"], split, eps_uncond=values["eps_uncond"])
    torch.testing.assert_close(found, affine_step(values["x"], guided, k))


def test_there_and_back_is_the_identity():
    """DDIM from t to s and, with the same noise prediction, back to t."""
    x, eps = tensors(1, 4, 8, 8)["x"], tensors(1, 4, 8, 8)["noise"]
    alpha, sigma = (0.6, 0.9), (0.8, 0.19**0.5)

    def jump(a: int, b: int) -> torch.Tensor:
        ratio = alpha[b] / alpha[a]
        return torch.tensor([ratio, sigma[b] - ratio * sigma[a], 0, 0, 0], dtype=torch.float64)

    torch.testing.assert_close(affine_step(affine_step(x, eps, jump(0, 1)), eps, jump(1, 0)), x)


@pytest.mark.parametrize("coef_dtype", [torch.float64, torch.float32])
def test_coefficients_of_any_strides(coef_dtype):
    values = tensors(3, 4, 6, dtype=torch.float32)
    coef = torch.randn(3, 5, dtype=coef_dtype)
    strided = torch.full((3, 11), float("nan"), dtype=coef_dtype)[:, ::2][:, :5].copy_(coef)
    assert torch.equal(affine_step(**values, coef=strided), affine_step(**values, coef=coef))
    table = torch.randn(7, 5, dtype=coef_dtype)
    assert torch.equal(affine_step(**values, coef=table[3]), affine_step(**values, coef=table[3].clone()))


def test_mixed_dtypes_compute_in_float32_and_return_that_of_x():
    values = tensors(2, 4, 9, dtype=torch.float32)
    coef = torch.randn(2, 5, dtype=torch.float64)
    values["eps_cond"] = values["eps_cond"].bfloat16()
    exact = affine_step(**{name: t.double() for name, t in values.items()}, coef=coef)
    found = affine_step(**values, coef=coef)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    leaf = values["eps_cond"].requires_grad_()
    (grad,) = torch.autograd.grad(affine_step(**values, coef=coef).sum(), [leaf])
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, coef[:, 1, None, None].expand_as(grad).bfloat16())


def test_gradients_are_rounded_to_the_dtype_of_their_own_tensor():
    """k = 1e5 leaves float16, in which x and the output are, but not float32, in which eps_cond is."""
    x = torch.ones(2, 4, dtype=torch.float16, requires_grad=True)
    eps = torch.full((2, 4), 1e-6, requires_grad=True)
    coef = torch.tensor([1 / 3, 1e5, 0, 0, 0], dtype=torch.float64)
    dx, deps = torch.autograd.grad(affine_step(x, eps, coef), [x, eps], torch.ones(2, 4, dtype=torch.float16))
    assert dx.dtype == torch.float16 and dx.tolist() == [[float(torch.tensor(1 / 3).half())] * 4] * 2
    assert deps.dtype == torch.float32 and deps.tolist() == [[1e5] * 4] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_passes_unchanged(dtype):
    """k0 = 1 is the identity on all 65,536 bit patterns: subnormals, infinities and signs are kept, NaN stays NaN."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(1, -1)
    out = affine_step(x, torch.zeros_like(x), torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))
    nan = x.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan] + 0, x[~nan] + 0)  # + 0: -0 + 0 * 0 is +0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even_as_torch_does(dtype):
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1, 200_000), dtype=torch.int64).to(torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.randn(1, 100_000), torch.randn(1, 100_000) * 3e-6], 1)
    x = x[:, ~x.isnan()[0]]
    grad = x.to(dtype)  # torch's own rounding
    half = torch.zeros_like(grad)
    coef = torch.tensor([0.0, 1, 0, 0, 0], dtype=torch.float64)
    found = affine_step(half, x.nan_to_num(posinf=1e38, neginf=-1e38), coef)
    assert torch.equal(found, x.nan_to_num(posinf=1e38, neginf=-1e38).to(dtype))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": 1.0}, TypeError, "x: got float, expected a tensor"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x: got torch.int64, expected a floating"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got a 0-d tensor, expected a batch dimension"),
        ({"eps_cond": torch.zeros(3, 2)}, ValueError, r"eps_cond: got shape \(3, 2\), expected \(2, 3\) as x"),
        ({"eps_cond": None}, TypeError, "eps_cond: got NoneType, expected a tensor"),
        ({"history": torch.zeros(2)}, ValueError, r"history: got shape \(2,\), expected \(2, 3\) as x"),
        ({"noise": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, "noise: got torch.complex64"),
        ({"noise": torch.zeros(2, 3, device="meta")}, ValueError, "noise: got device meta, expected (cpu|cuda:0) as x"),
        ({"coef": torch.zeros(4)}, ValueError, r"coef: got shape \(4,\), expected \(5,\) or \(2, 5\)"),
        ({"coef": torch.zeros(3, 5)}, ValueError, r"coef: got shape \(3, 5\), expected \(5,\) or \(2, 5\)"),
        ({"coef": torch.zeros(5, dtype=torch.float16)}, TypeError, "coef: got torch.float16, expected torch.float64"),
        ({"coef": [1.0, 0, 0, 0, 0]}, TypeError, "coef: got list, expected a float64 tensor"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_refuses_with_the_arguments_name(change, error, words, grad):
    inputs = {"x": torch.zeros(2, 3), "eps_cond": torch.zeros(2, 3), "coef": torch.zeros(5).double()} | change
    if grad and isinstance(inputs["x"], torch.Tensor) and inputs["x"].is_floating_point():
        inputs["x"] = inputs["x"].requires_grad_()
    with pytest.raises(error, match=words):
        affine_step(**inputs)

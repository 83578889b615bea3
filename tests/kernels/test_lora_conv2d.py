"""What is peculiar to lora_conv2d: its forms, memory formats, PEFT's layer, the linear layer as its 1x1 case."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora, _lora_rows, explain, lora_conv2d, lora_linear, use

LAST = torch.channels_last


def layer(
    batch: int = 2, size: int = 9, *, k: int = 6, n: int = 8, kernel: int = 3, r: int = 3, bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def draw(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    std = (k * kernel * kernel) ** -0.5
    return {
        "x": draw(batch, k, size, size + 2, std=1.0),
        "weight": draw(n, k, kernel, kernel, std=std),
        "bias": draw(n, std=1.0) if bias else None,
        "a": draw(r, k, kernel, kernel, std=std),
        "b": draw(n, r, 1, 1, std=r**-0.5),
    }


def gradients(inputs: dict, stride: int, scale: float | Tensor = 0.7) -> tuple[Tensor, ...]:
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("x", "a", "b")]
    padding = inputs["weight"].shape[-1] // 2
    y = lora_conv2d(leaves[0], inputs["weight"], inputs["bias"], leaves[1], leaves[2], scale, stride, padding)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel()).to(y)).view_as(y))


@pytest.fixture
def take(monkeypatch):
    def force(forward: str, input_grad: str = "split", adapter_grad: str = "thin") -> None:
        monkeypatch.setattr(_lora_rows, "takes", lambda *args, **options: False)
        monkeypatch.setattr(_lora, "forward_form", lambda *args: forward)
        plan = _lora.Plan(forward, input_grad, adapter_grad, "forced")
        monkeypatch.setattr(_lora, "plan", lambda *args, **options: plan)

    return force


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("forward", "input_grad", "adapter_grad"),
    itertools.product(("split", "accumulate", "fold"), ("split", "fold"), ("thin", "full")),
)
@pytest.mark.parametrize(("stride", "kernel", "last"), [(1, 3, False), (2, 3, True), (1, 1, True)])
def test_every_form_is_the_definition(take, forward, input_grad, adapter_grad, stride, kernel, last):
    inputs = layer(kernel=kernel, bias=stride == 1)
    if last:
        inputs = {
            k: t.contiguous(memory_format=LAST) if t is not None and t.dim() == 4 else t for k, t in inputs.items()
        }
    with use("reference"):
        expected = gradients(inputs, stride)
    take(forward, input_grad, adapter_grad)
    for found, exact in zip(gradients(inputs, stride), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("form", ["split", "accumulate", "fold"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_stays(take, form, dtype):
    take(form, form, "full" if form == "fold" else "thin")
    inputs = layer(2, 8, k=16, n=16, dtype=dtype)
    x = inputs["x"].contiguous(memory_format=LAST).requires_grad_()
    a, b = inputs["a"].requires_grad_(), inputs["b"].requires_grad_()
    for weight in (inputs["weight"], inputs["weight"].contiguous(memory_format=LAST)):
        y = lora_conv2d(x, weight, inputs["bias"], a, b, 0.7, 1, 1)
        dx, da, db = torch.autograd.grad(y.square().sum(), (x, a, b))
        assert y.is_contiguous(memory_format=LAST) and dx.is_contiguous(memory_format=LAST)
        assert da.is_contiguous() and db.is_contiguous()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("form", ["split", "accumulate", "fold"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_no_adapter_is_the_base_layer(take, form, layout):
    take(form)
    inputs = layer(2, 16, k=32, n=32, dtype=torch.float32)
    x, zero = inputs["x"].contiguous(memory_format=layout), torch.zeros_like(inputs["b"])
    y = lora_conv2d(x, inputs["weight"], inputs["bias"], inputs["a"], zero, 0.7, 1, 1)
    assert torch.equal(y, F.conv2d(x, inputs["weight"], inputs["bias"], 1, 1))


@pytest.mark.parametrize(("stride", "kernel", "n"), [(1, 3, 8), (2, 3, 70), (1, 1, 130)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_a_weight_folded_while_it_is_packed(stride, kernel, n, layout, monkeypatch):
    if torch.float32 not in _lora_rows._native.lora_dtypes():
        pytest.skip("this CPU has no such kernel")
    exact = layer(3, 11, k=20, n=n, kernel=kernel, r=5)
    inputs = {name: t.float() for name, t in exact.items()} | {"x": exact["x"].float().contiguous(memory_format=LAST)}
    inputs |= {name: inputs[name].contiguous(memory_format=layout) for name in ("weight", "a")}
    monkeypatch.setattr(_lora, "forward_form", lambda *args: "rows_fold")
    y = lora_conv2d(**inputs, scale=0.7, stride=stride, padding=kernel // 2)
    with use("reference"):
        truth = lora_conv2d(**exact, scale=0.7, stride=stride, padding=kernel // 2)
    assert y.is_contiguous(memory_format=LAST) and float((y - truth).norm() / truth.norm()) < 5e-7


@pytest.mark.usefixtures("device")
def test_a_1x1_kernel_is_the_linear_layer():
    inputs = layer(kernel=1)
    y = lora_conv2d(**inputs, scale=0.7)
    flat = {name: inputs[name].flatten(1) for name in ("weight", "a", "b")}
    rows = lora_linear(inputs["x"].permute(0, 2, 3, 1), bias=inputs["bias"], scale=0.7, **flat)
    torch.testing.assert_close(y, rows.permute(0, 3, 1, 2))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_folded_weight_is_the_layer_and_keeps_its_format(layout):
    inputs = layer(dtype=torch.float32)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=layout)
    weight = _lora.fold_weight(inputs["weight"], inputs["a"], inputs["b"], 0.7)
    assert weight.is_contiguous(memory_format=layout)
    folded = F.conv2d(inputs["x"], weight, inputs["bias"], 2, 1)
    torch.testing.assert_close(folded, lora_conv2d(**inputs, scale=0.7, stride=2, padding=1))


def test_a_folded_weight_of_one_channel_has_plain_strides():
    """oneDNN's convolution reads beside a weight whose single channel has another stride than a contiguous one."""
    weight = torch.randn(32, 1, 3, 3).transpose(2, 3)
    folded = _lora.fold(weight, torch.randn(4, 1, 3, 3), torch.zeros(32, 4, 1, 1), 1.0)
    assert torch.equal(folded, weight) and folded.stride() == (9, 9, 3, 1)


def test_a_small_update_survives_bfloat16_in_channels_last():
    # of the CPU's kernel alone: a GPU rounds the convolution to 16 bits before the update joins it, as PEFT does
    inputs = layer(4, 16, k=64, n=64, r=32, dtype=torch.bfloat16)
    inputs["b"] = inputs["b"] * 1e-4
    inputs["x"] = inputs["x"].contiguous(memory_format=LAST)
    wide = {name: t.double() for name, t in inputs.items()}
    base = F.conv2d(wide["x"], wide["weight"], wide["bias"], 1, 1)
    update = F.conv2d(F.conv2d(wide["x"], wide["a"], None, 1, 1), wide["b"])
    y = lora_conv2d(**inputs, scale=1.0, stride=1, padding=1).double()
    assert float(((y - base) * update).sum() / update.square().sum()) == pytest.approx(1.0, abs=0.35)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("stride", [1, 2])
def test_peft_layer(stride):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Conv2d

    inputs = layer(dtype=torch.float32, r=4)
    base = torch.nn.Conv2d(6, 8, 3, stride, 1)
    base.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    peft = Conv2d(base, "default", LoraConfig(r=4, lora_alpha=2), r=4, lora_alpha=2)
    peft.lora_A["default"].weight.data, peft.lora_B["default"].weight.data = inputs["a"], inputs["b"]
    x = inputs["x"].clone().requires_grad_()
    y = peft(x)
    upstream = torch.cos(torch.arange(y.numel()).to(y)).view_as(y)
    leaves = [x, peft.lora_A["default"].weight, peft.lora_B["default"].weight]
    expected = y.detach(), *torch.autograd.grad(y, leaves, upstream)
    for found, other in zip(gradients(inputs, stride, 0.5), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("device")
def test_scale_as_a_tensor():
    inputs = layer()
    for found, expected in zip(gradients(inputs, 1, torch.tensor(0.7)), gradients(inputs, 1, 0.7), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("device")
def test_the_frozen_weight_gets_no_gradient():
    inputs = layer(dtype=torch.float32)
    weight, a = inputs["weight"].requires_grad_(), inputs["a"].requires_grad_()
    lora_conv2d(inputs["x"], weight, inputs["bias"], a, inputs["b"], 0.7, 1, 1).sum().backward()
    assert weight.grad is None and a.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"x": torch.zeros(2, 5, 9, 9, dtype=torch.float64)}, ValueError, "x has shape"),
        ({"x": torch.zeros(6, 9, 9, dtype=torch.float64)}, ValueError, "x has shape"),
        ({"weight": torch.zeros(8, 6, dtype=torch.float64)}, ValueError, "weight has shape"),
        ({"a": torch.zeros(3, 6, 1, 1, dtype=torch.float64)}, ValueError, "a has shape"),
        ({"b": torch.zeros(8, 3, dtype=torch.float64)}, ValueError, "b has shape"),
        ({"bias": torch.zeros(8)}, TypeError, "bias has dtype"),
        ({"stride": 0}, ValueError, "stride is"),
        ({"stride": (1,)}, ValueError, "stride is"),
        ({"stride": ()}, ValueError, "stride is"),
        ({"padding": (1, 1, 1)}, ValueError, "padding is"),
        ({"padding": -1}, ValueError, "padding is"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_what_does_not_fit_is_named(change, error, word, train):
    inputs = layer() | {"scale": 0.7, "stride": 1, "padding": 1}
    inputs["a"].requires_grad_(train)
    with pytest.raises(error, match=f"lora_conv2d: {word}"):
        lora_conv2d(**inputs | change)
    if word in ("stride is", "padding is"):
        with pytest.raises(error, match=f"lora_conv2d: {word}"):
            explain(lora_conv2d, **inputs | change)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_rank_zero_is_the_base_layer(implementation):
    inputs = layer()
    inputs |= {"a": inputs["a"][:0], "b": inputs["b"][:, :0]}
    with use(implementation):
        _, dx, da, db = gradients(inputs, 1)
        y = lora_conv2d(**inputs, scale=0.7, padding=1)
    x = inputs["x"].requires_grad_()
    base = torch.conv2d(x, inputs["weight"], inputs["bias"], 1, 1)
    (expected,) = torch.autograd.grad(base, x, torch.cos(torch.arange(base.numel()).to(base)).view_as(base))
    torch.testing.assert_close((y, dx), (base.detach(), expected), rtol=1e-12, atol=1e-13)
    assert (da.shape, db.shape) == (inputs["a"].shape, inputs["b"].shape)

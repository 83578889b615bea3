"""adamw_ema_ and clip_coefficient against torch's optimizer, EMA and clip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypersd.kernels import _native, adamw_ema_, clip_coefficient
from hypersd.kernels._op import OPS
from hypersd.kernels.adamw_ema import OP

NUMBERS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
N = 3_001


def buffers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    param, grad, ema = (torch.randn(N, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    grad[::7] *= 1e-6  # moments of many sizes
    return {"param": param, "grad": grad, "exp_avg": param.new_zeros(N), "exp_avg_sq": param.new_zeros(N), "ema": ema}


def torchs(state: dict[str, Tensor], grads: list[Tensor], lr: float) -> tuple[Tensor, Tensor]:
    """(param, ema) after AdamW and an EMA of decay 0.95."""
    param, ema = torch.nn.Parameter(state["param"].clone()), state["ema"].clone()
    optimizer = torch.optim.AdamW([param], lr=lr, fused=True, **NUMBERS)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        ema.lerp_(param.detach(), 0.05)
    return param.detach(), ema


def own(state: dict[str, Tensor], grads: list[Tensor], lr: Any, **others: Any) -> tuple[Tensor, Tensor]:
    state = {k: v.clone() for k, v in state.items() if k != "grad"}
    for step, grad in enumerate(grads, 1):
        adamw_ema_(**state, grad=grad, step=step, lr=lr, ema_decay=0.95, **NUMBERS, **others)
    return state["param"], state["ema"]


def test_is_torchs_adamw_and_ema():
    state = buffers(torch.float64)
    grads = [state["grad"] * factor for factor in (1.0, -0.3, 2.0, 0.0, 1e-3)]
    for found, expected in zip(own(state, grads, 1e-2), torchs(state, grads, 1e-2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_one_step_is_exact_to_one_rounding():
    state = buffers()
    exact, exact_ema = torchs({k: v.double() for k, v in state.items()}, [state["grad"].double()], 1e-2)
    found, ema = own(state, [state["grad"]], 1e-2)
    ulp = torch.finfo(torch.float32).eps
    # half a unit of the result, and half a unit of the change: 1e-2 of param, 0.05 of the distance from param to ema
    for value, truth, change in ((found, exact, 1e-2), (ema, exact_ema, 0.05 * (exact.abs() + exact_ema.abs()).max())):
        assert ((value - truth).abs() <= 0.51 * ulp * truth.abs() + 2 * ulp * change).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_on_the_device_are_those_of_the_host(dtype):
    state = buffers(dtype)
    grads = [state["grad"], -state["grad"]]
    expected = own(state, grads, 1e-2, clip=torch.tensor(0.5))
    left = {k: v.clone() for k, v in state.items() if k != "grad"}
    count, rate = torch.tensor(0.0), torch.tensor(1e-2, dtype=torch.float64)
    for grad in grads:
        count += 1
        adamw_ema_(**left, grad=grad / 2, step=count, lr=rate, ema_decay=0.95, **NUMBERS)
    for found, value in zip((left["param"], left["ema"]), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shadow_is_the_new_parameter(dtype):
    state = buffers()
    shadow = torch.full((N,), torch.nan, dtype=dtype)
    param, _ = own(state, [state["grad"]], 1e-2, shadow=shadow)
    assert torch.equal(shadow, param.to(dtype))


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
@pytest.mark.parametrize("run", ["op", "reference"])
def test_a_clip_that_is_not_finite_writes_nothing(factor, run):
    state = buffers()
    state["grad"][5] = torch.inf
    before = {k: v.clone() for k, v in state.items()}
    shadow = torch.zeros(N, dtype=torch.bfloat16)
    numbers = (1.0, 1e-2, 0.9, 0.999, 1e-8, 0.1, 0.95, shadow, torch.tensor(factor), None, None)
    (OP if run == "op" else OP.reference)(*state.values(), *numbers)
    assert all(torch.equal(state[k], v) for k, v in before.items()) and not shadow.any()


@pytest.mark.parametrize("wide", [False, True])
def test_clip_coefficient_is_torchs(wide):
    """As torch's in float64, whose float32 adds up 100,000 squares with an error of its own."""
    grad = torch.randn(100_003, dtype=torch.float64 if wide else torch.float32)
    parameter = torch.nn.Parameter(torch.zeros_like(grad, dtype=torch.float64))
    parameter.grad = grad.double().clone()
    expected = torch.nn.utils.clip_grad_norm_([parameter], 2.0)
    norm, factor = clip_coefficient(grad, 2.0)
    assert norm.dtype == factor.dtype == grad.dtype
    torch.testing.assert_close(norm.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close((factor * grad).double(), parameter.grad, rtol=5e-7, atol=0)
    assert clip_coefficient(grad, float("inf"))[1] == 1 and clip_coefficient(grad, 1e9)[1] == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("run", ["op", "reference"])
def test_clip_coefficient_of_a_bad_gradient_is_nan(value, run):
    grad = torch.ones(5_000)
    grad[4_999] = value
    norm, factor = (clip_coefficient if run == "op" else OPS["clip_coefficient"].reference)(grad, 1.0)
    assert not norm.isfinite() and factor.isnan()


def test_clip_coefficient_of_nothing_and_of_zeros_is_one():
    for grad in (torch.zeros(0), torch.zeros(9)):
        norm, factor = clip_coefficient(grad, 1.0)
        assert (norm.item(), factor.item()) == (0.0, 1.0)


def test_clip_coefficient_of_a_strided_gradient():
    grad = torch.randn(40, 30)
    plain = clip_coefficient(grad[:, ::2].contiguous(), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(clip_coefficient(grad[:, ::2], 1.0), plain, strict=True))


BAD = {
    "param: got torch.bfloat16": {"param": torch.zeros(N).bfloat16()},
    "exp_avg: got torch.float64": {"exp_avg": torch.zeros(N).double()},
    "ema: got shape (2,)": {"ema": torch.zeros(2)},
    "grad: got torch.int64": {"grad": torch.zeros(N, dtype=torch.int64)},
    "grad: got strides (2,)": {"grad": torch.zeros(N, 2)[:, 0]},
    "shadow: got shape (3,)": {"shadow": torch.zeros(3)},
    "shadow: got torch.float64": {"shadow": torch.zeros(N).double()},
    "clip: got shape (1,)": {"clip": torch.ones(1)},
    "clip: got float": {"clip": 0.5},
    "step: got 0.0": {"step": 0},
    "lr: got -1.0": {"lr": -1},
    "step: got 0.5": {"step": torch.tensor(0.5)},
    "lr: got -0.5": {"lr": torch.tensor(-0.5)},
    "lr: got nan": {"lr": torch.tensor(torch.nan, dtype=torch.float64)},
    "betas: got (0.9, 1.0)": {"betas": (0.9, 1.0)},
    "eps: got -1e-08": {"eps": -1e-8},
    "weight_decay: got -0.1": {"weight_decay": -0.1},
    "ema_decay: got 1.5": {"ema_decay": 1.5},
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said, native, monkeypatch):
    if native and not _native.available():
        pytest.skip(_native.status())
    if not native:
        monkeypatch.setattr(OP, "raw", OP._checked(OP.fallback))
    inputs = {**buffers(), "step": 1, "lr": 1e-2, **NUMBERS, "ema_decay": 0.95, **BAD[said]}
    before = buffers()
    with pytest.raises((TypeError, ValueError)) as caught:
        adamw_ema_(**inputs)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert all(torch.equal(inputs[k], v) for k, v in before.items() if k not in BAD[said])
    with pytest.raises(ValueError, match="max_norm: got 0.0, expected a positive number"):
        clip_coefficient(before["grad"], 0.0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shift", [0, 1, N - 1, N])
@pytest.mark.parametrize(
    ("name", "other"),
    [("param", "ema"), ("exp_avg", "exp_avg_sq"), ("ema", "shadow"), ("param", "grad"), ("grad", "ema")],
)
def test_buffers_share_no_memory_but_for_a_spent_gradient(name, other, shift, native, monkeypatch):
    if native and not _native.available():
        pytest.skip(_native.status())
    if not native:
        monkeypatch.setattr(OP, "raw", OP._checked(OP.fallback))
    numbers = {"step": 1, "lr": 1e-2, **NUMBERS, "ema_decay": 0.95}
    apart = buffers() | {"shadow": torch.zeros(N)}
    block = torch.cat([apart[name], apart[other]])[: N + shift]
    inputs = apart | {name: block[:N], other: block[shift:]}
    apart = {k: v.clone() for k, v in inputs.items()}
    if shift == N or (shift == 0 and (name, other) == ("grad", "ema")):
        adamw_ema_(**inputs, **numbers)
        adamw_ema_(**apart, **numbers)
        assert all(torch.equal(inputs[k], v) for k, v in apart.items() if k not in ("grad", "ema") or shift)
        assert torch.equal(inputs["ema"], apart["ema"])
        return
    with pytest.raises(ValueError, match=f"{other}: shares memory with {name}, expected a buffer of its own"):
        adamw_ema_(**inputs, **numbers)
    assert all(torch.equal(inputs[k], v) for k, v in apart.items())

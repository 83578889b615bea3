"""Identities that need no oracle, on every instruction set and on the fallback.

Those of one operator alone (affine_step is linear, the loss of equal landings is 0, a permutation of the keys changes
nothing, ...) stand in its own test file; here are those that tie two operators, or an operator and a schedule.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import (
    _native,
    adamw_ema_,
    affine_step,
    attention,
    clip_coefficient,
    consistency_loss,
    geglu,
    group_norm_silu,
    lora_conv2d,
    lora_linear,
    lora_linear_routed,
    score_gradient,
)
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.solvers import lcm_boundary
from tests.conftest import SCHEDULER

pytestmark = pytest.mark.parametrize("implementation", [*_native.ISA_LEVELS, "fallback"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(found: Tensor, expected: Tensor, roundings: float = 4) -> None:
    """Within so many roundings of the largest number."""
    limit = roundings * torch.finfo(found.dtype).eps * float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def jump(process: NoiseProcess, t: int, s: int) -> Tensor:
    k0, k1 = process.jump(np.array([t]), np.array([s]))[0]
    return torch.tensor([k0, k1, 0, 0, 0], dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_there_and_back_at_every_distance(implementation, prediction):
    process = NoiseProcess.from_config(SCHEDULER | {"prediction_type": "epsilon"})
    x, eps = draw(2, 4, 8, 8, dtype=torch.float64), draw(2, 4, 8, 8, dtype=torch.float64, seed=1)
    for t, s in ((999, 0), (500, 499), (20, 960)):
        there = affine_step(x, eps, jump(process, t, s))
        close(affine_step(there, eps, jump(process, s, t)), x, 1e5)  # alpha of the last step is 0.07
        other = NoiseProcess.from_config(SCHEDULER | {"prediction_type": prediction})
        m = {"epsilon": eps, "sample": None, "v_prediction": None}[prediction]
        if m is None:  # the same jump from what another kind of network would have said
            (c0, c1), alpha, sigma = other.eps(np.array([t]))[0], *other.at(t)
            m = (eps - c0 * x) / c1
            assert float(alpha) ** 2 + float(sigma) ** 2 == pytest.approx(1)
        close(affine_step(x, m, jump(other, t, s)), there, 1e5)


def test_a_jump_of_no_length_is_the_boundary_condition(implementation):
    """f(x, t -> t) = x: what makes a consistency function one, at t = 0 and everywhere."""
    for prediction in ("epsilon", "v_prediction", "sample"):
        process = NoiseProcess.from_config(SCHEDULER | {"prediction_type": prediction})
        x, m = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1)
        for t in (0, 1, 999):
            close(affine_step(x, m, jump(process, t, t)), x, 1)
    skip, out = (float(c) for c in lcm_boundary(0))
    assert torch.equal(affine_step(x, m, torch.tensor([skip, out, 0, 0, 0], dtype=torch.float64)), x)


def test_the_loss_of_a_function_with_itself_is_zero(implementation):
    x, m = draw(2, 4, 8, 8), draw(2, 4, 8, 8, seed=1).requires_grad_()
    coef = torch.tensor([[0.9, -0.2, 0.9, -0.2]], dtype=torch.float64).repeat(2, 1)
    loss = consistency_loss(m, x, m.detach(), x, coef)
    (grad,) = torch.autograd.grad(loss, m)
    assert loss.item() == 0 and not grad.any()


@DTYPES
@pytest.mark.parametrize("last", [False, True])
def test_group_norm_forgets_scale_and_shift_of_a_group(implementation, dtype, last):
    x, weight, bias = draw(2, 12, 9, 7, dtype=dtype), draw(12, dtype=dtype), draw(12, dtype=dtype, seed=1)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    factor = torch.tensor([0.5, 2.0, 4.0]).to(dtype).repeat_interleave(4)[:, None, None]
    y = group_norm_silu(x, 3, weight, bias, 0.0)
    assert torch.equal(group_norm_silu(x * factor, 3, weight, bias, 0.0), y)  # powers of two round nothing
    shifted = group_norm_silu(x.float() * 3 + torch.tensor([1.0, -2.0, 5.0]).repeat_interleave(4)[:, None, None],
                              3, weight.float(), bias.float(), 0.0)  # fmt: skip
    close(shifted, group_norm_silu(x.float(), 3, weight.float(), bias.float(), 0.0), 32)
    close(group_norm_silu(-x, 3, -weight, bias, 0.0), y, 1)


@DTYPES
def test_geglu_is_odd_in_its_values_and_gelu_of_g_less_gelu_of_minus_g_is_g(implementation, dtype):
    value, gate = draw(5, 70, dtype=dtype), draw(5, 70, dtype=dtype, seed=1)
    y = geglu(torch.cat([value, gate], -1))
    assert torch.equal(geglu(torch.cat([-value, gate], -1)), -y)
    assert torch.equal(geglu(torch.cat([2 * value, gate], -1)), 2 * y)
    one = torch.ones_like(gate)
    close(geglu(torch.cat([one, gate], -1)) - geglu(torch.cat([one, -gate], -1)), gate)


def layer(dtype: torch.dtype, conv: bool, r: int = 8) -> dict[str, Any]:
    kernel, one = ((3, 3), (1, 1)) if conv else ((), ())
    x = draw(2, 16, 9, 11, dtype=dtype).contiguous(memory_format=torch.channels_last) if conv else draw(2, 50, 16)
    adapter = {"a": draw(r, 16, *kernel, dtype=dtype, seed=2), "b": draw(24, r, *one, dtype=dtype, seed=3)}
    return {
        "x": x.to(dtype),
        "weight": draw(24, 16, *kernel, dtype=dtype, seed=1),
        "bias": draw(24, dtype=dtype),
    } | adapter


@DTYPES
@pytest.mark.parametrize("conv", [False, True])
def test_lora_without_an_update_is_the_base_layer_and_its_scale_moves_into_b(implementation, dtype, conv):
    run, p = (lora_conv2d, layer(dtype, True)) if conv else (lora_linear, layer(dtype, False))
    base = (F.conv2d if conv else F.linear)(p["x"], p["weight"], p["bias"])
    close(run(**p | {"b": torch.zeros_like(p["b"])}, scale=1.0), base)
    close(run(**p, scale=0.0), base)
    y = run(**p, scale=4.0)
    close(run(**p | {"b": p["b"] * 4}, scale=1.0), y, 1)
    close(run(**p | {"a": p["a"] * 4}, scale=1.0), y, 1)
    doubled = p | {"a": torch.cat([p["a"], p["a"]]), "b": torch.cat([p["b"], p["b"]], 1)}
    close(run(**doubled, scale=2.0), y)  # the ranks of two equal adapters, half the scale


@DTYPES
def test_routed_with_equal_slots_is_the_single_layer(implementation, dtype):
    p = layer(dtype, False)
    pool = {name: torch.stack([torch.zeros_like(p[name]), p[name]]) for name in ("a", "b")}
    routed = p | pool | {"slots": torch.tensor([1, 1]), "scales": torch.tensor([9.0, 0.5])}
    close(lora_linear_routed(**routed), lora_linear(**p, scale=0.5))
    for slots in ([-1, -1], [0, -1]):  # no adapter, and one of zeros
        base = lora_linear_routed(**routed | {"slots": torch.tensor(slots)})
        close(base, F.linear(p["x"], p["weight"], p["bias"]))
    halved = routed | {"scales": torch.tensor([9.0, 1.0]), "b": pool["b"] / 2}
    close(lora_linear_routed(**halved), lora_linear_routed(**routed), 1)


@DTYPES
def test_attention_is_linear_in_its_values_and_blind_to_the_order_of_keys(implementation, dtype):
    q, k, v, w = (draw(2, 3, tokens, 40, dtype=dtype, seed=tokens + i) for i, tokens in enumerate((20, 77, 77, 77)))
    y = attention(q, k, v)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(0))
    close(attention(q, k[:, :, order], v[:, :, order]), y)
    assert torch.equal(attention(q, k, 2 * v), 2 * y)
    both = attention(q.float(), k.float(), v.float() + w.float()).to(dtype)
    close(attention(q, k, v) + attention(q, k, w), both)
    close(attention(q, k, torch.ones_like(v)), torch.ones_like(y), 8)  # the weights of a query sum to 1
    close(attention(4 * q, k, v), attention(q, k, v, scale=4 * 40**-0.5), 1)


def test_score_gradient_does_not_see_scale_or_shift_and_is_odd(implementation):
    x, real, fake = (draw(2, 4, 8, 8, seed=i) for i in range(3))
    g = score_gradient(x, real, fake)
    assert torch.equal(score_gradient(8 * x, 8 * real, 8 * fake), g)
    close(score_gradient(x + 1, real + 1, fake + 1), g, 16)
    close(score_gradient(x, real, 2 * real - fake), -g, 4)


def test_a_clipped_gradient_has_the_largest_norm_allowed(implementation):
    grad = draw(5000)
    norm, factor = clip_coefficient(grad, 3.0)
    close(clip_coefficient(grad * factor, 3.0)[0], torch.tensor(3.0))
    assert torch.equal(clip_coefficient(4 * grad, 3.0)[0], 4 * norm)


def test_adamw_moves_by_the_sign_alone_and_not_at_all_without_a_rate(implementation):
    """The first step divides a gradient by its own size, whatever that is; ema_decay 1 keeps the average."""
    param, grad = draw(3000), draw(3000, seed=1).abs() + 0.1
    numbers = {"step": 1, "betas": (0.9, 0.999), "eps": 0.0, "weight_decay": 0.0, "ema_decay": 1.0}
    moved = {}
    for factor in (1.0, 64.0):
        state = [param.clone(), factor * grad, torch.zeros(3000), torch.zeros(3000), param.clone()]
        adamw_ema_(*state, lr=1e-2, **numbers)
        moved[factor] = state[0]
        assert torch.equal(state[4], param)
    assert torch.equal(moved[1.0], moved[64.0])
    close(moved[1.0], param - 1e-2, 2)
    state = [param.clone(), grad, torch.zeros(3000), torch.zeros(3000), param.clone()]
    adamw_ema_(*state, lr=0.0, **numbers)
    assert torch.equal(state[0], param)

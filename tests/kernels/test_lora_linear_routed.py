"""lora_linear_routed: what each sample gets, whatever the order of the slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import lora_linear, lora_linear_routed, use
from hypersd.kernels.lora_linear_routed import OP

IMPLEMENTATIONS = ("auto", "reference")
ORDERS = ((0, 1, 2, -1), (2, 2, 2, 2), (-1, -1, -1, -1), (1, 0, 1, 0, 1, -1, 0), (0, 0, -1, 2, 2))


def problem(slots: tuple[int, ...], tokens: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pool = {"a": draw(3, 4, 24), "b": draw(3, 40, 4), "scales": torch.tensor([0.5, 2.0, -1.0])}
    base = {"x": draw(len(slots), tokens, 24), "weight": draw(40, 24), "bias": draw(40)}
    return base | pool | {"slots": torch.tensor(slots)}


def one_by_one(p: dict[str, Any]) -> Tensor:
    rows = []
    for x, slot in zip(p["x"], p["slots"].tolist(), strict=True):
        y = F.linear(x, p["weight"], p["bias"])
        if slot >= 0:
            y = y + x @ p["a"][slot].T @ p["b"][slot].T * p["scales"][slot]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize("slots", ORDERS, ids=str)
def test_every_sample_gets_its_adapter_forward_and_backward(slots, tokens, name):
    p = problem(slots, tokens)
    leaves = [p[k].requires_grad_() for k in ("x", "a", "b")]
    expected = one_by_one(p)
    upstream = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    truth = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(truth, leaves, strict=True)]
    with use(name):
        found = lora_linear_routed(**p)
        grads = torch.autograd.grad(found, leaves, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(list(grads), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_slot_for_all_is_lora_linear(dtype):
    p = problem((1, 1, 1), 64, dtype)
    routed = lora_linear_routed(**p)
    single = lora_linear(p["x"], p["weight"], p["bias"], p["a"][1], p["b"][1], 2.0)
    # the two may add the same terms in another order
    atol = 8 * torch.finfo(dtype).eps * float(single.abs().max())
    torch.testing.assert_close(routed, single, rtol=2 * torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_minus_one_and_scale_zero_are_the_base_layer(name):
    p = problem((-1, 0, -1), 9, torch.float32)
    p["scales"][0] = 0
    with use(name):
        torch.testing.assert_close(lora_linear_routed(**p), F.linear(p["x"], p["weight"], p["bias"]))
        p["a"].fill_(torch.nan)
        p["b"].fill_(torch.nan)  # an adapter that no sample uses may hold anything
        p["slots"].fill_(-1)
        torch.testing.assert_close(lora_linear_routed(**p), F.linear(p["x"], p["weight"], p["bias"]))


@pytest.mark.parametrize("tokens", [3, 600])  # as one batch of products, and slot by slot
def test_a_sample_that_overflows_spoils_its_own_adapter_alone(tokens):
    p = problem((0, 1, 0, 2), tokens)
    plain, spoilt = p | {"slots": torch.tensor((0, -1, 0, 2))}, p | {"x": p["x"].clone()}
    spoilt["x"][1] = float("inf")
    grads = []
    for given in (plain, spoilt):
        leaves = [given[name].requires_grad_() for name in "ab"]
        grads.append(torch.autograd.grad(lora_linear_routed(**given).sum(), leaves))
    for expected, found in zip(*grads, strict=True):
        assert not found[1].isfinite().all()
        torch.testing.assert_close(found[::2], expected[::2], rtol=1e-12, atol=1e-12)


def test_a_smaller_rank_is_padded_with_zeros():
    p = problem((0, 1, 2))
    p["a"][1, 2:], p["b"][1, :, 2:] = 0, 0
    small = lora_linear(p["x"][1], p["weight"], p["bias"], p["a"][1, :2], p["b"][1, :, :2], 2.0)
    torch.testing.assert_close(lora_linear_routed(**p)[1], small, rtol=1e-12, atol=1e-12)


def test_order_of_the_samples_does_not_matter():
    p, order = problem((1, 0, 1, -1, 0, 2), 5, torch.float32), torch.tensor([5, 3, 1, 0, 4, 2])
    shuffled = p | {"x": p["x"][order], "slots": p["slots"][order]}
    torch.testing.assert_close(lora_linear_routed(**shuffled), lora_linear_routed(**p)[order])


@pytest.mark.parametrize("needed", [("x",), ("a",), ("b",), ("a", "b")], ids=str)
def test_only_what_is_asked_for(needed):
    p = problem((0, 1, -1))
    leaves = [p[name].requires_grad_() for name in needed]
    expected = torch.autograd.grad(one_by_one(p).square().sum(), leaves)
    found = torch.autograd.grad(lora_linear_routed(**p).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_autocast_and_fp32_masters():
    p = problem((0, 1, -1), 9, torch.float32)
    leaves = [p[name].requires_grad_() for name in ("a", "b")]
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_linear_routed(**p)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("slots", [(0, 0, 1, 1), (1, 0, 1, -1)])
@pytest.mark.parametrize("pool", [1, 2, 3, 4])
def test_pools_of_any_size_in_float32_beside_a_bfloat16_layer(pool, slots):
    p = problem(tuple(min(slot, pool - 1) for slot in slots), 16, torch.bfloat16)
    p |= {name: torch.cat([p[name], p[name]])[:pool].float().requires_grad_() for name in ("a", "b")}
    p["scales"] = torch.linspace(0.5, 1.0, pool)
    out = lora_linear_routed(**p)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in p.items()}
    torch.testing.assert_close(out.double(), one_by_one(wide), rtol=0.05, atol=0.2)
    grads = torch.autograd.grad(out.float().sum(), [p["a"], p["b"]])
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grads)


BAD = {
    "slots has 3, expected -1": {"slots": torch.tensor([0, 3])},
    "slots has -2, expected -1": {"slots": torch.tensor([0, -2])},
    "slots has shape": {"slots": torch.tensor([0, 1, 1])},
    "slots has dtype torch.float32": {"slots": torch.zeros(2)},
    "scales has requires_grad, expected a constant": {"scales": torch.ones(3, requires_grad=True)},
    "scales: got shape": {"scales": torch.ones(2)},
    "a has shape": {"a": torch.zeros(3, 4, 23).double()},
    "b has shape": {"b": torch.zeros(3, 40, 5).double()},
    "x has shape": {"x": torch.zeros(24).double()},
    "weight has dtype": {"weight": torch.zeros(40, 24)},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    with pytest.raises((TypeError, ValueError)) as caught:
        lora_linear_routed(**(problem((0, 1)) | BAD[said]))
    assert str(caught.value).startswith(f"lora_linear_routed: {said}") and "\n" not in str(caught.value)


def test_a_slot_out_of_range_is_named_by_the_reference_too():
    with use("reference"), pytest.raises(ValueError, match="slots has 3, expected -1"):
        lora_linear_routed(**(problem((0, 1)) | {"slots": torch.tensor([0, 3])}))


def test_where_the_host_may_not_look_the_same_comes_out():
    """What runs on a device without a kernel of ours reads no slot."""
    p = {name: t.to("meta") for name, t in problem((0, 1)).items()}
    y, s = OP.fallback(p["x"], p["weight"], p["bias"], p["a"], p["b"], p["slots"], p["scales"], False)
    assert y.device.type == "meta" and y.shape == (2, 9, 40) and s.numel() == 0

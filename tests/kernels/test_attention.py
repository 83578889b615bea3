"""What is peculiar to attention: where it runs, its tiles of odd head dimensions, identities without an oracle."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _attention as tiles
from hypersd.kernels import _native, attention, explain, use

op_file = importlib.import_module("hypersd.kernels.attention")


def inputs(b: int = 2, h: int = 3, tq: int = 9, tk: int = 7, d: int = 16, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": tq, "k": tk, "v": tk}
    return {
        name: torch.randn(b, tokens, h, d, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for name, tokens in sizes.items()
    }


def gradients(tensors: dict[str, Tensor], **options: float) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
    out = attention(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel()).to(out)).view_as(out))


@pytest.mark.parametrize("sizes", [{}, {"tq": 300, "tk": 77}, {"tq": 64, "tk": 400}], ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_torchs_attention_is_the_same_function(sizes, options, native, monkeypatch):
    monkeypatch.setattr(op_file, "NATIVE", native)  # without it the long ones are torch's
    tensors = inputs(**sizes)
    leaves = [t.detach().clone().requires_grad_() for t in tensors.values()]
    out = F.scaled_dot_product_attention(*leaves, **options)
    upstream = torch.cos(torch.arange(out.numel()).to(out)).view_as(out)
    expected = out.detach(), *torch.autograd.grad(out, leaves, upstream)
    for found, exact in zip(gradients(tensors, **options), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


def test_result_lies_in_memory_as_the_query():
    """A projection's (batch, tokens, heads, dim) goes in and comes out: the next layer needs no copy."""
    tensors = inputs(dtype=torch.float32)
    out = attention(**tensors)
    assert out.stride() == tensors["q"].stride()
    assert out.transpose(1, 2).is_contiguous()


def test_a_shift_of_all_keys_changes_nothing():
    """q (k + c) shifts a row of scores by one number, which softmax does not see."""
    tensors = inputs()
    moved = tensors | {"k": tensors["k"] + torch.randn(16, dtype=torch.float64)}
    torch.testing.assert_close(attention(**moved), attention(**tensors), rtol=1e-12, atol=1e-12)


def test_one_key_is_its_value():
    tensors = inputs(tk=1, dtype=torch.float32)
    out, dq, dk, dv = gradients(tensors)
    assert torch.equal(out, tensors["v"].expand_as(out))
    assert not dq.any() and not dk.any()
    upstream = torch.cos(torch.arange(out.numel()).float()).view_as(out)
    torch.testing.assert_close(dv, upstream.sum(2, keepdim=True))


def test_order_of_keys_does_not_matter():
    tensors, order = inputs(), torch.randperm(7, generator=torch.Generator().manual_seed(0))
    turned = tensors | {name: tensors[name][:, :, order] for name in ("k", "v")}
    torch.testing.assert_close(attention(**turned), attention(**tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_scores_stay_finite(dtype):
    tensors = inputs(dtype=dtype)
    for value in gradients(tensors, scale=2000.0):
        assert value.isfinite().all()


def test_autocast_computes_in_its_dtype():
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(**tensors)
    assert torch.equal(out, attention(**{name: t.bfloat16() for name, t in tensors.items()}))


def test_explain_names_where_it_runs(monkeypatch):
    few, many = inputs(1, 1, 16, 16, dtype=torch.float32), inputs(1, 1, 1024, 1024, dtype=torch.float32)
    monkeypatch.setattr(op_file, "NATIVE", False)
    assert explain(attention, **few).implementation != "torch"
    said = explain(attention, **many)
    assert said.implementation == "torch" and "queries" in said.why
    with use("reference"):
        assert explain(attention, **many).implementation == "reference"
    monkeypatch.setattr(op_file, "NATIVE", True)
    monkeypatch.setattr(op_file._native, "cpu_kind", lambda: "cpu")
    assert explain(attention, **many).implementation != "torch"
    monkeypatch.setattr(op_file._native, "cpu_kind", lambda: "cpu_amx")
    said = explain(attention, **many)
    assert said.implementation == "torch" and "tile unit" in said.why
    assert explain(attention, **few).implementation != "torch"


@pytest.mark.skipif(not _native.available(), reason=_native.status())
def test_compiles_whole_whoever_takes_many_keys():
    """The choice is traced with the rest; another instruction set is another choice."""
    many = inputs(1, 1, 4, 1024, dtype=torch.float32)
    graphs: list[str] = []

    def listing(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(str(module.graph))
        return module

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=listing)
    try:
        for level in ("auto", "baseline"):
            _native.isa(level)
            assert torch.equal(compiled(**many), attention(**many))
            assert ("hypersd.attention" in graphs[-1]) is (explain(attention, **many).implementation == "cpp")
    finally:
        _native.isa("auto")


@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 48, 64, 80, 96, 100, 120, 128, 160])
def test_parts_of_a_head_dimension(d):
    """Two powers of two, each at least 16, that hold d with less padding than one would, or one."""
    first, second = tiles.parts(d)
    whole = max(16, 1 << (d - 1).bit_length())
    assert first + second >= d and first + second <= whole
    assert all(part == 0 or part >= 16 and part & (part - 1) == 0 for part in (first, second))
    assert {40: (32, 16), 80: (64, 16), 160: (128, 32), 64: (64, 0)}.get(d, (first, second)) == (first, second)


@pytest.mark.parametrize(("tq", "heads"), [(1, 1), (64, 2), (4096, 20), (4097, 3), (100, 1000)])
def test_splits_cover_every_query_once(tq, heads):
    splits, chunk = tiles.split(tq, heads, 64)
    assert chunk % 64 == 0 and (splits - 1) * chunk < tq <= splits * chunk


@pytest.mark.parametrize("keys", [7, 1100])  # the latter are torch's where there is a tile unit
def test_scale_is_checked_whoever_computes(keys):
    with pytest.raises(ValueError, match="attention: scale: got nan"):
        attention(**inputs(1, 1, 3, keys), scale=float("nan"))


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"q": torch.zeros(2, 9, 16, dtype=torch.float64)}, ValueError, "q has shape"),
        ({"q": torch.zeros(2, 3, 9, 16, dtype=torch.int64)}, TypeError, "q has dtype"),
        ({"k": torch.zeros(2, 3, 7, 16)}, TypeError, "k has dtype"),
        ({"k": torch.zeros(2, 3, 7, 15, dtype=torch.float64)}, ValueError, "k has shape"),
        ({"k": torch.zeros(2, 1, 7, 16, dtype=torch.float64)}, ValueError, "k has shape"),
        ({"v": torch.zeros(2, 3, 8, 16, dtype=torch.float64)}, ValueError, "v has shape"),
        ({"v": torch.zeros(2, 3, 7, 16, dtype=torch.float64, device="meta")}, ValueError, "v is on meta"),
        ({"v": 3.0}, TypeError, "v is a float"),
        ({"q": None}, TypeError, "q is a NoneType"),
    ],
)
@pytest.mark.parametrize("sizes", [{}, {"tq": 9000, "tk": 7}], ids=["short", "long"])
def test_what_does_not_fit_is_named(change, error, word, sizes):
    with pytest.raises(error, match=f"attention: {word}"):
        attention(**inputs(**sizes) | change)

"""What is peculiar to lora_linear: its forms are one function, small updates survive 16 bit, PEFT is matched."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hypersd.kernels import _lora, _lora_rows, _native, _tune, explain, lora_linear, use
from tests.kernels import checks

op_file = importlib.import_module("hypersd.kernels.lora_linear")
FORMS = ("split", "accumulate", "fold")


def layer(
    *rows: int, k: int = 24, n: int = 40, r: int = 6, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def draw(*shape: int, std: float) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    return {
        "x": draw(*rows, k, std=1.0),
        "weight": draw(n, k, std=k**-0.5),
        "bias": draw(n, std=1.0) if bias else None,
        "a": draw(r, k, std=k**-0.5),
        "b": draw(n, r, std=r**-0.5),
    }


def gradients(inputs: dict, scale: float | Tensor = 0.7) -> tuple[Tensor, ...]:
    leaves = [inputs[name].detach().clone().requires_grad_() for name in ("x", "a", "b")]
    y = lora_linear(leaves[0], inputs["weight"], inputs["bias"], leaves[1], leaves[2], scale)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.cos(torch.arange(y.numel()).to(y)).view_as(y))


@pytest.fixture(autouse=True)
def choose_anew(monkeypatch):
    """Every call chooses its forms again, by what a test has set."""
    monkeypatch.setattr(op_file, "_choice", op_file._choice.__wrapped__)


@pytest.fixture
def take(monkeypatch):
    """Force a form of each of y, dX and (dA, dB)."""

    def force(forward: str, input_grad: str = "split", adapter_grad: str = "thin") -> None:
        monkeypatch.setattr(_lora_rows, "fits", lambda *args: False)
        monkeypatch.setattr(_lora, "forward_form", lambda *args: forward)
        plan = _lora.Plan(forward, input_grad, adapter_grad, "forced")
        monkeypatch.setattr(_lora, "plan", lambda *args, **options: plan)

    return force


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("forward", "input_grad", "adapter_grad"), itertools.product(FORMS, FORMS, ("thin", "full")))
@pytest.mark.parametrize("bias", [True, False])
def test_every_form_is_the_definition(take, forward, input_grad, adapter_grad, bias):
    inputs = layer(3, 7, bias=bias)
    with use("reference"):
        expected = gradients(inputs)
    take(forward, input_grad, adapter_grad)
    for found, exact in zip(gradients(inputs), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_no_adapter_is_the_base_layer_bit_for_bit(take, form, bias):
    inputs = layer(64, k=96, n=80, dtype=torch.float32, bias=bias)
    take(form)
    y = lora_linear(**inputs | {"b": torch.zeros_like(inputs["b"])}, scale=0.7)
    assert torch.equal(y, F.linear(inputs["x"], inputs["weight"], inputs["bias"]))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [700, 2048])  # below and above the size from which oneDNN adds the three at once
def test_a_small_update_survives_16_bit(dtype, bias, rows):
    """b at 1e-4 of W: the share of the update found in y is 1; summed after a rounding, or folded, it is near 0."""
    inputs = layer(rows, k=320, n=320, r=64, dtype=dtype, bias=bias)
    inputs["b"] = inputs["b"] * 1e-4
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    base = F.linear(wide["x"], wide["weight"], wide["bias"])
    update = wide["x"] @ wide["a"].t() @ wide["b"].t()

    def share(y: Tensor) -> float:
        return float(((y.double() - base) * update).sum() / update.square().sum())

    assert share(lora_linear(**inputs, scale=1.0)) == pytest.approx(1.0, abs=0.25)
    folded = F.linear(inputs["x"], _lora.fold_weight(inputs["weight"], inputs["a"], inputs["b"], 1.0), inputs["bias"])
    assert share(folded) < 0.6


@pytest.mark.usefixtures("device")
def test_folded_weight_is_the_layer():
    inputs = layer(5, dtype=torch.float32)
    weight = _lora.fold_weight(inputs["weight"], inputs["a"], inputs["b"], 0.7)
    y = F.linear(inputs["x"], weight, inputs["bias"])
    torch.testing.assert_close(y, lora_linear(**inputs, scale=0.7))
    assert not weight.requires_grad
    narrow = {name: inputs[name].bfloat16() for name in ("weight", "a", "b")}
    assert _lora.fold_weight(**narrow, scale=0.7, dtype=torch.float32).dtype == torch.float32


@pytest.mark.usefixtures("device")
def test_peft_layer():
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    inputs = layer(9, k=64, n=48, r=8, dtype=torch.float32)
    base = torch.nn.Linear(64, 48)
    base.load_state_dict({"weight": inputs["weight"], "bias": inputs["bias"]})
    peft = Linear(base, "default", LoraConfig(r=8, lora_alpha=4), r=8, lora_alpha=4)
    peft.lora_A["default"].weight.data, peft.lora_B["default"].weight.data = inputs["a"], inputs["b"]
    x = inputs["x"].clone().requires_grad_()
    y = peft(x)
    upstream = torch.cos(torch.arange(y.numel()).to(y)).view_as(y)
    leaves = [x, peft.lora_A["default"].weight, peft.lora_B["default"].weight]
    expected = y.detach(), *torch.autograd.grad(y, leaves, upstream)
    for found, other in zip(gradients(inputs, 0.5), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("device")
def test_scale_moves_into_b():
    inputs = layer(6, 5, dtype=torch.float32)
    y = lora_linear(**inputs, scale=4.0)
    assert torch.equal(y, lora_linear(**inputs | {"b": inputs["b"] * 4}, scale=1.0))


@pytest.mark.usefixtures("device")
def test_scale_as_a_tensor():
    inputs = layer(6, 5)
    for found, expected in zip(gradients(inputs, torch.tensor(0.7)), gradients(inputs, 0.7), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.usefixtures("device")
def test_gradcheck_of_the_forms():
    inputs = layer(2, 3, k=5, n=4, r=2)
    leaves = [inputs[name].requires_grad_() for name in ("x", "a", "b")]

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, inputs["weight"], inputs["bias"], a, b, torch.tensor(-0.3, dtype=torch.float64))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("wanted", [("x",), ("a", "b"), ("a",), ("b",)])
def test_only_the_gradients_asked_for(wanted):
    inputs = layer(4, dtype=torch.float32)
    full = dict(zip(("y", "x", "a", "b"), gradients(inputs), strict=True))
    leaves = {n: inputs[n].clone().requires_grad_(n in wanted) for n in ("x", "a", "b")}
    weight = inputs["weight"].clone().requires_grad_()
    y = lora_linear(leaves["x"], weight, inputs["bias"], leaves["a"], leaves["b"], 0.7)
    y.backward(torch.cos(torch.arange(y.numel()).to(y)).view_as(y))
    assert weight.grad is None
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, full[name])
        else:
            assert leaf.grad is None


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_adapter_kept_in_float32(implementation):
    inputs = layer(8, dtype=torch.bfloat16)
    masters = {name: inputs[name].float().requires_grad_() for name in ("a", "b")}
    with use(implementation):
        y = lora_linear(**inputs | masters, scale=0.7)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert masters["a"].grad.dtype == masters["b"].grad.dtype == torch.float32
        assert torch.equal(y, lora_linear(**inputs, scale=0.7))


def test_a_float32_adapter_is_not_rounded_on_the_way():
    """On a CPU with the C++ kernel, dA and dB of a bfloat16 layer are float32 sums: no 8-bit mantissa in between."""
    inputs = layer(64, k=64, n=64, r=8, dtype=torch.bfloat16)
    if not _lora_rows.takes(inputs["x"], inputs["weight"], inputs["a"]):
        pytest.skip("this CPU has no bfloat16 products")
    masters = inputs | {name: inputs[name].float() for name in ("a", "b")}
    _, _, da, db = gradients(masters)
    assert "lora_linear on cpu: cpp" in str(explain(lora_linear, **masters, scale=0.7))
    for grad in (da, db):
        assert grad.dtype == torch.float32 and not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("rank", [4, 33, 130])
@pytest.mark.parametrize("rows", [1, 5, 97, 700, 4200])  # the last: more than the second cache keeps
@pytest.mark.parametrize("k", [18, 300])
def test_any_size_fills_whole_tiles(rows, k, rank, monkeypatch):
    """Rows, columns, ranks and sums around the sizes of tiles, panels and blocks; forward (folded too), backward."""
    inputs = layer(rows, k=k, n=70, r=rank, dtype=torch.float32)
    if not _lora_rows.takes(inputs["x"], inputs["weight"], inputs["a"]):
        pytest.skip("this CPU has no such kernel")
    wide = {name: t.double() for name, t in inputs.items()}
    exact = gradients(wide)
    monkeypatch.setattr(_lora, "plan", lambda *args, **options: _lora.Plan("rows", "rows", "rows", "asked for"))
    for found, wanted in zip(gradients(inputs), exact, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 5e-7
    monkeypatch.setattr(_lora, "forward_form", lambda *args: "rows_fold")
    with torch.no_grad():
        found = lora_linear(**inputs, scale=torch.tensor(0.7))
        wanted = op_file.reference(*wide.values(), 0.7, None)
        assert "y by rows_fold" in str(explain(lora_linear, **inputs, scale=0.7))
    assert float((found - wanted).norm() / wanted.norm()) < 5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_order_by_onednn(dtype, monkeypatch):
    """Its products, else for large layers alone."""
    module = importlib.import_module("hypersd.kernels.lora_linear")
    monkeypatch.setattr(module, "FUSED", 0)
    monkeypatch.setattr(module, "WIDE", 0)
    monkeypatch.setattr(_lora_rows, "fits", lambda *args: False)
    for name, inputs in checks.layouts(checks.odd(module.OP)[0].inputs(dtype)):
        assert checks.check(module.OP, inputs) == [], name


def test_autocast_computes_in_its_dtype():
    inputs = layer(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(**inputs, scale=0.7)
    low = {name: t.bfloat16() for name, t in inputs.items()}
    assert torch.equal(y, lora_linear(**low, scale=0.7))


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"x": torch.zeros(3, 25, dtype=torch.float64)}, ValueError, "x has shape"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, ValueError, "x has shape"),
        ({"x": torch.zeros(3, 24, dtype=torch.int64)}, TypeError, "x has dtype"),
        ({"weight": torch.zeros(40, 24)}, TypeError, "weight has dtype"),
        ({"weight": torch.zeros(40, dtype=torch.float64)}, ValueError, "weight has shape"),
        ({"bias": torch.zeros(39, dtype=torch.float64)}, ValueError, "bias has shape"),
        ({"a": torch.zeros(6, 23, dtype=torch.float64)}, ValueError, "a has shape"),
        ({"b": torch.zeros(40, 5, dtype=torch.float64)}, ValueError, "b has shape"),
        ({"scale": torch.zeros(2)}, ValueError, "scale has shape"),
        ({"weight": torch.zeros(40, 24, dtype=torch.float64, device="meta")}, ValueError, "weight is on meta"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_what_does_not_fit_is_named(change, error, word, train):
    inputs = layer(3) | {"scale": 0.7}
    if train:
        inputs["a"].requires_grad_()
        if "a" in change:
            change = {"a": change["a"].clone().requires_grad_()}
    with pytest.raises(error, match=f"lora_linear: {word}"):
        lora_linear(**inputs | change)


@pytest.mark.parametrize("scale", [float("nan"), torch.tensor(float("inf"))], ids=str)
def test_a_scale_that_the_host_sees_is_finite(scale):
    with pytest.raises(ValueError, match="scale: got"):
        lora_linear(**layer(3), scale=scale)


def test_plan_takes_the_cheapest_measured_form(monkeypatch):
    us = {"split": 5, "accumulate": 6, "fold": 4, "shrink": 2, "dx_split": 3, "dx_accumulate": 2, "dx_fold": 4,
          "ds": 1, "thin": 1, "full": 5}  # fmt: skip
    row = {"dtype": "float32", "sizes": {"M": 100, "K": 10, "N": 10, "R": 2}, "us": us}
    monkeypatch.setattr(_lora, "_table", lambda op, device: ("measured", (row,)))
    for cached in (_lora._microseconds, _lora.forward_form, _lora.plan):
        cached.cache_clear()
    try:
        sizes = (120, 10, 10, 2)
        assert _lora.forward_form("t", *sizes, torch.float32, "cpu", False) == "fold"
        # with S kept, fold pays for it: 4 + 2 against 5; then thin 1 + ds 1 + dx 2 beats full 5 + dx 4
        assert _lora.plan("t", *sizes, torch.float32, "cpu")[:3] == ("split", "accumulate", "thin")
        assert _lora.plan("t", *sizes, torch.float32, "cpu").provenance == "measured, row 100x10x10x2"
        assert _lora.plan("t", 120, 10, 10, 200, torch.float32, "cpu").provenance == "analytic"
        assert _lora.plan("t", *sizes, torch.float64, "cpu").provenance == "analytic"
    finally:
        for cached in (_lora._microseconds, _lora.forward_form, _lora.plan):
            cached.cache_clear()


@pytest.fixture
def table(monkeypatch):
    """Sets what was measured of every layer of 8 to 16 rows, 24 inputs, 40 outputs and rank 6, in bfloat16."""

    def measured(**us):
        times = dict.fromkeys(("split", "accumulate", "fold", "dx_split", "dx_accumulate", "dx_fold"), 4)
        times |= {"shrink": 1, "ds": 1, "thin": 1, "full": 5} | us
        row = {"dtype": "bfloat16", "sizes": {"M": 8, "K": 24, "N": 40, "R": 6}, "us": times}
        monkeypatch.setattr(_lora, "_table", lambda op, device: ("measured", (row,)))
        forget()

    def forget():
        for cached in (_lora._microseconds, _lora.forward_form, _lora.plan):
            cached.cache_clear()

    yield measured
    forget()


def test_16_bit_goes_to_the_product_of_rows_unless_it_was_measured_to_be_slower(table):
    sizes = (8, 24, 40, 6, torch.bfloat16, "cpu")
    for us, form in (({}, "rows"), ({"rows": 3, "rows_both": 3}, "rows"), ({"rows": 50, "rows_both": 50}, "split")):
        table(**us)
        assert _lora.plan("t", *sizes, native=True).forward == form
        assert _lora.forward_form("t", *sizes, False, True) == form


def test_float32_adapters_of_16_bit_layers_whatever_computes_them(table):
    table(rows=100, rows_both=100)
    inputs = layer(8, dtype=torch.bfloat16)
    mixed = inputs | {name: inputs[name].float() for name in "ab"}
    found = []
    for given in (inputs, mixed):
        leaves = [given[name].requires_grad_() for name in ("x", "a", "b")]
        y = lora_linear(**given, scale=0.7)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
        found.append([y, *grads])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*found, strict=True))
    assert "y by split" in str(explain(lora_linear, **mixed, scale=0.7))


def test_what_was_measured_belongs_to_the_kind_of_cpu(monkeypatch):
    chosen = {}
    for kind in ("cpu", "cpu_amx"):
        monkeypatch.setattr(_native, "cpu_kind", lambda kind=kind: kind)
        assert _lora.kind(torch.device("cpu")) == kind and _lora.kind(torch.device("meta")) == "meta"
        chosen[kind] = _lora.plan("lora_linear", 256, 1280, 1280, 64, torch.float32, _lora.kind(torch.device("cpu")))
    assert "row 256x1280x1280x64" in chosen["cpu"].provenance and "row 256x1280x1280x64" in chosen["cpu_amx"].provenance
    assert chosen["cpu"].provenance != chosen["cpu_amx"].provenance


@pytest.mark.parametrize("sizes", [(4096, 320, 2560, 64), (64, 64, 64, 4), (8, 2048, 2048, 128)])
def test_16_bit_rules(sizes):
    for dtype in (torch.bfloat16, torch.float16):
        assert _lora.plan("lora_linear", *sizes, dtype, "cpu").forward == "split"
    assert _lora.plan("lora_linear", *sizes, torch.float16, "cpu").adapter_grad == "thin"


def test_use_cpp_runs_what_auto_runs_in_cpp(monkeypatch):
    inputs = layer(64, k=64, n=64, r=8, dtype=torch.float32) | {"scale": 0.7}
    if not _lora_rows.takes(inputs["x"], inputs["weight"], inputs["a"]):
        pytest.skip("this CPU has no such kernel")
    monkeypatch.setattr(_lora, "forward_form", lambda *args: "rows")
    y = lora_linear(**inputs)
    with use("cpp"):
        assert explain(lora_linear, **inputs).why == "asked for by use('cpp')"
        assert torch.equal(lora_linear(**inputs), y)
        with pytest.raises(RuntimeError, match="does not take this layer, or costs more"):
            monkeypatch.setattr(_lora, "forward_form", lambda *args: "split")
            lora_linear(**inputs)
        assert "it cannot run: the C++ kernel" in explain(lora_linear, **inputs).why
    assert explain(lora_linear, **inputs).implementation == "aten"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_explain_inside_autocast_is_of_what_is_computed(dtype):
    inputs = layer(64, k=320, n=320, r=64, dtype=dtype) | {"scale": 0.7}
    cast = {name: t.bfloat16() if isinstance(t, Tensor) and dtype == torch.float32 else t for name, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = explain(lora_linear, **inputs)
    assert str(said) == str(explain(lora_linear, **cast))


def test_explain_shows_the_forms(monkeypatch):
    case = next(c for c in op_file.CASES if c.name == "sd15_4096x320x320").inputs()
    monkeypatch.setattr(_lora_rows, "fits", lambda *args: False)
    said = str(explain(lora_linear, **case))
    chosen = _lora.plan("lora_linear", 4096, 320, 320, 64, torch.float32, _lora.kind(case["x"].device))
    assert "lora_linear on cpu: aten" in said
    assert f"y by {chosen.forward}, dX by {chosen.input_grad}, dA and dB by {chosen.adapter_grad}" in said
    assert "row 4096x320x320x64" in said


@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float32, "aten"), (torch.bfloat16, "triton")], ids=str)
def test_float32_of_a_gpu_goes_to_aten(dtype, implementation):
    """The kernels' float32 sums stray further than the error rule allows; explain says what runs instead, and why."""
    if _tune.triton_missing():
        pytest.skip(_tune.triton_missing())
    with FakeTensorMode(), torch.device("cuda"):
        inputs = {"x": torch.empty(64, 32), "weight": torch.empty(48, 32), "bias": None, "a": torch.empty(4, 32)}
        inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
        said = explain(lora_linear, **inputs, b=torch.empty(48, 4).to(dtype), scale=1.0)
    assert said.implementation == implementation
    assert ("float32" in said.why) is (implementation == "aten") and said.config is not None


@pytest.mark.parametrize("kind", ["cpu", "cpu_amx"])
@pytest.mark.parametrize("op", ["lora_linear", "lora_conv2d"])
def test_rows_of_the_shipped_table_have_every_part(op, kind):
    _, rows = _lora._table(op, kind)
    forms = ("split", "accumulate", "fold")
    needed = {"ds", "shrink", "thin", "full", *forms, *(f"dx_{form}" for form in forms)}
    assert len(rows) >= 39 and not [row["sizes"] for row in rows if needed - set(row["us"])]


def test_wrong_weights_and_scales_are_named():
    x, a, b = torch.randn(3, 24).bfloat16(), torch.randn(6, 24), torch.randn(40, 6)
    for weight in (torch.randn(40), torch.randn(())):
        with pytest.raises(ValueError, match="weight has shape"):
            lora_linear(x, weight.bfloat16(), None, a, b, 1.0)
    weight = torch.randn(40, 24).bfloat16()
    with pytest.raises(ValueError, match="scale is on meta, expected cpu"):
        lora_linear(x, weight, None, a, b, torch.tensor(1.0, device="meta"))
    with pytest.raises(TypeError, match="scale has dtype torch.int64, expected a floating-point"):
        lora_linear(x, weight, None, a, b, torch.tensor(1))
    with pytest.raises(ValueError, match="scale has requires_grad, expected a constant"):
        lora_linear(x, weight, None, a, b, torch.tensor(1.0, requires_grad=True))

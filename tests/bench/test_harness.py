"""The benchmark tells no lies: what is wrong gets no time, and peers compute what we compute."""

from __future__ import annotations

import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

import bench
from bench import cli, compare, counters, gpu, harness, peers, report, roofline, sanitize
from bench import run as bench_run
from hypersd.errors import HypersdError
from hypersd.evaluate import plots
from hypersd.kernels import _native
from hypersd.kernels._cost import Ceiling, Cost
from hypersd.kernels._op import OPS, asked_for

QUIET = Console(quiet=True)


def sin(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x)


def providers(cost=None, roof=None, **functions):
    """The rows of these functions; "other" is not judged."""
    x = torch.linspace(-1, 1, 64)
    exact = {"y": torch.sin(x.double())}
    runners = {
        name: harness.Runner(lambda function=function: function(x), same=name != "other")
        for name, function in functions.items()
    }
    rows = harness.compare("sin", "line", torch.float32, "fwd", exact, runners, seconds=0.01, cost=cost, roof=roof)
    return {row.provider: row for row in rows}


def test_what_is_right_is_timed():
    rows = providers(hypersd=sin, eager=sin, peer=lambda x: torch.sin(x.double()).float(), other=torch.cos)
    assert [row.verdict for row in rows.values()] == ["green", "green", "green", "other"]
    for row in rows.values():
        assert row.rounds >= harness.MIN_ROUNDS
        assert 0 < row.p20 <= row.p50 <= row.p80
    assert rows["hypersd"].over_ours == 1.0
    assert rows["peer"].over_ours == pytest.approx(rows["peer"].p50 / rows["hypersd"].p50, abs=1e-3)


def test_twice_the_error_of_eager_is_allowed():
    assert harness.verdict(1.9e-3, 1e-3, torch.float32) == "green"
    assert harness.verdict(2.1e-3, 1e-3, torch.float32) == "red: error 2.1e-03, allowed 2.0e-03"


@pytest.mark.parametrize(
    "eager",
    [lambda x: torch.sin(x) * 1.2, lambda x: x * torch.nan, lambda x: x @ x[1:]],
    ids=["off by 20 %", "nan", "it fails"],
)
def test_nothing_is_green_beside_an_eager_that_is_wrong_itself(eager):
    rows = providers(hypersd=sin, eager=eager, peer=torch.cos, other=torch.cos)
    assert all(row.p50 is None and row.verdict.startswith("red") for row in rows.values())
    assert all("ill-posed" in rows[name].verdict for name in ("hypersd", "peer", "other"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: torch.sin(x) * 1.001,
        lambda x: torch.sin(x)[:-1],
        lambda x: torch.full_like(x, float("nan")),
        lambda x: torch.sin(x.bfloat16()).float(),
    ],
    ids=["off by 0.1 %", "an element short", "nan", "16 bit"],
)
def test_what_is_wrong_gets_no_time(wrong):
    rows = providers(hypersd=wrong, eager=sin)
    assert rows["hypersd"].verdict.startswith("red: error")
    assert (rows["hypersd"].p20, rows["hypersd"].p50, rows["hypersd"].p80) == (None, None, None)
    assert rows["eager"].p50 is not None and rows["eager"].over_ours is None


def test_a_wrong_gradient_gets_no_time():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.sin(x)

        @staticmethod
        def backward(ctx, upstream):
            return upstream  # cos(x) forgotten

    x = torch.linspace(-1, 1, 64)
    upstream = harness._upstreams((x,))[0].double()
    exact = {"y": torch.sin(x.double()), "x": upstream * torch.cos(x.double())}
    leaf = x.clone().requires_grad_()
    runners = {
        "hypersd": harness.Runner(lambda: Wrong.apply(leaf), {"x": leaf}),
        "eager": harness.Runner(lambda: torch.sin(leaf), {"x": leaf}),
    }
    wrong, right = harness.compare("sin", "line", torch.float32, "full", exact, runners, seconds=0.01)
    assert wrong.verdict.startswith("red") and wrong.p50 is None
    assert right.verdict == "green" and right.p50 is not None


def test_a_peer_that_fails_is_red_and_ours_may_not():
    def fails(x):
        raise RuntimeError("no such kernel")

    rows = providers(hypersd=sin, eager=sin, peer=fails)
    assert rows["peer"].verdict == "red: it failed (no such kernel)" and rows["peer"].p50 is None
    with pytest.raises(RuntimeError, match="no such kernel"):
        providers(hypersd=fails, eager=sin)


def test_a_backward_is_timed_without_its_forward():
    calls, x = [], torch.ones(3, requires_grad=True)
    runner = harness.Runner(lambda: calls.append("forward") or x * 2, {"x": x})
    for mode, forwards in (("bwd", 0), ("full", 1)):
        timed = harness.step(runner, mode)()
        calls.clear()
        timed()
        assert len(calls) == forwards


def test_the_share_of_the_roofline():
    roof = Ceiling(1e9, {torch.float32: 1e12}, 0.0, "")
    row = providers(Cost(2e6, 1e6), lambda cost: roof, hypersd=sin, eager=sin)["hypersd"]
    assert (row.bytes, row.flops) == (1e6, 2e6)
    assert row.of_roofline == pytest.approx(1000 / row.p50, rel=1e-2)  # 1 ms to move, 2 us to compute


def test_backward_has_its_own_share_and_both_have_their_sum():
    """The forward that keeps the slope for backward moves one tensor more than that without gradients."""
    options = {"device": "cpu", "dtypes": [torch.float32], "shapes": ("emoji",), "peers": [], "seconds": 0.001}
    roof = Ceiling(1e9, {torch.float32: 1e12}, 0.0, "")
    groups = harness.measure_op(OPS["consistency_loss"], roof=lambda cost: roof, **options)
    fwd, bwd, full = itertools.islice((group[0] for group in groups), 3)
    assert [row.mode for row in (fwd, bwd, full)] == ["fwd", "bwd", "full"]
    assert (fwd.bytes, bwd.bytes, full.bytes) == (fwd.bytes, fwd.bytes / 2, fwd.bytes * 7 / 4)
    for row in (fwd, bwd, full):
        assert row.provider == harness.OURS and row.of_roofline == pytest.approx(row.bytes / 1e3 / row.p50, rel=1e-2)


@pytest.mark.parametrize("name", ["lora_linear", "lora_conv2d", "lora_linear_routed"])
def test_the_base_layer_has_the_share_of_its_own_work(name):
    op, roof = OPS[name], Ceiling(1e9, {torch.float32: 1e9}, 0.0, "")
    case = next(case for case in op.cases if case.bench and case.name.startswith("emoji"))
    options = {"device": "cpu", "dtypes": [torch.float32], "shapes": (case.name,), "peers": ["base"], "seconds": 0.001}
    x, weight = (checked := case.inputs())["x"], checked["weight"]
    y = op.function(**checked)
    flops, moved = 2 * y.numel() * weight[0].numel(), 4 * (x.numel() + weight.numel() + y.numel())
    assert y.numel() * weight[0].numel() > 0
    for group in harness.measure_op(op, roof=lambda cost: roof, **options):
        rows = {row.provider: row for row in group}
        calls = 2 if group[0].mode == "full" else 1
        assert (rows["base"].flops, rows["base"].bytes) == (calls * flops, calls * moved)
        assert rows[harness.OURS].flops > rows["base"].flops and rows[harness.OURS].flops == rows["eager"].flops
        least = max(rows["base"].flops, rows["base"].bytes) / 1e3
        assert rows["base"].of_roofline == pytest.approx(least / rows["base"].p50, rel=1e-2)


def test_the_roofline_is_the_best_of_what_was_tried(monkeypatch):
    times = itertools.chain([3.0, 2.0, 0.5, 4.0, 1.0, 4.0], itertools.repeat(0.5))  # three ways to ask for a product
    monkeypatch.setattr(roofline, "_best", lambda call: next(times))
    monkeypatch.setattr(roofline, "PRODUCTS", ((5, 6, 7), (2, 3, 4)))
    monkeypatch.setattr(roofline, "COPIES", (2**10, 2**12))
    found = roofline.cpu([torch.float32])
    assert found(Cost(0, 2**10)).flops_per_second == {torch.float32: 2 * 5 * 6 * 7 / 0.5}
    sizes = (1, 2**10, 2**12 - 1, 2**12, 2**20)
    assert [found(Cost(0, size)).bytes_per_second for size in sizes] == [2**11, 2**11, 2**11, 2**13, 2**13]


def test_a_broken_operator_turns_the_command_red(monkeypatch, tmp_path):
    op = OPS["affine_step"]
    real = op.function
    options = {"dtypes": ["float32"], "shapes": ["emoji"], "peers": [], "seconds": 0.01, "console": QUIET}
    assert bench.main(["affine_step"], json_path=tmp_path / "good.jsonl", **options) == 0
    monkeypatch.setattr(op, "function", functools.wraps(real)(lambda **inputs: real(**inputs) * 1.01))
    assert bench.main(["affine_step"], json_path=tmp_path / "bad.jsonl", **options) == 1
    good, bad = (
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("good", "bad")
    )
    assert {row["provider"] for row in good} == {"hypersd", "eager"}
    assert all(row["p50"] for row in good) and all(row["torch"] == torch.__version__ for row in good)
    forward = next(row for row in good if row["mode"] == "fwd" and row["case"] == "emoji_b1_ddim_cfg")
    assert forward["bytes"] == 4 * 1024 * 4  # three tensors read, one written
    assert all(row["p50"] is None for row in bad if row["provider"] == "hypersd")
    assert all(row["p50"] for row in bad if row["provider"] == "eager")


def refused(job, *arguments, **options) -> str:
    """The one line of a request that is wrong."""
    with pytest.raises(HypersdError) as caught:
        job(*arguments, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_unknown_names_are_refused():
    assert "no operator no_such_op; known: " in refused(bench.main, ["no_such_op"])
    assert "no dtype float12; known: float32" in refused(bench.main, ["affine_step"], dtypes=["float12"])
    assert "no operator sampler_step" in refused(counters.main, ["sampler_step"])
    assert "no target sm_70; known: sm_80, sm_90" in refused(counters.main, ["geglu"], targets=["sm_70"])


def test_the_device_of_a_command_is_picked(monkeypatch):
    picked = []
    monkeypatch.setattr(bench_run, "main", lambda ops, *, device, **options: picked.append(device) or 0)
    cli.run(device="auto")
    assert picked == ["cuda" if torch.cuda.is_available() else "cpu"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_path": "none/x.jsonl"}, "there is no folder"),
        ({"plot_path": "none/x.png"}, "there is no folder"),
        ({"json_path": "."}, "is a folder, name a file"),
        ({"peers": ["eager", "nosuch"]}, "no peer nosuch; known: hypersd, cuda, eager, compile"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run.roofline, "measured", lambda *args: pytest.fail("measured"))
    options = {k: v if k == "peers" else tmp_path / v for k, v in options.items()}
    assert words in refused(bench.main, ["affine_step"], **options)
    if "json_path" in options:
        monkeypatch.setattr(compare, "checkout", lambda *args: pytest.fail("checked out"))
        assert words in refused(compare.trees, "HEAD", ["affine_step"], **options)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("lora_linear", peers.peft),
        ("lora_conv2d", peers.peft),
        ("lora_linear_routed", peers.adapter_loop),
        ("adamw_ema_", peers.torch_adamw),
        ("attention", peers.sdpa()),
    ],
)
def test_peers_compute_the_same(name, peer):
    op = OPS[name]
    inputs = next(case for case in op.cases if case.name.startswith("odd")).inputs()
    found, expected = (harness.outputs(make(op, inputs), bool(op.backward)) for make in (peer, peers.eager))
    assert found.keys() == expected.keys() and len(found) > 1
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_torchs_clipping_measures_the_same_norm():
    op = OPS["clip_coefficient"]
    inputs = next(case for case in op.cases if case.name.startswith("odd")).inputs()
    runner = peers.torch_clip(op, inputs)
    torch.testing.assert_close(runner.call(), peers.eager(op, inputs).call()[0])
    assert not runner.same  # the coefficient is not returned


def test_providers_take_turns():
    calls: list[str] = []
    harness.interleaved({n: lambda n=n: lambda: calls.append(n) for n in ("a", "b", "c")}, seconds=0.0)
    timed = calls[6:]  # after two warm-up calls each
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert len(rounds) == harness.MIN_ROUNDS
    assert all(sorted(group) == ["a", "b", "c"] for group in rounds)
    assert {group[0] for group in rounds} == {"a", "b", "c"}


def test_percentiles():
    assert harness.percentiles([float(i) for i in range(101)]) == (20.0, 50.0, 80.0)


def test_arguments_of_the_reference_are_those_of_the_public_function():
    op = OPS["affine_step"]
    inputs = op.cases[0].inputs()
    arguments = harness.schema_arguments(op, inputs)
    assert arguments[0] is inputs["x"] and len(arguments) == 6
    assert torch.equal(op.reference(*arguments), op.reference(*arguments))


def test_the_table_shows_ratios(capsys):
    rows = [
        harness.Result("op", "c", "float32", "fwd", p, "green", 1e-7, 1e-7, 1.0, v, 3.0, 9, v / 2)
        for p, v in (("hypersd", 2.0), ("eager", 5.0))
    ]
    report.show(rows, Console(width=160))
    said = capsys.readouterr().out
    assert "2.50" in said and "eager over hypersd, fwd: median 2.50" in said


def test_the_picture_shows_rows(tmp_path, monkeypatch):
    numbered, number_ticks = [], plots.number_ticks
    monkeypatch.setattr(plots, "number_ticks", lambda axis: numbered.append(axis.get_scale()) or number_ticks(axis))
    rows = [
        harness.Result("op", "c", "float32", "fwd", p, "green", 1e-7, 1e-7, 1.0, v, 3.0, 9, v / 2, of_roofline=share)
        for p, v, share in (("hypersd", 2.0, 0.5), ("eager", 5.0, None))
    ]
    report.plot(rows, tmp_path / "rows.png", bench.environment.environment())
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # the points of both providers
    assert numbered == ["log"]


@pytest.mark.parametrize("ratios", [(1.02, 1.07), (1.05, 1.4), (2.1, 2.9), (0.7, 4.0), (0.5, 300.0), (1.0, 1.0)])
def test_a_logarithmic_axis_has_numbers(ratios):
    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.scatter([1.0, *ratios], [0, 1, 2])
    plots.number_ticks(axes.xaxis)
    axes.figure.canvas.draw()
    (low, high), labels = axes.get_xlim(), [label.get_text() for label in axes.get_xticklabels()]
    seen = [label for label in labels if low <= float(label) <= high]
    assert 3 <= len(seen) <= 12 and len(set(seen)) == len(seen)
    assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))


def test_environment_stamp():
    stamp = bench.environment.environment()
    assert stamp["threads"] == torch.get_num_threads() and stamp["torch"] == torch.__version__
    assert all(stamp[name] for name in ("device", "cpu", "python", "diffusers", "peft", "commit", "date"))


def test_a_forced_implementation_is_forced_in_backward_too():
    """Otherwise the row of one implementation would hold the backward of another."""
    seen = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", asked_for()))
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append(("backward", asked_for()))
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    runner = harness.Runner(lambda: Asking.apply(x), {"x": x}, implementation="reference")
    assert torch.equal(harness.outputs(runner, True)["y"], torch.full((3,), 2.0))
    harness.step(runner, "full")()()
    harness.step(runner, "bwd")()()
    assert set(seen) == {("forward", "reference"), ("backward", "reference")}
    assert [where for where, _ in seen].count("backward") == 3
    assert asked_for() == "auto"


def test_cuda_kernels_are_a_provider_where_they_run(monkeypatch):
    op = OPS["affine_step"]
    inputs = op.cases[0].inputs()
    assert "cuda" not in peers.runners_for(op, inputs)
    monkeypatch.setattr(_native, "cuda_missing", lambda device: "")
    assert peers.runners_for(op, inputs)["cuda"].implementation == "cuda"
    assert "cuda" not in peers.runners_for(OPS["lora_linear"], OPS["lora_linear"].cases[-1].inputs(), ["cuda"])


def test_the_sanitizers_run_reaches_every_operator(capsys):
    assert sanitize.main(["affine_step", "consistency_loss"], "cpu", (torch.float32,)) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["affine_step", "consistency_loss"]
    assert all(int(line.split()[1]) >= 10 for line in said)
    assert all(any(not case.bench for case in sanitize.cases(op)) for op in OPS.values())


def test_copies_of_the_inputs_overflow_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000))
    assert gpu.copies(10_000_000) == 10 and gpu.copies(1e9) == 1 and gpu.copies(1000) == gpu.MAX_COPIES


def test_copies_share_one_compiled_function(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made.append(options["mode"]) or function)
    op = OPS["lora_linear"]
    inputs = op.cases[-1].inputs()
    for _ in range(3):
        peers.compiled(op, inputs)
    assert len(made) == 1
    assert len(peers.compiled(op, op.cases[0].inputs()).leaves) == 3 and len(made) == 2
    assert "max-autotune" not in peers.runners_for(op, inputs) and peers.autotuned(op, inputs) is None


def test_attention_of_a_gpu_is_no_peer_elsewhere():
    op = OPS["attention"]
    inputs = next(case for case in op.cases if case.name == "odd").inputs()
    assert peers.sdpa("FLASH_ATTENTION")(op, inputs) is None

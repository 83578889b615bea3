"""The generic checks against wrong kernels: one line of a kernel's source is changed, and they must turn red.

Run by test_interpreter.py, as interpreted.py is.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hypersd.kernels import _tune, use
from hypersd.kernels._op import OPS
from hypersd.kernels._tune import jit
from tests.kernels import checks, guards

assert _tune.interpreted(), "start with TRITON_INTERPRET=1"


class Mutation(NamedTuple):
    op: str
    kernel: str  # module, where it is not the operator's own, and function
    what: str
    old: str
    new: str


NARROW = ".to(tl.float16).to(tl.float32)"
DOT = 'total = tl.dot(left, right, total, input_precision="ieee")'
WIDE = "(inverse * scale) + base"
SHIFT = "_shift_of(shift, sample, channel, inside, channels)"
MUTATIONS = [
    Mutation(*row)
    for row in (
        ("affine_step", "_affine_step_kernel", "scale dropped", "total += k2 * tl.load", "total += tl.load"),
        ("affine_step", "_affine_step_kernel", "another row", "k = coef + row * coef_stride", "k = coef"),
        ("affine_step", "_affine_step_kernel", "no tail mask", "mask = inside < width", "mask = inside >= 0"),
        ("affine_step", "_affine_step_kernel", "fp16 sum", "total.to(out", f"total{NARROW}.to(out"),
        ("consistency_loss", "_loss_kernel", "scale dropped", "landing += p1 * tl.load", "landing += tl.load"),
        ("consistency_loss", "_loss_kernel", "another row", "k = coef + row * coef_stride", "k = coef"),
        ("consistency_loss", "_loss_kernel", "no tail mask", "mask = inside < width", "mask = inside >= 0"),
        ("consistency_loss", "_loss_kernel", "fp16 sum", "tl.sum(rho, axis=0)", "tl.sum(rho.to(tl.float16), axis=0)"),
        ("consistency_loss", "_scale_kernel", "scale dropped", " * inverse_count", ""),
        ("score_gradient", "_direction_kernel", "scale dropped", "value = factor * (", "value = ("),
        ("score_gradient", "_direction_kernel", "another row", "sample * weight_stride", "0 * weight_stride"),
        ("score_gradient", "_direction_kernel", "no tail mask", "mask = inside < width", "mask = inside >= 0"),
        ("score_gradient", "_distance_kernel", "no tail mask", "mask = inside < width", "mask = inside >= 0"),
        ("score_gradient", "_distance_kernel", "fp16 sum",
         "tl.abs(left - right)", "tl.abs(left - right).to(tl.float16)"),
        ("geglu", "_forward_kernel", "scale dropped", "0.5 + 0.5 * tl.erf", "0.5 + tl.erf"),
        ("geglu", "_forward_kernel", "halves swapped", "gate = tl.load(x + at + width", "gate = tl.load(x + at"),
        ("geglu", "_forward_kernel", "no tail mask", "mask = inside < width", "mask = inside >= 0"),
        ("geglu", "_forward_kernel", "fp16", "(gate * phi))", f"(gate * phi){NARROW})"),
        ("geglu", "_backward_kernel", "scale dropped", "grad * value *", "value *"),
        ("group_norm_silu", "_group_norm._apply_kernel", "scale dropped", WIDE, "inverse + base"),
        ("group_norm_silu", "_group_norm._affine", "another group",
         "channel // (channels // groups)", "channel % groups"),
        ("group_norm_silu", "_group_norm._centered", "shift dropped", f"value += {SHIFT}[None, :]", "pass"),
        ("group_norm_silu", "_group_norm._moments_kernel", "shift dropped", f"mean += {SHIFT}", "pass"),
        ("group_norm_silu", "_group_norm._moments_kernel", "residual dropped", "value += tl.load(residual", "tl.load(residual"),
        ("group_norm_silu", "_group_norm._moments_kernel", "no tail mask", "rounded, mask=valid", "rounded"),
        ("group_norm_silu", "_group_norm._moments_kernel", "fp16 sum",
         "rounded = value.to(", f"rounded = value{NARROW}.to("),
        ("group_norm_silu", "_group_norm._dx_kernel", "dh dropped", "value += tl.load(dh", "tl.load(dh"),
        ("group_norm_silu", "_group_norm._shift_of", "another sample", "sample * channels + channel", "channel"),
        ("group_norm_silu", "_group_norm._tile", "no tail mask", "(pixel < pixels)[:, None] & ", ""),
        ("group_norm_silu", "_group_norm._moments_kernel", "fp16 sum",
         "tl.sum(value, axis=0)", f"tl.sum(value, axis=0){NARROW}"),
        ("group_norm_silu", "_group_norm._dx_kernel", "scale dropped",
         "(centered * tilt + level)", "(centered + level)"),
        ("lora_linear", "_lora_gemm._expand_kernel", "scale dropped", "total *= factor", "total *= 1.0"),
        ("lora_linear", "_lora_gemm._expand_kernel", "bias dropped", "if HAS_BIAS:", "if False:"),
        ("lora_linear", "_lora_gemm._tile", "transposed", "rows[:, None].to(tl.int64) * column_count + columns[None, :]",
         "rows[:, None].to(tl.int64) + columns[None, :] * row_count"),
        ("lora_linear", "_lora_gemm._tile", "no tail mask", " & (columns[None, :] < column_count)", ""),
        ("lora_linear", "_lora_gemm._put", "no tail mask", "(rows[:, None] < m) & ", ""),
        ("lora_linear", "_lora_gemm._add_product", "fp16 sum", DOT, DOT + NARROW),
        ("lora_linear", "_lora_gemm._add_outer", "rows dropped", "range(first, last, BLOCK_M)", "range(first + 1, last, BLOCK_M)"),
        ("lora_linear", "_lora_gemm._gradients_kernel", "scale dropped", "total *= factor", "total *= 1.0"),
        ("lora_linear", "_lora_gemm._gradients_kernel", "no tail mask", " & (columns[None, :] < n)", ""),
        ("lora_linear", "_lora_gemm._gradients_kernel", "transposed", "* r + ranks[:, None]", "+ ranks[:, None] * n"),
        ("norm_shrink", "_norm_shrink._forward_kernel", "scale dropped", "rest[:, None]) * inverse[:, None]", "rest[:, None])"),
        ("norm_shrink", "_norm_shrink._forward_kernel", "no tail mask",
         "apart = tl.where(columns[None, :] < k, apart, 0.0)", "pass"),
        ("norm_shrink", "_norm_shrink._forward_kernel", "no tail mask", "& (ranks[None, :] < r)", ""),
        ("norm_shrink", "_norm_shrink._forward_kernel", "fp16 sum",
         'product, input_precision="ieee")', f'product, input_precision="ieee"){NARROW}'),
        ("norm_shrink", "_norm_shrink._backward_kernel", "scale dropped", "hat * tilt", "hat"),
        ("norm_shrink", "_norm_shrink._upstream", "no gradient of S", "if ds is not None:", "if False:"),
        ("lora_linear_routed", "_routed_expand_kernel", "scale dropped",
         "total *= tl.load(scales + slot).to(tl.float32)", "total *= 1.0"),
        ("lora_linear_routed", "_collect_kernel", "scale dropped",
         "total *= tl.load(scales + slot).to(tl.float32)", "total *= 1.0"),
        ("lora_linear_routed", "_slot_of", "slots transposed",
         "tl.load(slots + sample)", "slot_count - 1 - tl.load(slots + sample)"),
        ("lora_linear_routed", "_slot_of", "no base layer", "(slot >= 0) & ", ""),
        ("lora_linear_routed", "_routed_shrink_kernel", "one slot", "w += slot * k * r", "w += k * r"),
        ("lora_linear_routed", "_put", "no tail mask", "(rows[:, None] < m) & ", ""),
        ("lora_linear_routed", "_add_product", "fp16 sum", DOT, DOT + NARROW),
        ("attention", "_attention._row_scores", "scale dropped", "s * exponent", "s"),
        ("attention", "_attention._forward_kernel", "heads transposed", "(b * v_b + h * v_h)", "(b * v_h + h * v_b)"),
        ("attention", "_attention._row_scores", "no tail mask", "keys[None, :] < tk", "keys[None, :] >= 0"),
        ("attention", "_attention._put", "no tail mask", "tokens[:, None] < count", "tokens[:, None] >= 0"),
        ("attention", "_attention._forward_kernel", "fp16 sum",
         "norm = 1.0 / tl.sum(p, 1)[:, None]", f"norm = (1.0 / tl.sum(p, 1)[:, None]){NARROW}"),
        ("attention", "_attention._dkdv_kernel", "scale dropped", "dk0 * scale", "dk0"),
        ("adamw_ema_", "adamw_ema._adamw_ema_kernel", "scale dropped", "g = factor * tl.load", "g = tl.load"),
        ("adamw_ema_", "adamw_ema._adamw_ema_kernel", "moments swapped",
         "tl.store(exp_avg + offset, m", "tl.store(exp_avg + offset, v"),
        ("adamw_ema_", "adamw_ema._adamw_ema_kernel", "no tail mask", "mask = offset < limit", "mask = offset >= 0"),
        ("adamw_ema_", "adamw_ema._adamw_ema_kernel", "fp16",
         "m += weight1 * (g - m)", f"m += (weight1 * (g - m)){NARROW}"),
        ("clip_coefficient", "_finish_kernel", "scale dropped", "max_norm * 1.0", "1.0"),
        ("clip_coefficient", "_squares_kernel", "no tail mask", "mask=offset < count", "mask=offset >= 0"),
        ("clip_coefficient", "_squares_kernel", "fp16 sum", "values * values", "(values * values).to(tl.float16)"),
        ("clip_coefficient", "_finish_kernel", "no tail mask", "mask=inside < chunks", "mask=inside < chunks - 1"),
    )
]  # fmt: skip
CASES = {
    "score_gradient": ["odd_weighted"],
    "adamw_ema_": ["graph"],
    "clip_coefficient": ["unclipped"],
    "group_norm_silu": ["odd", "odd_residual"],  # the gradient of a shift keeps that of h out of the kernel
}  # else "odd"


def findings(op_name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    op, wrong = OPS[op_name], []
    for name in CASES.get(op_name, ["odd"]):
        inputs = next(case for case in op.cases if case.name == name).inputs()
        with use("triton"), guards.guarded(monkeypatch, inputs) as (inside, bands):
            wrong += checks.check(op, inside)
        wrong += ["it writes beside its output"] * (guards.touched(bands) > 0)
    return wrong


@pytest.mark.parametrize("op", [op.name for op in OPS.values() if op.triton])
def test_the_kernel_as_it_is_stays_green(op, monkeypatch):
    assert findings(op, monkeypatch) == []
    kinds = {mutation.what for mutation in MUTATIONS if mutation.op == op}
    assert {"scale dropped", "no tail mask"} <= kinds and any(kind.startswith("fp16") for kind in kinds)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.op}{m.kernel}-{m.what}".replace(" ", "_"))
def test_a_changed_line_turns_the_checks_red(mutation, tmp_path, monkeypatch):
    path, _, name = (
        f"{mutation.op}.{mutation.kernel}".rpartition(".")
        if "." not in mutation.kernel
        else mutation.kernel.rpartition(".")
    )
    module: Any = importlib.import_module(f"hypersd.kernels.{path}")
    source = inspect.getsource(getattr(module, name).fn)
    assert source.count(mutation.old) >= 1, "the kernel no longer has this line"
    file = Path(tmp_path) / f"{name}.py"
    file.write_text(source[source.index("def ") :].replace(mutation.old, mutation.new))
    scope: dict[str, Any] = {}
    exec(compile(file.read_text(), str(file), "exec"), getattr(module, name).fn.__globals__, scope)
    monkeypatch.setattr(module, name, jit(scope[name]))
    assert findings(mutation.op, monkeypatch) != []

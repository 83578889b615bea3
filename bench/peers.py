"""The other ways to compute what an operator computes, each over its own copies of the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.kernels._op import Op

from .harness import EAGER, OURS, Runner, schema_arguments, with_leaves


def ours(op: Op, inputs: dict[str, Any]) -> Runner:
    """The public function, as a caller calls it."""
    changed, leaves = with_leaves(op, inputs)
    return Runner(lambda: op.function(**changed), leaves)


def eager(op: Op, inputs: dict[str, Any]) -> Runner:
    """The definition in plain torch, without argument checks."""
    changed, leaves = with_leaves(op, inputs)
    arguments = schema_arguments(op, changed)
    return Runner(lambda: op.reference(*arguments), leaves)


def compiled(op: Op, inputs: dict[str, Any], mode: str = "default") -> Runner:
    """torch.compile of the definition, for these shapes."""
    changed, leaves = with_leaves(op, inputs)
    arguments = schema_arguments(op, changed)
    signature = [(v.shape, v.stride(), v.dtype, v.device) if isinstance(v, Tensor) else v for v in arguments]
    if _compiled.get("for") != (op.name, signature):  # another case: copies of this one share its function
        torch._dynamo.reset()
        _compiled.clear()
        _compiled["for"] = op.name, signature
    if mode not in _compiled:
        _compiled[mode] = torch.compile(op.reference, dynamic=False, mode=mode)
    function = _compiled[mode]
    return Runner(lambda: function(*arguments), leaves)


_compiled: dict[str, Any] = {}


def autotuned(op: Op, inputs: dict[str, Any]) -> Runner | None:
    """torch.compile that tries every product kernel it has: minutes for each case, so for large ones on a GPU alone,
    and only where it is asked for."""
    large = op.cost is not None and op.cost(**inputs).flops >= 5e9
    wanted = large and inputs["x"].is_cuda and inputs["x"].dtype == torch.bfloat16
    return compiled(op, inputs, "max-autotune-no-cudagraphs") if wanted else None


def peft(op: Op, inputs: dict[str, Any]) -> Runner:
    """PEFT's layer around a frozen torch layer, adapters in the layer's dtype."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Conv2d, Linear

    changed, leaves = with_leaves(op, inputs)
    weight, bias, a, b = (changed[name] for name in ("weight", "bias", "a", "b"))
    rank = a.shape[0]
    config = LoraConfig(r=rank, lora_alpha=inputs["scale"] * rank, lora_dropout=0.0)
    if op.name == "lora_linear":
        base: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer = Linear(base, "default", config, r=rank, lora_alpha=config.lora_alpha)
    else:
        sizes = {"kernel_size": weight.shape[2:], "stride": inputs["stride"], "padding": inputs["padding"]}
        base = nn.Conv2d(weight.shape[1], weight.shape[0], bias=bias is not None, **sizes)
        layer = Conv2d(base, "default", config, r=rank, lora_alpha=config.lora_alpha)
    base.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias.detach(), requires_grad=False)
    leaves = {
        "x": leaves["x"],
        "a": nn.Parameter(a.detach().clone()),
        "b": nn.Parameter(b.detach().clone()),
    }
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = leaves["a"], leaves["b"]
    x = leaves["x"]
    return Runner(lambda: layer(x), leaves)


def base_layer(op: Op, inputs: dict[str, Any]) -> Runner:
    """The layer without its adapter: what an adapter costs is the distance to this."""
    changed, leaves = with_leaves(op, inputs)
    x, weight, bias = leaves["x"], changed["weight"], changed["bias"]
    if op.name == "lora_linear":
        return Runner(lambda: F.linear(x, weight, bias), {"x": x}, same=False)
    stride, padding = inputs["stride"], inputs["padding"]
    return Runner(lambda: F.conv2d(x, weight, bias, stride, padding), {"x": x}, same=False)


PROVIDERS: dict[str, dict[str, Callable[[Op, dict[str, Any]], Runner | None]]] = {
    "": {OURS: ours, EAGER: eager, "compile": compiled},
    "lora_linear": {"max-autotune": autotuned, "peft": peft, "base": base_layer},
    "lora_conv2d": {"peft": peft, "base": base_layer},
}


def runners_for(op: Op, inputs: dict[str, Any], peers: Sequence[str] | None = None) -> dict[str, Runner]:
    """Every provider of this operator but max-autotune, or those in `peers`; ours and eager always."""
    known = PROVIDERS[""] | PROVIDERS.get(op.name, {})
    wanted = (
        {n: f for n, f in known.items() if f is not autotuned}
        if peers is None
        else {n: f for n, f in known.items() if n in (OURS, EAGER, *peers)}
    )
    return {name: runner for name, make in wanted.items() if (runner := make(op, inputs)) is not None}

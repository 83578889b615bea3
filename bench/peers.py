"""The other ways to compute what an operator computes, each over its own copies of the same numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.kernels._op import Op

from .harness import EAGER, OURS, Runner, schema_arguments, with_leaves, written


def ours(op: Op, inputs: dict[str, Any]) -> Runner:
    """The public function, as a caller calls it."""
    changed, leaves = with_leaves(op, inputs)
    return Runner(lambda: written(op, changed, op.function(**changed)), leaves)


def cuda(op: Op, inputs: dict[str, Any]) -> Runner | None:
    """The public function with our CUDA C++ kernels forced, where they are built and can run."""
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    if op.unavailable("cuda", device):
        return None
    runner = ours(op, inputs)
    runner.implementation = "cuda"
    return runner


def eager(op: Op, inputs: dict[str, Any]) -> Runner:
    """The definition in plain torch, without argument checks."""
    changed, leaves = with_leaves(op, inputs)
    arguments = schema_arguments(op, changed)
    return Runner(lambda: written(op, changed, op.reference(*arguments)), leaves)


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
    return Runner(lambda: written(op, changed, function(*arguments)), leaves)


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
    assert op.cost is not None
    pool = inputs["a"].dim() > weight.dim()  # of adapters, whose rank is the dimension after
    a, b = inputs["a"].narrow(int(pool), 0, 0), inputs["b"].narrow(1 + int(pool), 0, 0)
    once = op.cost(**inputs | {"a": a, "b": b})
    work = {"fwd": once, "bwd": once, "full": once + once}  # dX is as large a product, of tensors of the same sizes
    if op.name.startswith("lora_linear"):
        return Runner(lambda: F.linear(x, weight, bias), {"x": x}, same=False, work=work)
    stride, padding = inputs["stride"], inputs["padding"]
    return Runner(lambda: F.conv2d(x, weight, bias, stride, padding), {"x": x}, same=False, work=work)


def torch_adamw(op: Op, inputs: dict[str, Any]) -> Runner:
    """torch.optim.AdamW(fused=True) and a foreach EMA over 256 tensors, with what the case asks for beside them."""
    changed, _ = with_leaves(op, inputs)
    size = -(-changed["param"].numel() // 256)
    parameters = [nn.Parameter(part) for part in changed["param"].split(size)]
    clip, average = changed.get("clip"), changed["ema"].split(size)
    on_device = changed["param"].is_cuda
    rate = changed["lr"] if on_device else float(changed["lr"])
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=changed["betas"], eps=changed["eps"], weight_decay=changed["weight_decay"],
        fused=True, capturable=on_device,
    )  # fmt: skip
    state = zip(parameters, changed["exp_avg"].split(size), changed["exp_avg_sq"].split(size), strict=True)
    done = torch.as_tensor(float(changed["step"]) - 1.0, device=changed["param"].device)
    for parameter, first, second in state:
        optimizer.state[parameter] = {"step": done.clone(), "exp_avg": first, "exp_avg_sq": second}
    shadow = None if changed.get("shadow") is None else changed["shadow"].split(size)

    @torch.no_grad()
    def call() -> Any:
        grads = changed["grad"].float().split(size)
        for parameter, grad in zip(parameters, grads if clip is None else torch._foreach_mul(grads, clip), strict=True):
            parameter.grad = grad
        optimizer.step()
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 - changed["ema_decay"])
        if shadow is not None:
            torch._foreach_copy_(shadow, [p.data for p in parameters])
        return written(op, changed, None)

    return Runner(call)


def torch_clip(op: Op, inputs: dict[str, Any]) -> Runner:
    """torch.nn.utils.clip_grad_norm_ over 256 tensors: it returns the norm alone, and writes the clipped gradient."""
    size = -(-inputs["grad"].numel() // 256)
    parameters = [nn.Parameter(part) for part in torch.zeros_like(inputs["grad"]).split(size)]
    for parameter, grad in zip(parameters, inputs["grad"].clone().split(size), strict=True):
        parameter.grad = grad
    return Runner(lambda: torch.nn.utils.clip_grad_norm_(parameters, inputs["max_norm"]), same=False)


def sdpa(backend: str = "") -> Callable[[Op, dict[str, Any]], Runner | None]:
    """torch's attention, with the backend it chooses or one by name; the backends of a GPU only there."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def make(op: Op, inputs: dict[str, Any]) -> Runner | None:
        if backend and not inputs["q"].is_cuda:
            return None
        changed, leaves = with_leaves(op, inputs)
        q, k, v = (changed[name] for name in "qkv")

        def call() -> Tensor:
            if not backend:
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)

        return Runner(call, leaves)

    return make


def adapter_loop(op: Op, inputs: dict[str, Any]) -> Runner:
    """The base layer, then each adapter of the batch in turn: its samples gathered, two products, added where they lie.
    Who uses what is known beforehand."""
    changed, leaves = with_leaves(op, inputs)
    x, a, b, weight, bias = leaves["x"], leaves["a"], leaves["b"], changed["weight"], changed["bias"]
    slots, scales = changed["slots"].tolist(), changed["scales"].tolist()
    users = {s: [i for i, slot in enumerate(slots) if slot == s] for s in sorted(set(slots)) if s >= 0}
    samples = {slot: torch.tensor(index, device=x.device) for slot, index in users.items()}

    def call() -> Any:
        y = F.linear(x, weight, bias)
        for slot, index in samples.items():
            y.index_add_(0, index, F.linear(F.linear(x[index], a[slot]), b[slot]) * scales[slot])
        return y

    return Runner(call, leaves)


def liger_group_norm(op: Op, inputs: dict[str, Any]) -> Runner | None:
    """Liger-Kernel's GroupNorm, which wants channels first, and torch's SiLU after it."""
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    changed, leaves = with_leaves(op, inputs)
    names = ("x", "weight", "bias", "shift", "residual", "num_groups", "eps")
    x, weight, bias, shift, residual, groups, eps = (changed[name] for name in names)
    if weight is None or not x.is_contiguous():
        return None

    def call() -> Any:
        h = x if residual is None else x + residual
        z = h.flatten(2) if shift is None else h.flatten(2) + shift[..., None]
        # three dimensions: with four its backward writes beside its memory (Liger-Kernel issue 1375)
        y = LigerGroupNormFunction.apply(z, weight, bias, x.shape[1], groups, eps).view_as(x)
        y = F.silu(y) if changed["silu"] else y
        return y if residual is None else (y, h)

    return Runner(call, leaves)


def liger_geglu(op: Op, inputs: dict[str, Any]) -> Runner:
    """Liger-Kernel's GEGLU: it has the tanh approximation of GELU, so that it computes something else."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    changed, leaves = with_leaves(op, inputs)

    def call() -> Tensor:
        value, gate = changed["x"].chunk(2, -1)
        return LigerGELUMulFunction.apply(gate, value)

    return Runner(call, leaves, same=False)


def absent(name: str, device: str) -> dict[str, str]:
    """The peers of an operator that cannot run here, and why."""
    if "liger" not in PROVIDERS.get(name, {}):
        return {}
    if importlib.util.find_spec("liger_kernel") is None:
        return {"liger": "liger-kernel is not installed (pip install 'hypersd[peers]')"}
    return {} if device == "cuda" else {"liger": "its kernels are Triton's and need a GPU"}


PROVIDERS: dict[str, dict[str, Callable[[Op, dict[str, Any]], Runner | None]]] = {
    "": {OURS: ours, "cuda": cuda, EAGER: eager, "compile": compiled},
    "adamw_ema_": {"AdamW(fused)": torch_adamw},
    "attention": {
        "sdpa": sdpa(),
        "flash": sdpa("FLASH_ATTENTION"),
        "efficient": sdpa("EFFICIENT_ATTENTION"),
        "cudnn": sdpa("CUDNN_ATTENTION"),
    },
    "geglu": {"liger": liger_geglu},
    "group_norm_silu": {"liger": liger_group_norm},
    "clip_coefficient": {"clip_grad_norm_": torch_clip},
    "lora_linear": {"max-autotune": autotuned, "peft": peft, "base": base_layer},
    "lora_linear_routed": {"loop": adapter_loop, "base": base_layer},
    "lora_conv2d": {"peft": peft, "base": base_layer},
}


def runners_for(op: Op, inputs: dict[str, Any], peers: Sequence[str] | None = None) -> dict[str, Runner]:
    """Every provider of this operator but max-autotune, or those in `peers`; ours and eager always."""
    known = PROVIDERS[""] | PROVIDERS.get(op.name, {})
    asked = [name for name in known if name != "max-autotune"] if peers is None else [OURS, EAGER, *peers]
    device = next(value.device.type for value in inputs.values() if isinstance(value, Tensor))
    asked = [name for name in asked if name not in absent(op.name, device)]
    made = {name: make(op, inputs) for name, make in known.items() if name in asked}
    return {name: runner for name, runner in made.items() if runner is not None}

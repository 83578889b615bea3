"""Which shapes the layers of a real network have: one forward without numbers, every call of a layer counted.

    python -m bench.census SET     (emoji, sd15, sdxl, sd3 or flux)

The networks are built on the meta device from the configuration in hypersd/kernels/shapes/SET.json, so that neither
weights nor memory are needed. Shapes are those of one sample; the cases of SET name theirs with a batch.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hypersd.kernels import _shapes

Layer = tuple[str, tuple[int, ...]]


class Counting(TorchFunctionMode):
    """Counts (operator, sizes) of torch's functions that hypersd's operators stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Layer] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.linear:
            x, weight = args[0], args[1]
            self.seen["lora_linear", (x[0].numel() // x.shape[-1], *reversed(weight.shape))] += 1
        elif function in (F.conv2d, torch.conv2d):
            x, weight = args[0], args[1]
            stride = args[3] if len(args) > 3 else kwargs.get("stride", 1)
            stride = stride[0] if isinstance(stride, tuple) else stride
            self.seen["lora_conv2d", (x.shape[1], weight.shape[0], x.shape[2], weight.shape[2], stride)] += 1
        elif function is F.group_norm:
            self.seen["group_norm_silu", tuple(args[0].shape[1:])] += 1
        elif function is F.layer_norm:
            self.seen["norm_shrink", tuple(args[0].shape[1:])] += 1
        elif function is F.scaled_dot_product_attention:
            q, k = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
            self.seen["attention", (q.shape[1], q.shape[2], k.shape[2], q.shape[3])] += 1
        elif function is F.gelu and kwargs.get("approximate", "none") == "none":
            x = args[0]
            self.seen["geglu", (*x.shape[1:-1], 2 * x.shape[-1])] += 1
        return function(*args, **kwargs)


def build(network: dict[str, Any]) -> nn.Module:
    """The network of a set, without numbers."""
    with torch.device("meta"):
        return getattr(diffusers, network["class"])(**network["config"]).eval()


def layers(set_name: str) -> Counter[Layer]:
    """How often each layer occurs in one forward of the network of this set."""
    network = _shapes.read(set_name)["network"]
    model = build(network)
    inputs = {
        name: torch.zeros(shape, device="meta") if isinstance(shape, list) else
        {key: torch.zeros(size, device="meta") for key, size in shape.items()}
        for name, shape in network["inputs"].items()
    }  # fmt: skip
    with torch.no_grad(), Counting() as counting:
        model(**inputs, return_dict=False)
    return counting.seen


def layer(op: str, inputs: dict[str, Any]) -> Layer | None:
    """What the census counts for these inputs of an operator; None for one that is no layer of a network."""
    if op in ("lora_linear", "lora_linear_routed"):
        x, weight = inputs["x"], inputs["weight"]
        rows = x[0].numel() // x.shape[-1] if x.dim() > 2 else 1
        return "lora_linear", (rows, weight.shape[1], weight.shape[0])
    if op == "lora_conv2d":
        x, weight = inputs["x"], inputs["weight"]
        return op, (x.shape[1], weight.shape[0], x.shape[2], weight.shape[2], inputs["stride"])
    if op in ("group_norm_silu", "geglu", "norm_shrink"):
        return op, tuple(inputs["x"].shape[1:])
    if op == "attention":
        q, k = inputs["q"], inputs["k"]
        return op, (q.shape[1], q.shape[2], k.shape[2], q.shape[3])
    return None


def main(names: list[str]) -> int:
    for name in names or _shapes.SETS:
        print(name)
        for (op, sizes), count in sorted(layers(name).items()):
            print(f"  {op:16} {'x'.join(map(str, sizes)):24} {count}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What an unmerged LoRA costs a full-size SD1.5 UNet, and its attention blocks' linear layers in training.

Forward: random weights, the published configuration, latents of 64 x 64, batch 1, rank 64 on every layer that the LCM
scripts adapt; channels last, the faster order for all of them on a CPU. All providers share one copy of the weights.
`base` is the network that we run, fused operators and all, without its adapter: our time over its time is what the
adapter costs; `diffusers` is the network as diffusers runs it. Ours is judged by PEFT's output: both compute in
float32, so they may differ by roundings alone.

Forward with backward (`attention_linears`): the ten linear layers of a transformer block at each width, gradients of
the inputs and of every adapter, against PEFT's layers over the same weights.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hypersd.kernels import lora_linear
from hypersd.models.backbone import Backbone
from hypersd.models.lora import LCM_TARGETS, LoraSpec

from .harness import OURS, Result, Runner, compare, outputs, percentiles

RANK, TOKENS, TEXT = 64, 77, 768
WIDTHS = (320, 640, 1280, 1280)
CONFIG = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": TEXT, "attention_head_dim": 8,
    "block_out_channels": WIDTHS, "layers_per_block": 2,
}  # fmt: skip
BLOCKS = {(320, 4096): 5, (640, 1024): 5, (1280, 256): 5, (1280, 64): 1}  # (width, tokens): how often in the network
PEFT, BASE, DIFFUSERS = "peft", "base", "diffusers"
ROUNDS = 4
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative distance of two ways to add up a network


def random_unet(dtype: torch.dtype, config: dict[str, Any]) -> UNet2DConditionModel:
    """The network with weights that keep activations near 1, frozen."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to_empty(device="cpu").to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.dim() > 1:
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(1.0)  # norm weights; a bias of 1 is as good as any
    return unet.to(memory_format=torch.channels_last)


def shared_copy(network: nn.Module) -> nn.Module:
    """Another network over the same weights."""
    return copy.deepcopy(network, {id(p): p for p in network.parameters()})


def networks(unet: UNet2DConditionModel) -> dict[str, Callable[..., Tensor]]:
    """provider -> function of (latents, timestep, text)."""
    from peft import LoraConfig

    plain, peft = shared_copy(unet), shared_copy(unet)
    backbone = Backbone(unet, LoraSpec(RANK, float(RANK)), roles=("student",))
    backbone.fuse()
    generator = torch.Generator().manual_seed(1)
    adapter = backbone.role_parameters("student")
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.normal_(0.0, 0.3 / math.sqrt(parameter[0].numel()), generator=generator)
    peft.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LCM_TARGETS), lora_dropout=0.0))
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = adapter[name.replace(".default", "")].data

    def by(network: nn.Module) -> Callable[..., Tensor]:
        return lambda x, t, text: network(x, t, encoder_hidden_states=text, return_dict=False)[0]

    def role(name: str) -> Callable[..., Tensor]:
        return lambda x, t, text: backbone(x, t, {"encoder_hidden_states": text}, role=name)

    return {OURS: role("student"), PEFT: by(peft), BASE: role("base"), DIFFUSERS: by(plain)}


@torch.no_grad()
def forward(
    dtype: torch.dtype, rounds: int, peers: Sequence[str] | None, config: dict[str, Any] = CONFIG
) -> list[Result]:
    """Calls of the whole network, in turns."""
    functions = networks(random_unet(dtype, config))
    size, generator = config["sample_size"], torch.Generator().manual_seed(2)
    x = torch.randn(1, 4, size, size, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    text = torch.randn(1, TOKENS, config["cross_attention_dim"], generator=generator).to(dtype)
    timestep = torch.tensor(501)
    found = {name: function(x, timestep, text).double() for name, function in functions.items()}  # also warms up
    apart = float((found[OURS] - found[PEFT]).norm() / found[PEFT].norm())
    green = apart <= LIMIT[dtype]
    said = "green" if green else f"red: differs from {PEFT} by {apart:.1e}, allowed {LIMIT[dtype]:.0e}"
    asked = [name for name in functions if peers is None or name == OURS or name in peers]
    samples: dict[str, list[float]] = {n: [] for n in asked}
    for number in range(rounds if green else 0):
        for n in asked[number % len(asked) :] + asked[: number % len(asked)]:
            start = time.perf_counter_ns()
            functions[n](x, timestep, text)
            samples[n].append((time.perf_counter_ns() - start) / 1e3)
    name = str(dtype).removeprefix("torch.")
    rows = [
        Result(
            "sd15_unet", f"sd15_b1_{size}x{size}", name, "fwd", n, said if n in (OURS, PEFT) else "other", apart, None
        )
        for n in asked
    ]
    for row in rows:
        if samples[row.provider]:
            row.p20, row.p50, row.p80 = percentiles(samples[row.provider])
            row.rounds = len(samples[row.provider])
            row.over_ours = round(row.p50 / percentiles(samples[OURS])[1], 3)
    return rows


# ---- the linear layers of one transformer block -----------------------------------------------------------------


def block_layers(width: int) -> dict[str, tuple[int, int, bool]]:
    """name -> (in, out, bias) of the ten linear layers of a transformer block."""
    attention = {
        f"attn{i}.{name}": (TEXT if i == 2 and name in ("to_k", "to_v") else width, width, name == "to_out")
        for i in (1, 2)
        for name in ("to_q", "to_k", "to_v", "to_out")
    }
    return attention | {"ff.proj": (width, 8 * width, True), "ff.out": (4 * width, width, True)}


def block_runner(width: int, tokens: int, dtype: torch.dtype, provider: str, work: torch.dtype) -> Runner:
    """All ten layers in `work`, numbers of `dtype`, each on an input of its own shape; q, k and v share theirs."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(dtype).to(work)

    inputs = {
        "attn1": draw(1, tokens, width), "attn1.to_out": draw(1, tokens, width), "attn2.to_q": draw(1, tokens, width),
        "attn2": draw(1, TOKENS, TEXT), "attn2.to_out": draw(1, tokens, width), "ff.proj": draw(1, tokens, width),
        "ff.out": draw(1, tokens, 4 * width),
    }  # fmt: skip
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if name != "attn2"}  # text needs none
    calls: list[Callable[[], Tensor]] = []
    for name, (k, n, bias) in block_layers(width).items():
        x = inputs.get(name, inputs[name.split(".")[0]] if name.startswith("attn") else None)
        weight, bias_value = draw(n, k, std=k**-0.5), draw(n) if bias else None
        a, b = draw(RANK, k, std=k**-0.5).requires_grad_(), draw(n, RANK, std=0.1 * RANK**-0.5).requires_grad_()
        leaves |= {f"{name}.a": a, f"{name}.b": b}
        if provider == PEFT:
            base = nn.Linear(k, n, bias=bias, device="meta")
            base.weight = nn.Parameter(weight, requires_grad=False)
            base.bias = None if bias_value is None else nn.Parameter(bias_value, requires_grad=False)
            layer = Linear(base, "default", LoraConfig(r=RANK, lora_alpha=RANK), r=RANK, lora_alpha=RANK)
            layer.lora_A["default"].weight, layer.lora_B["default"].weight = nn.Parameter(a), nn.Parameter(b)
            leaves |= {f"{name}.a": layer.lora_A["default"].weight, f"{name}.b": layer.lora_B["default"].weight}
            calls.append(lambda layer=layer, x=x: layer(x))
        else:
            calls.append(lambda p=(x, weight, bias_value, a, b): lora_linear(*p, 1.0))
    return Runner(lambda: tuple(call() for call in calls), leaves)


def attention_linears(dtype: torch.dtype, seconds: float, blocks: dict[tuple[int, int], int]) -> list[Result]:
    """One row a width, and their sum as the network has them."""
    rows: list[Result] = []
    for width, tokens in blocks:
        exact = outputs(block_runner(width, tokens, dtype, PEFT, torch.float64), True)
        runners = {name: block_runner(width, tokens, dtype, name, dtype) for name in (OURS, PEFT)}
        rows += compare(
            "attention_linears", f"sd15_block_{tokens}x{width}", dtype, "full", exact, runners, seconds=seconds,
            yardstick=PEFT,
        )  # fmt: skip
    totals = {}
    for provider in (OURS, PEFT):
        parts = [row for row in rows if row.provider == provider]
        if all(row.p50 for row in parts):
            totals[provider] = sum(row.p50 * count for row, count in zip(parts, blocks.values(), strict=True))  # type: ignore[operator]
    for provider, total in totals.items():
        row = Result("attention_linears", "sd15_blocks", rows[0].dtype, "full", provider, "other", None, None)
        row.p20 = row.p50 = row.p80 = round(total, 2)
        row.over_ours = round(total / totals[OURS], 3) if OURS in totals else None
        rows.append(row)
    return rows


def measure(
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    shapes: str | tuple[str, ...],
    peers: Sequence[str] | None,
    seconds: float,
) -> Iterable[list[Result]]:
    """On a CPU, in the first of `dtypes`. `seconds` are those of a block; the network is called ROUNDS times."""
    if device != "cpu":
        return
    yield attention_linears(dtypes[0], seconds, BLOCKS)
    yield forward(dtypes[0], ROUNDS, peers)

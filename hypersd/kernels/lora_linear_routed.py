"""lora_linear_routed: sample i is y = x W^T + bias + scales[s] (x a[s]^T) b[s]^T with s = slots[i]; s = -1: no adapter

 backward  dX = dY W + scale dS a,  dS = dY b;   dA[s], dB[s]: the sum over the samples of slot s, in their order
 flops     2 M K N + 2 M r (K + N) as written (M rows, K in, N out, r rank)
 bytes     x, W, a, b read, y written
 launches  2 forward, 6 backward, whatever the slots are: a GPU's host never reads them
 replaces  a loop over the adapters of a batch: gather, two products, scale, scatter-add for each

Samples of an image model have one length, so a tile of rows lies in one sample and reads one slot: no sorting, no
padding, no tables. _lora_routed.py has the same in ATen products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora, _lora_routed, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._lora_gemm import _add_outer, _add_product, _put, widen
from hypersd.kernels._lora_gemm import config as linear_config
from hypersd.kernels._op import Case, Op
from hypersd.kernels._rows import aten_in_float64, check_numbers, check_strided, on_device
from hypersd.kernels._tune import Config, Program, jit, tl, triton


def _case(
    name: str, m: tuple[int, ...], k: int, n: int, r: int, slots: tuple[int, ...], *, bias: bool = True,
    bench: bool = True,
) -> Case:  # fmt: skip
    pool = max(slots, default=0) + 2  # the last adapter is used by none

    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict:
        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

        return {
            "x": draw(*m, k),
            "weight": draw(n, k, std=k**-0.5),
            "bias": draw(n) if bias else None,
            "a": draw(pool, r, k, std=k**-0.5),
            "b": draw(pool, n, r, std=0.1 * r**-0.5),
            "slots": torch.tensor(slots, dtype=torch.int64, device=device),
            "scales": torch.linspace(0.5, 1.5, pool, device=device),
        }

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("lora_linear_routed", _case),
    _case("odd", (5, 7), 13, 11, 5, (1, -1, 0, 1, 1), bench=False),
    _case("odd_tail", (3, 2, 35), 24, 40, 8, (2, 0, 2), bench=False),
    _case("odd_long", (4, 77), 20, 36, 16, (0, 1, 0, -1), bench=False),
    _case("vectors", (6,), 24, 16, 4, (1, 0, -1, 1, 0, 0), bench=False),
    _case("all_base", (2, 9), 24, 40, 8, (-1, -1), bench=False),
    _case("no_tokens", (2, 0), 16, 8, 4, (0, 1), bench=False),
    _case("no_samples", (0, 9), 16, 8, 4, (), bench=False),
)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor) -> Cost:
    """As if every sample had an adapter: arithmetic of the cheaper form, each tensor moved once."""
    n, k = weight.shape
    m, r = x.shape[:-1].numel(), a.shape[1]
    moved = x.numel() + m * n + n * k + a.numel() + b.numel()
    return Cost(2 * m * n * k + 2 * r * min(m * (k + n), a.shape[0] * n * k), moved * x.element_size(), 2)


def backward_cost(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, **others: Any) -> Cost:
    """As if every sample had an adapter; see _lora.backward_cost."""
    n, k = weight.shape
    m, ab = x.shape[:-1].numel(), a.numel() + b.numel()
    return _lora.backward_cost(m, k, n, a.shape[1], x.numel(), ab, x.element_size(), a.shape[0])


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor,
    keep: bool = False,
) -> Tensor:  # fmt: skip
    """The definition, as written; a slot that is none of 0 .. n - 1 means the base layer."""
    valid, index = _lora_routed.known(slots, a.shape[0])
    rows = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
    update = rows @ a[index].mT @ b[index].mT * scales[index].to(x.dtype)[:, None, None]
    y = F.linear(x, weight, bias)
    return y + torch.where(valid[:, None, None], update, 0.0).view(y.shape)


# ---- Triton: the kernels of lora_linear.py with a slot to each tile ------------------------------------------------


@jit
def _slot_of(slots, sample, slot_count):
    """(whether the sample has an adapter, its slot or 0)."""
    slot = tl.load(slots + sample)
    valid = (slot >= 0) & (slot < slot_count)
    return valid, tl.where(valid, slot, 0).to(tl.int64)


@jit
def _routed_shrink_kernel(
    x, w, slots, out, tokens, tiles, slot_count, k, r, NT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (samples tokens, r) = x w[slot]; w is (slots, r, k) if NT, else (slots, k, r). Zeros without an adapter."""
    sample = tl.program_id(0) // tiles
    rows = sample * tokens + (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    last = (sample + 1) * tokens
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid, slot = _slot_of(slots, sample, slot_count)
    w += slot * k * r
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    total = _add_product(total, x, w, rows, ranks, tl.where(valid, k, 0), last, r, k, NT, BLOCK_K, WIDEN)
    _put(out, total, rows, ranks, last, r)


@jit
def _routed_expand_kernel(
    s, u, x, w, bias, slots, scales, y, tokens, tiles, slot_count, n, k, r, NT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y = scales[slot] s u[slot] + x w + bias; u, w are (slots, n, r), (n, k) if NT, else (slots, r, n), (k, n)."""
    sample = tl.program_id(0) // tiles
    rows = sample * tokens + (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    last = (sample + 1) * tokens
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, slot = _slot_of(slots, sample, slot_count)
    u += slot * n * r
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = _add_product(total, s, u, rows, columns, tl.where(valid, r, 0), last, n, r, NT, BLOCK_R, WIDEN)
    total *= tl.load(scales + slot).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    total = _add_product(total, x, w, rows, columns, k, last, n, k, NT, BLOCK_K, WIDEN)
    _put(y, total, rows, columns, last, n)


@jit
def _routed_outer_kernel(
    u, v, slots, out, tokens, chunks, chunk, slot_count, r, c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """out (samples chunks, r, c) fp32: u^T v over each chunk of a sample's rows."""
    ranks = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(2) // chunks
    first = sample * tokens + (tl.program_id(2) % chunks) * chunk
    last = tl.minimum(first + chunk, (sample + 1) * tokens)
    valid, slot = _slot_of(slots, sample, slot_count)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    total = _add_outer(total, u, v, ranks, columns, first, tl.where(valid, last, first), r, c, BLOCK_M, WIDEN)
    _put(out + tl.program_id(2).to(tl.int64) * r * c, total, ranks, columns, r, c)


@jit(do_not_specialize=("samples", "chunks"))
def _collect_kernel(partial, slots, scales, out, samples, chunks, size, BLOCK: tl.constexpr):
    """out (slots, size) = scales[slot] * the partial products of the slot's samples, added in their order."""
    slot = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for sample in range(samples):
        count = tl.where(tl.load(slots + sample) == slot, size, 0)  # nothing is read for another slot's sample
        for chunk in range(chunks):
            base = partial + (sample * chunks + chunk).to(tl.int64) * size
            total += tl.load(base + offset, mask=offset < count, other=0.0)
    total *= tl.load(scales + slot).to(tl.float32)
    tl.store(out + slot.to(tl.int64) * size + offset, total.to(out.dtype.element_ty), mask=offset < size)


def _row_block(tokens: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(tokens)))


def _shrink(x: Tensor, w: Tensor, slots: Tensor, tokens: int, nt: bool) -> Tensor:
    (m, k), r = x.shape, w.shape[1] if nt else w.shape[2]
    out = x.new_empty(m, r)
    block_m, block_r = _row_block(tokens, 64), min(64, max(16, triton.next_power_of_2(r)))
    block_k = linear_config(m, r, k, r, x.dtype).blocks["BLOCK_K"]
    if out.numel():
        tiles = triton.cdiv(tokens, block_m)
        _routed_shrink_kernel[(slots.shape[0] * tiles, triton.cdiv(r, block_r))](
            x, w, slots, out, tokens, tiles, w.shape[0], k, r, nt, block_m, block_r, block_k, widen(x.dtype),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _expand(
    s: Tensor, u: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, slots: Tensor, scales: Tensor, tokens: int,
    nt: bool,
) -> Tensor:  # fmt: skip
    (m, k), r, n = x.shape, s.shape[1], w.shape[0] if nt else w.shape[1]
    y = x.new_empty(m, n)
    config = linear_config(m, n, k, r, x.dtype)
    blocks = {**config.blocks, "BLOCK_M": _row_block(tokens, config.blocks["BLOCK_M"])}
    if y.numel():
        tiles = triton.cdiv(tokens, blocks["BLOCK_M"])
        _routed_expand_kernel[(slots.shape[0] * tiles, triton.cdiv(n, blocks["BLOCK_N"]))](
            s, u, x, w, bias, slots, scales, y, tokens, tiles, u.shape[0], n, k, r, nt, bias is not None,
            **blocks, WIDEN=widen(x.dtype), num_warps=config.num_warps if blocks["BLOCK_M"] > 64 else 4,
            num_stages=config.num_stages,
        )  # fmt: skip
    return y


def _collected(u: Tensor, v: Tensor, slots: Tensor, scales: Tensor, tokens: int, like: Tensor) -> Tensor:
    """By slot, scale * the sum of u^T v over its samples, in the shape and dtype of `like`."""
    (_, r), c, samples = u.shape, v.shape[1], slots.shape[0]
    block_r, block_c = (min(64, max(16, triton.next_power_of_2(size))) for size in (r, c))
    tiles = triton.cdiv(r, block_r) * triton.cdiv(c, block_c)
    chunks = max(1, min(triton.cdiv(tokens, 256), 264 // max(1, tiles * samples)))
    chunk = triton.cdiv(triton.cdiv(max(tokens, 1), chunks), 64) * 64
    chunks = triton.cdiv(max(tokens, 1), chunk)
    partial = u.new_empty(samples * chunks, r, c, dtype=torch.float32)
    out = like.new_empty(like.shape)
    if partial.numel():
        _routed_outer_kernel[(triton.cdiv(r, block_r), triton.cdiv(c, block_c), samples * chunks)](
            u, v, slots, partial, tokens, chunks, chunk, like.shape[0], r, c, block_r, block_c, 64, widen(u.dtype),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    if out.numel():
        _collect_kernel[(like.shape[0], triton.cdiv(r * c, 1024))](
            partial, slots, scales, out, samples, chunks, r * c, BLOCK=1024, num_warps=4
        )
    return out


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return _lora_routed.forward(x, weight, bias, a, b, slots, scales, keep)
    (n, k), tokens = weight.shape, x.shape[1:-1].numel()
    rows, weight, a, b = x.reshape(-1, k).contiguous(), weight.contiguous(), a.contiguous(), b.contiguous()
    slots, scales = slots.contiguous(), scales.contiguous()
    with on_device(x):
        s = _shrink(rows, a, slots, tokens, True)
        y = _expand(s, b, rows, weight, None if bias is None else bias.contiguous(), slots, scales, tokens, True)
    return y.view(*x.shape[:-1], n), s if keep else x.new_empty(0)


def _triton_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return _lora_routed.backward(dy, x, s, weight, a, b, slots, scales, need_x, need_adapter)
    (n, k), tokens = weight.shape, x.shape[1:-1].numel()
    rows, dy = x.reshape(-1, k).contiguous(), dy.reshape(-1, n).contiguous()
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    slots, scales = slots.contiguous(), scales.contiguous()
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    with on_device(x):
        ds = _shrink(dy, b, slots, tokens, False)
        if need_x:
            dx = _expand(ds, a, dy, weight, None, slots, scales, tokens, False).view(x.shape)
        if need_adapter:
            s = s if s.dim() == 2 else _shrink(rows, a, slots, tokens, True)
            da = _collected(ds, rows, slots, scales, tokens, a)
            db = _collected(dy, s, slots, scales, tokens, b)
    return dx, da, db


def programs() -> list[Program]:
    """The variants that ship, for the offline gate."""
    pointer, small = "*bf16", Config({}, 4, 3)
    sizes = ("tokens", "tiles", "chunks", "chunk", "slot_count", "k", "n", "r", "c")
    ragged = ("tokens", "tiles", "chunks", "slot_count", "scales", "slots")

    def program(name: str, kernel: Any, types: dict, constants: dict, config: Config, registers: int) -> Program:
        types |= {"slots": "*i64"} | {size: "i32" for size in kernel.arg_names if size in sizes}
        divisible = tuple(n for n in types if n not in ragged)
        ordered = {name: types[name] for name in kernel.arg_names if name in types}
        constants = constants | {"WIDEN": False}
        return Program(name, kernel, ordered, constants, config, divisible, dot=True, max_registers=registers)

    made = []
    for nt in (True, False):
        types = dict.fromkeys(("x", "w", "out"), pointer)
        blocks = {"NT": nt, "BLOCK_M": 64, "BLOCK_R": 64, "BLOCK_K": 64}
        made.append(program(f"shrink_{'nt' if nt else 'nn'}", _routed_shrink_kernel, types, blocks, small, 128))
        for m, n in ((16128, 640), (1024, 640)):
            config = linear_config(m, n, 640, 64, torch.bfloat16)
            types = dict.fromkeys(("s", "u", "x", "w", "bias", "y"), pointer) | {"scales": "*fp32"}
            name = f"expand_{'nt' if nt else 'nn'}_{config.blocks['BLOCK_N']}"
            flags = {"NT": nt, "HAS_BIAS": nt, **config.blocks}
            made.append(program(name, _routed_expand_kernel, types, flags, config, 168))
    types = {"u": pointer, "v": pointer, "out": "*fp32"}
    blocks = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_M": 64}
    made.append(program("outer", _routed_outer_kernel, types, blocks, small, 128))
    collect = {"partial": "*fp32", "slots": "*i64", "scales": "*fp32", "out": pointer}
    collect |= {"samples": "i32", "chunks": "i32", "size": "i32", "BLOCK": "constexpr"}
    options: dict[str, Any] = {"divisible": ("partial", "out", "size"), "streaming": True, "max_registers": 64}
    config = Config({"BLOCK": 1024}, 4)
    made.append(Program("collect", _collect_kernel, collect, dict(config.blocks), config, **options))
    return made


# ---- registration -----------------------------------------------------------------------------------------------


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, keep: bool
) -> None:
    name = "lora_linear_routed"
    _lora.check(name, x, weight, bias, a, b, None)
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}, expected (out, in)")
    n, k = weight.shape
    if x.dim() < 2 or x.shape[-1] != k:
        raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (batch, ..., {k}) as in weight")
    if a.dim() != 3 or a.shape[2] != k or not a.shape[0]:
        raise ValueError(f"{name}: a has shape {tuple(a.shape)}, expected (adapters, r, {k}) as in weight")
    if b.shape != (a.shape[0], n, a.shape[1]):
        raise ValueError(f"{name}: b has shape {tuple(b.shape)}, expected {(a.shape[0], n, a.shape[1])}")
    if not isinstance(slots, Tensor):
        raise TypeError(f"{name}: slots is a {type(slots).__name__}, expected a tensor")
    if slots.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: slots has dtype {slots.dtype}, expected torch.int64 or torch.int32")
    if slots.shape != x.shape[:1]:
        raise ValueError(f"{name}: slots has shape {tuple(slots.shape)}, expected ({x.shape[0]},), one a sample")
    check_numbers(f"{name}: scales", scales, ((a.shape[0],),), x.device, finite=True)
    check_strided(f"{name}: slots", slots)
    for label, tensor in (("slots", slots), ("scales", scales)):
        if tensor.device != x.device:
            raise ValueError(f"{name}: {label} is on {tensor.device}, expected {x.device} as x")
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if type(slots) is Tensor and slots.is_cpu and not traced:
        wrong = next((slot for slot in slots.tolist() if not -1 <= slot < a.shape[0]), None)
        if wrong is not None:
            raise ValueError(f"{name}: slots has {wrong}, expected -1 (no adapter) to {a.shape[0] - 1}")


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    kept = x.new_empty((x.shape[:-1].numel(), a.shape[1]) if keep else 0)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), kept


def _fake_backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0),
        a.new_empty(a.shape if need_adapter else 0),
        b.new_empty(b.shape if need_adapter else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, a, b, slots, scales, _ = inputs
    ctx.save_for_backward(x, output[1], weight, a, b, slots, scales)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    need_x, need_a, need_b = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    dx, da, db = BACKWARD.run(dy, *ctx.saved_tensors, need_x, need_a or need_b)
    grads = dx if need_x else None, None, None, da if need_a else None, db if need_b else None
    return *grads, None, None, None


def _plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor
) -> _lora.Plan:
    """That of the mean slot; each slot takes its own."""
    m, (n, k) = x.shape[:-1].numel() // a.shape[0], weight.shape
    return _lora.plan("lora_linear", m, k, n, a.shape[1], x.dtype, _lora.kind(x.device), full=False)


def _triton_config(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *others: Any, **rest: Any) -> Config:
    n, k = weight.shape
    return linear_config(x.shape[:-1].numel(), n, k, a.shape[1], x.dtype)


BACKWARD = Op(
    "lora_linear_routed_backward",
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor a, Tensor b, Tensor slots, Tensor scales, bool need_x, "
    "bool need_adapter) -> (Tensor, Tensor, Tensor)",
    reference=_lora_routed.backward,
    fake=_fake_backward,
    triton=_triton_backward,
)


def _arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor
) -> tuple[Any, ...]:
    x, weight, bias, a, b, _, _ = _lora.arguments(x, weight, bias, a, b, 1.0)
    if isinstance(scales, Tensor):
        _lora.check_scale("lora_linear_routed: scales", scales)
    return x, weight, bias, a, b, slots, scales, _lora.wants_adapter_grad(a, b)


OP = Op(
    "lora_linear_routed",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor slots, Tensor scales, bool keep) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=_fake,
    check=_check,
    fallback=_lora_routed.forward,
    triton=_triton,
    differentiable=("x", "a", "b"),
    backward=_backward,
    setup_context=_setup_context,
    result=lambda output: output[0],
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    backward_cost=backward_cost,
    config=_triton_config,
    plan=_plan,
    autocast=("x", "weight", "bias"),
    aten=aten_in_float64("x"),
    programs=programs,
)

for _op in (OP, BACKWARD):
    _lora.skip_dispatcher(_op)


@OP.public
def lora_linear_routed(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor
) -> Tensor:
    """A linear layer whose samples use different adapters of a pool, or none.

    Sample i: y = x W^T + bias + scales[s] (x a[s]^T) b[s]^T with s = slots[i]; s = -1 means the base layer.

    Args:
        x: (batch, ..., in). weight (out, in), bias (out,) or None, of its dtype and device.
        a: (n, r, in), b: (n, out, r), the pool; adapters of a smaller rank are padded with zeros. Another dtype is cast
            to x's, gradients come back in their own; inside torch.autocast all is cast as for F.linear.
        slots: (batch,) int64 or int32, scales: (n,) float32 or float64, both on the device of x. Values may change
            between replays of a captured graph: the host does not read them.

    Returns:
        (batch, ..., out). Differentiable in x, a and b (a slot that no sample uses gets zeros); weight and bias are
        frozen. Sums run in a fixed order.

    Raises TypeError for a dtype and ValueError for a shape or a device that does not fit, and on the CPU for a slot
    that is not -1 .. n - 1; on a GPU such a slot means the base layer.
    """
    return OP(*_arguments(x, weight, bias, a, b, slots, scales))

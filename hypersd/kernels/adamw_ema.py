"""adamw_ema_: AdamW, the moving average of its weights and a low-precision copy of them, in one pass, in place

g = clip grad,  m += (1 - beta1) (g - m),  v += (1 - beta2) (g^2 - v)
p -= lr weight_decay p + lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)      (Loshchilov & Hutter 2019)
ema += (1 - ema_decay) (p - ema),  shadow = p

bytes: 8 reads and writes of N float32, the gradient and the shadow     flops: 20 N     launches: 1
replaces: clip_grad_norm_'s pass over the gradient, AdamW, a foreach lerp, a cast; each once a tensor
arithmetic: float32 (float64 if param is), the bias corrections in float64; one rounding of each new value's size
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from hypersd.kernels import _rows, _shapes
from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op
from hypersd.kernels._tune import Config, Program, jit, tl

MASTER = (torch.float32, torch.float64)


def _case(name: str, *shape: int, shadow: bool = False, on_device: bool = False, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        def draw() -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

        inputs: dict[str, Any] = {"param": 0.1 * draw(), "grad": (0.01 * draw()).to(dtype)}
        inputs |= {"exp_avg": 0.01 * draw(), "exp_avg_sq": 1e-4 * draw().square(), "ema": 0.1 * draw()}
        inputs |= {"step": 3, "lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.95}
        if shadow:
            inputs["shadow"] = torch.zeros(shape, device=device).to(dtype)
        if on_device:
            numbers = {"step": 7.0, "lr": 3e-3, "clip": 0.25}
            inputs |= {name: torch.tensor(value, device=device) for name, value in numbers.items()}
        return inputs

    return Case(name, make_inputs, bench)


CASES = (
    *_shapes.cases("adamw_ema_", _case),
    _case("odd_4099", 4_099, bench=False),
    _case("odd_17", 17, bench=False),
    _case("shadow", 3_333, shadow=True, bench=False),
    _case("graph", 5_003, shadow=True, on_device=True, bench=False),
    _case("matrix", 33, 72, bench=False),
    _case("large", 262_147, bench=False),
    _case("empty", 0, bench=False),
)


def cost(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, shadow: Tensor | None = None,
    **numbers: Any,
) -> Cost:  # fmt: skip
    """Four buffers read and written, the gradient read, the shadow written."""
    each = 8 * param.element_size() + grad.element_size() + (shadow.element_size() if shadow is not None else 0)
    return Cost(flops=20 * param.numel(), bytes=each * param.numel(), launches=1)


def reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: float, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, ema_decay: float, shadow: Tensor | None, clip: Tensor | None,
    step_tensor: Tensor | None, lr_tensor: Tensor | None,
) -> None:  # fmt: skip
    """The definition: plain torch in the dtype of param, in place."""
    t = step if step_tensor is None else step * step_tensor.double()
    rate = lr if lr_tensor is None else lr * lr_tensor.double()
    g = grad.to(param.dtype) if clip is None else grad.to(param.dtype) * clip
    first = exp_avg + (1 - beta1) * (g - exp_avg)
    second = exp_avg_sq + (1 - beta2) * (g * g - exp_avg_sq)
    change = first / (second.sqrt() / (1 - beta2**t) ** 0.5 + eps)
    new = param - (rate * weight_decay * param + rate / (1 - beta1**t) * change)
    average = ema + (1 - ema_decay) * (new - ema)
    outputs = [(param, new), (exp_avg, first), (exp_avg_sq, second), (ema, average)]
    for old, value in outputs if shadow is None else [*outputs, (shadow, new)]:
        # a gradient that is not finite leaves everything as it is
        old.copy_(value if clip is None else torch.where(clip.isfinite(), value.to(old.dtype), old))


def check(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: float, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, ema_decay: float, shadow: Tensor | None, clip: Tensor | None,
    step_tensor: Tensor | None, lr_tensor: Tensor | None,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError for arguments that adamw_ema_ does not take."""
    _rows.check_tensor("param", param)
    if param.dtype not in MASTER:
        raise TypeError(f"param: got {param.dtype}, expected torch.float32 or torch.float64; `shadow` is for 16 bit")
    state = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema}
    buffers = {"param": param, "grad": grad, **state} | ({} if shadow is None else {"shadow": shadow})
    for name, tensor in buffers.items():
        _rows.check_tensor(name, tensor, param, "param")
        if name in state and tensor.dtype != param.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, expected {param.dtype} as param")
        if name == "shadow" and tensor.dtype.itemsize > param.dtype.itemsize:
            raise TypeError(f"shadow: got {tensor.dtype}, expected {param.dtype} as param, or a narrower one")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: got strides {tuple(tensor.stride())}, expected a contiguous tensor")
    _check_apart(buffers)
    for name, number, low in (("clip", clip, None), ("step", step_tensor, 1), ("lr", lr_tensor, 0)):
        if number is not None:
            _rows.check_numbers(name, number, ((),), param.device)
            if low is not None and type(number) is Tensor and number.device.type == "cpu":  # read without waiting
                _rows.check_real(name, number.item(), low)
    for name, value, low, high in (
        ("step", step, 1, math.inf), ("lr", lr, 0, math.inf), ("eps", eps, 0, math.inf),
        ("weight_decay", weight_decay, 0, math.inf), ("ema_decay", ema_decay, 0, 1),
    ):  # fmt: skip
        _rows.check_real(name, value, low, high)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas: got {(beta1, beta2)}, expected two numbers in [0, 1)")


def _check_apart(buffers: dict[str, Tensor]) -> None:
    """Raise ValueError where two buffers share memory (fake tensors have none); only `ema` may be `grad` itself."""
    real = {k: t for k, t in buffers.items() if type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"}
    spans = [(name, t.data_ptr(), t.data_ptr() + t.nbytes) for name, t in real.items()]
    for (name, begin, end), (other, first, last) in combinations(spans, 2):
        is_grad = {name, other} == {"grad", "ema"} and begin == first and real["grad"].dtype == real["ema"].dtype
        if begin < last and first < end and not is_grad:
            raise ValueError(f"{other}: shares memory with {name}, expected a buffer of its own")


# ---------------------------------------------------------------------------------------------------- Triton kernel


@jit
def _adamw_ema_kernel(
    param, grad, exp_avg, exp_avg_sq, ema, shadow, clip,
    step_tensor, lr_tensor, step, lr, log_beta1, log_beta2,  # device numbers; used where one of the two is given
    decay, step_size, root2,                                 # host numbers otherwise
    weight1, weight2, eps, weight_decay, weight_ema, count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    limit = count
    factor = 1.0
    if clip is not None:
        factor = tl.load(clip).to(tl.float32)
        limit = tl.where(factor - factor == 0.0, count, 0)  # not finite: nothing is read or written
    mask = offset < limit
    g = factor * tl.load(grad + offset, mask=mask).to(tl.float32)
    if step_tensor is not None or lr_tensor is not None:
        rate = lr * 1.0
        if lr_tensor is not None:
            rate *= tl.load(lr_tensor).to(tl.float32)
        t = step * 1.0
        if step_tensor is not None:
            t *= tl.load(step_tensor).to(tl.float32)
        # 1 - beta^t cancels in float32 while t is small
        decay = rate * weight_decay
        step_size = tl.div_rn(rate, (1.0 - tl.exp((t * log_beta1).to(tl.float64))).to(tl.float32))
        root2 = tl.div_rn(1.0, tl.sqrt_rn((1.0 - tl.exp((t * log_beta2).to(tl.float64))).to(tl.float32)))
    p = tl.load(param + offset, mask=mask)
    m = tl.load(exp_avg + offset, mask=mask)
    v = tl.load(exp_avg_sq + offset, mask=mask)
    e = tl.load(ema + offset, mask=mask)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    p -= decay * p + step_size * tl.div_rn(m, tl.sqrt_rn(v) * root2 + eps)
    e += weight_ema * (p - e)
    tl.store(exp_avg + offset, m, mask=mask)
    tl.store(exp_avg_sq + offset, v, mask=mask)
    tl.store(param + offset, p, mask=mask)
    tl.store(ema + offset, e, mask=mask)
    if shadow is not None:
        tl.store(shadow + offset, p.to(shadow.dtype.element_ty), mask=mask)


def _run_triton(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: float, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, ema_decay: float, shadow: Tensor | None, *on_device: Tensor | None,
) -> None:  # fmt: skip
    # beta = 0: its power is 0 for every step, and exp(-1e4 t) is
    logs = [math.log(beta) if beta > 0 else -1e4 for beta in (beta1, beta2)]
    ready = lr * weight_decay, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    config = _config(param)
    block = config.blocks["BLOCK"]
    _adamw_ema_kernel[(-(-param.numel() // block),)](
        param, grad, exp_avg, exp_avg_sq, ema, shadow, *on_device, step, lr, *logs, *ready,
        1 - beta1, 1 - beta2, eps, weight_decay, 1 - ema_decay, param.numel(),
        BLOCK=block, num_warps=config.num_warps,
    )  # fmt: skip


def _run_cuda(*args: Any) -> None:
    torch.ops.hypersd._adamw_ema_cuda(*args)


def _launch(
    run: Callable[..., None],
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: float, lr: float, beta1: float,
    beta2: float, eps: float, weight_decay: float, ema_decay: float, shadow: Tensor | None, clip: Tensor | None,
    step_tensor: Tensor | None, lr_tensor: Tensor | None,
) -> None:  # fmt: skip
    if torch.float64 in (param.dtype, grad.dtype) or not param.numel():  # the kernel computes in float32
        return reference(
            param, grad, exp_avg, exp_avg_sq, ema, step, lr, beta1, beta2, eps, weight_decay, ema_decay, shadow, clip,
            step_tensor, lr_tensor,
        )  # fmt: skip
    on_device = [None if t is None else t.to(param.device, non_blocking=True) for t in (clip, step_tensor, lr_tensor)]
    with _rows.on_device(param):
        run(
            param, grad, exp_avg, exp_avg_sq, ema, step, lr, beta1, beta2, eps, weight_decay, ema_decay, shadow,
            *on_device,
        )  # fmt: skip


def _config(param: Tensor, **others: Any) -> Config:
    return Config({"BLOCK": 1024}, num_warps=4)


def _programs() -> list[Program]:
    """What ships: numbers from the host, float32 gradient; and all on the device, 16-bit gradient and shadow."""
    numbers = ("step", "lr", "log_beta1", "log_beta2", "decay", "step_size", "root2", "weight1", "weight2", "eps")
    buffers = ("param", "grad", "exp_avg", "exp_avg_sq", "ema")
    config = Config({"BLOCK": 1024}, num_warps=4)
    programs = []
    for name, narrow, optional in (
        ("host fp32", "*fp32", {}),
        ("device fp32", "*fp32", {"clip": "*fp32", "step_tensor": "*fp32", "lr_tensor": "*fp32"}),
        ("device bf16", "*bf16", {"shadow": "*bf16", "clip": "*fp32", "step_tensor": "*fp32", "lr_tensor": "*fp32"}),
    ):
        signature = dict.fromkeys(buffers, "*fp32") | {"grad": narrow, "count": "i32", "BLOCK": "constexpr"}
        signature |= dict.fromkeys((*numbers, "weight_decay", "weight_ema"), "fp32") | optional
        absent = {n: None for n in ("shadow", "clip", "step_tensor", "lr_tensor") if n not in optional}
        programs.append(
            Program(
                name,
                _adamw_ema_kernel,
                signature,
                {**absent, **config.blocks},
                config,
                divisible=(*buffers, "count", *[n for n in optional if n == "shadow"]),
                streaming=True,
                max_registers=96,
            )
        )
    return programs


# ------------------------------------------------------------------------------------------------------ registration


def _arguments(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor, step: float | Tensor,
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, ema_decay: float,
    shadow: Tensor | None, clip: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: got {betas!r}, expected two numbers in [0, 1)")
    beta1, beta2 = _rows.as_real("betas", betas[0]), _rows.as_real("betas", betas[1])
    step_tensor, number = (step, 1.0) if isinstance(step, Tensor) else (None, _rows.check_real("step", step, 1))
    lr_tensor, rate = (lr, 1.0) if isinstance(lr, Tensor) else (None, _rows.check_real("lr", lr, 0))
    return (
        param, grad, exp_avg, exp_avg_sq, ema, number, rate, beta1, beta2, eps, weight_decay, ema_decay, shadow, clip,
        step_tensor, lr_tensor,
    )  # fmt: skip


OP = Op(
    "adamw_ema_",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) ema, float step, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, float ema_decay, Tensor(e!)? shadow, Tensor? clip, "
    "Tensor? step_tensor, Tensor? lr_tensor) -> ()",
    reference=reference,
    fake=lambda *args: None,
    check=check,
    triton=partial(_launch, _run_triton),
    cuda=partial(_launch, _run_cuda),
    cpp=True,
    arguments=_arguments,
    cases=CASES,
    cost=cost,
    config=_config,
    aten=_rows.aten_in_float64("param", "grad"),
    programs=_programs,
)


@OP.public
def adamw_ema_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    ema: Tensor,
    step: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    ema_decay: float,
    *,
    shadow: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """One step of torch.optim.AdamW on a flat buffer, then ema += (1 - ema_decay) (param - ema); all in place.

    Args:
        param, exp_avg, exp_avg_sq, ema: contiguous buffers of one shape, float32 (or all float64), written to; each
            with memory of its own. Where no average is wanted, `ema` may be `grad`, which is then spent.
        grad: their gradient, contiguous, any floating-point dtype.
        step: the number of this step, from 1. A 0-d float32 or float64 tensor works in a captured graph.
        lr: learning rate, a float or such a tensor. betas, eps, weight_decay: AdamW's. ema_decay: in [0, 1].
        shadow: receives param in its own floating-point dtype, no wider than param's, or None.
        clip: a 0-d tensor that multiplies the gradient (see `clip_coefficient`). Where it is not finite, nothing is
            written: the weights of a step whose gradient overflowed stay as they are, without asking the host.

    Raises TypeError for a dtype and for what is no number, ValueError for a shape, device, stride or number that does
    not fit, or for buffers that share memory; numbers on a GPU are not looked at, which would wait for it.
    """
    OP(
        *_arguments(
            param, grad, exp_avg, exp_avg_sq, ema, step, lr, betas, eps, weight_decay, ema_decay, shadow, clip
        )
    )  # fmt: skip

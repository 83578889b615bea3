"""affine_step: out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise

Every first-order or multistep solver step (DDIM, TCD, LCM, Euler flow, DPM-Solver++ 2M), classifier-free guidance and
the jump x_t -> x_s are this one sum, with one row of float64 coefficients per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd.kernels._cost import Cost
from hypersd.kernels._op import Case, Op


def _case(name: str, *shape: int, terms: int = 5, per_sample: bool = False, bench: bool = True) -> Case:
    def make_inputs(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict:
        draw = [torch.randn(shape, generator=generator, device=device, dtype=torch.float32) for _ in range(terms)]
        rows = (shape[0], 5) if per_sample else (5,)
        coef = torch.randn(rows, generator=generator, device=device, dtype=torch.float32).double()
        coef[..., terms:] = 0
        names = ("x", "eps_cond", "eps_uncond", "history", "noise")
        return {"coef": coef.cpu(), **{name: t.to(dtype) for name, t in zip(names, draw, strict=False)}}

    return Case(name, make_inputs, bench)


CASES = (
    _case("emoji_b1", 1, 4, 16, 16, terms=3),
    _case("emoji_b32", 32, 4, 16, 16, per_sample=True),
    _case("sd15_b1", 1, 4, 64, 64, terms=3),
    _case("sd15_b4", 4, 4, 64, 64, per_sample=True),
    _case("sdxl_b4", 4, 4, 128, 128, per_sample=True),
    _case("odd", 3, 5, 7, 11, per_sample=True, bench=False),
    _case("ddim", 2, 4, 9, 9, terms=2, bench=False),
    _case("empty", 0, 4, 8, 8, per_sample=True, bench=False),
)


def cost(x: Tensor, eps_cond: Tensor, coef: Tensor, **terms: Tensor | None) -> Cost:
    """Each tensor read once, one written."""
    count = 2 + sum(t is not None for t in terms.values())
    return Cost(2 * count * x.numel(), (count + 1) * x.numel() * x.element_size(), 1)


def reference(
    x: Tensor, eps_cond: Tensor, coef: Tensor, eps_uncond: Tensor | None, history: Tensor | None, noise: Tensor | None
) -> Tensor:
    """The definition. Works in float32 at least, in float64 for float64 inputs."""
    work = torch.promote_types(x.dtype, torch.float32)
    k = coef.to(device=x.device, dtype=work).reshape(-1, 5, *[1] * (x.dim() - 1))
    out = k[:, 0] * x + k[:, 1] * eps_cond
    for index, term in ((2, eps_uncond), (3, history), (4, noise)):
        if term is not None:
            out = out + k[:, index] * term
    return out.to(x.dtype)


def _fake(x: Tensor, eps_cond: Tensor, coef: Tensor, *terms: Tensor | None) -> Tensor:
    return torch.empty_like(x)


OP = Op(
    "affine_step",
    "(Tensor x, Tensor eps_cond, Tensor coef, Tensor? eps_uncond, Tensor? history, Tensor? noise) -> Tensor",
    reference=reference,
    fake=_fake,
    cases=CASES,
    cost=cost,
)


@OP.public
def affine_step(
    x: Tensor,
    eps_cond: Tensor,
    coef: Tensor,
    *,
    eps_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """out = k0 x + k1 eps_cond + k2 eps_uncond + k3 history + k4 noise."""
    return OP(x, eps_cond, coef, eps_uncond, history, noise)

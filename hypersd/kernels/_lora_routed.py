"""lora_linear_routed in ATen products, in one of two orders.

runs   CPU: neighbours of one slot form one product, written where its result lies; each slot takes the form of
       _lora.py that is cheapest for the number of its rows
batch  each sample's adapter is gathered, and all samples are multiplied at once; asks nothing of the host
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hypersd.kernels import _lora

SHORT = 512  # tokens a sample below which samples of mixed slots do better as one batch of products


def known(slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(whether the slot names an adapter, the slot or 0)."""
    valid = (slots >= 0) & (slots < count)
    return valid, torch.where(valid, slots, 0)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """(y, S or nothing)."""
    (n, k), tokens = weight.shape, x.shape[1:-1].numel()
    runs = Runs(slots, a.shape[0], tokens) if x.device.type == "cpu" else None
    if runs is not None and runs.pay:
        return _forward_runs(runs, x, weight, bias, a, b, scales, keep)
    own_a, own_b, factor = _own(a, b, slots, scales, runs)
    rows = x.reshape(-1, k)
    s = torch.bmm(rows.view(x.shape[0], tokens, k), own_a.mT)
    if x.dtype in _lora.SIXTEEN_BIT:  # without the bias, whose rounding would swallow a small update
        y = torch.bmm(s * factor, own_b.mT).view(-1, n).addmm_(rows, weight.t())
        y = y if bias is None else y.add_(bias)
    else:
        y = F.linear(rows, weight, bias)
        y.view(x.shape[0], tokens, n).baddbmm_(s * factor, own_b.mT)
    return y.view(*x.shape[:-1], n), s.view(rows.shape[0], a.shape[1]) if keep else x.new_empty(0)


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX, dA, dB), empty where not needed."""
    (n, k), tokens = weight.shape, x.shape[1:-1].numel()
    runs = Runs(slots, a.shape[0], tokens) if x.device.type == "cpu" else None
    if runs is not None and runs.pay:
        return _backward_runs(runs, dy, x, s, weight, a, b, scales, need_x, need_adapter)
    own_a, own_b, factor = _own(a, b, slots, scales, runs)
    dy = dy.reshape(-1, n)
    samples = dy.view(x.shape[0], tokens, n)
    ds = torch.bmm(samples, own_b) * factor
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if need_x and x.dtype in _lora.SIXTEEN_BIT:
        dx = torch.bmm(ds, own_a).view(-1, k).addmm_(dy, weight).view(x.shape)
    elif need_x:
        dx = dy.mm(weight)
        dx.view(x.shape[0], tokens, k).baddbmm_(ds, own_a)
        dx = dx.view(x.shape)
    if need_adapter:
        rows = x.reshape(x.shape[0], tokens, k)
        s = s.view(x.shape[0], tokens, a.shape[1]) if s.dim() == 2 else torch.bmm(rows, own_a.mT)
        da = _by_slot(torch.bmm(ds.mT, rows), slots, a)
        db = _by_slot(torch.bmm(samples.mT, s * factor), slots, b)
    return dx, da, db


def _by_slot(terms: Tensor, slots: Tensor, like: Tensor) -> Tensor:
    """The sum of each slot's terms, in one order (index_add has none on a GPU), whatever the other slots' are: 0 times
    a sample that overflowed is nan."""
    out = like.new_empty(like.shape)
    for slot in range(like.shape[0]):
        own = slots == slot
        chosen = terms[own] if terms.device.type == "cpu" else torch.where(own[:, None, None], terms, 0.0)
        out[slot] = chosen.sum(0)
    return out


def _own(a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, runs: Runs | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's a and b, zeros where it has none (not 0 times what another adapter holds), and its scale."""
    valid, index = known(slots, a.shape[0])
    own_a, own_b = a.index_select(0, index), b.index_select(0, index)
    if runs is None:
        own_a, own_b = (torch.where(valid[:, None, None], own, 0.0) for own in (own_a, own_b))
    else:
        for own in (own_a, own_b):
            for sample in runs.bare:
                own[sample].zero_()
    return own_a, own_b, scales[index].to(a.dtype)[:, None, None]


# ---- runs ---------------------------------------------------------------------------------------------------------


class Runs:
    """Rows by slot: `each` has (slot, slice of rows), neighbours of one slot in one; a slot out of range raises."""

    def __init__(self, slots: Tensor, count: int, tokens: int) -> None:
        values = slots.tolist()
        for slot in values:
            if not -1 <= slot < count:
                raise ValueError(f"lora_linear_routed: slots has {slot}, expected -1 (no adapter) to {count - 1}")
        starts = [i for i, slot in enumerate(values) if i == 0 or slot != values[i - 1]]
        stops = [*starts[1:], len(values)] if values else []
        self.each = [(values[i], slice(i * tokens, stop * tokens)) for i, stop in zip(starts, stops, strict=True)]
        self.bare = [i for i, slot in enumerate(values) if slot < 0]
        self.pay = tokens >= SHORT or len(starts) == len(set(values))

    def rows(self, slot: int) -> int:
        return sum(part.stop - part.start for other, part in self.each if other == slot)


def _product_into(out: Tensor, p: Tensor, q: Tensor, alpha: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """out = bias + alpha p q."""
    if bias is None and alpha == 1.0:
        return torch.mm(p, q, out=out)
    return torch.addmm(out if bias is None else bias, p, q, beta=0 if bias is None else 1, alpha=alpha, out=out)


def _forward_runs(
    runs: Runs, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scales: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    (n, k), r, narrow = weight.shape, a.shape[1], x.dtype in _lora.SIXTEEN_BIT
    factors = scales.tolist()
    rows = x.reshape(-1, k)
    y = rows.new_empty(rows.shape[0], n)
    s = rows.new_zeros(rows.shape[0], r) if keep else None
    folded: dict[int, Tensor] = {}
    for slot, part in runs.each:
        if slot < 0:
            _product_into(y[part], rows[part], weight.t(), bias=bias)
            continue
        form = _lora.forward_form("lora_linear", runs.rows(slot), k, n, r, x.dtype, _lora.kind(x.device), keep)
        thin = None
        if s is not None:
            thin = torch.mm(rows[part], a[slot].t(), out=s[part])
        elif form != "fold":
            thin = rows[part].mm(a[slot].t())
        if form == "fold" or thin is None:
            if slot not in folded:
                folded[slot] = _lora.fold(weight, a[slot], b[slot], factors[slot])
            _product_into(y[part], rows[part], folded[slot].t(), bias=bias)
        elif form == "accumulate":
            _product_into(y[part], rows[part], weight.t(), bias=bias).addmm_(thin, b[slot].t(), alpha=factors[slot])
        else:  # in 16 bit without the bias, whose rounding would swallow a small update
            start = _product_into(y[part], thin, b[slot].t(), factors[slot], None if narrow else bias)
            start.addmm_(rows[part], weight.t())
            if narrow and bias is not None:
                start.add_(bias)
    return y.view(*x.shape[:-1], n), x.new_empty(0) if s is None else s


def _backward_runs(
    runs: Runs, dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, scales: Tensor, need_x: bool,
    need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (n, k), r = weight.shape, a.shape[1]
    factors = scales.tolist()
    dy = dy.reshape(-1, n)
    rows = x.reshape(-1, k) if need_adapter else x.new_empty(0)
    kept = s if s.dim() == 2 else None
    dx = dy.new_empty(dy.shape[0], k) if need_x else dy.new_empty(0)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(a.shape[0])]
    folded: dict[int, Tensor] = {}
    for slot, part in runs.each:
        if slot < 0:
            if need_x:
                torch.mm(dy[part], weight, out=dx[part])
            continue
        form = _lora.plan(
            "lora_linear", runs.rows(slot), k, n, r, x.dtype, _lora.kind(x.device), need_x, need_adapter, full=False
        ).input_grad  # fmt: skip
        ds = None
        if need_adapter or form != "fold":
            ds = _lora.product(dy[part], b[slot], factors[slot])
        if need_x and (form == "fold" or ds is None):  # ds is None only where it folds
            if slot not in folded:
                folded[slot] = _lora.fold(weight, a[slot], b[slot], factors[slot])
            torch.mm(dy[part], folded[slot], out=dx[part])
        elif need_x and ds is not None and form == "accumulate":
            torch.mm(dy[part], weight, out=dx[part]).addmm_(ds, a[slot])
        elif need_x and ds is not None:
            torch.mm(ds, a[slot], out=dx[part]).addmm_(dy[part], weight)
        if need_adapter and ds is not None:
            thin = rows[part].mm(a[slot].t()) if kept is None else kept[part]
            parts[slot].append((ds.t().mm(rows[part]), _lora.product(dy[part].t(), thin, factors[slot])))
    dx = dx.view(x.shape) if need_x else dx
    if not need_adapter:
        return dx, a.new_empty(0), b.new_empty(0)
    da, db = a.new_zeros(a.shape), b.new_zeros(b.shape)
    for slot, found in enumerate(parts):
        for out, terms in zip((da[slot], db[slot]), zip(*found, strict=True), strict=False):
            out.copy_(terms[0] if len(terms) == 1 else _sum(terms))
    return dx, da, db


def _sum(terms: tuple[Tensor, ...]) -> Tensor:
    """In float32 at least, from the first to the last."""
    total = terms[0].to(torch.promote_types(terms[0].dtype, torch.float32), copy=True)
    for term in terms[1:]:
        total.add_(term)
    return total

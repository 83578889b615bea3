"""lora_linear_routed on the CPU: runs of neighbours with one slot, in ATen products that write where the result lies.

Each slot takes the form of _lora.py that is cheapest for the number of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hypersd.kernels import _lora

SHORT = 64  # tokens a sample below which samples are sorted by slot rather than multiplied run by run


class Runs:
    """Rows by slot: `each` yields (slot, slice of rows) in order; short samples are brought into the order of slots."""

    def __init__(self, slots: Tensor, count: int, tokens: int) -> None:
        values = slots.tolist()
        wrong = [slot for slot in values if not -1 <= slot < count]
        if wrong:
            raise ValueError(f"lora_linear_routed: slots has {wrong[0]}, expected -1 (no adapter) to {count - 1}")
        self.tokens, self.order = tokens, None
        starts = [i for i, slot in enumerate(values) if i == 0 or slot != values[i - 1]]
        if tokens < SHORT and len(starts) > len(set(values)):
            order = sorted(range(len(values)), key=values.__getitem__)
            self.order, values = torch.tensor(order), [values[i] for i in order]
            starts = [i for i, slot in enumerate(values) if i == 0 or slot != values[i - 1]]
        stops = [*starts[1:], len(values)] if values else []
        self.each = [(values[i], slice(i * tokens, stop * tokens)) for i, stop in zip(starts, stops, strict=True)]

    def rows(self, slot: int) -> int:
        return sum(part.stop - part.start for other, part in self.each if other == slot)

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows of the caller's samples, in the order of the runs."""
        if self.order is None:
            return rows
        return rows.view(len(self.order), -1).index_select(0, self.order).view(rows.shape)

    def restore(self, rows: Tensor) -> Tensor:
        """The other way."""
        if self.order is None:
            return rows
        samples = rows.view(len(self.order), -1)
        return torch.empty_like(samples).index_copy_(0, self.order, samples).view(rows.shape)


def _product_into(out: Tensor, p: Tensor, q: Tensor, alpha: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """out = bias + alpha p q."""
    if bias is None and alpha == 1.0:
        return torch.mm(p, q, out=out)
    return torch.addmm(out if bias is None else bias, p, q, beta=0 if bias is None else 1, alpha=alpha, out=out)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    (n, k), r, narrow = weight.shape, a.shape[1], x.dtype in _lora.SIXTEEN_BIT
    runs, factors = Runs(slots, a.shape[0], x.shape[1:-1].numel()), scales.tolist()
    rows = runs.arrange(x.reshape(-1, k).contiguous())
    y = rows.new_empty(rows.shape[0], n)
    s = rows.new_zeros(rows.shape[0], r) if keep else None
    folded: dict[int, Tensor] = {}
    for slot, part in runs.each:
        if slot < 0:
            _product_into(y[part], rows[part], weight.t(), bias=bias)
            continue
        form = _lora.forward_form("lora_linear", runs.rows(slot), k, n, r, x.dtype, "cpu", keep)
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
    return runs.restore(y).view(*x.shape[:-1], n), x.new_empty(0) if s is None else runs.restore(s)


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, slots: Tensor, scales: Tensor,
    need_x: bool, need_adapter: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (n, k), r = weight.shape, a.shape[1]
    runs, factors = Runs(slots, a.shape[0], x.shape[1:-1].numel()), scales.tolist()
    dy = runs.arrange(dy.reshape(-1, n).contiguous())
    rows = runs.arrange(x.reshape(-1, k).contiguous()) if need_adapter else x.new_empty(0)
    kept = runs.arrange(s) if s.dim() == 2 else None
    dx = dy.new_empty(dy.shape[0], k) if need_x else dy.new_empty(0)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(a.shape[0])]
    folded: dict[int, Tensor] = {}
    for slot, part in runs.each:
        if slot < 0:
            if need_x:
                torch.mm(dy[part], weight, out=dx[part])
            continue
        form = _lora.plan(
            "lora_linear", runs.rows(slot), k, n, r, x.dtype, "cpu", need_x, need_adapter, full=False
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
    dx = runs.restore(dx).view(x.shape) if need_x else dx
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

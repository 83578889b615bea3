"""Merging LoRAs: exactly, ranks side by side, or into a given rank by truncated SVD.

    W = W_0 + sum_i w_i s_i B_i A_i,   s_i = alpha_i / r_i

The exact merge is A = [A_1; A_2], B = [w_1 s_1 B_1, w_2 s_2 B_2], of rank r_1 + r_2 and scale 1. Averaging A and B
apart, as is sometimes done, gives cross terms B_1 A_2 that nobody trained. The weights are the strength dial.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models.formats import Layer

Layers = Mapping[str, Layer]


def concatenate(loras: Sequence[Layers], weights: Sequence[float]) -> dict[str, Layer]:
    """The weighted sum of the LoRAs, exactly. Layers that only some of them adapt are in the result too.

    Raises HypersdError where a layer has two shapes, there is not one weight for each LoRA, or one is not finite.
    """
    if len(loras) != len(weights) or not loras:
        raise HypersdError(f"{len(weights)} weights for {len(loras)} LoRAs; give one weight each", exit_code=2)
    if not all(math.isfinite(weight) for weight in weights):
        raise HypersdError(f"the weights {list(weights)} are not all finite numbers", exit_code=2)
    merged = {}
    for path in dict.fromkeys(path for layers in loras for path in layers):
        parts = [(layers[path], weight) for layers, weight in zip(loras, weights, strict=True) if path in layers]
        shapes = {(tuple(layer.a.shape[1:]), layer.b.shape[0]) for layer, _ in parts}
        if len(shapes) > 1:
            raise HypersdError(f"the LoRAs belong to different models: {path} has shapes {sorted(shapes)}")
        b = torch.cat([weight * layer.scale * layer.b for layer, weight in parts], dim=1)
        merged[path] = Layer(torch.cat([layer.a for layer, _ in parts]), b, 1.0)
    return merged


def truncate(layers: Layers, rank: int) -> tuple[dict[str, Layer], float, dict[str, float]]:
    """The best LoRA of this rank, layer by layer (Eckart & Young 1936): (layers, dropped, dropped per layer).

    Dropped is the share of the updates' energy that is lost, |dW - dW_r|^2 / |dW|^2 in Frobenius norms; over all
    layers, and in each. Computed in float64 on the factors, never on dW itself; results have the layers' own dtype and
    scale 1. Layers of no higher rank are left as they are.
    """
    if rank < 1:
        raise HypersdError(f"the LoRA rank must be at least 1, got {rank}", exit_code=2)
    cut, lost, whole = {}, {}, {}
    for path, layer in layers.items():
        u, s, v = _svd(layer)
        lost[path], whole[path] = float(s[rank:].square().sum()), float(s.square().sum())
        if layer.a.shape[0] <= rank:
            cut[path], lost[path] = layer, 0.0
            continue
        root = s[:rank].sqrt()
        a, b = root[:, None] * v[:, :rank].T, u[:, :rank] * root
        cut[path] = Layer(
            a.to(layer.a.dtype).reshape(-1, *layer.a.shape[1:]),
            b.to(layer.b.dtype).reshape(layer.b.shape[0], -1, *layer.b.shape[2:]),
            1.0,
        )
    total = sum(whole.values())
    shares = {path: lost[path] / whole[path] if whole[path] else 0.0 for path in lost}
    return cut, sum(lost.values()) / total if total else 0.0, shares


def _svd(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """(u, s, v) with scale B A = u diag(s) v^T, by QR of both factors and the SVD of a rank x rank core."""
    q_b, r_b = torch.linalg.qr(layer.b.flatten(1).double())
    q_a, r_a = torch.linalg.qr(layer.a.flatten(1).double().T)
    u, s, vh = torch.linalg.svd(layer.scale * r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, q_a @ vh.T

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.export import load_lora, save_lora
from hypersd.models.formats import Layer
from hypersd.models.lora import LoraSpec
from hypersd.models.merge import concatenate, truncate

G = torch.Generator().manual_seed(3)


def layer(rank: int, a: tuple[int, ...], out: int, scale: float) -> Layer:
    tail = (1, 1) if len(a) == 3 else ()
    make = {"generator": G, "dtype": torch.float64}
    return Layer(torch.randn(rank, *a, **make), torch.randn(out, rank, *tail, **make), scale)


def update(layer: Layer) -> torch.Tensor:
    """scale B A, written out."""
    return layer.scale * layer.b.flatten(1) @ layer.a.flatten(1)


def test_the_exact_merge_is_the_sum_of_both_updates() -> None:
    one = {"linear": layer(3, (10,), 8, 0.5), "conv": layer(2, (4, 3, 3), 6, 1.0)}
    two = {"linear": layer(2, (10,), 8, 2.0), "other": layer(1, (5,), 5, 0.125)}
    merged = concatenate([one, two], [1.0, -0.7])
    assert merged["linear"].a.shape == (5, 10) and merged["linear"].b.shape == (8, 5)
    wanted = {
        "linear": update(one["linear"]) - 0.7 * update(two["linear"]),
        "conv": update(one["conv"]),
        "other": -0.7 * update(two["other"]),
    }
    assert merged.keys() == wanted.keys()
    for path, value in wanted.items():
        torch.testing.assert_close(update(merged[path]), value, rtol=1e-13, atol=1e-13)


def test_truncation_is_the_best_of_its_rank_and_says_what_it_dropped() -> None:
    big, conv = layer(6, (12,), 9, 0.3), layer(5, (4, 3, 3), 7, 2.0)
    cut, dropped, shares = truncate({"linear": big, "conv": conv}, 3)
    lost = whole = 0.0
    for path, before in (("linear", big), ("conv", conv)):
        s = torch.linalg.svdvals(update(before))
        gap = (update(cut[path]) - update(before)).square().sum()
        torch.testing.assert_close(gap, s[3:].square().sum(), rtol=1e-10, atol=0)  # Eckart-Young: no better exists
        assert shares[path] == pytest.approx(float(gap / s.square().sum()), rel=1e-10)
        lost, whole = lost + float(gap), whole + float(s.square().sum())
        assert cut[path].a.shape[0] == 3 and cut[path].b.shape[1:] == (3, *before.b.shape[2:])
    assert dropped == pytest.approx(lost / whole, rel=1e-10) and 0.005 < dropped < 0.5


def test_truncation_of_two_aligned_updates_loses_nothing() -> None:
    """Two LoRAs in the same three directions: the sum has rank three again."""
    one = layer(3, (10,), 8, 1.0)
    two = Layer(one.a, torch.randn(8, 3, generator=G, dtype=torch.float64), 0.5)
    merged = concatenate([{"x": one}, {"x": two}], [1.0, 1.0])
    cut, dropped, _ = truncate(merged, 3)
    assert dropped < 1e-28
    torch.testing.assert_close(update(cut["x"]), update(one) + update(two), rtol=1e-12, atol=1e-12)
    kept, dropped, _ = truncate({"x": one}, 3)
    assert kept["x"] is one and dropped == 0.0


def test_wrong_merges() -> None:
    with pytest.raises(HypersdError, match="1 weights for 2 LoRAs"):
        concatenate([{}, {}], [1.0])
    with pytest.raises(HypersdError, match="not all finite"):
        concatenate([{}, {}], [1.0, float("nan")])
    with pytest.raises(HypersdError, match="different models: x has shapes"):
        concatenate([{"x": layer(1, (3,), 3, 1.0)}, {"x": layer(1, (4,), 3, 1.0)}], [1.0, 1.0])
    with pytest.raises(HypersdError, match="at least 1"):
        truncate({}, 0)


def test_a_sum_of_roles_is_the_merged_file_and_both_adapters(tiny_unet, tiny_batch, tmp_path: Path) -> None:
    """forward, its gradient and the exported file of "p+q" against weights merged by hand in float64."""
    x_t, t, cond = (v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in tiny_batch)
    cond = {k: v.double() for k, v in tiny_batch[2].items()}
    backbone = Backbone(tiny_unet.double(), LoraSpec(4, 2.0), roles=("p", "q"))
    with torch.no_grad():
        for role in ("p", "q"):
            for p in backbone.role_parameters(role).values():
                p.normal_(0, 0.05, generator=G)
    for p in backbone.role_parameters("p").values():
        p.requires_grad_(False)
    both = backbone(x_t, t, cond, role="p+q")
    both.square().mean().backward()
    assert all(p.grad is None for p in backbone.role_parameters("p").values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.role_parameters("q").values())
    path = save_lora(tmp_path / "merged.safetensors", backbone, "p+q")
    state, metadata = load_lora(path)
    assert metadata["rank"] == "8" and float(metadata["alpha"]) == 8.0
    layers = [backbone.lora_layers(role) for role in ("p", "q")]
    updates = {path: update(layers[0][path]) + update(layers[1][path]) for path in layers[0]}
    for name, merged in backbone.lora_layers("p+q").items():
        torch.testing.assert_close(update(merged), updates[name], rtol=1e-13, atol=1e-14)
    backbone.load_lora_state_dict(state, "file")
    torch.testing.assert_close(backbone(x_t, t, cond, role="file"), both, rtol=1e-5, atol=1e-6)  # the file is float32
    network = backbone.release()
    with torch.no_grad():
        for name, value in updates.items():
            weight = network.get_submodule(name).weight
            weight += value.reshape(weight.shape)
        torch.testing.assert_close(network(x_t, t, **cond).sample, both.detach(), rtol=1e-9, atol=1e-10)


def test_an_unknown_role_of_a_sum_is_named(tiny_unet, tiny_batch) -> None:
    backbone = Backbone(tiny_unet, LoraSpec(2, 2.0), roles=("p",))
    with pytest.raises(HypersdError, match="no role 'q'"):
        backbone(*tiny_batch, role="p+q")
    with pytest.raises(HypersdError, match="no role 'q'"):
        backbone.lora_state_dict("p+q")

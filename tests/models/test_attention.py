"""Attention by the operator equals diffusers' processor, in value and gradient, and only where it is meant."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from torch import nn

from hypersd.models import fuse, unfuse
from hypersd.models.attention import FusedAttention
from hypersd.models.networks import predict
from tests.conftest import make_flux, make_sd3, make_unet


class Around(nn.Module):
    """A network of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def layer(**options) -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=24, heads=3, dim_head=8, **options).double()


@pytest.mark.parametrize("cross", [False, True])
def test_equals_the_fused_kernel(cross):
    attn = layer(cross_attention_dim=16 if cross else None)
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 5, 16, dtype=torch.float64) if cross else None
    upstream = torch.randn(2, 9, 24, dtype=torch.float64)
    plain = attn(x, text)
    (expected,) = torch.autograd.grad(plain, x, upstream)
    fuse(Around(attn))
    assert type(attn) is FusedAttention
    y = attn(x, text)
    assert not torch.equal(y, plain)  # another order of the same sums: it did run
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    unfuse(Around(attn))
    assert type(attn) is Attention and torch.equal(attn(x, text), plain)


def test_masks_go_to_the_fused_kernel_of_torch():
    attn = layer()
    fuse(Around(attn))
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    mask = torch.zeros(2, 1, 8, dtype=torch.float64)
    found = attn(x, attention_mask=mask)
    unfuse(Around(attn))
    assert torch.equal(found, attn(x, attention_mask=mask))


def test_unusual_layers_are_left_alone():
    for options in ({"residual_connection": True}, {"rescale_output_factor": 2.0}, {"norm_num_groups": 4}):
        attn = layer(**options)
        fuse(Around(attn))
        assert type(attn) is Attention


def flux_batch():
    return torch.randn(1, 4, 8, 8), {
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
    }


@pytest.fixture
def math_calls(monkeypatch) -> list[int]:
    """One entry for each call of a backend of diffusers that is not its default."""
    registry, name = _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH
    calls, plain = [], registry[name]
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    monkeypatch.setitem(registry, name, lambda *args, **options: calls.append(1) or plain(*args, **options))
    return calls


def test_a_backend_chosen_later_is_used(math_calls):
    network, (x, cond) = fuse(make_flux()), flux_batch()
    with torch.no_grad():
        fused = predict(network, x, 500, cond)
        network.set_attention_backend("_native_math")
        chosen = predict(network, x, 500, cond)
        assert len(math_calls) == 3
        torch.testing.assert_close(chosen, fused, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(fuse(unfuse(network)), x, 500, cond), chosen)
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)  # the layers were told, too
        assert torch.equal(predict(network, x, 500, cond), chosen) and len(math_calls) == 9
        network.reset_attention_backend()
        assert torch.equal(predict(network, x, 500, cond), fused) and len(math_calls) == 9


def test_a_backend_chosen_for_some_calls_is_used_in_them(math_calls):
    network, (x, cond) = fuse(make_flux()), flux_batch()
    with torch.no_grad():
        fused = predict(network, x, 500, cond)
        with attention_backend("_native_math"):
            chosen = predict(network, x, 500, cond)
        assert len(math_calls) == 3 and torch.equal(predict(network, x, 500, cond), fused)
        with attention_backend("_native_math"):
            assert torch.equal(chosen, predict(unfuse(network), x, 500, cond))


def test_sd3_computes_as_diffusers_where_a_backend_is_chosen():
    """Its processor of diffusers knows no backends, but is what was asked for."""
    network = fuse(make_sd3())
    x, cond = torch.randn(1, 4, 16, 16), {"encoder_hidden_states": torch.randn(1, 5, 64)}
    cond["pooled_projections"] = torch.randn(1, 64)
    with torch.no_grad():
        fused = predict(network, x, 500, cond)
        with attention_backend("_native_math"):
            chosen = predict(network, x, 500, cond)
        plain = predict(unfuse(network), x, 500, cond)
    assert torch.equal(chosen, plain) and not torch.equal(chosen, fused)


def test_processors_set_by_the_user_compute_and_the_usual_one_is_fused_again():
    network = fuse(make_unet())
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 32)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        """With fused attention, and with diffusers'; the other layers are fused in both."""
        found = network(x, 500, encoder_hidden_states=text).sample
        layers = [layer for layer in network.modules() if type(layer) is FusedAttention]
        assert len(layers) == 8
        for layer in layers:
            layer.__class__ = Attention
        plain = network(x, 500, encoder_hidden_states=text).sample
        for layer in layers:
            layer.__class__ = FusedAttention
        return found, plain

    with torch.no_grad():
        usual, fused = network.attn_processors, outputs()
        assert not torch.equal(*fused)
        network.set_default_attn_processor()
        assert {type(p) for p in network.attn_processors.values()} == {AttnProcessor} and torch.equal(*outputs())
        network.set_attn_processor(SlicedAttnProcessor(2))
        assert torch.equal(*outputs())
        network.set_attn_processor(usual)
        network.fuse_qkv_projections()
        assert torch.equal(*outputs())
        network.unfuse_qkv_projections()
        assert torch.equal(outputs()[0], fused[0])


def test_ip_adapters_load_into_a_fused_unet():
    network = fuse(make_unet())
    weights = {}
    layers = [name for name in network.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(layers):
        rows = network.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights |= {f"{2 * index + 1}.{part}_ip.weight": torch.randn(rows, 32) for part in ("to_k", "to_v")}
    image = {"proj.weight": torch.randn(128, 16), "proj.bias": torch.zeros(128)}
    image |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    network._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}], low_cpu_mem_usage=False)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 16, 32)
    with torch.no_grad():
        arguments = {"encoder_hidden_states": text, "added_cond_kwargs": {"image_embeds": [torch.randn(1, 1, 16)]}}
        found = network(x, 500, **arguments).sample
        assert any(isinstance(layer, FusedAttention) for layer in network.modules())
        torch.testing.assert_close(found, unfuse(network)(x, 500, **arguments).sample, rtol=1e-4, atol=1e-5)

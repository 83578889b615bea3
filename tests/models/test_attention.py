"""Attention by the operator equals diffusers' processor, in value and gradient, and only where it is meant."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from hypersd.models import attention, fuse, unfuse
from hypersd.models.networks import predict
from tests.conftest import make_flux, make_unet


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
    attention.install(attn)
    assert isinstance(attn.processor, attention.FusedAttention)
    y = attn(x, text)
    assert not torch.equal(y, plain)  # another order of the same sums: it did run
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    (found,) = torch.autograd.grad(y, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    attention.remove(attn)
    assert type(attn.processor) is AttnProcessor2_0


def test_masks_go_to_the_fused_kernel_of_torch():
    attn = layer()
    attention.install(attn)
    x = torch.randn(2, 8, 24, dtype=torch.float64)
    mask = torch.zeros(2, 1, 8, dtype=torch.float64)
    found = attn(x, attention_mask=mask)
    attention.remove(attn)
    assert torch.equal(found, attn(x, attention_mask=mask))


def test_unusual_layers_are_left_alone():
    for options in ({"residual_connection": True}, {"rescale_output_factor": 2.0}, {"norm_num_groups": 4}):
        attn = layer(**options)
        attention.install(attn)
        assert type(attn.processor) is AttnProcessor2_0


def test_a_backend_chosen_later_is_used(monkeypatch):
    network = fuse(make_flux())
    registry, name = _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH
    calls, plain = [], registry[name]
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    monkeypatch.setitem(registry, name, lambda *args, **options: calls.append(1) or plain(*args, **options))
    x, cond = torch.randn(1, 4, 8, 8), {"encoder_hidden_states": torch.randn(1, 5, 32)}
    cond["pooled_projections"] = torch.randn(1, 32)
    with torch.no_grad():
        fused = predict(network, x, 500, cond)
        network.set_attention_backend("_native_math")
        chosen = predict(network, x, 500, cond)
        assert len(calls) == 3
        torch.testing.assert_close(chosen, fused, rtol=1e-4, atol=1e-5)
        assert torch.equal(predict(fuse(unfuse(network)), x, 500, cond), chosen)
        network.reset_attention_backend()
        assert torch.equal(predict(network, x, 500, cond), fused) and len(calls) == 6


@pytest.mark.parametrize("fused", attention._FUSED.values())
def test_diffusers_may_make_one_itself(fused):
    """For layers without the adapter, IP-Adapters set a new processor of the class that was there."""
    assert type(fused().otherwise) is fused.plain


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
        assert any(isinstance(p, attention.FusedAttention) for p in network.attn_processors.values())
        torch.testing.assert_close(found, unfuse(network)(x, 500, **arguments).sample, rtol=1e-4, atol=1e-5)

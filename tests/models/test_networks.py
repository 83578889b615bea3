"""SD3 and FLUX: called like a UNet, fused and back, with a LoRA role, compiled whole."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from hypersd.errors import HypersdError
from hypersd.models import Backbone, LoraSpec, fuse, unfuse
from hypersd.models.attention import FusedAttention, FusedFluxAttention
from hypersd.models.networks import default_targets
from tests.conftest import make_flux, make_sd3

NETWORKS = {
    "sd3": make_sd3,
    "sd3.5": lambda: make_sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": make_flux,
}


def spec(network) -> LoraSpec:
    own = ("proj_mlp",) if hasattr(network, "single_transformer_blocks") else ()
    return LoraSpec(rank=4, alpha=4.0, targets=("to_q", "to_k", "to_v", "add_k_proj", "ff.net.2", *own))


def batch(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(0)
    width = 32 if name == "flux" else 64
    shapes = ((2, 4, 16, 16), (2, 7, width), (2, width))
    x, text, pooled = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, torch.tensor([900.0, 250.0]), {"encoder_hidden_states": text, "pooled_projections": pooled}


def adapted(network) -> Backbone:
    backbone = Backbone(network, spec(network))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(std=0.1, generator=generator)
    return backbone


def attentions(network) -> list[type]:
    return [type(m) for m in network.modules() if hasattr(m, "processor")]


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_output_and_gradient_in_float64(name):
    network = NETWORKS[name]().double()
    keys, before = list(network.state_dict()), attentions(network)
    backbone = adapted(network)
    lora = list(backbone.lora_state_dict("student"))
    x, t, cond = batch(name, torch.float64)
    found = []
    for prepare in (lambda n: n, fuse, fuse, unfuse):
        assert prepare(network) is network
        leaf = x.clone().requires_grad_()
        y = backbone(leaf, t, cond, role="student")
        grads = torch.autograd.grad(y.square().sum(), [leaf, *backbone.role_parameters("student").values()])
        found.append((y.detach(), grads, attentions(network)))
        assert list(backbone.lora_state_dict("student")) == lora
    (plain, grads, _), (fused, fused_grads, changed), (twice, _, _), (again, _, back) = found
    assert set(changed) <= {FusedAttention, FusedFluxAttention} and back == before
    assert torch.equal(plain, again) and torch.equal(fused, twice) and not torch.equal(plain, fused)
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)
    for mine, theirs in zip(fused_grads, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    fuse(network)
    released = backbone.release()
    assert list(released.state_dict()) == keys and attentions(released) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_error_at_most_twice_the_networks(name, dtype):
    x, t, cond = batch(name, dtype)
    with torch.no_grad():
        wide = {key: value.double() for key, value in cond.items()}
        truth = Backbone(NETWORKS[name]().to(dtype).double())(x.double(), t, wide)
        backbone = Backbone(NETWORKS[name]().to(dtype))
        plain = backbone(x, t, cond)
        backbone.fuse()
        fused = backbone(x, t, cond)
    errors = [(y.double() - truth).norm() / truth.norm() for y in (fused, plain)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["sd3.5", "flux"])
def test_compiles_whole_with_a_role(name):
    backbone = adapted(NETWORKS[name]())
    backbone.fuse()
    x, t, cond = batch(name)
    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(x, t, cond, role="student")
        torch.testing.assert_close(found, backbone(x, t, cond, role="student"), rtol=1e-4, atol=1e-5)
        assert (found - backbone(x, t, cond)).abs().max() > 1e-3


def test_flux_latents_are_packed_as_the_pipeline_packs_them():
    network = make_flux()
    x, t, cond = batch("flux")
    x = x[..., :8]
    tokens = FluxPipeline._pack_latents(x, 2, 4, 16, 8)
    ids = FluxPipeline._prepare_latent_image_ids(2, 8, 4, "cpu", torch.float32)
    more = {"img_ids": ids, "txt_ids": torch.zeros(7, 3), "return_dict": False}
    backbone = Backbone(network, spec(network))
    for guidance in (3.5, 1.5):
        told = torch.full((2,), guidance)
        theirs = network(tokens, timestep=t / 1000, guidance=told, **cond, **more)[0]
        theirs = FluxPipeline._unpack_latents(theirs, 16 * 8, 8 * 8, 8)
        ours = backbone(x, t, cond if guidance == 3.5 else {**cond, "guidance": told})
        assert ours.shape == x.shape and torch.equal(ours, theirs)
    with pytest.raises(HypersdError, match="even height and width, got 15 x 16"):
        backbone(torch.zeros(1, 4, 15, 16), t[:1], cond)
    plain = Backbone(make_flux(guidance_embeds=False))
    assert torch.equal(plain(x, t, {**cond, "guidance": told}), plain(x, t, cond))


def test_default_targets_leave_norms_and_embedders():
    for name, make in NETWORKS.items():
        network = make()
        linear = {path for path, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
        found = set(Backbone(network).slots)
        left = {path for path in linear - found if not any(part.startswith("norm") for part in path.split("."))}
        assert {path.split(".")[0] for path in left} <= {"time_text_embed", "context_embedder", "x_embedder"}, name
        assert len(found) > 15 and not any("norm" in path or "embed" in path for path in found)


# config.json of stabilityai/stable-diffusion-3-medium and black-forest-labs/FLUX.1-dev, as far as it sets shapes
SD3_MEDIUM = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip
FLUX_DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "config", "parameters", "published", "adapted"),
    [(make_sd3, SD3_MEDIUM, 2_028_328_000, 472, 83_857_408), (make_flux, FLUX_DEV, 11_901_408_320, 1388, 261_689_344)],
    ids=["sd3", "flux"],
)
def test_the_real_shapes(make, config, parameters, published, adapted):
    """Without weights. Rank 64 on every linear layer and the patch convolution is what Hyper-SD3 and Hyper-FLUX hold,
    by the size of their files (MB, fp32); ours are the attention and feed-forward layers."""
    with torch.device("meta"):
        network = make(**config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    layers = [m.weight for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    everything = sum(64 * (w[0].numel() + len(w)) for w in layers)
    assert round(4 * everything / 1e6) == published
    backbone = Backbone(network, LoraSpec(64, 64.0, default_targets(network)))
    assert sum(p.numel() for p in backbone.role_parameters("student").values()) == adapted

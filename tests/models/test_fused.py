"""The fused form of a network computes what the network computes, keeps its names, and comes out again."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from hypersd.errors import HypersdError
from hypersd.models import Backbone, LoraSpec, fuse, unfuse
from hypersd.models.fused import FusedGEGLU, FusedGroupNorm, FusedGroupNormSiLU, FusedResnetBlock2D, is_fused
from tests.conftest import make_flux, make_sdxl_unet, make_unet, make_vae
from tests.kernels.checks import Recorder

SPEC = LoraSpec(rank=4, alpha=4.0)


def classes(network: nn.Module) -> list[type]:
    return [type(module) for module in network.modules()]


def call(network: nn.Module, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return network(x, torch.tensor(500), encoder_hidden_states=text, return_dict=False)[0]


def batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in ((2, 4, 16, 16), (2, 16, 32)))  # type: ignore


def test_float64_output_and_gradient_are_the_networks():
    network = make_unet().double()
    x, text = batch(torch.float64)
    found = []
    for prepare in (lambda n: n, fuse, unfuse):
        prepare(network)
        leaf = x.clone().requires_grad_()
        y = call(network, leaf, text)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), leaf)[0]))
    (plain, grad), (fused, fused_grad), (again, _) = found
    assert torch.equal(plain, again) and not torch.equal(plain, fused)  # another order of the same sums: it did run
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(fused_grad, grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_at_most_twice_the_networks(dtype, last):
    exact = make_unet().double()
    x, text = batch(dtype)
    truth = call(exact, x.double(), text.double())
    network = make_unet().to(dtype)
    if last:
        network, x = network.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = call(network, x, text)
        fused = call(fuse(network), x, text)
    errors = [(y.double() - truth).norm() / truth.norm() for y in (fused, plain)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_adds_its_residual_as_the_plain_one_does(base):
    """Under autocast the residual is wider than what the layer returns; else the sum is made in the layer's output."""
    plain = ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)
    with torch.no_grad():  # what comes out is what goes in, to far more digits than bfloat16 has
        plain.conv2.weight.mul_(1e-3)
        plain.conv2.bias.zero_()
    fused = fuse(nn.Sequential(copy.deepcopy(plain)))[0]
    x = torch.linspace(0.5, 0.7, 8 * 16).view(1, 8, 4, 4)
    before = x.clone()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=base == torch.bfloat16):
        expected, got = plain(x, None), fused(x, None)
    assert got.dtype == expected.dtype == torch.float32 and torch.equal(x, before)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_what_a_hook_keeps_or_hands_back_is_not_added_to():
    block = fuse(nn.Sequential(ResnetBlock2D(in_channels=8, temb_channels=None, groups=4)))[0]
    x, kept = torch.randn(2, 8, 4, 4, requires_grad=True), []
    alone = block(x, None)
    handle = block.conv2.register_forward_hook(lambda layer, args, output: kept.append((output, output.clone())))
    assert torch.equal(block(x, None), alone) and torch.equal(*kept[0])
    handle.remove()
    stored = torch.randn(2, 8, 4, 4)
    with_stored = stored + x
    handle = block.conv2.register_forward_hook(lambda layer, args, output: stored)
    assert all(torch.equal(block(x, None), with_stored) for _ in range(2))
    handle.remove()
    (wanted,) = torch.autograd.grad(alone.square().sum(), [x])
    seen = []
    block.conv2.register_full_backward_hook(lambda layer, inputs, outputs: seen.append(outputs[0]))
    (got,) = torch.autograd.grad(block(x, None).square().sum(), [x])
    assert torch.equal(got, wanted) and torch.equal(seen[0], 2 * alone)


@pytest.mark.parametrize("make", [make_unet, make_sdxl_unet, make_vae])
def test_every_layer_is_found_and_put_back(make):
    network = make()
    before, keys = classes(network), list(network.state_dict())
    plain = [module for module in network.modules() if type(module) in (nn.GroupNorm, GEGLU, ResnetBlock2D)]
    assert fuse(fuse(network)) is network
    assert plain and all(type(m) in (FusedGroupNorm, FusedGroupNormSiLU, FusedGEGLU, FusedResnetBlock2D) for m in plain)
    assert list(network.state_dict()) == keys
    silu = [m for m in plain if type(m) is FusedGroupNormSiLU]
    blocks = [m for m in plain if type(m) is FusedResnetBlock2D]
    assert len(silu) == 2 * len(blocks) + (2 if make is make_vae else 1)  # the last norm of each network
    assert unfuse(network) is network and classes(network) == before


def test_operators_run_once_each():
    network, (x, text) = make_unet(), batch()
    norms = sum(isinstance(m, nn.GroupNorm) for m in network.modules())
    gates = sum(isinstance(m, GEGLU) for m in network.modules())
    with Recorder() as record, torch.no_grad():
        call(fuse(network), x, text)
    names = [func.__name__.split(".")[0] for func, _ in record.calls]
    assert names.count("_group_norm_silu") == norms and names.count("_geglu") == gates
    channels = sorted(m.out_channels for m in network.modules() if type(m) is FusedResnetBlock2D)
    shifts = [args[6].shape for func, args in record.calls if "group_norm" in func.__name__ and args[6] is not None]
    assert sorted(shifts) == [(2, c) for c in channels]  # the time embeddings, added in norm2


@pytest.mark.parametrize("options", [{"resnet_time_scale_shift": "scale_shift"}, {"act_fn": "gelu"}])
def test_unusual_blocks_keep_their_activation(options):
    network, (x, text) = make_unet(**options), batch()
    with torch.no_grad():
        plain = call(network, x, text)
        fused = call(fuse(network), x, text)
    assert not any(isinstance(m, FusedResnetBlock2D) for m in network.modules())
    assert any(isinstance(m, FusedGroupNorm) for m in network.modules())
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["fused before", "fused after"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backbone_on_it_has_the_same_roles_and_gradients(order, checkpointing):
    x, text = batch()
    found = []
    for fused in (False, True):
        network = make_unet()
        if fused and order == "fused before":
            fuse(network)
        backbone = Backbone(network, SPEC, roles=("student",))
        with torch.no_grad():
            for parameter in backbone.role_parameters("student").values():
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        if fused and order == "fused after":
            fuse(network)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
            network.train()
        y = backbone(x, torch.tensor(500), {"encoder_hidden_states": text}, role="student")
        y.square().mean().backward()
        grads = {name: p.grad for name, p in backbone.role_parameters("student").items()}
        found.append((y.detach(), grads, sorted(backbone.lora_state_dict("student")), backbone))
    (y, grads, keys, _), (fused_y, fused_grads, fused_keys, backbone) = found
    assert keys == fused_keys
    torch.testing.assert_close(fused_y, y, rtol=1e-4, atol=1e-5)
    assert any("time_emb_proj" in name and grad.norm() > 0 for name, grad in grads.items())
    for name, grad in grads.items():
        assert ((fused_grads[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7).item(), name
    released = unfuse(backbone.release())
    assert classes(released) == classes(make_unet())


@pytest.mark.parametrize("release", [False, True])
def test_layers_with_a_hook_for_a_forward_are_refused(release):
    """Hooks of offloading keep the forward that they found: it would go on computing for the old class."""
    network, (x, text) = make_unet(), batch()
    before = classes(network)
    norm = network.down_blocks[1].attentions[0].norm
    norm.forward = norm.forward
    with pytest.raises(HypersdError, match=r"down_blocks.1.attentions.0.norm \(GroupNorm\) has a hook"):
        fuse(network)
    assert classes(network) == before
    del norm.forward
    backbone = Backbone(network, SPEC)
    backbone.fuse()
    fused = call(network, x, text)
    norm.forward = norm.forward
    with pytest.raises(HypersdError, match=r"norm \(FusedGroupNorm\) has a hook"):
        backbone.release() if release else unfuse(network)
    assert torch.equal(call(network, x, text), fused) and backbone.roles == ["student"]


@pytest.mark.parametrize("make", [make_unet, make_flux])
def test_a_backbone_gives_back_a_fused_network_fused(make):
    network = fuse(make())
    before = classes(network)
    assert before != classes(make()) and Backbone(network, roles=()).release() is network
    assert classes(network) == before


def test_a_copy_is_fused_too_and_compiles_whole():
    network = copy.deepcopy(fuse(make_unet()))
    assert any(isinstance(m, FusedResnetBlock2D) for m in network.modules())
    x, text = batch()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(call(compiled, x, text), call(network, x, text), rtol=1e-4, atol=1e-5)


def combined(pipe) -> None:
    pipe.load_lora_weights(lora(2), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.3, 0.7])


def kept_in_the_weights(pipe) -> None:
    pipe.fuse_lora(lora_scale=0.8)
    pipe.unload_lora_weights()


def taken_out_again(pipe) -> None:
    pipe.fuse_lora()
    pipe.unfuse_lora()


def copied(pipe) -> None:
    pipe.unet = copy.deepcopy(pipe.unet)


def pickled(pipe) -> None:
    pipe.unet = pickle.loads(pickle.dumps(pipe.unet))


def offloaded(pipe) -> None:
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


LORA_USES = {
    "loaded": lambda pipe: None,
    "combined": combined,
    "disabled": lambda pipe: pipe.disable_lora(),
    "kept in the weights": kept_in_the_weights,
    "taken out again": taken_out_again,
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
    "replaced": lambda pipe: pipe.load_lora_weights(lora(2), adapter_name="one", hotswap=True),
    "copied": copied,
    "pickled": pickled,
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "another dtype": lambda pipe: pipe.to(torch.float64),
    "offloaded": offloaded,
}


def lora(seed: int) -> dict[str, torch.Tensor]:
    backbone = Backbone(make_unet(), SPEC)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(std=0.03, generator=generator)
    return backbone.lora_state_dict("student")


@pytest.mark.parametrize("use", LORA_USES)
def test_a_pipeline_does_with_its_lora_what_it_does_unfused(use):
    parts = ("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor")
    found = []
    for prepare in (lambda network: network, fuse):
        options = {"unet": prepare(make_unet()), "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**dict.fromkeys(parts), **options)
        pipe.load_lora_weights(lora(1), adapter_name="one")
        LORA_USES[use](pipe)
        with torch.no_grad():
            found.append(call(pipe.unet, *batch(pipe.unet.dtype)))
    assert is_fused(pipe.unet)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)
    assert not torch.equal(found[1], found[0])  # another order of the same sums: the fused layers did run

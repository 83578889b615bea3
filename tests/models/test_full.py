"""Whole networks as roles: each its own model, LoRAs merged into them, their files, and diffusers as a reader."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from hypersd.errors import HypersdError
from hypersd.models import Backbone, FullBackbone, LoraSpec, save_network
from hypersd.models.encoder_critic import BottleneckCritic
from tests.conftest import make_sd3, make_unet


def randomise(backbone: FullBackbone, role: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.role_parameters(role).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def by_hand(network: Any, backbone: FullBackbone, role: str) -> Any:
    """A network of its own with the role's weights."""
    found = copy.deepcopy(network)
    found.load_state_dict({name: p.detach().clone() for name, p in backbone.role_parameters(role).items()})
    return found


def test_every_role_is_its_own_model(tiny_unet: Any, tiny_batch: Any) -> None:
    x_t, t, cond = tiny_batch
    original = copy.deepcopy(tiny_unet)
    backbone = FullBackbone(tiny_unet, roles=("student", "ema"))
    expected = original(x_t, t, **cond).sample
    for role in ("base", "student", "ema"):
        assert torch.equal(backbone(x_t, t, cond, role=role), expected)
    for seed, role in enumerate(("student", "ema")):
        randomise(backbone, role, seed)
        assert torch.equal(backbone(x_t, t, cond, role=role), by_hand(original, backbone, role)(x_t, t, **cond).sample)
    assert torch.equal(backbone(x_t, t, cond), expected)
    assert (backbone(x_t, t, cond, role="student") - expected).abs().max() > 0.01
    backbone.add_role("previous", like="student")
    assert torch.equal(backbone(x_t, t, cond, role="previous"), backbone(x_t, t, cond, role="student"))
    backbone.drop_role("previous")
    assert backbone.roles == ["student", "ema"] and backbone.fingerprint == Backbone(original).fingerprint


def test_copy_and_lerp_are_in_place(tiny_unet: Any) -> None:
    backbone = FullBackbone(tiny_unet, roles=("student", "ema"))
    randomise(backbone, "student", 1)
    student, ema = (backbone.role_parameters(role) for role in ("student", "ema"))
    before = {name: p.detach().clone() for name, p in ema.items()}
    backbone.lerp_role("ema", "student", 0.25)
    for name, old in before.items():
        torch.testing.assert_close(ema[name].data, old + 0.25 * (student[name].data - old))
    backbone.copy_role("student", "ema")
    again = backbone.role_parameters("ema")
    assert all(again[name] is p and torch.equal(p, student[name]) for name, p in ema.items())


@pytest.mark.parametrize("recompute", ["", "enable_gradient_checkpointing", "recompute_feed_forward"])
def test_gradient_reaches_the_student_alone(tiny_unet: Any, tiny_batch: Any, recompute: str) -> None:
    """Whatever is computed again in backward, with another role's pass before it; roles made before or after."""
    x_t, t, cond = tiny_batch
    original = copy.deepcopy(tiny_unet)
    backbone = FullBackbone(tiny_unet)
    if recompute:
        getattr(backbone, recompute)()
    randomise(backbone, "student", 3)
    backbone.add_role("ema", like="student")
    randomise(backbone, "ema", 4)
    reference = by_hand(original, backbone, "student").requires_grad_(True)
    with torch.no_grad():
        target = by_hand(original, backbone, "ema")(x_t, t, **cond).sample + original(x_t, t, **cond).sample
    (reference(x_t, t, **cond).sample - target).square().mean().backward()
    m = backbone(x_t, t, cond, role="student")
    with torch.no_grad():
        target = backbone(x_t, t, cond, role="ema") + backbone(x_t, t, cond)
    (m - target).square().mean().backward()
    assert all(p.grad is None for p in [*backbone.role_parameters("ema").values(), *tiny_unet.parameters()])
    wanted = dict(reference.named_parameters())
    for name, p in backbone.role_parameters("student").items():
        torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-4, atol=1e-7)


def test_16_bit_computes_in_it_and_keeps_float32(tiny_unet: Any, tiny_batch: Any) -> None:
    x_t, t, cond = tiny_batch
    exact = tiny_unet(x_t, t, **cond).sample
    backbone = FullBackbone(tiny_unet.to(torch.bfloat16))
    backbone.fuse()
    m = backbone(x_t, t, cond, role="student")
    m.square().mean().backward()
    parameters = backbone.role_parameters("student")
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters.values())
    frozen = backbone(x_t, t, cond)
    assert m.dtype == torch.float32 and torch.equal(m, m.bfloat16().float())  # the last layer computed in 16 bit
    assert 0 < (m - exact).abs().max() <= 2 * (frozen - exact).abs().max()
    assert all(v.dtype == torch.bfloat16 for v in backbone.network_state_dict("student").values())


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_a_lora_is_merged_into_the_weights(tiny_unet: Any, tiny_batch: Any, format: str) -> None:
    x_t, t, cond = tiny_batch
    x_t, cond = x_t.double(), {name: value.double() for name, value in cond.items()}
    adapted = Backbone(copy.deepcopy(tiny_unet).double(), LoraSpec(rank=4, alpha=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.role_parameters("student").values():
            parameter.normal_(0, 0.05, generator=generator)
    state = {k: v.double() for k, v in adapted.lora_state_dict("student", format).items()}
    backbone = FullBackbone(tiny_unet.double())
    for role in ("student", "new"):
        backbone.load_lora_state_dict(state, role, scale=0.5)  # of PEFT's keys, which do not say alpha
        found, expected = backbone(x_t, t, cond, role=role), adapted(x_t, t, cond, role="student")
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert (expected - backbone(x_t, t, cond)).abs().max() > 0.01


def test_the_file_is_a_diffusers_network(tiny_unet: Any, tiny_batch: Any, tmp_path: Any) -> None:
    x_t, t, cond = tiny_batch
    backbone = FullBackbone(tiny_unet)
    randomise(backbone, "student", 2)
    path = save_network(tmp_path / "unet.safetensors", backbone, "student", {"solver": "lcm", "timesteps": "[800]"})
    other = make_unet()
    other.load_state_dict(load_file(path))
    expected = backbone(x_t, t, cond, role="student")
    assert torch.equal(other(x_t, t, **cond).sample, expected)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["base_model"] == backbone.fingerprint and json.loads(metadata["timesteps"]) == [800]
    tiny_unet.save_config(tmp_path)
    path.rename(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(type(tiny_unet).from_pretrained(tmp_path)(x_t, t, **cond).sample, expected)
    backbone.load_network_state_dict(other.state_dict(), "again")
    assert torch.equal(backbone(x_t, t, cond, role="again"), expected)
    assert not any(p.requires_grad for p in backbone.role_parameters("again").values())


def test_a_critic_looks_at_the_roles_own_weights(tiny_unet: Any, tiny_batch: Any) -> None:
    x_t, t, cond = tiny_batch
    backbone = FullBackbone(tiny_unet)
    randomise(backbone, "student", 5)
    critic = BottleneckCritic(backbone, "student")  # type: ignore[arg-type]
    critic(x_t, t, cond).sum().backward()
    grads = {name: p.grad for name, p in backbone.role_parameters("student").items()}
    assert grads["conv_in.weight"].abs().max() > 0 and grads["conv_out.weight"] is None
    assert all(p.grad is None for p in tiny_unet.parameters())


def test_what_does_not_fit_is_said_before_anything_changes(tiny_unet: Any, tiny_batch: Any) -> None:
    x_t, t, cond = tiny_batch
    backbone = FullBackbone(tiny_unet)
    before = {name: p.detach().clone() for name, p in backbone.role_parameters("student").items()}
    state = tiny_unet.state_dict()
    wrong = state | {"conv_in.weight": torch.zeros(32, 9, 3, 3)}
    pair = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(31, 2, 1, 1)}
    for call, message in [
        (lambda: backbone(x_t, t, cond, role="student+ema"), r"no role 'student\+ema'.*whole networks have no sum"),
        (lambda: backbone.add_role("student"), "already has a role 'student'"),
        (lambda: backbone.add_role("new", like="ema"), r"no role 'ema'; it has \['base', 'student'\]"),
        (lambda: backbone.add_role("a.b"), "role name 'a.b' cannot be used"),
        (lambda: backbone.load_network_state_dict(wrong, "new"), r"conv_in.weight has shape \(32, 9, 3, 3\), not \(32"),
        (lambda: backbone.load_network_state_dict({}, "new"), "the file lacks conv_in.weight"),
        (lambda: backbone.load_network_state_dict(state | {"x": state["conv_in.bias"]}, "new"), "model has no x"),
        (lambda: backbone.load_lora_state_dict(state, "student"), "conv_in.weight is not a LoRA key"),
        (lambda: backbone.load_lora_state_dict(pair, "student"), r"conv_in b has shape \(31, 2, 1, 1\)"),
    ]:  # fmt: skip
        with pytest.raises(HypersdError, match=message):
            call()
    assert backbone.roles == ["student"]
    assert all(torch.equal(p, before[name]) for name, p in backbone.role_parameters("student").items())
    tiny_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(HypersdError, match="has PEFT adapters inside"):
        FullBackbone(tiny_unet)


def test_a_transformer_with_buffers() -> None:
    network = make_sd3()
    backbone = FullBackbone(network)
    assert backbone.key_prefix == "transformer" and not backbone.embeds_guidance
    make_sd3().load_state_dict(backbone.network_state_dict("student"))

"""Roles on one frozen network: isolation, checkpointing, handing the network back."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from itertools import product

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from hypersd.errors import HypersdError
from hypersd.models import Backbone, FullBackbone, LoraSpec, fuse, unfuse
from hypersd.models import backbone as backbone_module
from hypersd.models import lora as lora_module
from tests.conftest import make_flux, make_sd3, make_unet

SPEC = LoraSpec(rank=4, alpha=2)


def randomise(backbone, role, seed, std=0.05):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.role_parameters(role).values():
            parameter.normal_(0, std, generator=generator)


def two_roles(network):
    backbone = Backbone(network, SPEC, roles=("student", "ema"))
    for seed, role in enumerate(backbone.roles):
        randomise(backbone, role, seed)
    return backbone


def by_hand(network, backbone, role):
    """A separate copy of the original network with the role merged into its weights."""
    merged = copy.deepcopy(network)
    with torch.no_grad():
        for path, slot in backbone.role_slots(role).items():
            layer = merged.get_submodule(path)
            delta = slot.b[role].flatten(1) @ slot.a[role].flatten(1)
            layer.weight += SPEC.scale * delta.view_as(layer.weight)
    return merged


def test_targets_are_the_lcm_set(tiny_unet):
    backbone = Backbone(tiny_unet, SPEC)
    ends = {next(t for t in SPEC.targets if path.endswith(t)) for path in backbone.slots}
    assert ends == set(SPEC.targets)
    assert not any(path.startswith(("conv_in", "conv_out", "time_embedding")) for path in backbone.slots)
    parameters = backbone.role_parameters("student")
    assert len(parameters) == 2 * len(backbone.slots)
    assert sum(p.numel() for p in parameters.values()) == sum(
        p.numel() for p in backbone.parameters() if p.requires_grad
    )
    assert all(p.dtype == torch.float32 for p in parameters.values())


def test_every_role_is_its_own_model(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    original = copy.deepcopy(tiny_unet)
    backbone = two_roles(tiny_unet)
    expected = original(x_t, t, **cond).sample
    assert torch.equal(backbone(x_t, t, cond), expected)
    for role in ("student", "ema", "student"):
        reference = by_hand(original, backbone, role)(x_t, t, **cond).sample
        assert (reference - expected).abs().max() > 0.1
        assert (backbone(x_t, t, cond, role=role) - reference).abs().max() < 1e-4
    assert torch.equal(backbone(x_t, t, cond), expected)


def test_a_new_role_changes_nothing_and_a_copy_is_equal(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    backbone = two_roles(tiny_unet)
    backbone.add_role("fresh", generator=torch.Generator().manual_seed(0))
    base = backbone(x_t, t, cond)
    assert (backbone(x_t, t, cond, role="fresh") - base).abs().max() < 1e-5
    backbone.add_role("previous", like="student")
    assert torch.equal(backbone(x_t, t, cond, role="previous"), backbone(x_t, t, cond, role="student"))
    randomise(backbone, "student", 9)
    assert not torch.equal(backbone(x_t, t, cond, role="previous"), backbone(x_t, t, cond, role="student"))
    backbone.drop_role("previous")
    assert backbone.roles == ["student", "ema", "fresh"]
    assert not any("previous" in name for name, _ in backbone.named_parameters())


def test_copy_and_lerp_are_in_place_and_exact(tiny_unet):
    backbone = two_roles(tiny_unet)
    before = {k: v.detach().clone() for k, v in backbone.role_parameters("ema").items()}
    student, ema = backbone.role_parameters("student"), backbone.role_parameters("ema")
    backbone.lerp_role("ema", "student", 0.05)
    for name, old in before.items():
        assert (ema[name] - (old + 0.05 * (student[name] - old))).abs().max() < 1e-7
        assert backbone.role_parameters("ema")[name] is ema[name]
    backbone.copy_role("student", "ema")
    assert all(torch.equal(ema[name], student[name]) for name in student)


def gradients(backbone, batch, enable):
    """Student gradients of a consistency-like loss with a target pass of another role before backward."""
    x_t, t, cond = batch
    for p in backbone.parameters():
        p.grad = None
    enable(backbone)
    student = backbone(x_t, t, cond, role="student")
    with torch.no_grad():
        target = backbone(x_t, t, cond, role="ema")
        target = target + 0.1 * backbone(x_t, t, cond, role="base")
    ((student - target) ** 2).mean().backward()
    backbone.network.disable_gradient_checkpointing()
    assert all(p.grad is None for p in backbone.role_parameters("ema").values())
    return {name: p.grad for name, p in backbone.role_parameters("student").items()}


def test_checkpointing_gives_the_gradients_of_separate_modules(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    original = copy.deepcopy(tiny_unet)
    backbone = two_roles(tiny_unet)
    plain = gradients(backbone, tiny_batch, lambda b: None)
    checkpointed = gradients(backbone, tiny_batch, Backbone.enable_gradient_checkpointing)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name

    # separate modules: the chain rule through the merged weight of a copy, dA = scale B^T dW, dB = scale dW A^T
    student, ema = (by_hand(original, backbone, role) for role in ("student", "ema"))
    student.requires_grad_(True)
    with torch.no_grad():
        target = ema(x_t, t, **cond).sample + 0.1 * original(x_t, t, **cond).sample
    ((student(x_t, t, **cond).sample - target) ** 2).mean().backward()
    for path, slot in backbone.role_slots("student").items():
        dw = student.get_submodule(path).weight.grad.flatten(1)
        a, b = slot.a["student"].flatten(1), slot.b["student"].flatten(1)
        for name, expected in ((f"{path}.lora_A.weight", b.t() @ dw), (f"{path}.lora_B.weight", dw @ a.t())):
            found, expected = plain[name].flatten(1), SPEC.scale * expected
            assert (found - expected).abs().max() < 1e-3 * expected.abs().max() + 1e-8, name


def test_switching_by_state_fails_under_checkpointing(tiny_unet, tiny_batch, monkeypatch):
    """The trap: with the role in mutable state, backward recomputes with whatever role came last."""
    backbone = two_roles(tiny_unet)
    plain = gradients(backbone, tiny_batch, lambda b: None)

    @contextmanager
    def set_and_leave(role):
        lora_module._active.role = role
        yield

    monkeypatch.setattr(backbone_module, "use_role", set_and_leave)
    monkeypatch.setattr(lora_module._active, "role", "base")

    def naive(backbone):
        backbone.network.enable_gradient_checkpointing(
            lambda function, *args: torch_checkpoint(function, *args, use_reentrant=False, determinism_check="none")
        )

    def run():
        x_t, t, cond = tiny_batch
        naive(backbone)
        student = backbone(x_t, t, cond, role="student")
        with torch.no_grad():
            target = backbone(x_t, t, cond, role="base") * 0.1 + backbone(x_t, t, cond, role="ema")
        ((student - target) ** 2).mean().backward()

    for p in backbone.parameters():
        p.grad = None
    run()
    found = {name: p.grad for name, p in backbone.role_parameters("student").items()}
    wrong = [n for n, g in plain.items() if found[n] is None or (found[n] - g).abs().max() > 1e-2 * g.abs().max()]
    assert len(wrong) > len(plain) / 2


def test_checkpointing_already_on_is_taken_over(tiny_unet, tiny_batch):
    tiny_unet.enable_gradient_checkpointing()
    backbone = two_roles(tiny_unet)
    found = gradients(backbone, tiny_batch, lambda b: None)
    plain = gradients(backbone, tiny_batch, lambda b: None)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_release_gives_the_network_back_bit_for_bit(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    tiny_unet.conv_in.requires_grad_(True)
    before = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    modules = [name for name, _ in tiny_unet.named_modules()]
    flags = {name: p.requires_grad for name, p in tiny_unet.named_parameters()}
    expected = tiny_unet(x_t, t, **cond).sample
    backbone = two_roles(tiny_unet)
    backbone.enable_gradient_checkpointing()
    backbone(x_t, t, cond, role="student").sum().backward()
    network = backbone.release()
    assert network is tiny_unet and backbone.roles == []
    assert [name for name, _ in network.named_modules()] == modules
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    after = network.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert not network.is_gradient_checkpointing
    assert torch.equal(network(x_t, t, **cond).sample, expected)


def test_peft_adapters_stay_part_of_the_base(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    plain_fingerprint = Backbone(copy.deepcopy(tiny_unet), SPEC).fingerprint
    tiny_unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "conv1"], init_lora_weights=False))
    before = {name: value.clone() for name, value in tiny_unet.state_dict().items()}
    expected = tiny_unet(x_t, t, **cond).sample
    backbone = two_roles(tiny_unet)
    assert backbone.fingerprint == plain_fingerprint
    assert torch.equal(backbone(x_t, t, cond), expected)
    student = backbone(x_t, t, cond, role="student")
    assert (student - expected).abs().max() > 0.1
    student.square().mean().backward()
    path = next(p for p in backbone.slots if p.endswith("to_q"))
    slot = backbone.slots[path]
    assert slot.a["student"].grad.abs().max() > 0
    hidden = torch.randn(3, slot.in_features)
    with torch.no_grad(), lora_module.use_role("student"):
        low_rank = hidden @ slot.a["student"].t() @ slot.b["student"].t() * SPEC.scale
        assert (slot(hidden) - slot.base(hidden) - low_rank).abs().max() < 1e-6
    after = backbone.release().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(tiny_unet(x_t, t, **cond).sample, expected)


def test_peft_adapters_may_go_before_the_backbone_does(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    plain = tiny_unet(x_t, t, **cond).sample
    tiny_unet.conv_in.requires_grad_(True)
    flags = {name: p.requires_grad for name, p in tiny_unet.named_parameters()}
    tiny_unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    for name, parameter in tiny_unet.named_parameters():
        parameter.requires_grad_(flags.get(name.replace(".base_layer", ""), True))
    backbone = two_roles(tiny_unet)
    tiny_unet.unload_lora()
    network = backbone.release()
    assert {name: p.requires_grad for name, p in network.named_parameters()} == flags
    assert torch.equal(network(x_t, t, **cond).sample, plain)


def test_folded_weights_follow_the_adapter(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    backbone = two_roles(tiny_unet)
    expected = backbone(x_t, t, cond, role="student").detach()
    slot = next(iter(backbone.slots.values()))
    with torch.no_grad(), backbone.folded():
        first = backbone(x_t, t, cond, role="student")
        kept = slot._folded["student"][1]
        assert torch.equal(backbone(x_t, t, cond, role="student"), first)
        assert slot._folded["student"][1] is kept
        assert not torch.equal(backbone(x_t, t, cond, role="ema"), first)
        randomise(backbone, "student", 7)
        changed = backbone(x_t, t, cond, role="student")
    assert not slot._folded
    assert (first - expected).abs().max() < 1e-4
    assert (changed - backbone(x_t, t, cond, role="student")).abs().max() < 1e-4
    assert (changed - first).abs().max() > 0.1


def test_inference_adapters_are_not_folded(tiny_unet, tiny_batch):
    """Their changes in place cannot be seen."""
    x_t, t, cond = tiny_batch
    backbone = two_roles(tiny_unet)
    first, second = (backbone.lora_state_dict(role) for role in backbone.roles)
    with torch.inference_mode(), backbone.folded():
        backbone.load_lora_state_dict(first, "file")
        backbone(x_t, t, cond, role="file")
        backbone.load_lora_state_dict(second, "file")
        found = backbone(x_t, t, cond, role="file")
    with torch.no_grad():
        assert torch.equal(found, backbone(x_t, t, cond, role="file"))


def test_16_bit_network_with_fp32_adapters(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    exact_backbone = two_roles(copy.deepcopy(tiny_unet))
    exact = exact_backbone(x_t, t, cond, role="student")
    merged = by_hand(tiny_unet, exact_backbone, "student").bfloat16()
    eager = merged(x_t.bfloat16(), t, cond["encoder_hidden_states"].bfloat16()).sample
    backbone = two_roles(tiny_unet.bfloat16())
    found = backbone(x_t, t, cond, role="student")
    assert found.dtype == x_t.dtype and backbone.dtype == torch.bfloat16
    error, bound = ((y - exact).square().mean().sqrt() for y in (found, eager))
    assert 0 < error < 2 * bound
    found.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in backbone.role_parameters("student").values())


def test_autocast_network(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    backbone = two_roles(tiny_unet)
    exact = backbone(x_t, t, cond, role="student")
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(x_t, t, cond, role="student")
    found.square().mean().backward()
    assert 0 < (found - exact).abs().max() < 0.1 * exact.abs().max()


def test_sdxl_conditions_are_packed(tiny_sdxl_unet):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 16, 16, generator=generator)
    cond = {
        "encoder_hidden_states": torch.randn(2, 16, 64, generator=generator),
        "text_embeds": torch.randn(2, 32, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
    }
    t = torch.tensor(500)
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    expected = tiny_sdxl_unet(x_t, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert torch.equal(Backbone(tiny_sdxl_unet, SPEC)(x_t, t, cond), expected)


def test_transformers_take_the_same_call():
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    text, pooled = torch.randn(1, 5, 16), torch.randn(1, 16)
    cases = [
        (sd3, torch.randn(1, 4, 8, 8), {"encoder_hidden_states": text, "pooled_projections": pooled}),
        (
            flux,
            torch.randn(1, 16, 16),
            {
                "encoder_hidden_states": text,
                "pooled_projections": pooled,
                "guidance": torch.tensor([3.5]),
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3),
            },
        ),
    ]
    for network, x_t, cond in cases:
        t = torch.tensor([0.5])
        expected = network(x_t, timestep=t, **cond).sample
        backbone = Backbone(network, LoraSpec(rank=2, alpha=2, targets=("to_q", "to_out.0", "net.2")))
        backbone.enable_gradient_checkpointing()
        assert torch.equal(backbone(x_t, t, cond), expected)
        randomise(backbone, "student", 0)
        out = backbone(x_t, t, cond, role="student")
        assert (out - expected).abs().max() > 1e-3
        out.sum().backward()
        assert all(p.grad is not None for p in backbone.role_parameters("student").values())
        assert next(iter(backbone.lora_state_dict("student"))).startswith("transformer.")


def five_samples(make, peft=False):
    """A backbone in float64 of three roles, of two ranks and not of the same layers, and (x_t, t, cond, roles)."""
    network = make().double()
    if peft:
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    backbone = two_roles(network)
    state = {name: value * 2 for name, value in backbone.lora_state_dict("ema").items() if "to_k" not in name}
    few = {name: value[:2] if "lora_A" in name else value[:, :2] for name, value in state.items()}
    backbone.load_lora_state_dict(few, "few")
    generator = torch.Generator().manual_seed(3)
    width = 64 if make is make_sd3 else 32
    cond = {"encoder_hidden_states": torch.randn(5, 4, width, generator=generator, dtype=torch.float64)}
    if make is not make_unet:
        cond["pooled_projections"] = torch.randn(5, width, generator=generator, dtype=torch.float64)
    x_t = torch.randn(5, 4, 16, 16, generator=generator, dtype=torch.float64)
    roles = ("student", "few", "few", "base", "student+few")
    return backbone, x_t, torch.tensor([10, 900, 500, 20, 30]), cond, roles


def one_by_one(backbone, x_t, t, cond, roles):
    rows = [slice(i, i + 1) for i in range(len(roles))]
    parts = [
        backbone(x_t[i], t[i], {name: value[i] for name, value in cond.items()}, role=role)
        for i, role in zip(rows, roles, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("make", "form"), [(make_unet, "peft"), *product((make_unet, make_sd3, make_flux), ("plain", "fused", "folded"))]
)
def test_each_sample_has_a_role_of_its_own(make, form):
    backbone, *batch, roles = five_samples(make, form == "peft")
    if form == "fused":
        backbone.fuse()
    with torch.no_grad(), backbone.folded() if form == "folded" else nullcontext():
        expected = one_by_one(backbone, *batch, roles)
        found = backbone(*batch, role=list(roles))
        assert len({round(float(e.sum()), 6) for e in expected}) == 5
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
        assert torch.equal(backbone(*batch, role=["few"] * 5), backbone(*batch, role="few"))
        # what is kept of the adapters follows them
        pools = [slot._pooled for slot in backbone.slots.values() if slot._pooled]
        assert torch.equal(backbone(*batch, role=roles), found)
        assert all(slot._pooled in pools for slot in backbone.slots.values() if slot._pooled)
        randomise(backbone, "few", 7)
        changed = backbone(*batch, role=roles)
        torch.testing.assert_close(changed, one_by_one(backbone, *batch, roles), rtol=1e-9, atol=1e-10)
        assert (changed - found).flatten(1).abs().amax(1).ge(1e-3).tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_each_sample_reaches_its_own_role(checkpointing):
    backbone, *batch, roles = five_samples(make_unet)
    found = []
    for call in (one_by_one, lambda backbone, *inputs: backbone(*inputs[:-1], role=inputs[-1])):
        for parameter in backbone.parameters():
            parameter.grad = None
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        y = call(backbone, *batch, roles)
        with torch.no_grad():
            backbone(*batch, role="ema")
        y.square().sum().backward()
        assert all(p.grad is None for p in backbone.role_parameters("ema").values())
        grads = {role: backbone.role_parameters(role) for role in ("student", "few")}
        found.append({(role, name): p.grad for role in grads for name, p in grads[role].items()})
    for name, grad in found[0].items():
        assert grad.norm() > 0
        torch.testing.assert_close(found[1][name], grad, rtol=1e-8, atol=1e-10)


def test_a_role_for_each_sample_in_16_bit():
    backbone, *batch, roles = five_samples(make_unet)
    with torch.no_grad():
        exact = one_by_one(backbone, *batch, roles)
        backbone.network.bfloat16()
        errors = [(y - exact).norm() for y in (backbone(*batch, role=roles), one_by_one(backbone, *batch, roles))]
    assert 0 < errors[0] < 2 * errors[1]


def test_wrong_use_is_one_clear_line(tiny_unet, tiny_batch):
    with pytest.raises(HypersdError, match="matches the LoRA targets"):
        Backbone(copy.deepcopy(tiny_unet), LoraSpec(targets=("to_z",)))
    with pytest.raises(HypersdError, match="UNet2DConditionModel matches the LoRA targets to_kk, net.9; check"):
        Backbone(copy.deepcopy(tiny_unet), LoraSpec(targets=("to_q", "to_kk", "net.2", "net.9")))
    for arguments in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(HypersdError, match="LoRA (rank|alpha)"):
            LoraSpec(**arguments)
    backbone = two_roles(tiny_unet)
    x_t, t, cond = tiny_batch
    with pytest.raises(HypersdError, match="no role 'teacher'"):
        backbone(x_t, t, cond, role="teacher")
    for roles, message in ((["ema"], "1 roles for 2 samples"), (["ema", "teacher"], "no role 'teacher'")):
        with pytest.raises(HypersdError, match=message):
            backbone(x_t, t, cond, role=roles)
    for name in ("base", "keys", "a.b", ""):
        with pytest.raises(HypersdError, match="role name"):
            backbone.add_role(name)
    with pytest.raises(HypersdError, match="already has"):
        backbone.add_role("ema")
    with pytest.raises(HypersdError, match="no role 'none'"):
        backbone.copy_role("none", "ema")
    with pytest.raises(HypersdError, match="no role 'none'"), backbone.network_of("student+none"):
        pass
    with (
        pytest.raises(TypeError, match="network_of takes the name of a role .*got NoneType"),
        backbone.network_of(None),
    ):
        pass


@pytest.mark.parametrize("taker", [Backbone, FullBackbone, fuse, unfuse])
@pytest.mark.parametrize("wrong", ["unet", None])
def test_what_is_no_network_is_one_clear_line(taker, wrong):
    found = f"{taker.__name__} takes a network .UNet2DConditionModel, .*not {type(wrong).__name__}; of a pipeline take"
    with pytest.raises(TypeError, match=found):
        taker(wrong)


def test_wrapped_layers_are_not_taken_for_diffusers_own(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    network = copy.deepcopy(tiny_unet)
    backbone = Backbone(network)
    with pytest.raises(HypersdError, match="load_lora_adapter .*use backbone.load_lora_state_dict"):
        network.load_lora_adapter({"unet.to_q.lora_A.weight": torch.zeros(4, 32)})
    with pytest.raises(HypersdError, match="add_adapter .*use backbone.add_role"):
        network.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(HypersdError, match="fuse_qkv_projections .*release"):
        network.fuse_qkv_projections()
    backbone.release().fuse_qkv_projections()
    with pytest.raises(
        HypersdError, match="UNet2DConditionModel computes q, k and v .*call its unfuse_qkv_projections"
    ):
        Backbone(network)
    network.unfuse_qkv_projections()
    assert Backbone(network)(x_t, t, cond).shape == x_t.shape


def test_layers_that_diffusers_casts_or_offloads_take_adapters(tiny_unet, tiny_batch):
    """Its hooks stand in place of the layers' forward: the weight alone is not what they compute with."""
    x_t, t, cond = tiny_batch
    backbone = two_roles(copy.deepcopy(tiny_unet))
    network, cpu = backbone.network, torch.device("cpu")
    roles = ["student", "ema"]
    with torch.no_grad():
        before = [backbone(x_t, t, cond, role=role) for role in ("student", roles)]
        network.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
        for expected, role in zip(before, ("student", roles), strict=True):
            torch.testing.assert_close(backbone(x_t, t, cond, role=role), expected, rtol=1e-4, atol=1e-5)
    backbone = two_roles(copy.deepcopy(tiny_unet))
    backbone.network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert backbone.network.down_blocks[0].resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad(), backbone.network_of("student") as network:
        found = network(x_t, t, **cond).sample
    assert 0 < (found - before[0]).norm() < 0.02 * before[0].norm()


def test_adapters_offloaded_layer_by_layer_are_refused(tiny_unet, tiny_batch):
    x_t, t, cond = tiny_batch
    backbone = two_roles(copy.deepcopy(tiny_unet))
    accelerate.cpu_offload(backbone.network, torch.device("cpu"))
    with pytest.raises(HypersdError, match="offload by model .enable_model_cpu_offload. or in groups"):
        with backbone.network_of("student") as network:
            network(x_t, t, **cond)


@pytest.mark.parametrize("make", [make_sd3, make_flux])
def test_transformers_with_joined_projections_are_refused(make):
    network = make()
    network.fuse_qkv_projections()
    with pytest.raises(HypersdError, match="call its unfuse_qkv_projections"):
        Backbone(network)
    network.unfuse_qkv_projections()
    Backbone(network)


def test_a_wrapped_network_is_not_saved_under_names_that_no_reader_knows(tiny_unet, tmp_path):
    network = copy.deepcopy(tiny_unet)
    backbone = Backbone(network)
    with pytest.raises(HypersdError, match="save_pretrained .* inside a Backbone.*save_lora.*release"):
        network.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    backbone.release().save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path, local_files_only=True).state_dict()
    assert all(torch.equal(again[name], value) for name, value in tiny_unet.state_dict().items())


class OneLayer(torch.nn.Module):
    """The least that Backbone can hold: fast to compile."""

    def __init__(self):
        super().__init__()
        self.to_q = torch.nn.Linear(6, 6)

    def forward(self, x, timestep, return_dict=False):
        return (self.to_q(x).tanh() * timestep,)


def test_torch_compile_sees_the_role():
    """One graph without breaks per role, and no graph is used for another role. (A compiled call may take
    another form of the layer: it keeps nothing for backward.)"""
    torch.manual_seed(0)
    backbone = two_roles(OneLayer())
    x, t = torch.randn(3, 6), torch.tensor(2.0)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    own = ("student", "base", "ema")
    for role in ("base", "student", own, "ema", "student", own[::-1], "base"):
        torch.testing.assert_close(compiled(x, t, {}, role=role), backbone(x, t, {}, role=role))
    inner = torch.compile(backbone.network, backend="eager", fullgraph=True)
    for role in ("base", "student", "ema", "base"):
        with lora_module.use_role(role):
            torch.testing.assert_close(inner(x, t)[0], backbone(x, t, {}, role=role))


def test_threads_do_not_share_a_role():
    from threading import Barrier, Thread

    backbone, barrier, seen = two_roles(OneLayer()), Barrier(2), {}

    def run(role):
        with lora_module.use_role(role):
            barrier.wait()
            seen[role] = lora_module.current_role()
            barrier.wait()

    threads = [Thread(target=run, args=(role,)) for role in backbone.roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"student": "student", "ema": "ema"} and lora_module.current_role() == "base"

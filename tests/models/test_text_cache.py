"""Text keys and values are projected once per prompt, with the bits of projecting them in every step."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor

from hypersd.models import Backbone, LoraSpec, NoiseProcess, lora
from hypersd.models.text_cache import text_layers
from hypersd.sampling import ddim, denoiser, sample, trailing
from tests.conftest import SCHEDULER, make_sd3, make_sdxl_unet, make_unet

SPEC = LoraSpec(rank=4, alpha=4.0)
TABLE = ddim(NoiseProcess.from_config(SCHEDULER), trailing(4))


def prompts(dim: int = 32, seed: int = 1) -> tuple[torch.Tensor, dict, dict]:
    """(x_T, cond, null) of two pictures."""
    generator = torch.Generator().manual_seed(seed)
    x_T = torch.randn(2, 4, 16, 16, generator=generator)
    cond, null = ({"encoder_hidden_states": torch.randn(2, 16, dim, generator=generator)} for _ in range(2))
    return x_T, cond, null


def two_roles(network, spec: LoraSpec = SPEC) -> Backbone:
    backbone = Backbone(network, spec, roles=("student", "ema"))
    with torch.no_grad():
        for seed, role in enumerate(("student", "ema")):
            generator = torch.Generator().manual_seed(seed)
            for parameter in backbone.role_parameters(role).values():
                parameter.normal_(std=0.05, generator=generator)
    return backbone


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How often each text layer computes, by path; to give what is known already is no computation."""
    counts: Counter = Counter()
    plain = lora.LoraSlot.forward

    def forward(slot, x, *args, **kwargs):
        y = plain(slot, x, *args, **kwargs)
        if slot.path and y is not (lora._active.text or {}).get(slot.path):
            counts[slot.path] += 1
        return y

    monkeypatch.setattr(lora.LoraSlot, "forward", forward)
    return counts


def every_step(backbone: Backbone, cond, null=None, role="student"):
    """`denoiser` without the cache."""
    if null is None:
        return lambda x, t: backbone(x, t, cond, role=role)
    both = {name: torch.cat((cond[name], null[name])) for name in cond}

    def denoise(x, t):
        m = backbone(torch.cat((x, x)), torch.cat((t, t)), both, role=role)
        return m[: len(x)], m[len(x) :]

    return denoise


@pytest.mark.parametrize(
    ("form", "role", "guided"),
    [
        ("plain", "base", True),
        ("plain", "student", False),
        ("fused", "student", True),
        ("folded", "student", False),
        ("bfloat16", "student", True),
        ("fused bfloat16", "base", False),
    ],
)
def test_sampling_has_the_same_bits_and_projects_once(form, role, guided, counts):
    backbone = two_roles(make_unet().to(torch.bfloat16 if "bfloat16" in form else torch.float32))
    if "fused" in form:
        backbone.fuse()
    x_T, cond, null = prompts()
    table, null = (TABLE.guided(2.0), null) if guided else (TABLE, None)
    with backbone.folded() if form == "folded" else contextlib.nullcontext():
        expected = sample(every_step(backbone, cond, null, role), table, x_T)
        assert set(counts) == set(backbone.text_slots) and set(counts.values()) == {4}
        counts.clear()
        found = sample(denoiser(backbone, cond, null=null, role=role), table, x_T)
    assert torch.equal(found, expected)
    assert len(counts) == 8 and set(counts.values()) == {1}


@pytest.mark.parametrize("make", [make_unet, make_sdxl_unet])
def test_every_cross_attention_layer_is_found(make):
    network = make()
    layers = [name for name, module in network.named_modules() if name.endswith("attn2")]
    assert layers and text_layers(network) == [f"{name}.{part}" for name in layers for part in ("to_k", "to_v")]


def test_layers_outside_of_the_lora_targets_are_kept_too(counts):
    x_T, cond, _ = prompts()
    plain = make_unet()
    backbone = two_roles(plain, LoraSpec(rank=4, alpha=4.0, targets=("to_q",)))
    assert not any("to_k" in path for path in backbone.slots) and len(backbone.text_slots) == 8
    expected = sample(every_step(backbone, cond), TABLE, x_T)
    counts.clear()
    assert torch.equal(sample(denoiser(backbone, cond), TABLE, x_T), expected) and set(counts.values()) == {1}
    # such a layer takes an adapter from a file, and is found under its own name
    wide = two_roles(make_unet(), LoraSpec(rank=4, alpha=4.0, targets=("attn2.to_k",)))
    state = wide.lora_state_dict("student")
    backbone.load_lora_state_dict(state, "file")
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.lora_state_dict("file").items())
    expected = sample(every_step(wide, cond), TABLE, x_T)
    assert torch.equal(sample(denoiser(backbone, cond, role="file"), TABLE, x_T), expected)
    names = [name for name, _ in make_unet().named_modules()]
    assert [name for name, _ in backbone.release().named_modules()] == names


@pytest.mark.parametrize("guided", [False, True])
def test_a_role_for_each_sample(guided, counts):
    backbone = two_roles(make_unet())
    x_T, cond, null = prompts()
    table, null = (TABLE.guided(2.0), null) if guided else (TABLE, None)
    roles = ["ema", "student"]
    expected = [sample(denoiser(backbone, cond, null=null, role=role), table, x_T)[i] for i, role in enumerate(roles)]
    counts.clear()
    found = sample(denoiser(backbone, cond, null=null, role=roles), table, x_T)
    assert len(counts) == 8 and set(counts.values()) == {1}
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_another_prompt_another_role_another_adapter(counts):
    """One backbone, many caches, used in turn; an adapter that changes under a cache is projected again."""
    backbone = two_roles(make_unet())
    x_T, first, second = prompts()
    t = torch.tensor([500, 500])
    with torch.no_grad():
        conds, roles = (first, second), ("base", "student", "ema")
        caches = {(i, role): backbone.text_cache(conds[i], role=role) for i in (0, 1) for role in roles}
        for _ in range(2):
            for (i, role), cache in caches.items():
                expected = backbone(x_T, t, conds[i], role=role)
                assert torch.equal(backbone(x_T, t, cache(), role=role), expected)
        assert len({float(backbone(x_T, t, cache(), role=role).sum()) for (_, role), cache in caches.items()}) == 6
        cache = caches[0, "student"]
        backbone.lerp_role("student", "ema", 0.5)
        assert torch.equal(backbone(x_T, t, cache(), role="student"), backbone(x_T, t, first, role="student"))
        first["encoder_hidden_states"].mul_(2)
        assert torch.equal(backbone(x_T, t, cache(), role="student"), backbone(x_T, t, first, role="student"))
        counts.clear()
        cache()
        cache()
        assert not counts


def test_a_text_that_comes_to_lie_where_the_old_one_was():
    backbone = two_roles(make_unet())
    x_T, cond, _ = prompts()
    cache = backbone.text_cache(cond, role="student")
    with torch.no_grad():
        for seed in range(8):  # each is let go before the next is made: the allocator reuses its place
            del cond["encoder_hidden_states"]
            cond["encoder_hidden_states"] = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(seed))
            found = backbone(x_T, 500, cache(), role="student")
            assert torch.equal(found, backbone(x_T, 500, cond, role="student"))
        whole = cond["encoder_hidden_states"]
        cond["encoder_hidden_states"] = whole[:, :8]  # the same address, and nothing was written
        found = backbone(x_T, 500, cache(), role="student")
        assert torch.equal(found, backbone(x_T, 500, cond, role="student"))


@pytest.mark.parametrize("inference", ["text", "adapter"])
def test_changes_of_inference_tensors_are_not_missed(inference):
    backbone = two_roles(make_unet())
    x_T, cond, other = prompts()
    states = [backbone.lora_state_dict(role) for role in ("student", "ema")]
    with torch.inference_mode():
        if inference == "text":
            cond["encoder_hidden_states"] = cond["encoder_hidden_states"].clone()
        backbone.load_lora_state_dict(states[0], "file")  # adapters that are inference tensors
        role = "file" if inference == "adapter" else "student"
        cache = backbone.text_cache(cond, role=role)
        assert "inference tensor, whose changes cannot be seen" in cache.reason
        backbone(x_T, 500, cache(), role=role)
        if inference == "text":
            cond["encoder_hidden_states"].copy_(other["encoder_hidden_states"])
        else:
            backbone.load_lora_state_dict(states[1], "file")
        found = backbone(x_T, 500, cache(), role=role)
        assert torch.equal(found, backbone(x_T, 500, cond, role=role))
    assert backbone.text_cache(other, role="student").reason == ""


def test_with_gradients_the_adapter_of_the_text_layers_learns():
    backbone = two_roles(make_unet())
    x_T, cond, _ = prompts()
    denoise, t = denoiser(backbone, cond), torch.tensor([500, 500])
    with torch.no_grad():
        denoise(x_T, t)  # keeps projections
    denoise(x_T, t).square().mean().backward()
    found = {path: slot.b["student"].grad.clone() for path, slot in backbone.text_slots.items()}
    backbone(x_T, t, cond, role="student").square().mean().backward()
    for path, slot in backbone.text_slots.items():
        assert found[path].abs().max() > 0
        torch.testing.assert_close(slot.b["student"].grad, 2 * found[path])


def test_compiles_whole_and_once():
    backbone = two_roles(make_unet())
    backbone.fuse()
    x_T, cond, other = prompts()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend=backend)
    for conditions in (cond, other):
        expected = sample(denoiser(backbone, conditions), TABLE, x_T)
        found = sample(denoiser(compiled, conditions), TABLE, x_T)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_networks_without_such_layers_say_so():
    cond = {"encoder_hidden_states": torch.zeros(2, 5, 64), "pooled_projections": torch.zeros(2, 64)}
    cache = Backbone(make_sd3(), SPEC).text_cache(cond)
    with torch.no_grad():
        assert "SD3Transformer2DModel change with the timestep" in cache.reason and cache() is cond
    changed = Backbone(make_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj"), SPEC)
    assert "changes the text" in changed.text_cache({}).reason
    odd = make_unet()
    odd.up_blocks[0].attentions[0].transformer_blocks[0].attn2.processor = SlicedAttnProcessor(2)
    assert "SlicedAttnProcessor may treat" in Backbone(odd, SPEC).text_cache({}).reason
    backbone = Backbone(make_unet(), SPEC)
    assert backbone.text_cache(cond).reason == ""

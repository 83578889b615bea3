"""LoRA files: both key layouts, metadata, foreign and broken files, and diffusers as a reader."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hypersd.errors import HypersdError
from hypersd.models import Backbone, LoraSpec, encode_prompts, formats, load_components, load_lora, save_lora
from tests.conftest import full_disk, make_flux, make_sd3, make_sdxl_unet, make_unet

SPEC = LoraSpec(rank=4, alpha=2)
METADATA = {"prediction_type": "epsilon", "solver": "tcd", "steps": "1,2,4,8", "eta": "0.3", "guidance_scale": "1.0"}


@pytest.fixture
def backbone(tiny_unet):
    backbone = Backbone(tiny_unet, SPEC)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(0, 0.05, generator=generator)
    return backbone


def assert_equal_roles(backbone, role, other):
    first, second = backbone.role_parameters(role), backbone.role_parameters(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [s.scale[role] for s in backbone.slots.values()] == [s.scale[other] for s in backbone.slots.values()]


@pytest.mark.parametrize("format", ["peft", "kohya"])
def test_round_trip_keeps_every_bit_and_the_scale(backbone, tmp_path, format):
    path = save_lora(tmp_path / "lora.safetensors", backbone, "student", METADATA, format)
    state, metadata = load_lora(path)
    backbone.load_lora_state_dict(state, "again")
    assert_equal_roles(backbone, "student", "again")
    assert metadata.items() >= METADATA.items()
    assert (metadata["rank"], float(metadata["alpha"])) == ("4", 2.0)
    assert metadata["base_model"] == backbone.fingerprint and metadata["lora_format"] == format
    names = set(load_file(path))
    if format == "peft":
        assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in names and len(names) == 2 * len(backbone.slots)
    else:
        key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
        assert {f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"} <= names
        assert load_file(path)[f"{key}.alpha"] == 2.0


def test_kohya_and_peft_say_the_same(backbone):
    backbone.load_lora_state_dict(backbone.lora_state_dict("student", "kohya"), "kohya")
    backbone.load_lora_state_dict(backbone.lora_state_dict("kohya", "peft"), "peft", scale=SPEC.scale)
    assert_equal_roles(backbone, "student", "peft")


def test_other_spellings_are_read(backbone):
    state = backbone.lora_state_dict("student")
    spellings = [
        lambda k: k.removeprefix("unet."),
        lambda k: k.replace("unet.", "base_model.model."),
        lambda k: k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda k: k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."),
    ]
    for i, spell in enumerate(spellings):
        backbone.load_lora_state_dict({spell(k): v for k, v in state.items()}, f"r{i}", scale=SPEC.scale)
        assert_equal_roles(backbone, "student", f"r{i}")


@pytest.mark.parametrize("make", [make_unet, make_sdxl_unet])
def test_the_original_names_of_a_unet_are_read(make):
    """By which sd-scripts calls the layers of SDXL: as diffusers itself turns them into its own."""
    network = make()
    paths = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    names = formats._original_names(paths)
    assert list(names) == paths
    original = {
        f"model.diffusion_model.{name}.{end}": torch.tensor(i)
        for i, name in enumerate(names.values())
        for end in ("weight", "bias")
    }
    found = convert_ldm_unet_checkpoint(original, dict(network.config))
    assert {key: int(i) for key, i in found.items() if "bias" not in key} == {
        f"{path}.weight": i for i, path in enumerate(paths)
    }
    state = {}
    some = {"down_blocks.1.resnets.0.conv1", "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_q"}
    for path in some:
        weight = network.get_submodule(path).weight
        key = "lora_unet_" + names[path].replace(".", "_")
        state |= {f"{key}.lora_down.weight": torch.ones(2, *weight.shape[1:]), f"{key}.alpha": torch.tensor(1.0)}
        state[f"{key}.lora_up.weight"] = torch.ones(weight.shape[0], 2, *[1] * (weight.dim() - 2))
    backbone = Backbone(network, SPEC, roles=())
    backbone.load_lora_state_dict(state, "theirs")
    assert set(backbone.role_slots("theirs")) == some
    assert backbone.role_scales("theirs") == [0.5, 0.5]


def test_without_alpha_the_scale_is_one_or_as_told(backbone):
    """A rank-64 file that says nothing of alpha is used at 1, and at 0.125 where its author says so."""
    state = backbone.lora_state_dict("student")
    backbone.load_lora_state_dict(state, "plain")
    backbone.load_lora_state_dict(state, "told", scale=0.125)
    assert {s.scale["plain"] for s in backbone.slots.values()} == {1.0}
    assert {s.scale["told"] for s in backbone.slots.values()} == {0.125}


def test_a_file_brings_its_own_ranks_and_layers(tiny_unet, backbone):
    state = {
        "unet.conv_in.lora_A.weight": torch.randn(3, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.randn(32, 3, 1, 1),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.randn(7, 64),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.randn(64, 7),
    }
    backbone.load_lora_state_dict(state, "odd")
    assert {path: s.a["odd"].shape[0] for path, s in backbone.role_slots("odd").items()} == {
        "conv_in": 3,
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7,
    }
    x_t, cond = torch.randn(1, 4, 16, 16), {"encoder_hidden_states": torch.randn(1, 16, 32)}
    base, odd = (backbone(x_t, torch.tensor(500), cond, role=role) for role in ("base", "odd"))
    assert (odd - base).abs().max() > 1e-2
    assert isinstance(backbone.release().conv_in, torch.nn.Conv2d)


def test_loading_into_a_known_role_keeps_its_parameters(backbone):
    parameters = backbone.role_parameters("student")
    state = {name: tensor * 2 for name, tensor in backbone.lora_state_dict("student").items()}
    backbone.load_lora_state_dict(state, "student", scale=SPEC.scale)
    for name, parameter in backbone.role_parameters("student").items():
        assert parameter is parameters[name] and torch.equal(parameter, state["unet." + name])


def test_a_lora_for_another_model_names_what_does_not_fit(backbone, tiny_sdxl_unet):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = backbone.lora_state_dict("student")
    foreign = Backbone(tiny_sdxl_unet, SPEC).lora_state_dict("student")
    wide = {name: t.repeat(1, 2) if "attn2.to_k.lora_A" in name else t for name, t in state.items()}
    other_rank = {name: t[:2] if "lora_A" in name else t[:, :2] for name, t in state.items()}
    before = {name: p.clone() for name, p in backbone.role_parameters("student").items()}
    cases = [
        (foreign, "new", "another model: .*transformer_blocks.1.attn1.to_q.lora_A.weight names a layer"),
        (wide, "new", "another model: .*attn2.to_k a has shape \\(4, 64\\), not \\(4, 32\\)"),
        ({"unet.nowhere.lora_A.weight": torch.zeros(4, 4)}, "new", "unet.nowhere.lora_A.weight names a layer"),
        ({"unet.conv_in.weight": torch.zeros(1)}, "new", "unet.conv_in.weight is not a LoRA key"),
        (state | {"lora_te1_x.alpha": torch.ones(1)}, "new", "adapts the text encoder, too .lora_te1_x.alpha"),
        (state | {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, "new", "without the keys that start with lora_te"),
        ({k: v for k, v in state.items() if k != key + ".lora_B.weight"}, "new", "incomplete.*attn1.to_q"),
        ({}, "new", "no tensors"),
        (other_rank, "student", "rank 2 in the file and 4"),
        ({k: v for k, v in state.items() if not k.startswith(key)}, "student", "the file lacks layer .*attn1.to_q"),
    ]
    for bad, role, message in cases:
        with pytest.raises(HypersdError, match=message) as error:
            backbone.load_lora_state_dict(bad, role)
        assert "\n" not in str(error.value)
    assert backbone.roles == ["student"]
    assert all(torch.equal(p, before[name]) for name, p in backbone.role_parameters("student").items())


def test_broken_files_are_one_clear_line(backbone, tmp_path):
    whole = save_lora(tmp_path / "lora.safetensors", backbone, "student", METADATA)
    data = whole.read_bytes()
    cases = {"half.safetensors": data[: len(data) // 2], "stub.safetensors": data[:5], "empty.safetensors": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HypersdError, match=f"{name} is truncated or damaged"):
            load_lora(tmp_path / name)
    torch.save({"a": torch.zeros(2)}, tmp_path / "lora.pt")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("lora.pt", "old.pt"):
        with pytest.raises(HypersdError, match=f"{name} is a pickle"):
            load_lora(tmp_path / name)
    with pytest.raises(HypersdError, match="does not exist"):
        load_lora(tmp_path / "none.safetensors")
    save_file({"unet.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(HypersdError, match="not a JSON object"):
        load_lora(tmp_path / "m.safetensors")


def test_a_full_disk_leaves_the_old_file(backbone, tmp_path):
    path = save_lora(tmp_path / "lora.safetensors", backbone, "student")
    before = path.read_bytes()
    with full_disk(len(before) // 2), pytest.raises(HypersdError, match="cannot write .*lora.*free space") as error:
        save_lora(path, backbone, "student", METADATA)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    with pytest.raises(HypersdError, match="format 'onnx'"):
        save_lora(path, backbone, "student", format="onnx")


@pytest.mark.parametrize("make", [make_sd3, make_flux])
def test_kohya_keys_of_transformers_are_not_written(make, tmp_path):
    """diffusers does not find their layers."""
    backbone = Backbone(make(), LoraSpec(rank=2, alpha=2, targets=("to_q",)))
    with pytest.raises(HypersdError, match="SD3 and FLUX.*take the format peft"):
        save_lora(tmp_path / "lora.safetensors", backbone, "student", format="kohya")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("shape", ["sd", "sdxl"])
def test_a_diffusers_pipeline_loads_our_file(request, tmp_path, format, shape):
    folder = request.getfixturevalue(f"tiny_{shape}_folder")
    components = load_components(folder)
    backbone = Backbone(components.network, SPEC)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.role_parameters("student").values():
            parameter.normal_(0, 0.05, generator=generator)
    save_lora(tmp_path / "lora.safetensors", backbone, "student", METADATA, format)
    x_t = torch.randn(1, 4, 16, 16, generator=generator)
    cond = encode_prompts(components, ["a fox and a red apple"])
    t = torch.tensor(400)
    ours, base = (backbone(x_t, t, cond, role=role) for role in ("student", "base"))
    assert (ours - base).abs().max() > 0.05

    cls = diffusers.StableDiffusionPipeline if shape == "sd" else diffusers.StableDiffusionXLPipeline
    pipe = cls.from_pretrained(folder, local_files_only=True)
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    added = {k: cond[k] for k in ("text_embeds", "time_ids") if k in cond} or None
    theirs = pipe.unet(x_t, t, cond["encoder_hidden_states"], added_cond_kwargs=added).sample
    assert (ours - theirs).abs().max() < 1e-4


def test_ranks_of_layers_whose_names_end_alike(tmp_path):
    """FLUX's last layer is proj_out, as are those of its blocks: each is read back with its own rank and alpha, here
    and in diffusers."""
    network = make_flux()
    path = "single_transformer_blocks.{}.proj_out"
    ranks = {"proj_out": 2, path.format(0): 4, path.format(1): 4}
    state = {}
    for name, rank in ranks.items():
        layer, key = network.get_submodule(name), f"transformer.{name}"
        state[f"{key}.lora_A.weight"] = torch.randn(rank, layer.in_features) * 0.1
        state[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, rank) * 0.1
        state[f"{key}.alpha"] = torch.tensor(6.0 / rank)
    backbone = Backbone(network, SPEC, roles=())
    backbone.load_lora_state_dict(state, "mixed")
    save_lora(tmp_path / "lora.safetensors", backbone, "mixed")
    backbone.load_lora_state_dict(load_lora(tmp_path / "lora.safetensors")[0], "again")
    for name, rank in ranks.items():
        scales = backbone.slots[name].scale
        assert scales["mixed"] == scales["again"] == 6.0 / rank**2
    network = backbone.release()
    network.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer", adapter_name="x")
    layers = [network.get_submodule(name) for name in ranks]
    assert [(layer.r["x"], layer.scaling["x"]) for layer in layers] == [(r, 6.0 / r**2) for r in ranks.values()]


def test_alpha_patterns_match_as_in_peft(tmp_path):
    path = tmp_path / "lora.safetensors"
    state = {f"unet.{name}.lora_A.weight": torch.zeros(2, 2) for name in ("a.to_q", "b.to_q", "to_q", "b.to_k")}

    def alphas(pattern):
        config = {"unet.lora_alpha": 3, "unet.alpha_pattern": pattern}
        save_file(state, path, {"lora_adapter_metadata": json.dumps(config)})
        return {key: float(value) for key, value in load_lora(path)[0].items() if key.endswith(".alpha")}

    found = alphas({"^to_q": 5, r"a\.to_[qk]": 6, "to_q": 7, "b": 8})
    assert found == {"unet.a.to_q.alpha": 6, "unet.b.to_q.alpha": 7, "unet.to_q.alpha": 5, "unet.b.to_k.alpha": 3}
    with pytest.raises(HypersdError, match=r"alpha_pattern 'to_\(', which is no regular expression"):
        alphas({"to_(": 5})


def test_a_folder_that_peft_saved_is_read_with_its_alpha(tiny_unet, tmp_path):
    """PEFT keeps alpha beside the weights."""
    config = LoraConfig(r=4, lora_alpha=5, alpha_pattern={"to_k": 3}, use_rslora=True, target_modules=["to_q", "to_k"])
    get_peft_model(tiny_unet, config).save_pretrained(tmp_path)
    backbone = Backbone(make_unet(), SPEC, roles=())
    backbone.load_lora_state_dict(load_lora(tmp_path / "adapter_model.safetensors")[0], "theirs")
    slots = backbone.role_slots("theirs")
    assert {slot.scale["theirs"] for path, slot in slots.items() if path.endswith("to_q")} == {2.5}
    assert {slot.scale["theirs"] for path, slot in slots.items() if path.endswith("to_k")} == {1.5}
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(HypersdError, match=r"adapter_config.json is not a JSON object"):
        load_lora(tmp_path / "adapter_model.safetensors")


def test_a_file_of_diffusers_is_read_with_its_alpha(tiny_unet, tmp_path):
    """Saved by diffusers from PEFT adapters with alpha != rank, scale from the file's own metadata."""
    unet = copy.deepcopy(tiny_unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    state, metadata = load_lora(tmp_path / "lora.safetensors")
    backbone = Backbone(tiny_unet, SPEC)
    assert json.loads(metadata["lora_adapter_metadata"])["lora_alpha"] == 6
    backbone.load_lora_state_dict(state, "theirs")
    x_t, cond = torch.randn(1, 4, 16, 16), {"encoder_hidden_states": torch.randn(1, 16, 32)}
    expected = unet(x_t, torch.tensor(10), **cond).sample
    assert (backbone(x_t, torch.tensor(10), cond, role="theirs") - expected).abs().max() < 1e-4

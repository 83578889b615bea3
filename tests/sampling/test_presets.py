"""The published weights' rules: step tables of the Hyper-SD model card, read through sampler_for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hypersd.models import NoiseProcess
from hypersd.sampling import PRESETS, rules_for, sampler_for

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
VP, SD3 = NoiseProcess.from_config(SD), NoiseProcess.from_config({"shift": 3.0})


@pytest.mark.parametrize(
    ("name", "steps", "timesteps", "guidance_scale"),
    [
        ("Hyper-SD15-2steps-lora", None, [999, 499], 1),
        ("Hyper-SDXL-4steps-lora", None, [999, 749, 499, 249], 1),
        ("Hyper-SDXL-8steps-lora", None, [999, 874, 749, 624, 499, 374, 249, 124], 1),
        ("Hyper-SD15-1step-lora", 1, [999], 1),
        ("Hyper-SDXL-1step-lora", 4, [999, 759, 499, 259], 1),
        ("Hyper-SD15-1step-lora", None, [999, 879, 759, 639, 499, 379, 259, 139], 1),
        ("Hyper-SD15-12steps-CFG-lora", None, [999, 916, 832, 749, 666, 582, 499, 416, 332, 249, 166, 82], 5),
    ],
)
def test_tables_are_those_of_the_model_card(name, steps, timesteps, guidance_scale):
    table = sampler_for(VP, rules_for(f"folder/{name}.safetensors", {}), steps)
    assert table.timesteps.tolist() == timesteps
    assert table.is_guided is (guidance_scale > 1)
    if guidance_scale > 1:  # g and 1 - g times one coefficient
        assert np.allclose(table.coef[:, 1] * (1 - guidance_scale), table.coef[:, 2] * guidance_scale, atol=1e-12)
    noisy = (table.coef[:, 4] > 0).tolist()
    assert noisy == [PRESETS[name].eta > 0] * (len(timesteps) - 1) + [False]


def test_the_one_step_network_is_fed_white_noise_at_800():
    preset = PRESETS["Hyper-SDXL-1step-Unet"]
    table = sampler_for(VP, preset.metadata)
    assert table.timesteps.tolist() == [800]
    assert np.allclose(table.coef[0, :2], [1 / 0.19201, -0.98139 / 0.19201], rtol=1e-4)
    assert rules_for("folder/Hyper-SDXL-1step-Unet.safetensors", {}) == preset.metadata and preset.kind == "unet"


def test_flow_files_take_an_eighth_of_their_strength():
    rules = rules_for("Hyper-SD3-4steps-CFG-lora.safetensors", {})
    table = sampler_for(SD3, rules)
    # the grid of diffusers' own pipeline; the trailing one on request
    assert np.abs(table.timesteps - [1000, 857.69, 602.15, 8.9286]).max() < 5e-3 and table.is_guided
    trailing = sampler_for(SD3, rules | {"solver": "ddim"})
    assert np.abs(trailing.timesteps - [1000, 900, 750, 500]).max() < 1e-9 and trailing.is_guided
    flux = NoiseProcess.from_config({"use_dynamic_shifting": True}, latent_size=(128, 128))
    table = sampler_for(flux, rules_for("Hyper-FLUX.1-dev-8steps-lora.safetensors", {}))
    assert table.embedded_guidance == 3.5 and not table.is_guided and len(table) == 8
    assert {float(p.metadata["lora_scale"]) for n, p in PRESETS.items() if "SD3" in n or "FLUX" in n} == {0.125}
    assert {float(p.metadata["lora_scale"]) for n, p in PRESETS.items() if "SD15" in n or "SDXL" in n} == {1.0}


def test_what_a_file_says_itself_wins():
    own = {"solver": "tcd", "steps": "4", "eta": "0.3"}
    assert rules_for("Hyper-SD15-4steps-lora.safetensors", own) == own
    assert rules_for("mine.safetensors", {"format": "pt"}) == {"format": "pt"}


def test_every_published_file_is_there():
    assert len(PRESETS) == 18
    assert sum("CFG" in name for name in PRESETS) == 7 and all("/" not in name for name in PRESETS)


def test_a_renamed_file_is_sampled_by_the_rules(tiny_sd_folder, tmp_path):
    """Through the command's own loader: the scale applies to files without alpha, the grid is the published one."""
    from safetensors.torch import save_file

    from hypersd import resolve

    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "Hyper-SD3-8steps-CFG-lora.safetensors"  # any file that stores no alpha
    save_file({f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}, path)
    state, metadata = resolve.read_lora(path)
    backbone, _, process = resolve.load_with_lora(str(tiny_sd_folder), state, metadata, "cpu")
    assert [slot.scale["lora"] for slot in backbone.role_slots("lora").values()] == [0.125]
    assert len(sampler_for(SD3, metadata)) == 8 and len(sampler_for(SD3, metadata, 6)) == 6

"""What ships: the embedded model's folder and its judge."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from hypersd.emoji import evaluators, flow_model_folder, model_folder
from hypersd.emoji.scenes import render
from hypersd.emoji.train import check_evaluator, to_tensor
from hypersd.evaluate.generate import generate, to_float
from hypersd.evaluate.metrics import object_recall
from hypersd.models import decode_latents, encode_images, encode_prompts, load_components
from hypersd.models.backbone import Backbone
from hypersd.sampling.solvers import ddim
from hypersd.sampling.timesteps import trailing


def test_all_weights_together_are_small_and_in_sixteen_bit() -> None:
    files = sorted(model_folder().rglob("*.safetensors"))
    assert {file.parent.name for file in files} >= {"unet", "transformer", "vae", "text_encoder", "evaluators"}
    assert sum(file.stat().st_size for file in files) <= 25_000_000
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_it_is_an_ordinary_diffusers_pipeline() -> None:
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline.from_pretrained(model_folder(), torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a fox on a blue background", num_inference_steps=2, generator=generator, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert images.std() > 0.01


def test_captions_reach_the_text_encoder_with_their_own_meaning() -> None:
    components = load_components(model_folder())
    hidden = encode_prompts(components, ["a fox on a blue background", "an owl on a blue background"])
    states = hidden["encoder_hidden_states"]
    assert states.shape == (2, 16, 128)
    assert torch.equal(states[0, 0], states[1, 0])  # causal: the start token has not read the caption
    assert (states[0, 2] - states[1, 2]).norm() > 0.1


def test_the_autoencoder_keeps_the_scene() -> None:
    components = load_components(model_folder())
    images = to_tensor(render(321, 32, "heldout").images)
    with torch.no_grad():
        latents = encode_images(components, images)
        output = decode_latents(components, latents)
    assert latents.shape == (32, 4, 16, 16)
    assert 0.8 < latents.std() < 1.2
    psnr = -10 * torch.log10((output - images).square().mean() / 4)
    assert psnr > 22


def test_the_judge_recognises_held_out_scenes() -> None:
    found = check_evaluator(evaluators.load("judge"), "cpu", count=200)
    assert found["objects"] > 0.93 and found["background"] > 0.98
    assert found["retrieval"] > 0.85 and found["preference"] > 0.95


def test_the_flow_teacher_follows_captions() -> None:
    """15 guided steps; by chance an object is found in 1 or 2 of 100 pictures, a background in 10."""
    components = load_components(flow_model_folder())
    process, backbone = components.noise_process(), Backbone(components.network, roles=())
    assert process.kind == "flow" and sum(p.numel() for p in components.network.parameters()) < 2_000_000
    scenes = render(4321, 48, "heldout")
    table = ddim(process, trailing(15, process.num_train_timesteps)).guided(5.0)
    images = to_float(next(generate(components, backbone, table, scenes.captions, seed=1)))
    judge = evaluators.load("judge")
    assert object_recall(judge.objects(images), scenes.objects).mean() > 0.5
    ground = judge.background(images).argmax(1)
    assert (ground == torch.from_numpy(scenes.background)).float().mean() > 0.9


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluator set is 'critic'"):
        evaluators.load("critic")

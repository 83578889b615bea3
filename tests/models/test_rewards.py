"""The public classes at tiny sizes with random weights, saved under the names of the public files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models.rewards import Instances, hpsv2, imagereward, load_reward, load_segmenter
from hypersd.models.rewards.aesthetic import HEAD
from hypersd.models.rewards.files import square
from tests.conftest import write_tokenizer

CAPTIONS = ["a fox", "an apple on a red background"]
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
    "image_size": 32, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 514,
    "max_position_embeddings": 16, "projection_dim": 16, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
}  # fmt: skip


def pictures(count: int = 2, height: int = 48, width: int = 64) -> Tensor:
    return (torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(4)) * 2 - 1).requires_grad_()


def check(reward: Any, **expect: Any) -> Tensor:
    """Shape, dtype, frozen, a gradient of each score in its own picture alone; the scores."""
    images = pictures()
    scores = reward(images, CAPTIONS)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
    (gradient,) = torch.autograd.grad(scores[0], images)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0
    with torch.no_grad():
        assert torch.allclose(reward(images[1:], CAPTIONS[1:]), scores[1:], rtol=1e-4, atol=1e-5)  # row by row
    return scores.detach()


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    write_tokenizer(folder)
    clip().save_pretrained(folder)
    return folder


def tokens(folder: Path, length: int = 16) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(CAPTIONS, padding="max_length", max_length=length, truncation=True, return_tensors="pt"))


def test_square_is_what_the_processor_of_clip_makes() -> None:
    """Shorter side to size, middle cut out, normalised; a constant picture can be checked by hand."""
    grey = square(torch.zeros(1, 3, 40, 60), 32)
    assert grey.shape == (1, 3, 32, 32)
    wanted = (torch.tensor([0.5] * 3) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(grey[0, :, 5, 7], wanted)
    images = torch.full((1, 3, 32, 64), -1.0)
    images[..., 16:48] = 1.0  # the middle square is white
    assert (square(images, 32) > 1).all()
    assert torch.equal(square(torch.full((1, 3, 32, 32), 3.0), 32), square(torch.ones(1, 3, 32, 32), 32))


def test_pickscore(clip_folder: Path) -> None:
    scores = check(load_reward("pickscore", clip_folder))
    model = clip()
    with torch.no_grad():
        output = model(**tokens(clip_folder), pixel_values=square(pictures(), 32))
    torch.testing.assert_close(scores, output.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5)


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to open_clip's, written the other way round on its own."""
    found = {"logit_scale": state["logit_scale"], "visual.proj": state["visual_projection.weight"].T.contiguous()}
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    v, t = "vision_model.embeddings.", "text_model.embeddings."
    found["visual.class_embedding"] = state[f"{v}class_embedding"]
    found["visual.positional_embedding"] = state[f"{v}position_embedding.weight"]
    found["visual.conv1.weight"] = state[f"{v}patch_embedding.weight"]
    found["positional_embedding"] = state[f"{t}position_embedding.weight"]
    found["token_embedding.weight"] = state[f"{t}token_embedding.weight"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for i in range(2):
                old, new = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
                qkv = [state[f"{old}self_attn.{c}_proj.{kind}"] for c in "qkv"]
                found[f"{new}attn.in_proj_{kind}"] = torch.cat(qkv)
                found[f"{new}attn.out_proj.{kind}"] = state[f"{old}self_attn.out_proj.{kind}"]
                found[f"{new}ln_1.{kind}"] = state[f"{old}layer_norm1.{kind}"]
                found[f"{new}ln_2.{kind}"] = state[f"{old}layer_norm2.{kind}"]
                found[f"{new}mlp.c_fc.{kind}"] = state[f"{old}mlp.fc1.{kind}"]
                found[f"{new}mlp.c_proj.{kind}"] = state[f"{old}mlp.fc2.{kind}"]
    return found


def test_hpsv2_from_the_names_of_open_clip(tmp_path: Path) -> None:
    folder = tmp_path / "hps"
    write_tokenizer(folder)
    torch.manual_seed(0)
    from transformers import CLIPConfig, CLIPModel

    vision, text = ({**config, "hidden_act": "gelu"} for config in (VISION, TEXT))
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    state = to_open_clip(model.state_dict())
    save_file(state, folder / "HPS_v2.1.safetensors")
    scores = check(hpsv2.load(folder, vision=vision, text=text))
    with torch.no_grad():
        output = model(**tokens(folder), pixel_values=square(pictures(), 32))
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    torch.testing.assert_close(scores, cosine, rtol=1e-5, atol=1e-6)
    # the real sizes are those of ViT-H-14, which this file is not
    with pytest.raises(HypersdError, match=r"has shape .*; it must be the state dict of HPS_v2.1"):
        load_reward("hpsv2", folder)


def test_aesthetic(clip_folder: Path) -> None:
    torch.manual_seed(1)
    widths = (16, 1024, 128, 64, 16, 1)
    state = {}
    for number, (a, b) in zip("02467", zip(widths[:-1], widths[1:], strict=True), strict=True):
        state |= {f"layers.{number}.weight": torch.randn(b, a) / a**0.5, f"layers.{number}.bias": torch.randn(b)}
    with pytest.raises(HypersdError, match=f"{HEAD} does not exist"):
        load_reward("aesthetic", clip_folder)
    save_file(state, clip_folder / HEAD)
    scores = check(load_reward("aesthetic", clip_folder))
    with torch.no_grad():
        x = clip()(**tokens(clip_folder), pixel_values=square(pictures(), 32)).image_embeds
        for number in "02467":
            x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(scores, x[:, 0], rtol=1e-4, atol=1e-5)


def blip_score(state: dict[str, Tensor], tokens: dict[str, Tensor]) -> Tensor:
    """ImageReward's raw score from BLIP's own names and the papers' words: a ViT with norms before its layers, BERT
    with norms after them and the picture's tokens as keys and values between, then linear layers on the first token."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in (q, k, v))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None] == 0, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    at = "visual_encoder."
    kernel = state[at + "patch_embed.proj.weight"]
    patches = torch.nn.functional.unfold(square(pictures(), 32), 8, stride=8).transpose(1, 2)
    x = patches @ kernel.flatten(1).T + state[at + "patch_embed.proj.bias"]
    x = torch.cat([state[at + "cls_token"].expand(len(x), 1, -1), x], 1) + state[at + "pos_embed"]
    for block in (f"{at}blocks.0", f"{at}blocks.1"):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(at + "norm", x, 1e-6)

    at, ids = "text_encoder.embeddings.", tokens["input_ids"]
    x = state[at + "word_embeddings.weight"][ids] + state[at + "position_embeddings.weight"][: ids.shape[1]]
    x = norm(at + "LayerNorm", x, 1e-12)
    for layer in ("text_encoder.encoder.layer.0", "text_encoder.encoder.layer.1"):
        for part, mask in (("attention", tokens["attention_mask"]), ("crossattention", None)):
            own, keys = f"{layer}.{part}.self", x if part == "attention" else seen
            y = attend(linear(f"{own}.query", x), linear(f"{own}.key", keys), linear(f"{own}.value", keys), mask)
            x = norm(f"{layer}.{part}.output.LayerNorm", x + linear(f"{layer}.{part}.output.dense", y), 1e-12)
        y = linear(f"{layer}.output.dense", gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + y, 1e-12)
    x = x[:, 0]
    for number in "02467":
        x = linear(f"mlp.layers.{number}", x)
    return x[:, 0]


def test_imagereward_from_the_names_of_blip(tmp_path: Path) -> None:
    """Saved under BLIP's names, by a renaming of its own; the loaded one answers as the model before."""
    vision = imagereward.VISION | {k: v for k, v in VISION.items() if k != "projection_dim"}
    text = imagereward.TEXT | {
        "hidden_size": 24, "encoder_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 514, "max_position_embeddings": 40,
    }  # fmt: skip
    folder = tmp_path / "imagereward"
    write_tokenizer(folder)
    torch.manual_seed(2)
    model = imagereward.ImageReward(None, vision, text).eval()
    state: dict[str, Tensor] = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    renamed = {
        "embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj", "encoder.layers": "blocks", "post_layernorm": "norm",
        "self_attn.projection": "attn.proj", "self_attn.qkv": "attn.qkv", "layer_norm": "norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        part, rest = name.split(".", 1)
        for new, old in renamed.items() if part == "vision" else ():
            rest = rest.replace(new, old)
        prefix = {"vision": "blip.visual_encoder", "text": "blip.text_encoder", "mlp": "mlp.layers"}[part]
        state[f"{prefix}.{rest}"] = tensor.contiguous()
    names = set(state)
    assert {
        "blip.visual_encoder.blocks.1.attn.qkv.weight",
        "blip.visual_encoder.blocks.0.norm1.weight",
        "blip.visual_encoder.norm.bias",
        "blip.visual_encoder.pos_embed",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "mlp.layers.7.bias",
    } <= names
    save_file(state, folder / "ImageReward.safetensors")
    reward = imagereward.load(folder, vision=vision, text=text)
    scores = check(reward)
    model.tokenizer = reward.tokenizer
    with torch.no_grad():
        torch.testing.assert_close(scores, model(pictures(), CAPTIONS))
        by_hand = blip_score({k.removeprefix("blip."): v for k, v in state.items()}, tokens(folder, imagereward.LENGTH))
        torch.testing.assert_close(scores, (by_hand - 0.16717) / 1.03334, rtol=1e-4, atol=1e-5)
        swapped = model(pictures(), CAPTIONS[::-1])
    assert (scores - swapped).abs().min() > 1e-6  # the caption counts
    with pytest.raises(HypersdError, match="it must be the state dict of ImageReward.pt"):
        load_reward("imagereward", folder)


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, clip_folder: Path) -> None:
    def line(kind: str, folder: Path) -> str:
        with pytest.raises(HypersdError) as caught:
            load_reward(kind, folder)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for kind in ("aesthetic", "pickscore"):
        assert "has no config.json; it must hold" in line(kind, tmp_path / "nowhere")
    for kind in ("hpsv2", "imagereward"):
        assert "no folder" in line(kind, tmp_path / "nowhere")
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "weights.pt").write_bytes(b"PK")
        assert "has no *.safetensors files; it must hold the state dict of" in line(kind, tmp_path / kind)
    assert "use aesthetic, pickscore, hpsv2, imagereward" in line("clipscore", tmp_path)
    state = load_file(clip_folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, clip_folder / "model.safetensors")
    assert "visual_projection.weight is missing; it must hold PickScore_v1" in line("pickscore", clip_folder)
    (clip_folder / "model.safetensors").unlink()
    (clip_folder / "pytorch_model.bin").write_bytes(b"PK")
    assert "only as a pickle" in line("pickscore", clip_folder)


def mask2former() -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(3)
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=1, num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=7,
        train_num_points=64,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def instances() -> list[Instances]:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:30, 10:40] = masks[1, 40:60, 5:50] = True
    return [Instances(torch.tensor([3, 6]), masks), Instances(torch.zeros(0, dtype=torch.long), masks[:0])]


def test_structure_by_any_segmenter_of_transformers(tmp_path: Path) -> None:
    model = mask2former()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    segmenter: Any = load_segmenter("transformers", tmp_path)
    images = pictures(2, 64, 64)
    loss = segmenter(images, instances())
    (gradient,) = torch.autograd.grad(loss, images)
    # the second picture has no instances and is left out
    assert loss.dim() == 0 and gradient[0].abs().max() > 0 and gradient[1].abs().max() == 0
    assert torch.isfinite(gradient).all() and not any(p.requires_grad for p in segmenter.parameters())
    before = torch.random.get_rng_state()
    assert torch.equal(segmenter(images, instances()), loss)  # its random points are the same ones
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(0)
    own = model.eval()(
        pixel_values=((images[:1] + 1) / 2 - 0.4) / 0.2,
        mask_labels=[instances()[0].masks.float()],
        class_labels=[instances()[0].labels],
    )
    torch.testing.assert_close(own.loss.sum(), loss)
    assert float(segmenter(images[1:].detach(), instances()[1:])) == 0.0
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(HypersdError, match="preprocessor_config.json is missing"):
        load_segmenter("transformers", tmp_path)
    with pytest.raises(HypersdError, match="use solo or transformers"):
        load_segmenter("yolo", tmp_path)

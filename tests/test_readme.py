"""The README's Python runs as it stands, on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
[data]
kind = "folder"
[lora]
rank = 2
alpha = 2.0
[train]
batch_size = 2
[[stages]]
method = "tscd"
segments = 1
iterations = 1
guidance_scale = [3.0, 3.0]
"""


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def block_with(word: str) -> str:
    (found,) = (block for block in blocks((ROOT / "README.md").read_text("utf-8")) if word in block)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_sd_folder):
    """Executes the block that holds a word, in one folder, with its example names replaced by tiny things."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pictures").mkdir()
    for index in range(2):
        image = np.full((64, 64, 3), 90 * index, np.uint8)
        Image.fromarray(image).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"picture {index}")
    (folder / "tiny.toml").write_text(RECIPE)
    names = {"path/to/model": tiny_sd_folder, "path/to/pictures": folder / "pictures", "sd15": folder / "tiny.toml"}
    names |= {"out/mine": folder / "out"}
    names |= dict.fromkeys(("lora.safetensors", "style.safetensors"), folder / "out" / "lora.safetensors")

    def execute(word: str, before: dict[str, object] | None = None, **changes: Path) -> dict[str, object]:
        code = block_with(word)
        for name, value in (names | changes).items():
            code = code.replace(name, str(value))
        scope: dict[str, object] = before or {}
        exec(compile(code, "README.md", "exec"), scope)
        return scope

    execute("Trainer(")
    assert (folder / "out" / "lora.safetensors").exists()
    return execute


def test_every_block_is_run_here():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(blocks(text)) == 6


def test_sampling_without_a_pipeline(run):
    scope = run("sampler_for")
    assert scope["images"].shape == (1, 3, 64, 64)
    assert run("style.safetensors", scope)["pictures"].shape == (3, 3, 64, 64)


def test_a_published_file_without_a_pipeline(run, tiny_sd3_folder, tmp_path):
    """Its strength, grid and guidance come by its name."""
    path = tmp_path / "Hyper-SD3-4steps-CFG-lora.safetensors"
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}, path)
    scope = run("sampler_for", **{"path/to/model": tiny_sd3_folder, "lora.safetensors": path})
    assert scope["backbone"].role_scales("student") == [0.125]
    assert scope["table"].is_guided and scope["images"].shape == (1, 3, 64, 64)


def test_scheduler_in_a_pipeline(run):
    scope = run("pipe.scheduler =")
    assert scope["image"].size == (64, 64)
    fused = run("network_of", scope)
    assert "student" in fused["backbone"].roles
    assert fused["fused_image"].size == (64, 64)


def test_kernels(run):
    scope = run("explain(")
    x, eps = scope["x"], scope["eps"]
    torch.testing.assert_close(scope["y"], 0.9 * x - 0.1 * eps)

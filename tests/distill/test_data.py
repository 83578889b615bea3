from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hypersd.distill.data import LatentDataset
from hypersd.errors import HypersdError
from hypersd.models.load import load_components
from hypersd.models.prompts import encode_images, encode_null, encode_prompts
from tests.conftest import make_vae


def numbered(count: int, shards: int = 1) -> LatentDataset:
    """Sample i has latents and condition filled with i."""
    values = torch.arange(count, dtype=torch.float32)
    parts = [
        {"latents": v[:, None, None, None].expand(-1, 4, 2, 2).contiguous(), "c": v[:, None] + 0.5}
        for v in values.chunk(shards)
    ]
    return LatentDataset(parts, [str(i) for i in range(count)], {"c": torch.full((1, 1), -1.0)})


def test_every_epoch_is_a_permutation() -> None:
    data = numbered(10, shards=3)
    seen = [data.batch(step, 4, seed=5).latents[:, 0, 0, 0].tolist() for step in range(10)]
    flat = [x for batch in seen for x in batch]
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    whole, cut = numbered(50), numbered(50, shards=4)
    for step in (7, 0, 31):  # any order
        a, b = whole.batch(step, 6, seed=1), cut.batch(step, 6, seed=1)
        assert torch.equal(a.latents, b.latents) and torch.equal(a.cond["c"], b.cond["c"])
        assert torch.equal(a.cond["c"][:, 0], a.latents[:, 0, 0, 0] + 0.5)  # rows stay together
        assert not torch.equal(a.latents, whole.batch(step, 6, seed=2).latents)
    assert len(whole.batch(0, 120, seed=0).latents) == 120  # larger than an epoch


def test_caption_dropout() -> None:
    data = numbered(40)
    dropped = torch.stack([data.batch(s, 40, seed=3, caption_dropout=0.3).cond["c"][:, 0] < 0 for s in range(50)])
    assert abs(dropped.float().mean() - 0.3) < 0.04
    assert len(dropped.unique(dim=0)) == 50  # others in every batch
    again = data.batch(9, 40, seed=3, caption_dropout=0.3).cond["c"]
    assert torch.equal(again, data.batch(9, 40, seed=3, caption_dropout=0.3).cond["c"])
    assert torch.all(data.batch(9, 40, seed=3).cond["c"] > 0)  # the stored conditions are untouched


def test_bad_datasets() -> None:
    with pytest.raises(HypersdError, match="empty"):
        LatentDataset([], [], {})
    with pytest.raises(HypersdError, match="1 captions for 2 latents"):
        LatentDataset([{"latents": torch.zeros(2, 1)}], ["x"], {})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_folder_to_cache_and_back(tmp_path: Path, pictures: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    counted: list[tuple[int, int | None]] = []

    def build() -> LatentDataset:
        return LatentDataset.from_folder(
            pictures, components, tmp_path / "cache", dtype=torch.float32, batch_size=2,
            progress=lambda done, total: counted.append((done, total)),
        )  # fmt: skip

    data = build()
    assert counted == [(2, 5), (4, 5), (5, 5)] and len(data) == 5 and data.captions[3] == "picture 3"
    rows = data.rows(np.array([3, 1]))
    assert rows.latents.shape == (2, 4, 16, 16)
    expected = encode_prompts(components, ["picture 3", "picture 1"])["encoder_hidden_states"]
    torch.testing.assert_close(rows.cond["encoder_hidden_states"], expected)
    torch.testing.assert_close(data.uncond, encode_null(components))
    counted.clear()
    assert torch.equal(build().rows(np.array([3, 1])).latents, rows.latents) and counted == []  # opened, not encoded
    (pictures / "4.txt").write_text("another caption")
    assert build().captions[4] == "another caption" and len(counted) == 3


def test_latents_are_vae_samples(tmp_path: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    images = np.random.default_rng(1).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    source = [(images, ["a", "b", "c"])]
    first, again, other = (
        LatentDataset.from_source(source, components, tmp_path / str(i), dtype=torch.float32, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    )
    a, b, c = (d.rows(np.arange(3)).latents for d in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    drawn = torch.stack([encode_images(components, pixels, torch.Generator().manual_seed(i)) for i in range(64)])
    assert ((a - drawn.mean(0)) / drawn.std(0)).abs().mean() < 1.0  # 0.8 for a sample of that normal distribution


def test_sdxl_is_told_the_picture_s_size(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    components = load_components(tiny_sdxl_folder)
    images = np.zeros((2, 32, 48, 3), np.uint8)
    data = LatentDataset.from_source([(images, ["a", "b"])], components, tmp_path, shard_size=1)
    cond = data.rows(np.array([1, 0])).cond
    assert cond["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert "time_ids" not in data.uncond and torch.all(data.uncond["text_embeds"] == 0)


def test_other_weights_are_encoded_anew(
    tmp_path: Path, pictures: Path, tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another VAE or text encoder in the same folder; the network does not matter."""
    model = tmp_path / "model"
    shutil.copytree(tiny_sd_folder, model)

    def build() -> LatentDataset:
        return LatentDataset.from_folder(pictures, load_components(model), tmp_path / "cache", dtype=torch.float32)

    first, rows = build(), np.arange(5)
    (model / "unet" / "diffusion_pytorch_model.safetensors").touch()
    assert torch.equal(build().rows(rows).latents, first.rows(rows).latents) and not caplog.records
    vae = make_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(0.5)
    vae.save_pretrained(model / "vae")
    second = build()
    assert not torch.equal(second.rows(rows).latents, first.rows(rows).latents)
    assert len(caplog.records) == 1 and "encoding again: " in caplog.text and "weights of VAE" in caplog.text
    os.utime(model / "text_encoder" / "model.safetensors", ns=(1, 1))
    assert torch.equal(build().rows(rows).latents, second.rows(rows).latents) and len(caplog.records) == 2


def test_shards_are_cut_by_bytes(tmp_path: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), dtype=np.uint8)
    source = [(images[i : i + 1], [str(i)]) for i in range(6)]
    one = 2 * (4 * 16 * 16 + 16 * 32)  # bytes of a picture: latents and text
    whole = LatentDataset.from_source(source, components, tmp_path / "whole")
    cut = LatentDataset.from_source(source, components, tmp_path / "cut", shard_bytes=2 * one)
    assert [len(shard["latents"]) for shard in cut.shards] == [2, 2, 2] and len(whole.shards) == 1
    assert torch.equal(cut.rows(np.arange(6)).latents, whole.rows(np.arange(6)).latents)
    assert cut.fingerprint == whole.fingerprint  # a run resumes however its data is cut


def test_a_fingerprint_of_before() -> None:
    """That of shards of 4,096 pictures, so that older runs resume."""
    data = LatentDataset([{"latents": torch.zeros(n, 1, 1, 1)} for n in (4096, 4)], ["x"] * 4100, {})
    shapes = [{"latents": [4096, 1, 1, 1]}, {"latents": [4, 1, 1, 1]}]
    assert data.fingerprint == hashlib.sha256(json.dumps([["x"] * 4100, shapes]).encode()).hexdigest()


def test_a_source_that_does_not_match(tmp_path: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    with pytest.raises(HypersdError, match="batch 0 of the source has 2 images and 1 captions"):
        LatentDataset.from_source([(images, ["a"])], components, tmp_path)
    with pytest.raises(HypersdError, match="gave no picture"):
        LatentDataset.from_source([], components, tmp_path)
    with pytest.raises(HypersdError, match="no data cache"):
        LatentDataset.open(tmp_path)


def test_a_damaged_cache(tmp_path: Path, tiny_sd_folder: Path) -> None:
    components = load_components(tiny_sd_folder)
    images = np.zeros((2, 64, 64, 3), np.uint8)
    LatentDataset.from_source([(images, ["a", "b"])], components, tmp_path, key="k")
    assert len(LatentDataset.open(tmp_path, key="k")) == 2
    with pytest.raises(HypersdError, match="made from other data"):
        LatentDataset.open(tmp_path, key="other")
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(HypersdError, match="shard-00000.safetensors is damaged"):
        LatentDataset.open(tmp_path)
    shard.write_bytes(whole)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["count"] = 3
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(HypersdError, match="not the shard that index.json describes"):
        LatentDataset.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(HypersdError, match="index.json is damaged"):
        LatentDataset.open(tmp_path)

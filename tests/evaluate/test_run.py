from __future__ import annotations

import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.evaluate import run
from hypersd.evaluate.generate import generate, to_float, to_uint8
from hypersd.evaluate.metrics import Moments, frechet_distance
from hypersd.evaluate.protocol import FeatureEvaluator
from hypersd.evaluate.run import COLUMNS, Judge, Reference, evaluate
from hypersd.models.backbone import Backbone
from hypersd.models.load import load_components
from hypersd.models.lora import LoraSpec
from hypersd.models.noise_process import NoiseProcess
from hypersd.models.prompts import decode_latents, encode_images
from hypersd.sampling.solvers import ddim, tcd
from hypersd.sampling.timesteps import trailing


class Colours:
    """An evaluator whose every number can be worked out by hand: pictures are their mean colour."""

    def features(self, images):
        return images.mean((2, 3))

    def alignment(self, images, captions):
        return torch.tensor([float(len(caption)) for caption in captions])

    def preference(self, images):
        return images.mean((1, 2, 3))

    def objects(self, images):
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def components(tiny_sd_folder):
    return load_components(tiny_sd_folder)


@pytest.fixture(scope="module")
def backbone(components):
    backbone = Backbone(components.network, LoraSpec(rank=4, alpha=4.0), roles=())
    backbone.add_role("student", generator=torch.Generator().manual_seed(0))
    for name, parameter in backbone.role_parameters("student").items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return backbone


def reference(count: int, seed: int = 0) -> Reference:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    captions = [f"caption {'x' * index}" for index in range(count)]
    return Reference(images, captions, [(index % 3,) for index in range(count)])


def pictures(components, backbone, table, count=5, **options) -> np.ndarray:
    captions = [f"picture {index}" for index in range(count)]
    return np.concatenate(list(generate(components, backbone, table, captions, **options)))


def test_uint8_round_trip_and_clamping():
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    assert np.array_equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).reshape(1, 3, 1, 1)).ravel().tolist() == [0, 255, 128]


def test_pictures_depend_on_the_seed_and_not_on_the_batch(components, backbone):
    process = NoiseProcess.from_config(components.scheduler_config)
    for table in (ddim(process, trailing(2)).guided(3.0), tcd(process, trailing(2), eta=1.0)):
        first = pictures(components, backbone, table, seed=3, batch_size=5)
        assert first.shape == (5, 64, 64, 3) and first.dtype == np.uint8 and first.std() > 5
        assert np.array_equal(first, pictures(components, backbone, table, seed=3, batch_size=5))
        other_batches = pictures(components, backbone, table, seed=3, batch_size=2)
        assert np.abs(first.astype(int) - other_batches).max() <= 1  # convolutions may round differently
        assert not np.array_equal(first, pictures(components, backbone, table, seed=4, batch_size=5))


def test_a_role_changes_the_picture(components, backbone):
    table = ddim(NoiseProcess.from_config(components.scheduler_config), trailing(1))
    base = pictures(components, backbone, table)
    assert not np.array_equal(base, pictures(components, backbone, table, role="student"))


def test_judge_row_by_hand():
    real = reference(40)
    judge = Judge(Colours(), Colours().features, real)
    shifted = np.clip(real.images.astype(int) + 20, 0, 255).astype(np.uint8)
    row, intervals = judge.row([shifted[:7], shifted[7:]], nfe=5)
    means = to_float(shifted).mean((2, 3))
    assert row["nfe"] == 5
    assert row["frechet"] == pytest.approx(
        frechet_distance(Moments.of(means), Moments.of(to_float(real.images).mean((2, 3))))
    )
    assert row["alignment"] == pytest.approx(np.mean([len(caption) for caption in real.captions]))
    hits = [int(means[i].argmax()) == i % 3 for i in range(40)]
    assert row["objects"] == pytest.approx(np.mean(hits))
    assert row["aesthetic"] == pytest.approx(float(means.mean()))
    assert intervals["objects"][0] < row["objects"] < intervals["objects"][1]
    assert judge.diversity([real.images[:4]], 2) == pytest.approx(
        float(
            (
                judge.features([real.images[0:2]]).diff(dim=0).norm()
                + judge.features([real.images[2:4]]).diff(dim=0).norm()
            )
            / 2
        )
    )


def test_table_of_a_tiny_model(components, backbone, monkeypatch):
    real, seen, roles = reference(6), [], []
    monkeypatch.setattr(
        run, "generate", lambda *args, **options: roles.append(options["role"]) or generate(*args, **options)
    )
    result = evaluate(
        components, backbone, real, Colours(), zero=reference(6, seed=1), steps=(1, 2), teacher_steps=3, variety=(2, 3),
        grid=2, batch_size=4, progress=lambda *event: seen.append(event),
    )  # fmt: skip
    assert list(result.rows) == ["reference", "teacher", "undistilled", "student"]
    assert roles == ["base"] * 2 + (["base"] * 2 + ["student"] * 2) * 2  # pictures and variety of each row
    decoded = to_uint8(decode_latents(components, encode_images(components, to_float(real.images))))
    means = (to_float(pixels).mean((2, 3)) for pixels in (decoded, real.images))
    autoencoded = frechet_distance(*map(Moments.of, means))
    assert result.rows["reference"]["autoencoder"]["frechet"] == pytest.approx(autoencoded, rel=1e-3)
    assert result.rows["teacher"]["nfe"] == 6
    assert {n: row["nfe"] for n, row in result.rows["undistilled"].items()} == {"1": 2, "2": 4}
    assert {n: row["nfe"] for n, row in result.rows["student"].items()} == {"1": 1, "2": 2}
    for row in [result.rows["teacher"], *result.rows["undistilled"].values(), *result.rows["student"].values()]:
        assert set(row) == set(COLUMNS) and all(row[name] is not None and np.isfinite(row[name]) for name in COLUMNS)
        assert row["alignment"] == pytest.approx(10.5)  # "caption " and 0 to 5 letters
    assert 0 < result.rows["reference"]["real"]["frechet"] < result.rows["student"]["1"]["frechet"]
    assert list(result.pictures) == ["teacher", "undistilled/1", "student/1", "undistilled/2", "student/2"]
    assert all(kept.shape == (2, 64, 64, 3) for kept in result.pictures.values())
    assert [event for event in seen if event[0] == "teacher"] == [
        ("teacher", 4, 12), ("teacher", 6, 12), ("teacher", 10, 12), ("teacher", 12, 12)
    ]  # fmt: skip
    again = evaluate(
        components, backbone, real, Colours(), steps=(1,), teacher_steps=3, variety=(2, 3), grid=2, batch_size=4
    )
    assert again.rows["student"]["1"] == result.rows["student"]["1"]


def test_only_what_the_evaluator_can_judge(components, backbone):
    result = evaluate(
        components, backbone, reference(4), FeatureEvaluator(lambda images: images.mean((2, 3))), steps=(1,),
        teacher_steps=1, variety=(1, 2), batch_size=4,
    )  # fmt: skip
    row = result.rows["student"]["1"]
    assert row["alignment"] is None and row["objects"] is None and row["aesthetic"] is None
    assert row["frechet"] > 0 and row["diversity"] > 0


def test_captions_that_do_not_match_the_pictures():
    with pytest.raises(HypersdError, match="4 reference pictures but 3 captions"):
        Reference(np.zeros((4, 8, 8, 3), np.uint8), ["a"] * 3)


def test_table_of_a_network_that_is_told_its_guidance(tiny_flux_folder):
    """No row of FLUX takes a second pass; teacher and undistilled are told the guidance that was asked for."""
    flux = load_components(tiny_flux_folder)
    flux.resolution = (32, 32)
    told = []
    flux.network.register_forward_pre_hook(
        lambda module, args, kwargs: told.append((len(args[0]), set(kwargs["guidance"].tolist()))), with_kwargs=True
    )
    small = Backbone(flux.network, LoraSpec(2, 2.0, ("to_q",)))
    images = np.zeros((2, 32, 32, 3), np.uint8)
    result = evaluate(
        flux, small, Reference(images, ["a", "b"], None), Colours(), steps=(1,), teacher_steps=2, guidance_scale=2.0,
        variety=(1, 2),
    )  # fmt: skip
    assert [result.rows[name]["nfe"] if name == "teacher" else result.rows[name]["1"]["nfe"] for name in
            ("teacher", "undistilled", "student")] == [2, 1, 1]  # fmt: skip
    assert {size for size, _ in told} == {2} and {2.0} in [g for _, g in told] and {3.5} in [g for _, g in told]

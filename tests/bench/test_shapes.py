"""The cases of a shape set are shapes of its network: every layer is found in one forward of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import census
from hypersd.kernels import _shapes
from hypersd.kernels._op import OPS

ROOT = Path(__file__).resolve().parents[2]
LATENTS = {"affine_step": "x", "consistency_loss": "x_t", "score_gradient": "x"}
BUFFERS = {"adamw_ema_", "clip_coefficient"}  # as long as the LoRA is: no layer of the network
layers = cache(census.layers)


def wrong(name: str, seen: Counter[census.Layer]) -> list[str]:
    """The cases of a set that its network does not have."""
    latent = next(iter(_shapes.read(name)["network"]["inputs"].values()))
    found = []
    for op in OPS.values():
        for case in op.cases:
            if not case.name.startswith(f"{name}_") or op.name in BUFFERS:
                continue
            with FakeTensorMode():
                inputs = case.inputs()
            if op.name in LATENTS:
                good = list(inputs[LATENTS[op.name]].shape[1:]) == latent[1:]
            else:
                layer = census.layer(op.name, inputs)
                assert layer is not None, f"the census does not know {op.name}"
                good = layer in seen
            found += [] if good else [f"{op.name} {case.name}"]
    return found


@pytest.mark.parametrize("name", _shapes.SETS)
def test_every_case_is_a_layer_of_its_network(name):
    assert wrong(name, layers(name)) == []


def test_a_shape_that_no_layer_has_is_found():
    seen = layers("emoji").copy()
    del seen["geglu", (16, 1024)]
    assert wrong("emoji", seen) == ["geglu emoji_b32_16x512"]


def test_the_census_counts_the_layers_of_sd15():
    """Two attentions in each of 16 transformers; norms: two in 22 residual blocks, one a transformer, one last."""
    seen = layers("sd15")
    count = Counter()
    for (op, _), times in seen.items():
        count[op] += times
    assert count["attention"] == 32 and count["geglu"] == 16
    assert count["group_norm_silu"] == 2 * 22 + 16 + 1
    assert seen["attention", (8, 4096, 77, 40)] == 5


def test_each_set_has_cases_for_every_operator_that_occurs_there():
    for name in _shapes.SETS:
        listed = set(_shapes.read(name)["cases"])
        patches = ("lora_conv2d", "sd3")  # its patch embedding: no LoRA goes there
        large = {op for op, sizes in layers(name) if math.prod(sizes) > 8e3 and (op, name) != patches}
        assert large | LATENTS.keys() | BUFFERS | {"lora_linear_routed"} == listed, name
    assert {op for name in _shapes.SETS for op in _shapes.read(name)["cases"]} <= OPS.keys()


def test_the_embedded_network_is_the_one_that_ships():
    config = json.loads((ROOT / "hypersd/emoji/weights/unet/config.json").read_text("utf-8"))
    assert _shapes.read("emoji")["network"]["config"].items() <= config.items()


def test_names_are_unique_and_benchmark_cases_belong_to_a_set():
    for op in OPS.values():
        names = [case.name for case in op.cases]
        assert len(set(names)) == len(names)
        sets = {case.name.split("_")[0] for case in op.cases if case.bench}
        assert sets <= set(_shapes.SETS), op.name


def test_the_sets_are_packaged():
    assert '"hypersd.kernels" = ["configs/**/*.json", "shapes/*.json"]' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_a_case_draws_its_numbers_from_the_set():
    (case,) = (c for c in OPS["attention"].cases if c.name == "emoji_b32_64x16")
    inputs = case.inputs(torch.bfloat16)
    assert inputs["q"].shape == (32, 4, 64, 32) and inputs["k"].shape == (32, 4, 16, 32)
    assert inputs["q"].dtype == torch.bfloat16

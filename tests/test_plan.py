from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from hypersd.distill.recipe import parse_recipe
from hypersd.models.backbone import Backbone
from hypersd.models.encoder_critic import EncoderCritic
from hypersd.plan import plan, show
from hypersd.resolve import load_model


def planned(*stages: dict[str, Any]) -> dict[str, Any]:
    return plan(parse_recipe({"stages": [{"iterations": 1} | stage for stage in stages]}))


def shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_memory_counts_whole_networks() -> None:
    """Student, EMA, fake score, gradient and two moments of two that are trained; the beginning where it is used."""
    dmd = {"method": "dmd", "iterations": 1, "real_score": "base"}
    for anchor, copies in (([0.0, 0.0], 3 + 6), ([0.25, 0.0], 4 + 6)):
        found = plan(parse_recipe({"train": {"full": True}, "stages": [dmd | {"anchor": anchor}]}))
        size = found["base_parameters"]
        assert found["trained_parameters"] == size and found["adapter_bytes"] == 4 * size * copies
    said = shown(found)
    assert f"trained    {size / 1e6:,.2f} M parameters, the whole network" in said
    assert f"+ {found['adapter_bytes'] / 2**20:,.0f} MiB copies and optimizer" in said


def test_memory_counts_every_every_adapter_and_the_copy_of_the_encoder() -> None:
    first, second = {"method": "tscd", "segments": 8}, {"method": "tscd", "segments": 4, "teacher": "previous_stage"}
    ladder, dmd = planned(first, second), planned(first, {"method": "dmd", "real_score": "base"})
    # student, EMA, the stage before; gradient and two moments
    assert ladder["adapter_bytes"] == ladder["trained_parameters"] * 4 * (3 + 3) and ladder["critic_bytes"] == 0
    # student, EMA, fake score, start; two that are trained
    assert dmd["adapter_bytes"] == dmd["trained_parameters"] * 4 * (4 + 6)
    assert [stage["teacher"] for stage in ladder["stages"]] == ["base", "previous_stage"]
    assert [stage["teacher"] for stage in dmd["stages"]] == ["base", "base"]
    critic = EncoderCritic(Backbone(load_model("embedded", "cpu").network, roles=())).network
    found = planned(first, second | {"critic": "encoder", "staged_weights": True})
    assert found["critic_bytes"] == 16 * sum(p.numel() for p in critic.parameters())
    said = shown(found)
    assert f"+ {found['critic_bytes'] / 2**20:,.0f} MiB critic" in said
    components = load_model("embedded", "cpu")
    vae, text = (
        4 * sum(p.numel() for p in part.parameters()) for part in (components.vae, components.text_encoders[0])
    )
    assert f"encoding   {text / 2**20:,.0f} MiB text encoders + {vae / 2**20:,.0f} MiB VAE, before" in said

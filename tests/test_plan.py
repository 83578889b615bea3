from __future__ import annotations

import io

from rich.console import Console

from hypersd.distill.recipe import load_recipe
from hypersd.models.backbone import Backbone
from hypersd.models.encoder_critic import EncoderCritic
from hypersd.plan import plan, show
from hypersd.resolve import load_model


def test_memory_counts_every_adapter_and_the_copy_of_the_encoder() -> None:
    quick, unified = plan(load_recipe("emoji-quick")), plan(load_recipe("emoji-unified"))
    # student, EMA, the stage before; gradient and two moments
    assert quick["adapter_bytes"] == quick["lora_parameters"] * 4 * (3 + 3) and quick["critic_bytes"] == 0
    # student, EMA, fake score, start; two that are trained
    assert unified["adapter_bytes"] == unified["lora_parameters"] * 4 * (4 + 6)
    assert [stage["teacher"] for stage in quick["stages"]] == ["base"] + ["previous_stage"] * 3
    assert {stage["teacher"] for stage in unified["stages"]} == {"base"}
    critic = EncoderCritic(Backbone(load_model("embedded", "cpu").network, roles=())).network
    found = plan(load_recipe("emoji-quick", ["stages.3.critic=encoder", "stages.3.staged_weights=true"]))
    assert found["critic_bytes"] == 16 * sum(p.numel() for p in critic.parameters())
    console = Console(file=io.StringIO(), width=200)
    show(found, console)
    assert f"+ {found['critic_bytes'] / 2**20:,.0f} MiB critic" in console.file.getvalue()  # type: ignore[attr-defined]

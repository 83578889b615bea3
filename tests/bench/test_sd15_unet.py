"""The benchmark of a whole UNet, on a small one: both sides agree, weights are shared, what is wrong is not timed."""

from __future__ import annotations

import torch

from bench import sd15_unet
from bench.harness import OURS

TINY = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "attention_head_dim": 2,
    "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def test_every_provider_is_timed_and_ours_agrees_with_peft():
    rows = {row.provider: row for row in sd15_unet.forward(torch.float32, 2, None, TINY)}
    assert rows.keys() == {OURS, "peft", "base", "diffusers"}
    assert rows[OURS].verdict == "green" and 0 < rows[OURS].error < 1e-5
    assert all(row.rounds == 2 and row.p50 > 0 for row in rows.values())


def test_what_differs_from_peft_gets_no_time(monkeypatch):
    monkeypatch.setitem(sd15_unet.LIMIT, torch.float32, 0.0)
    ours, *_ = sd15_unet.forward(torch.float32, 1, ["peft"], TINY)
    assert ours.verdict.startswith("red") and ours.p50 is None


def test_networks_share_their_weights():
    unet = sd15_unet.random_unet(torch.float32, TINY)
    copied = sd15_unet.shared_copy(unet)
    pairs = list(zip(unet.parameters(), copied.parameters(), strict=True))
    assert pairs and all(one is other for one, other in pairs)


def test_linear_layers_of_a_block():
    rows = sd15_unet.attention_linears(torch.float32, 0.01, {(16, 9): 3, (32, 4): 1})
    assert [row.verdict for row in rows if row.case != "sd15_blocks"] == ["green"] * 4
    narrow, wide, total = (row for row in rows if row.provider == OURS)
    assert total.p50 == round(3 * narrow.p50 + wide.p50, 2) and total.over_ours == 1.0

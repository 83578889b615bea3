"""The diffusers peers take the same step as we do, and the training peer has our loss and gradient."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from bench import sampler, tscd_step


def test_solver_steps_equal_diffusers():
    options = {"device": "cpu", "dtypes": [torch.float32], "shapes": "emoji", "peers": None, "seconds": 0.01}
    groups = list(sampler.measure(**options))
    assert {rows[0].case for rows in groups} == {"ddim_emoji_b32", "tcd_emoji_b32", "lcm_emoji_b32"}
    for rows in groups:
        assert {row.provider for row in rows} == {"hypersd", "scheduler", "diffusers"}
        assert all(row.verdict == "green" and row.p50 for row in rows)


def test_training_peer_has_our_loss_and_gradient(monkeypatch, tmp_path):
    monkeypatch.setattr(tscd_step, "BATCH", 2)
    unet = tscd_step.random_unet()
    data, start = tscd_step.RandomLatents(unet.config.cross_attention_dim), tscd_step.initial_adapter(unet)
    peer = tscd_step.peer(copy.deepcopy(unet), torch.float32, data, start)
    found: list[tuple[float, float]] = []
    tscd_step.ours(unet, torch.float32, data, start, 2, lambda step, loss: found.append(peer(step)), tmp_path)
    own = tscd_step.logged(tmp_path)
    assert len(own) == len(found) == 2 and own[0] != own[1]
    for mine, other in zip(own, found, strict=True):
        assert tscd_step.judge(mine, other, torch.float32)[0] == "green"


def test_a_training_step_is_judged_by_loss_and_gradient_norm():
    assert tscd_step.judge((1.0, 2.0), (1.00005, 2.0), torch.float32)[0] == "green"
    for wrong in ((1.001, 2.0), (1.0, 2.002), (1.0, float("nan")), (float("nan"), 2.0)):
        assert tscd_step.judge(wrong, (1.0, 2.0), torch.float32)[0].startswith("red: loss or gradient norm differs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_the_training_peer_compute_in_the_network_s_dtype(dtype, tiny_unet, tiny_batch):
    loop, (x_t, timestep, cond) = tscd_step.PeerLoop(tiny_unet, dtype), tiny_batch
    computed = set()
    for name, layer in loop.student.named_modules():
        if name.endswith((".lora_A.default", ".lora_B.default")):
            layer.register_forward_hook(lambda layer, inputs, output: computed.add(output.dtype))
    m = loop.network(loop.student, x_t, timestep, cond["encoder_hidden_states"])
    assert computed == {dtype} and m.dtype == torch.float32
    assert {p.dtype for p in loop.parameters} == {torch.float32}


def test_peak_bytes_counts_what_lives_at_once():
    def run() -> torch.Tensor:
        kept = torch.zeros(1000, 1000)
        for _ in range(3):
            torch.zeros(500, 1000)  # freed at once
        return kept

    assert 6_000_000 <= tscd_step.peak_bytes(run) < 6_100_000


def test_what_earlier_runs_left_in_cycles_is_not_taken_off():
    class Knot:
        def __init__(self) -> None:
            self.memory, self.self = torch.zeros(1_000_000), self

    def run() -> torch.Tensor:
        gc.collect()  # as happens at any moment by itself
        return torch.zeros(1_500_000)

    gc.disable()
    try:
        Knot()
        assert 6_000_000 <= tscd_step.peak_bytes(run) < 6_100_000
    finally:
        gc.enable()

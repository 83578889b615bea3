from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hypersd.distill.data import Batch
from hypersd.distill.method import Context
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.rg_lcd import RGLCD
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.export import load_lora
from hypersd.models.noise_process import NoiseProcess
from tests.conftest import make_unet, make_vae
from tests.distill import toy
from tests.distill.test_competitors import SIZE, VP, WEIGHTS, Linear, Scene, free, huber, run
from tests.distill.test_trainer import Stop, assert_same, latents, losses, stop_at

TERMS = [{"kind": "brightness", "weight": 0.3}, {"kind": "contrast", "weight": 0.1}, {"kind": "seen", "weight": 0.0}]


def brightness(images: Tensor, captions: Any) -> Tensor:
    return images.mean((1, 2, 3))


def contrast(images: Tensor, captions: Any) -> Tensor:
    return images.flatten(1).var(1)


def stage(**options: Any) -> Any:
    document = {"method": "rg_lcd", "iterations": 1, "guidance_scale": [3.0, 3.0], "rewards": TERMS}
    return parse_recipe({"stages": [document | options]}).stages[0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_lcm_s_minus_the_rewards_of_the_single_jump(kind: str) -> None:
    scene, student, net = Scene(kind), free(), Linear()
    asked: list[Any] = []

    def seen(images: Tensor, captions: Any) -> Tensor:
        asked.append((torch.is_grad_enabled(), len(captions)))
        return -brightness(images, captions)

    rewards = {"brightness": brightness, "contrast": contrast, "seen": seen}
    process = NoiseProcess.from_config(VP | {"prediction_type": kind})
    context = Context(net, process, {"c": scene.empty}, None, lambda z: 2.0 * z + 1.0, rewards)  # type: ignore[arg-type]
    method = RGLCD(stage(), context)
    inner = method.loss
    method.loss = lambda batch, draw: inner(Batch(batch.latents, batch.cond, ["a"] * SIZE), draw)  # type: ignore
    loss, (t, t_prev, _) = run(scene, method)

    def jump(x: Tensor, n: np.ndarray, weight: Any) -> Tensor:
        x_0, _ = scene.split(x, scene.network(x, n, scene.c, weight), n)
        scaled = torch.tensor(10.0 * n)[:, None, None, None]
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x_0

    x_t = scene.start(t)
    ours = jump(x_t, t, student)
    distance = huber(ours - jump(scene.ddim(x_t, t, t_prev, w=2.0), t_prev, WEIGHTS["student"]))
    picture = 2.0 * ours + 1.0
    measured = {"brightness": picture.mean(), "contrast": picture.flatten(1).var(1).mean(), "seen": -picture.mean()}
    for name, value in measured.items():
        assert method.measures[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert asked == [(False, SIZE)]
    loss32 = distance - 0.3 * measured["brightness"] - 0.1 * measured["contrast"]
    loss32.backward()
    # rewards are float32
    torch.testing.assert_close(loss, loss32, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.w["student"].grad, student.grad, rtol=1e-5, atol=1e-6)
    assert net.w["ema"].grad is None
    assert method.stage.network_evaluations == 2 + 1 + 3 and not method.stage.drops_captions


REWARDS = {
    "brightness": brightness,
    "contrast": contrast,
    "seen": lambda images, captions: -brightness(images, captions),
}


def train(out: Path, resume: bool = False, document: Any = None, batch: int = 2, **options: Any) -> Any:
    document = {"method": "rg_lcd", "iterations": 4, "rewards": TERMS, "guidance_scale": [1.0, 1.0]} | (document or {})
    base = {"batch_size": batch, "learning_rate": 1e-3, "checkpoint_every": 2}
    r = parse_recipe({"train": base, "lora": {"rank": 4, "alpha": 4.0}, "stages": [document]})
    vae = make_vae().requires_grad_(False)
    components = SimpleNamespace(network=make_unet(), vae=vae, scheduler_config=toy.SCHEDULER)
    return Trainer(r, components, latents(), out, rewards=REWARDS, **options).run(resume=resume)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "cut", progress=stop_at("rg_lcd", 3))
    assert_same(whole, train(tmp_path / "cut", resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 4
    _, metadata = load_lora(tmp_path / "cut" / "lora.safetensors")
    assert metadata["method"] == "rg_lcd" and metadata["solver"] == "lcm" and metadata["steps"] == "1,2,4,8"


def test_a_real_picture_grows_brighter(tmp_path: Path) -> None:
    """By the rewards alone: the same run without them stays where it was."""
    means = []
    for weight in (20.0, 1e-9):
        terms = [{"kind": "brightness", "weight": weight}]
        train(tmp_path / str(weight), document={"rewards": terms, "iterations": 16}, batch=4)
        rows = [json.loads(line) for line in (tmp_path / str(weight) / "metrics.jsonl").read_text().splitlines()]
        means.append(np.mean([row["measures"]["brightness"] for row in rows[-4:]]))  # of the same draws
    assert means[0] - means[1] > 5e-4


def test_a_watched_reward_that_falls_while_the_others_rise_warns() -> None:
    process = NoiseProcess.from_config(VP | {"prediction_type": "epsilon"})
    context = Context(Linear(), process, {}, None, lambda z: z, REWARDS)  # type: ignore[arg-type]
    (monitor,) = RGLCD(stage(check_every=10), context).monitors
    noise = np.random.default_rng(0).standard_normal((60, 3)) * 0.05
    rising = (
        {"brightness": 0.1 * i + a, "contrast": 0.1 * i + b, "seen": c - 0.1 * i} for i, (a, b, c) in enumerate(noise)
    )
    said = [message for step, measures in enumerate(rising) if (message := monitor.add(step, measures))]
    assert len(said) == 1 and "stage rg_lcd, step" in said[0] and "independent seen falls" in said[0]


def test_what_cannot_work() -> None:
    with pytest.raises(HypersdError, match="no reward to learn from"):
        stage(rewards=[TERMS[2]])
    with pytest.raises(HypersdError, match="reward seen is there twice"):
        stage(rewards=[TERMS[0], TERMS[2], TERMS[2]])
    with pytest.raises(HypersdError, match=r"stages\.0\.rewards: missing"):
        parse_recipe({"stages": [{"method": "rg_lcd", "iterations": 1}]})
    with pytest.raises(HypersdError, match=r"rewards\.0\.treshold: unknown key; .*allowed: kind, path, weight"):
        stage(rewards=[TERMS[0] | {"treshold": 1.0}])
    net, process = Linear(), NoiseProcess.from_config(VP | {"prediction_type": "epsilon"})
    with pytest.raises(HypersdError, match="decoded to pictures"):
        RGLCD(stage(), Context(net, process, {}))  # type: ignore[arg-type]
    with pytest.raises(HypersdError, match="the stage wants contrast, seen, but no such reward"):
        RGLCD(stage(), Context(net, process, {}, None, lambda z: z, {"brightness": brightness}))  # type: ignore[arg-type]

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
from hypersd.distill.method import STUDENT, Context, Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.rg_lcd import RGLCD, preference_loss
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
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


def test_rewards_that_nobody_watches_are_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    process = NoiseProcess.from_config(VP | {"prediction_type": "epsilon"})
    context = Context(Linear(), process, {}, None, lambda z: z, REWARDS)  # type: ignore[arg-type]
    RGLCD(stage(), context)
    assert not caplog.messages
    RGLCD(stage(rewards=[{"kind": "brightness"}]), context)
    (said,) = caplog.messages
    assert said.startswith("stage rg_lcd: nobody watches the rewards") and "with weight = 0" in said


def test_preferences_are_compared_by_their_divergence() -> None:
    wanted = torch.tensor([1.2, -0.3, 0.0, 4.0], dtype=torch.float64)
    opinion = torch.tensor([0.2, 0.9, -1.5, 4.0], dtype=torch.float64, requires_grad=True)
    p, q = 1 / (1 + torch.exp(-wanted)), 1 / (1 + torch.exp(-opinion))
    expected = (p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))).mean()
    loss = preference_loss(wanted, opinion)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, opinion)
    torch.testing.assert_close(gradient, (q - p).detach() / 4, rtol=1e-10, atol=1e-12)
    assert preference_loss(wanted, wanted).item() == pytest.approx(0.0, abs=1e-15)


def proxied(decode: Any, **options: Any) -> tuple[RGLCD, Batch]:
    torch.manual_seed(0)
    backbone = Backbone(make_unet(), roles=("student", "ema"))
    one = stage(proxy=True, guidance_scale=[1.0, 1.0], **options)
    method = RGLCD(one, Context(backbone, toy.PROCESS, {}, None, decode, REWARDS))  # type: ignore[arg-type]
    return method, latents().batch(0, 4, seed=0)


def test_with_a_proxy_the_student_never_sees_the_rewards() -> None:
    def decode(z: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return z

    method, batch = proxied(decode, proxy_temperature=0.5)
    loss, jumps = (
        method.loss(batch, Draw((3,), torch.device("cpu"))),
        method.jumps(batch, Draw((3,), torch.device("cpu"))),
    )
    x_0 = method._end(jumps)
    assert method.proxy is not None and method.measures == {}
    scores = method.proxy(x_0, torch.zeros(4, dtype=torch.int64), batch.cond)
    opinion = sum(score.mean((1, 2, 3)) for score in scores) / len(scores)
    torch.testing.assert_close(loss, method.distance(jumps) - 0.5 * opinion.mean(), rtol=1e-6, atol=1e-7)
    student = list(method.context.backbone.role_parameters(STUDENT).values())
    ours = torch.autograd.grad(loss, student, retain_graph=True, allow_unused=True)
    alone = torch.autograd.grad(method.distance(jumps), student, allow_unused=True)
    moved = [
        g
        for g, other in zip(ours, alone, strict=True)
        if g is not None and other is not None and not torch.equal(g, other)
    ]
    assert moved and all(g.isfinite().all() for g in moved)
    # its own step: the rewards of three ends, the student's being what is measured
    (auxiliary,) = method.auxiliaries()
    assert auxiliary.name == "proxy" and auxiliary.learning_rate is None
    draw = Draw((4,), torch.device("cpu"))
    jumps = method.jumps(batch, Draw((4,), torch.device("cpu")))
    wanted = [0.3 * brightness(x, None) + 0.1 * contrast(x, None) for x in _three(method, batch, jumps)]
    opinions = [method._opinion(x, batch.cond) for x in _three(method, batch, jumps)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(preference_loss((wanted[i] - wanted[j]) / 0.5, opinions[i] - opinions[j]) for i, j in pairs) / 3
    torch.testing.assert_close(auxiliary.loss(batch, draw), expected, rtol=1e-5, atol=1e-7)
    assert method.measures["brightness"].item() == pytest.approx(method._end(jumps).mean().item(), rel=1e-5)
    # LCM's 1 + 1 + 3; the critic's look at the student's end 3; in its step the jumps 1 + 2 and three looks
    assert method.stage.network_evaluations == 5 + 3 + 3 + 3


def _three(method: RGLCD, batch: Batch, jumps: Any) -> list[Tensor]:
    """The data's end, the target's by the boundary scalings of a consistency model, the student's."""
    scaled = 10.0 * jumps.t_prev
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
    alpha, sigma = (values[jumps.t_prev] for values in (toy.PROCESS.alpha, toy.PROCESS.sigma))

    def at(values: np.ndarray) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None, None]

    x_0 = (jumps.x_prev - at(sigma) * jumps.m_target) / at(alpha)
    return [batch.latents, at(skip) * jumps.x_prev + at(out) * x_0, method._end(jumps).detach()]


def test_the_proxy_comes_to_prefer_what_the_rewards_prefer() -> None:
    """On latents it has never seen."""
    method, _ = proxied(lambda z: z, rewards=[TERMS[0]], proxy_temperature=0.02)
    data, cpu = latents(), torch.device("cpu")
    assert method.proxy is not None
    optimizer = torch.optim.AdamW(method.proxy.parameters(), 3e-3)

    @torch.no_grad()
    def held_out() -> float:
        losses = [method._proxy_loss(data.batch(100 + i, 4, seed=3), Draw((7, i), cpu)) for i in range(4)]
        return torch.stack(losses).mean().item()

    found = [held_out()]
    for step in range(40):
        loss = method._proxy_loss(data.batch(step, 4, seed=1), Draw((step,), cpu))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 19:
            found.append(held_out())
    assert found[1] < 0.5 * found[0]  # 0.25, 0.05
    batch = data.batch(0, 4, seed=2)
    cond = {name: value[:1].expand(16, *value.shape[1:]) for name, value in batch.cond.items()}
    fresh = torch.randn(16, *batch.latents.shape[1:], generator=torch.Generator().manual_seed(5))
    fresh = fresh + torch.linspace(-0.5, 0.5, 16)[:, None, None, None]
    with torch.no_grad():
        told = method._opinion(fresh, cond)
    assert np.corrcoef(told.numpy(), brightness(fresh, None).numpy())[0, 1] > 0.7  # 0.90; 0.1 after ten steps


def test_a_run_with_a_proxy_resumes_with_the_same_bits(tmp_path: Path) -> None:
    document = {"proxy": True, "proxy_learning_rate": 1e-2}
    whole = train(tmp_path / "whole", document=document)
    with pytest.raises(Stop):
        train(tmp_path / "cut", progress=stop_at("rg_lcd", 3), document=document)
    assert_same(whole, train(tmp_path / "cut", resume=True, document=document))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert all(set(row["measures"]) >= {"brightness", "contrast", "seen", "proxy_loss"} for row in rows)


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

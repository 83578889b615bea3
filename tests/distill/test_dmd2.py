from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypersd.distill import matching
from hypersd.distill.data import Batch, LatentDataset
from hypersd.distill.dmd2 import DMD2
from hypersd.distill.method import Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.export import load_lora
from hypersd.sampling.sampler import sampler_for
from tests.distill import toy
from tests.distill.test_competitors import KEY, SIZE, WEIGHTS, Linear, Scene, built, check, free
from tests.distill.test_dmd import MEAN, SPREAD, Gaussian
from tests.distill.test_trainer import Stop, assert_same, losses, stop_at, trainer, weights

CPU = torch.device("cpu")
FOUR = [999, 749, 499, 249]


class ToyHead(nn.Module):
    """A GAN head on the mean of what it sees; counts what it is asked, a look at a picture being 1."""

    def __init__(self, net: Linear, role: str) -> None:
        super().__init__()
        assert role == "fake"
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.evaluations = 0

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return (self.weight[0] * x_t.flatten(1).mean(1) + self.weight[1] * timestep / 1000)[:, None]


def simulate(scene: Scene, draw: Draw, student: Tensor) -> Tensor:
    """The samples, each stopped at its own step, sample by sample from the paper's words."""
    offset = int(draw.host.integers(4))
    x_t = torch.randn(scene.x_0.shape, dtype=torch.float64, generator=draw.generator)
    last = [(i + offset) % 4 for i in range(SIZE)]
    for step in range(3):
        going = [i for i in range(SIZE) if last[i] > step]
        t = np.full(SIZE, FOUR[step])
        x_0, _ = scene.split(x_t, scene.network(x_t, t, scene.c, WEIGHTS["student"]), t)
        noise = torch.randn((len(going), *x_t.shape[1:]), dtype=torch.float64, generator=draw.generator)
        alpha, sigma = (v[going] for v in scene.level(np.full(SIZE, FOUR[step + 1])))
        x_t = x_t.clone()
        x_t[going] = alpha * x_0[going] + sigma * noise
    t = np.array(FOUR)[last]
    return scene.split(x_t, scene.network(x_t, t, scene.c, student), t)[0]


def opinion(scene: Scene, x: Tensor, draw: Draw, head: ToyHead) -> Tensor:
    t = draw.host.integers(0, 1000, SIZE)
    alpha, sigma = scene.level(t)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=draw.generator)
    return head(alpha * x + sigma * noise, torch.tensor(t), {})[:, 0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_student_s_loss(monkeypatch: pytest.MonkeyPatch, kind: str, weight: float) -> None:
    """Backward simulation, matching and GAN term against a second derivation; only the last step has a gradient."""
    monkeypatch.setattr(matching, "BottleneckCritic", ToyHead)
    scene, student = Scene(kind), free()
    method, net = built(scene, method="dmd2", guidance_scale=[3.0, 3.0], adversarial_weight=weight)
    loss = method.loss(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU))
    loss.backward()
    draw = Draw(KEY, CPU)
    x = simulate(scene, draw, student)
    t = draw.host.integers(int(0.02 * 999), int(0.98 * 999) + 1, SIZE)
    draw.host.uniform(3.0, 3.0, SIZE)
    alpha, sigma = scene.level(t)
    x_t = (alpha * x + sigma * torch.randn(x.shape, dtype=torch.float64, generator=draw.generator)).detach()
    cond, empty = (scene.split(x_t, scene.network(x_t, t, c, WEIGHTS["base"]), t)[0]
                   for c in (scene.c, scene.empty.expand(SIZE, 3)))  # fmt: skip
    real = empty + 3.0 * (cond - empty)
    fake = scene.split(x_t, scene.network(x_t, t, scene.c, WEIGHTS["fake"]), t)[0]
    direction = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    expected = 0.5 * (x - (x - direction).detach()).square().mean()
    if weight:
        expected = expected + weight * -torch.log(torch.sigmoid(opinion(scene, x, draw, method.critic))).mean()
    check(loss, net, expected, student)


def test_the_fake_score_s_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "BottleneckCritic", ToyHead)
    scene = Scene("epsilon")
    method, net = built(scene, method="dmd2", guidance_scale=[3.0, 3.0], fake_updates=7, critic_weight=0.2)
    (auxiliary,) = method.auxiliaries()
    assert auxiliary.updates == 7 and set(auxiliary.parameters) == {"w", "weight"}
    loss = auxiliary.loss(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU))
    draw = Draw(KEY, CPU)
    x = simulate(scene, draw, torch.tensor(WEIGHTS["student"], dtype=torch.float64))
    t = draw.host.integers(0, 1000, SIZE)
    noise = torch.randn(x.shape, dtype=torch.float64, generator=draw.generator)
    alpha, sigma = scene.level(t)
    denoising = (scene.network(alpha * x + sigma * noise, t, scene.c, WEIGHTS["fake"]) - noise).square().mean()
    real, fake = (torch.sigmoid(opinion(scene, picture, draw, method.critic)) for picture in (scene.x_0, x))
    expected = denoising - 0.2 * (torch.log(real).mean() + torch.log(1 - fake).mean())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert method.measures["critic_accuracy"] == 0.5 * ((real > 0.5).double().mean() + (fake < 0.5).double().mean())
    loss.backward()
    assert net.w["student"].grad is None and net.w["fake"].grad is not None and method.critic.weight.grad is not None


@pytest.mark.parametrize("timesteps", [FOUR, [999]])
@pytest.mark.parametrize("weight", [0.0, 5e-3])
def test_network_evaluations_are_what_a_step_costs(
    monkeypatch: pytest.MonkeyPatch, timesteps: list[int], weight: float
) -> None:
    monkeypatch.setattr(matching, "BottleneckCritic", ToyHead)
    scene = Scene("epsilon")
    options = {"timesteps": timesteps, "adversarial_weight": weight, "fake_updates": 3}
    method, net = built(scene, method="dmd2", guidance_scale=[3.0, 3.0], **options)
    batch = Batch(scene.x_0, {"c": scene.c})
    method.loss(batch, Draw(KEY, CPU))
    (auxiliary,) = method.auxiliaries()
    for update in range(auxiliary.updates):
        auxiliary.loss(batch, Draw((update,), CPU))
    looks = method.critic.evaluations / 3 if method.critic is not None else 0
    assert net.evaluations + looks == pytest.approx(method.matching.network_evaluations * SIZE)


def test_a_one_step_student_may_first_learn_where_the_teacher_s_path_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same noise, which the student is fed at 399 and the base model at 999."""
    monkeypatch.setattr(matching, "BottleneckCritic", ToyHead)
    scene, student = Scene("epsilon"), free()
    options = {"timesteps": [399], "guidance_scale": [3.0, 3.0], "regression": 0.25, "regression_steps": 4}
    method, net = built(scene, method="dmd2", fake_updates=2, **options)
    batch = Batch(scene.x_0, {"c": scene.c})
    loss = method.loss(batch, Draw(KEY, CPU, progress=0.24))
    loss.backward()
    warm = net.evaluations
    z = Draw(KEY, CPU).normal(scene.x_0.shape, scene.x_0)
    x, at = z, np.full(SIZE, 999)
    for to in (749, 499, 249, None):
        cond, empty = (scene.network(x, at, c, WEIGHTS["base"]) for c in (scene.c, scene.empty.expand(SIZE, 3)))
        x_0, eps = scene.split(x, empty + 3.0 * (cond - empty), at)
        at = np.full(SIZE, to or 0)
        x = x_0 if to is None else scene.land(x_0, eps, at)
    fed = np.full(SIZE, 399)
    own = scene.split(z, scene.network(z, fed, scene.c, student), fed)[0]
    check(loss, net, (own - x).square().mean(), student)
    (auxiliary,) = method.auxiliaries()
    for update in range(auxiliary.updates):
        auxiliary.loss(batch, Draw((update,), CPU))
    fake = net.evaluations - warm + method.critic.evaluations / 3
    method.critic.evaluations, net.evaluations = 0, 0.0
    plain, _ = built(scene, method="dmd2", fake_updates=2, timesteps=[399], guidance_scale=[3.0, 3.0])
    later = method.loss(batch, Draw(KEY, CPU, progress=0.25))
    torch.testing.assert_close(later, plain.loss(batch, Draw(KEY, CPU)), rtol=1e-9, atol=0)
    late = net.evaluations + method.critic.evaluations / 3
    assert 0.25 * warm + 0.75 * late + fake == pytest.approx(method.stage.network_evaluations * SIZE)
    with pytest.raises(HypersdError, match="regression is for one timestep, here are 4"):
        built(scene, method="dmd2", regression=0.5)


def test_every_step_has_its_share_of_the_batch_and_sampling_is_what_was_simulated() -> None:
    scene = Scene("v_prediction")
    method, net = built(scene, method="dmd2", adversarial_weight=0.0)
    seen: list[Tensor] = []
    inner = net.forward

    def record(x_t: Tensor, timestep: Tensor, cond: Any, *, role: str = "base") -> Tensor:
        seen.append(timestep)
        return inner(x_t, timestep, cond, role=role)

    net.forward = record  # type: ignore[method-assign]
    method.generate(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU))
    assert [len(t) for t in seen] == [48, 32, 16, SIZE] and [int(t[0]) for t in seen[:3]] == FOUR[:3]
    assert sorted(seen[3].tolist(), reverse=True) == [t for t in FOUR for _ in range(SIZE // 4)]
    metadata = DMD2.metadata(method.matching, method.process)
    table = sampler_for(method.process, metadata)
    assert table.timesteps.tolist() == FOUR and metadata["steps"] == "4" and metadata["method"] == "dmd2"
    for i, t in enumerate(FOUR):
        alpha, sigma = method.process.at(FOUR[i + 1]) if i < 3 else (1.0, 0.0)
        np.testing.assert_allclose(table.coef[i, :2], alpha * method.process.x0(t), rtol=1e-5)
        np.testing.assert_allclose(table.coef[i, 4], sigma, rtol=1e-9)


def test_a_batch_smaller_than_the_number_of_steps_asks_the_network_for_no_empty_rows() -> None:
    scene = Scene("epsilon")
    method, net = built(scene, method="dmd2", adversarial_weight=0.0)
    batch, sizes = Batch(scene.x_0[:1], {"c": scene.c[:1]}), []
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for key in range(12):
        method.generate(batch, Draw((key,), CPU))
    steps = [1 + int(Draw((key,), CPU).host.integers(4)) for key in range(12)]
    assert set(steps) == {1, 2, 3, 4} and sizes == [1] * sum(steps)


def test_a_gaussian_student_moves_to_the_teachers_gaussian(tmp_path: Any) -> None:
    g = torch.Generator().manual_seed(5)
    data = LatentDataset([{"latents": MEAN + SPREAD * torch.randn(512, 16, generator=g)}], [""] * 512, {})
    stage = {"method": "dmd2", "iterations": 250, "guidance_scale": [1.0, 1.0], "adversarial_weight": 0.0}
    stage |= {"timesteps": [999, 499], "fake_learning_rate": 0.05}
    recipe = parse_recipe({"train": {"batch_size": 64, "learning_rate": 0.02}, "stages": [stage]})
    model = Trainer(recipe, toy.COMPONENTS, data, tmp_path, backbone=Gaussian()).run()
    student = model.roles["ema"]
    torch.testing.assert_close(student["mean"].data, MEAN, rtol=0, atol=0.08)
    torch.testing.assert_close(student["log_spread"].data.exp(), torch.full((16,), SPREAD), rtol=0.3, atol=0)
    # a step: two passes of the student and the two scores; then 5 times two of the student and one of the fake
    step = ["student"] * 2 + ["base", "fake"] + ["student", "student", "fake"] * 5
    first = model.calls.index("student")  # fixed noises are looked at before
    assert model.calls[first : first + len(step)] == step


@pytest.mark.parametrize(
    "stage",
    [
        {"method": "dmd2", "timesteps": [999, 499]},
        {"method": "dmd", "real_score": "base", "adversarial_weight": 0.1, "anchor_steps": 1, "consistency": 0.5},
    ],
    ids=["dmd2", "dmd"],
)
def test_a_resumed_run_with_a_gan_ends_with_the_same_bits(
    tiny_unet: Any, tmp_path: Path, stage: dict[str, Any]
) -> None:
    stage = {"iterations": 4, "fake_updates": 2, "critic_weight": 0.1, "guidance_scale": [1.0, 2.0]} | stage
    base = {"batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2}
    r = parse_recipe({"train": base, "lora": {"rank": 4, "alpha": 4.0}, "stages": [stage]})
    nets = [copy.deepcopy(tiny_unet) for _ in range(3)]
    whole = trainer(nets[0], r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        trainer(nets[1], r, tmp_path / "cut", progress=stop_at(r.stages[0].name, 3)).run()
    resumed = trainer(nets[2], r, tmp_path / "cut").run(resume=True)
    assert_same(whole, resumed)
    fakes = [weights(net, "fake") for net in (whole, resumed)]
    assert all(torch.equal(fakes[0][name], fakes[1][name]) for name in fakes[0])
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 4
    rows = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["measures"].keys() >= {"critic_accuracy", "fake_loss"} for row in rows)
    _, metadata = load_lora(tmp_path / "cut" / "lora.safetensors")
    assert metadata["method"] == stage["method"]


def test_what_cannot_work() -> None:
    def error(**options: Any) -> str:
        with pytest.raises(HypersdError) as caught:
            built(Scene("epsilon"), method="dmd2", **options)
        return str(caught.value)

    assert "stages.0: timesteps [499, 999] must descend" in error(timesteps=[499, 999])
    assert "timesteps" in error(timesteps=[])
    method, _ = built(Scene("epsilon"), method="dmd2", adversarial_weight=0.0)
    (monitor,) = method.monitors
    always = [monitor.add(step, {"diversity": 1.0, "critic_accuracy": 0.99}) for step in range(101)]
    assert [step for step, warning in enumerate(always) if warning] == [99]
    assert "stage dmd2-4, step 99" in always[99] and "lower the stage's critic_weight" in always[99]

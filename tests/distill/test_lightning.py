from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.distill import adversarial
from hypersd.distill.data import Batch
from hypersd.distill.method import Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.export import load_lora
from hypersd.sampling.sampler import sampler_for
from tests.distill import toy
from tests.distill.test_adversarial import ToyCritic
from tests.distill.test_competitors import KEY, SIZE, WEIGHTS, Scene, built, check, free
from tests.distill.test_trainer import Stop, assert_same, losses, stop_at, trainer

CPU = torch.device("cpu")


def stage(many: int, few: int, **options: Any) -> dict[str, Any]:
    base = {"method": "lightning", "teacher_steps": many, "student_steps": few, "teacher": "base"}
    return base | {"guidance_scale": [4.0, 4.0]} | options


def starts_of(scene: Scene) -> np.ndarray:
    """The starts that the draws of KEY choose from 4 trailing steps, and whether pure noise replaces x_T."""
    return np.random.default_rng(KEY).choice([999, 749, 499, 249], SIZE)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("teacher", ["base", "previous_stage"])
def test_one_jump_must_end_where_the_teacher_s_steps_end(kind: str, teacher: str) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, **stage(8, 4, teacher=teacher))
    loss = method.loss(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU))
    loss.backward()
    t = starts_of(scene)
    middle, end = t - 125, t - 250
    if kind == "flow":  # the final point is clean data
        scene.alpha, scene.sigma = np.append(scene.alpha, 1.0), np.append(scene.sigma, 0.0)
    else:  # or the level of the first index, as set_alpha_to_one = False has it
        scene.alpha, scene.sigma = (np.append(v, v[0]) for v in (scene.alpha, scene.sigma))
    x_t = torch.where(torch.tensor(t == 999)[:, None, None, None], scene.z, scene.start(t))
    target = x_t
    for now, then in ((t, middle), (middle, end)):
        if teacher == "base":
            target = scene.ddim(target, now, then, w=3.0)
        else:
            m = scene.network(target, now, scene.c, WEIGHTS["previous"])
            target = scene.land(*scene.split(target, m, now), then)
    ours = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, student), t), end)
    check(loss, net, ((ours - target) ** 2).mean(), student)


def test_starts_between_the_student_s_steps() -> None:
    """One step, from the four starts of the 4-step student; the 2-step teacher stops at its own steps on the way."""
    scene = Scene("epsilon")
    method, net = built(scene, **stage(2, 1, teacher="previous_stage", starts=4))
    seen: list[np.ndarray] = []
    inner = net.forward

    def record(x_t: torch.Tensor, timestep: torch.Tensor, cond: Any, *, role: str = "base") -> torch.Tensor:
        if role == "previous":
            seen.append(timestep.numpy())
        return inner(x_t, timestep, cond, role=role)

    net.forward = record  # type: ignore[method-assign]
    ends = method._jumps(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU), with_real=True)
    t = starts_of(scene)
    assert ends.t.tolist() == t.tolist() and (ends.t_end == -1).all()
    assert seen[0].tolist() == t.tolist()
    assert len(seen) == 2 and seen[1].tolist() == [499] * int((t > 499).sum())
    assert method.stage.path == (2 + 2 + 1 + 1) / 4
    halves, _ = built(scene, **stage(4, 2, starts=4))
    found = halves._jumps(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU), with_real=False)
    assert dict(zip(found.t.tolist(), found.t_end.tolist(), strict=True)) == {999: 499, 749: 499, 499: -1, 249: -1}
    assert halves.stage.path == (2 + 1 + 2 + 1) / 4 and built(scene, **stage(32, 8))[0].stage.path == 4


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_the_critic_s_opinion(monkeypatch: pytest.MonkeyPatch, progress: float) -> None:
    """Both losses by hand on a linear network and critic; the ends are diffused to the critic's levels first."""
    monkeypatch.setattr(adversarial, "EncoderCritic", ToyCritic)
    scene = Scene("v_prediction")
    options = {"mse_weight": 0.0, "adversarial_weight": 0.5, "critic_levels": [0.75], "critic_learning_rate": 0.1}
    method, net = built(scene, **stage(8, 4, **options))
    w = method.adversary.critic.weight
    batch, draw = Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU, progress)
    loss = method.loss(batch, draw)
    (auxiliary,) = method.auxiliaries()
    critic = auxiliary.loss(batch, Draw(KEY, CPU, progress))
    assert auxiliary.learning_rate == 0.1 and 0 <= method.measures["critic_accuracy"] <= 1

    again = Draw(KEY, CPU, progress)
    ends = method._jumps(batch, again, with_real=True)
    start = ends.x_t.flatten(1).mean(1) if progress == 0.0 else torch.zeros(SIZE)
    alpha, sigma = method.process.at(ends.t_end)
    level = np.maximum(ends.t_end, 749)
    alpha_a, sigma_a = method.process.at(level)
    scale = alpha_a / alpha
    fresh = np.sqrt(np.maximum(sigma_a**2 - (scale * sigma) ** 2, 0))

    def score(end: torch.Tensor) -> torch.Tensor:
        noise = again.normal(end.shape, end)
        x = torch.tensor(scale)[:, None, None, None] * end + torch.tensor(fresh)[:, None, None, None] * noise
        return w[0] * start + w[1] * x.flatten(1).mean(1) + w[2] * torch.tensor(level / 1000)

    again.host.choice([0], SIZE)  # the levels
    s = torch.sigmoid
    expected = -torch.log(s(score(ends.real))).mean() - torch.log(1 - s(score(ends.fake))).mean()
    torch.testing.assert_close(critic, expected, rtol=1e-7, atol=1e-9)
    again = Draw(KEY, CPU, progress)
    ends = method._jumps(batch, again, with_real=False)
    again.host.choice([0], SIZE)
    torch.testing.assert_close(loss, 0.5 * -torch.log(s(score(ends.fake))).mean(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"mse_weight": 1.0},
        {"mse_weight": 0.0, "adversarial_weight": 1.0, "unconditional": 0.0},
        {"adversarial_weight": 1.0, "unconditional": 1.0, "teacher": "previous_stage"},
    ],
)
def test_network_evaluations_are_what_a_step_costs(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(adversarial, "EncoderCritic", ToyCritic)
    scene = Scene("epsilon")
    method, net = built(scene, **stage(8, 2, **options))
    batch, draw = Batch(scene.x_0, {"c": scene.c}), Draw(KEY, CPU, 0.5)
    method.loss(batch, draw)
    critic = 0.0
    for auxiliary in method.auxiliaries():
        auxiliary.loss(batch, draw)
        critic = method.adversary.critic.evaluations / 3
    assert net.evaluations + critic == pytest.approx(method.stage.network_evaluations * SIZE)


def test_recipes_that_cannot_work() -> None:
    def error(*stages: dict[str, Any]) -> str:
        with pytest.raises(HypersdError) as caught:
            parse_recipe({"stages": [{"iterations": 1} | s for s in stages]})
        return str(caught.value)

    assert "stages.0: teacher_steps = 8 must be a multiple of student_steps (3)" in error(stage(8, 3))
    assert "stages.0: starts = 4 must be a multiple of student_steps (8)" in error(stage(32, 8, starts=4))
    assert "mse_weight and adversarial_weight are both 0" in error(stage(8, 4, mse_weight=0.0))
    assert 'put a stage before it, or say teacher = "base"' in error(stage(8, 4, teacher="previous_stage"))
    wrong = error(stage(32, 8), stage(4, 2, teacher="previous_stage"))
    assert (
        "stages.1: a teacher of 4 steps must be a lightning or tscd stage made for as many, not lightning-32-8" in wrong
    )
    tscd = {"method": "tscd", "segments": 4}
    good = parse_recipe({"stages": [{"iterations": 1} | s for s in (tscd, stage(4, 2, teacher="previous_stage"))]})
    assert good.stages[1].file == "lora-2step" and good.stages[1].needs_previous


def test_a_resumed_run_ends_with_the_same_bits(tiny_unet: Any, tmp_path: Path) -> None:
    """Also in a stage with a critic, taught by the stage before; and the file says how to sample."""
    second = stage(
        2, 1, teacher="previous_stage", mse_weight=0.0, adversarial_weight=1.0, starts=2, critic_levels=[0.5]
    )
    stages = [stage(4, 2) | {"iterations": 2}, second | {"iterations": 4}]
    base = {"batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2}
    r = parse_recipe({"train": base, "lora": {"rank": 4, "alpha": 4.0}, "stages": stages})
    nets = [copy.deepcopy(tiny_unet) for _ in range(3)]
    whole = trainer(nets[0], r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        trainer(nets[1], r, tmp_path / "cut", progress=stop_at("lightning-2-1", 3)).run()
    assert_same(whole, trainer(nets[2], r, tmp_path / "cut").run(resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 6
    for name, steps in (("lora-2step", [999, 499]), ("lora-1step", [999]), ("lora", [999])):
        _, metadata = load_lora(tmp_path / "cut" / f"{name}.safetensors")
        assert sampler_for(toy.PROCESS, metadata).timesteps.tolist() == steps
        assert metadata["method"] == "lightning" and metadata["solver"] == "ddim"


@pytest.mark.slow
def test_training_straightens_the_mixture(tmp_path: Path) -> None:
    stages = [stage(16, 4), stage(4, 2, teacher="previous_stage")]
    r = parse_recipe({
        "train": {"batch_size": 256, "learning_rate": 2e-3, "checkpoint_every": 1000},
        "stages": [s | {"iterations": 300, "guidance_scale": [1.0, 1.0]} for s in stages],
    })  # fmt: skip
    model = Trainer(r, toy.COMPONENTS, toy.dataset(), tmp_path, backbone=toy.Mixture()).run()
    assert toy.few_step_error(model, 2) < 0.8 * toy.few_step_error(model, 2, "base")

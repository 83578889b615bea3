from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.distill import adversarial as adversary
from hypersd.distill import matching
from hypersd.distill.adversarial import Ends, adaptive_weight
from hypersd.distill.data import Batch
from hypersd.distill.method import Context, Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.stages import TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.noise_process import NoiseProcess
from tests.distill import test_competitors, toy
from tests.distill.test_competitors import KEY, SIZE, WEIGHTS, Linear, Scene, built
from tests.distill.test_trainer import Stop, assert_same, losses, recipe, stop_at, trainer

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


@pytest.mark.parametrize("config", [toy.SCHEDULER, FLOW], ids=["vp", "flow"])
def test_diffusing_again_keeps_the_variance(config: dict[str, Any]) -> None:
    """Signal and noise of x_a are those of a clean picture diffused to t_a."""
    process = NoiseProcess.from_config(config)
    t_end, t_a = np.array([0, 249, 499, 600]), np.array([240, 249, 990, 610])
    (alpha_e, sigma_e), (alpha_a, sigma_a) = process.at(t_end), process.at(t_a)
    scale, fresh = process.renoise(t_end, t_a).T
    np.testing.assert_allclose(scale * alpha_e, alpha_a, rtol=1e-6)
    np.testing.assert_allclose((scale * sigma_e) ** 2 + fresh**2, sigma_a**2, rtol=1e-6, atol=1e-9)


def adversarial(weight: float) -> Any:
    r = recipe(2, iterations=4, train={"checkpoint_every": 2})
    stages = [stage.model_copy(update={"adversarial_weight": weight}) for stage in r.stages]
    return r.model_copy(update={"stages": stages})


def test_training_with_a_critic(tiny_unet: Any, tmp_path: Path) -> None:
    run = trainer(tiny_unet, adversarial(0.1), tmp_path)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(set(row["measures"]) == {"critic_accuracy", "critic_loss"} for row in rows)
    assert all(0.0 <= row["measures"]["critic_accuracy"] <= 1.0 for row in rows)
    assert len(losses(tmp_path)) == 4


def test_the_critics_opinion_is_a_second_term(tiny_unet: Any) -> None:
    backbone = Backbone(tiny_unet, roles=("student", "ema"))
    context = Context(backbone, toy.PROCESS, {})
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, {"encoder_hidden_states": torch.zeros(3, 16, 32)})
    base = {"method": "tscd", "segments": 2, "iterations": 1, "guidance_scale": [1.0, 1.0]}
    values = []
    for options in ({}, {"adversarial_weight": 1.0}, {"adversarial_weight": 2.0, "consistency_weight": 0.0}):
        torch.manual_seed(3)
        method = TSCD(TSCDStage.model_validate(base | options), context)
        values.append(method.loss(batch, Draw((5,), torch.device("cpu"))))
    plain, both, opinion = (value.item() for value in values)
    assert both == pytest.approx(plain + opinion / 2, rel=1e-5) and opinion != 0
    values[2].backward()
    assert any(p.grad is not None and p.grad.any() for p in backbone.role_parameters("student").values())
    (monitor,) = method.monitors
    warned = [monitor.add(step, {"critic_accuracy": 0.99}) for step in range(120)]
    assert [step for step, warning in enumerate(warned) if warning] == [99]
    assert "stage tscd-2, step 99" in warned[99] and "lower the stage's critic_learning_rate" in warned[99]


GAIN, BIAS = torch.tensor([3.0, -1.0, 4.0]).double(), torch.tensor([0.2, -0.1, 0.4]).double()


class Watched(Linear):
    """Shows its output to three heads and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.path = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))
        down, mid, up = self.path
        config = SimpleNamespace(block_out_channels=[3])
        self.network = SimpleNamespace(down_blocks=[down], mid_block=mid, up_blocks=[up], config=config)
        self.device, self.calls = torch.device("cpu"), []  # type: ignore[var-annotated]

    def forward(self, x_t: Any, timestep: Any, cond: Any, *, role: str = "base") -> torch.Tensor:
        self.calls.append((x_t, timestep, cond, role))
        return self.path(super().forward(x_t, timestep, cond, role=role))


def featured(scene: Scene, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Watched]:
    """Each head is GAIN times the mean over the channels, plus BIAS."""
    monkeypatch.setattr(test_competitors, "Linear", Watched)
    options = options or {"method": "tscd", "segments": 2}
    method, net = built(scene, guidance_scale=[3.0, 3.0], adversarial_weight=0.2, **options)
    method.adversary.critic.heads = heads = torch.nn.ModuleList(torch.nn.Conv2d(3, 1, 1) for _ in range(3))
    for head, gain, bias in zip(heads, GAIN, BIAS, strict=True):
        torch.nn.init.constant_(head.weight, gain.item() / 3)
        torch.nn.init.constant_(head.bias, bias.item())
    return method, net


def diffused(scene: Scene, x: torch.Tensor, t_end: np.ndarray, t_a: np.ndarray, draw: Draw) -> torch.Tensor:
    (alpha_e, sigma_e), (alpha_a, sigma_a) = scene.level(t_end), scene.level(t_a)
    scale = alpha_a / alpha_e
    return scale * x + (sigma_a**2 - (scale * sigma_e) ** 2).clamp_min(0).sqrt() * draw.normal(x.shape, x)


def scores(scene: Scene, x_a: torch.Tensor, t_a: np.ndarray) -> torch.Tensor:
    return GAIN * scene.network(x_a, t_a, scene.c, WEIGHTS["base"]).mean(1)[..., None] + BIAS


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_feature_critic_judges_both_ends_diffused_again(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scene, cpu = Scene(kind), torch.device("cpu")
    method, net = featured(scene, monkeypatch)
    t, t_end, cond = np.arange(SIZE) + 900, np.arange(SIZE) * 5, {"c": scene.c}
    real, fake = scene.x_0 + 0.5, (0.5 * scene.x_0.flip(0) - 0.3).requires_grad_()
    ends, twin = Ends(scene.z, t, t_end, fake, real), Draw(KEY, cpu)
    t_a = twin.host.integers(t_end, t + 1)
    expected = [diffused(scene, x, t_end, t_a, twin) for x in (real, fake)]
    loss = method.adversary.critic_loss(ends, cond, Draw(KEY, cpu))
    for (x_a, time, seen, role), x in zip(net.calls, expected, strict=True):
        torch.testing.assert_close(x_a, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(time, torch.tensor(1000 * scene.sigma[t_a] if kind == "flow" else t_a))
        assert seen is cond and role == "base"
    r, f = (scores(scene, x, t_a) for x in expected)
    torch.testing.assert_close(loss.double(), hinge(r, f), rtol=1e-5, atol=0)
    told = 0.5 * ((r.mean((1, 2, 3)) > 0).double().mean() + (f.mean((1, 2, 3)) < 0).double().mean())
    assert method.measures["critic_accuracy"].item() == pytest.approx(told.item())
    opinion = method.adversary.generator_loss(ends, cond, Draw(KEY, cpu))
    x_a = diffused(scene, fake, t_end, t_a, Draw(KEY, cpu))
    torch.testing.assert_close(opinion.double(), -scores(scene, x_a, t_a).mean(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(opinion, fake)
    slope = -GAIN.mean() * WEIGHTS["base"] / fake.numel() * scene.level(t_a)[0] / scene.level(t_end)[0]
    torch.testing.assert_close(gradient, slope.expand_as(fake), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_real_end_is_where_the_targets_jump_lands(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    scene, cpu = Scene(kind), torch.device("cpu")
    method, net = featured(scene, monkeypatch)
    batch, twins = Batch(scene.x_0, {"c": scene.c}), [Draw(KEY, cpu) for _ in range(2)]
    jumps, _ = (method.jumps(batch, twin) for twin in twins)
    x_t, t, t_prev, t_end = jumps.x_t, jumps.t, jumps.t_prev, jumps.t_end
    x_prev = scene.ddim(x_t, t, t_prev, w=2.0)
    fake = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, WEIGHTS["student"]), t), t_end)
    real = scene.land(*scene.split(x_prev, scene.network(x_prev, t_prev, scene.c, WEIGHTS["ema"]), t_prev), t_end)
    ends = method.ends(jumps, with_real=True)
    torch.testing.assert_close((ends.fake, ends.real), (fake, real), rtol=1e-9, atol=1e-9)
    assert ends.t is t and ends.t_end is t_end and method.ends(jumps).real is None
    t_a = [twin.host.integers(t_end, t + 1) for twin in twins][0]
    r, f = (scores(scene, diffused(scene, x, t_end, t_a, twins[0]), t_a) for x in (real, fake))
    (auxiliary,) = method.auxiliaries()
    loss = auxiliary.loss(batch, Draw(KEY, cpu))
    torch.testing.assert_close(loss.double(), hinge(r, f), rtol=1e-5, atol=0)
    loss.backward()
    assert net.w["student"].grad is None and all(p.grad.any() for p in auxiliary.parameters.values())
    expected = method.distance(jumps) - 0.2 * scores(scene, diffused(scene, fake, t_end, t_a, twins[1]), t_a).mean()
    torch.testing.assert_close(method.loss(batch, Draw(KEY, cpu)).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_the_critic_of_pcm_looks_anywhere_in_the_phase(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Both ends at the phase's boundary, diffused to a level between it and the phase's top."""
    scene, cpu = Scene(kind), torch.device("cpu")
    method, net = featured(scene, monkeypatch, method="pcm", phases=4, grid=50)
    batch, twins = Batch(scene.x_0, {"c": scene.c}), [Draw(KEY, cpu) for _ in range(2)]
    jumps, _ = (method.jumps(batch, twin) for twin in twins)
    x_t, t, t_prev, t_end = jumps.x_t, jumps.t, jumps.t_prev, jumps.t_end
    # 50 points, 20 apart; the phases begin with points 0, 12, 25 and 37
    top = np.select([t < 259, t < 519, t < 759], [239, 499, 739], 999)
    assert (top >= t).all() and len(set(top)) > 1
    x_prev = scene.ddim(x_t, t, t_prev, w=2.0)
    fake = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, WEIGHTS["student"]), t), t_end)
    m_target = scene.network(x_prev, t_prev, scene.c, WEIGHTS["student"])  # PCM's target is the student itself
    real = scene.land(*scene.split(x_prev, m_target, t_prev), t_end)
    t_a = [twin.host.integers(t_end, top + 1) for twin in twins][0]
    r, f = (scores(scene, diffused(scene, x, t_end, t_a, twins[0]), t_a) for x in (real, fake))
    (auxiliary,) = method.auxiliaries()
    assert auxiliary.learning_rate == 1e-5
    net.evaluations = 0.0
    loss = auxiliary.loss(batch, Draw(KEY, cpu))
    torch.testing.assert_close(loss.double(), hinge(r, f), rtol=1e-5, atol=0)
    expected = method.distance(jumps) - 0.2 * scores(scene, diffused(scene, fake, t_end, t_a, twins[1]), t_a).mean()
    torch.testing.assert_close(method.loss(batch, Draw(KEY, cpu)).double(), expected, rtol=1e-5, atol=0)
    looks = SIZE * 2 * 2  # the critic's own at two ends here have a gradient, for the heads, that stops at the network
    declared = method.stage.network_evaluations * SIZE
    assert 0.8 * declared < net.evaluations - looks <= declared


@pytest.mark.parametrize("options", [{}, {"critic": "encoder"}])
def test_the_critic_may_be_shown_pictures_of_the_data(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """With one segment: the real end is then the data at t_end, and no teacher is asked."""
    scene, cpu, shown = Scene("epsilon"), torch.device("cpu"), []
    common = {"method": "tscd", "segments": 1, "critic_real": "data"} | options
    if options:
        monkeypatch.setattr(adversary, "EncoderCritic", ToyCritic)
        method, net = built(scene, guidance_scale=[3.0, 3.0], adversarial_weight=0.2, **common)
    else:
        method, net = featured(scene, monkeypatch, **common)
    inner = method.adversary.critic_loss
    method.adversary.critic_loss = lambda ends, cond, draw: shown.append(ends) or inner(ends, cond, draw)
    (auxiliary,) = method.auxiliaries()
    batch, twin = Batch(scene.x_0, {"c": scene.c}), Draw(KEY, cpu)
    assert auxiliary.loss(batch, Draw(KEY, cpu)).requires_grad
    x_t, (t, _, t_end), _ = method.starts(batch, twin)
    alpha, sigma = scene.level(t_end)
    (ends,) = shown
    real = alpha * scene.x_0 + sigma * twin.normal(x_t.shape, x_t)
    fake = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, WEIGHTS["student"]), t), t_end)
    torch.testing.assert_close((ends.real, ends.fake), (real, fake.detach()), rtol=1e-9, atol=1e-9)
    assert not ends.fake.requires_grad
    taught = method.stage.model_copy(update={"critic_real": "teacher"})
    assert taught.network_evaluations - method.stage.network_evaluations == 2 + 2 - 1
    for wrong, said in (({"segments": 2}, "is for one segment, not 2"), ({"adversarial_weight": 0.0}, "critic_real")):
        with pytest.raises(HypersdError, match=said):
            built(scene, **{"adversarial_weight": 0.2} | common | {"critic": "features"} | wrong)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "tscd", "segments": 2},
        {"method": "pcm", "phases": 2},
        {"method": "lightning", "teacher": "base", "teacher_steps": 4, "student_steps": 2},
        {"method": "dmd", "real_score": "base"},
        {"method": "dmd2"},
    ],
    ids=lambda options: options["method"],
)
def test_every_critic_that_always_wins_is_told(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(test_competitors, "Linear", Watched)
    monkeypatch.setattr(adversary, "EncoderCritic", ToyCritic)
    monkeypatch.setattr(matching, "BottleneckCritic", lambda net, role: torch.nn.Identity())
    method, _ = built(Scene("epsilon"), guidance_scale=[3.0, 3.0], adversarial_weight=0.2, **options)
    measures = {"critic_accuracy": 0.99, "diversity": 1.0}
    said = [text for step in range(120) for monitor in method.monitors if (text := monitor.add(step, measures))]
    assert len(said) == 1 and "step 99" in said[0] and "tells nearly every sample right" in said[0]
    assert options["method"] in said[0] and "adversarial_weight" in said[0]


class ToyCritic(torch.nn.Module):
    """Features are means of the picture; counts what it is asked, an evaluation of an encoder being 1."""

    def __init__(self, net: Linear) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.7, -0.4, 0.2], dtype=torch.float64))
        self.net, self.evaluations, self.seen = net, 0, []  # type: ignore[var-annotated]

    def features(self, x_t: torch.Tensor, timestep: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        self.seen.append(timestep)
        return torch.stack([x_t.flatten(1).mean(1), timestep / 1000], dim=1)

    def score(self, end: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        first = 0.0 if start is None else start[:, :1]
        return self.weight[0] * first + self.weight[1] * end[:, :1] + self.weight[2] * end[:, 1:]


def paired(scene: Scene, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[TSCD, Linear, ToyCritic]:
    monkeypatch.setattr(adversary, "EncoderCritic", ToyCritic)
    base = {
        "method": "tscd",
        "segments": 2,
        "guidance_scale": [3.0, 3.0],
        "critic": "encoder",
        "adversarial_weight": 0.2,
    }
    method, net = built(scene, **base | options)
    return method, net, method.adversary.critic


@pytest.mark.parametrize("progress", [0.5, 0.8])
def test_an_encoder_critic_sees_start_and_end_and_later_the_end_alone(
    monkeypatch: pytest.MonkeyPatch, progress: float
) -> None:
    """The opinion, worked out by hand on a linear network."""
    scene = Scene("epsilon")
    method, net, critic = paired(scene, monkeypatch)
    draw = Draw(KEY, torch.device("cpu"), progress)
    jumps = method.jumps(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, torch.device("cpu"), progress))
    method.jumps = lambda batch, draw: jumps  # type: ignore[method-assign]
    loss = method.loss(Batch(scene.x_0, {"c": scene.c}), draw)
    x_0, eps = scene.split(jumps.x_t, jumps.m, jumps.t)
    end = scene.land(x_0, eps, jumps.t_end)
    start = jumps.x_t.flatten(1).mean(1) if progress < 0.75 else torch.zeros(SIZE)
    w = critic.weight
    score = w[0] * start + w[1] * end.flatten(1).mean(1) + w[2] * torch.tensor(jumps.t_end / 1000)
    expected = method.distance(jumps) + 0.2 * -torch.log(torch.sigmoid(score)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert method.stage.unpaired == 0.25


@pytest.mark.parametrize(("progress", "unconditional"), [(0.0, 0.0), (0.99, 1.0)])
def test_what_a_paired_critic_costs(monkeypatch: pytest.MonkeyPatch, progress: float, unconditional: float) -> None:
    scene = Scene("epsilon")
    method, net, critic = paired(scene, monkeypatch, unconditional=unconditional)
    batch, draw = Batch(scene.x_0, {"c": scene.c}), Draw(KEY, torch.device("cpu"), progress)
    method.loss(batch, draw)
    (auxiliary,) = method.auxiliaries()
    assert auxiliary.betas == (0.0, 0.99) and auxiliary.learning_rate == 1e-5
    auxiliary.loss(batch, draw)
    declared = method.stage.network_evaluations * SIZE
    assert 0.9 * declared < net.evaluations + critic.evaluations / 3 <= declared + 1e-6
    assert 0.0 <= method.measures["critic_accuracy"] <= 1.0


def test_stage_weights() -> None:
    def weights(k: int, **options: Any) -> tuple[float, float]:
        base = {"method": "tscd", "segments": k, "iterations": 1}
        return parse_recipe({"stages": [base | options]}).stages[0].weights

    staged = [weights(k, staged_weights=True) for k in (16, 8, 4, 2, 1)]
    assert staged == [(1.0, 0.0), (1.0, 0.0), (1.0, 0.1), (0.5, 0.2), (0.25, 0.3)]
    assert weights(1) == (1.0, 0.0) and weights(1, consistency_weight=0.5, adversarial_weight=0.1) == (0.5, 0.1)
    with pytest.raises(
        HypersdError, match=r"stages\.0: adversarial_weight and staged_weights = true exclude each other"
    ):
        weights(1, staged_weights=True, adversarial_weight=0.1)
    whole = parse_recipe({"stages": [{"method": "tscd", "segments": 1, "iterations": 1, "staged_weights": True}]})
    assert parse_recipe(whole.model_dump(mode="json", exclude_none=True)) == whole  # as a checkpoint keeps it


def test_the_adaptive_weight_makes_both_gradients_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("v_prediction")
    plain, net, _ = paired(scene, monkeypatch, loss="mse")
    adaptive, twin, _ = paired(scene, monkeypatch, loss="mse", adaptive=True, adversarial_weight=1.0)
    batch = Batch(scene.x_0, {"c": scene.c})
    values = [method.loss(batch, Draw(KEY, torch.device("cpu"))) for method in (plain, adaptive)]
    factor = adaptive.measures["adaptive_weight"]
    m = torch.randn(5, requires_grad=True)
    assert adaptive_weight(3 * m.sum(), 2 * m.sum(), m).item() == pytest.approx(1.5)
    assert adaptive_weight(3 * m.sum(), 0 * m.sum(), m).item() == 10.0
    assert adaptive_weight(0 * m.sum(), m.sum(), m).item() == pytest.approx(0.01)
    jumps = plain.jumps(batch, Draw(KEY, torch.device("cpu")))
    distance = plain.distance(jumps)
    opinion = (values[0] - distance) / 0.2
    torch.testing.assert_close(values[1], distance + factor * opinion, rtol=1e-9, atol=1e-12)
    assert not factor.requires_grad and 0.01 <= factor <= 10
    assert adaptive.stage.network_evaluations == pytest.approx(plain.stage.network_evaluations + 2 / 3)


def test_a_critic_that_warms_up_learns_and_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, cpu = Scene("v_prediction"), torch.device("cpu")
    options = {"loss": "mse", "consistency_weight": 0.5, "adversarial_weight": 1.0, "adaptive": True}
    plain, _, _ = paired(scene, monkeypatch, **options)
    warming, _, _ = paired(scene, monkeypatch, critic_warmup=0.3, **options)
    batch = Batch(scene.x_0, {"c": scene.c})
    early = warming.loss(batch, Draw(KEY, cpu, progress=0.29))
    torch.testing.assert_close(early, 0.5 * warming.distance(warming.jumps(batch, Draw(KEY, cpu))), rtol=1e-9, atol=0)
    assert "adaptive_weight" not in warming.measures  # nor is the student's gradient asked for
    later = [method.loss(batch, Draw(KEY, cpu, progress=0.3)) for method in (plain, warming)]
    assert torch.equal(*later) and not torch.equal(later[1], early)
    (auxiliary,) = warming.auxiliaries()
    loss = auxiliary.loss(batch, Draw(KEY, cpu, progress=0.0))
    assert loss.requires_grad and loss.item() > 0
    # a third of the encoder's looks, each: the student's end 3 and again 2, the start 1
    saved = plain.stage.network_evaluations - warming.stage.network_evaluations
    assert saved == pytest.approx(0.3 * (5 + 1) / 3)
    late = plain.stage.model_copy(update={"critic_warmup": 0.8, "unconditional": 0.5})
    whole = late.model_copy(update={"critic_warmup": 0.0})
    assert whole.network_evaluations - late.network_evaluations == pytest.approx((0.8 * 5 + 0.5) / 3)
    heads = late.model_copy(update={"critic": "features"})
    silent = heads.model_copy(update={"critic_warmup": 0.0})
    assert silent.network_evaluations - heads.network_evaluations == pytest.approx(0.8 * 5)


def test_a_run_with_an_encoder_critic_resumes_with_the_same_bits(tiny_unet: Any, tmp_path: Path) -> None:
    options = {"critic": "encoder", "staged_weights": True, "unconditional": 0.5, "critic_learning_rate": 1e-3}
    r = recipe(2, iterations=4, train={"checkpoint_every": 2}, **options)
    nets = [copy.deepcopy(tiny_unet) for _ in range(3)]
    whole = trainer(nets[0], r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        trainer(nets[1], r, tmp_path / "cut", progress=stop_at("tscd-2", 3)).run()
    assert_same(whole, trainer(nets[2], r, tmp_path / "cut").run(resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 4

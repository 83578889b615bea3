from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.data import Batch, LatentDataset
from hypersd.distill.dmd import DMD
from hypersd.distill.matching import network_target
from hypersd.distill.method import Context, Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.stages import DMDStage
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import sample, sampler_for
from tests.distill import toy
from tests.distill.test_competitors import KEY, SIZE, WEIGHTS, Scene, built

# enough dimensions for the mean |x - x_real| of a sample to be no wild number
MEAN, SPREAD = torch.linspace(-0.8, 0.9, 16), 0.3


def stage(**options: Any) -> DMDStage:
    defaults = {"method": "dmd", "iterations": 1, "anchor": [0.0, 0.0], "consistency": 0.0}
    return DMDStage.model_validate(defaults | options)


class Gaussian(nn.Module):
    """Exact noise prediction of N(MEAN, SPREAD^2) as base. A role's is that of a Gaussian of its own mean and spread;
    as generator such a role makes samples of exactly that Gaussian, for it is fed (nearly) pure noise."""

    def __init__(self) -> None:
        super().__init__()
        self.roles = nn.ModuleDict()
        self.calls: list[str] = []
        self.alpha = torch.tensor(toy.PROCESS.alpha, dtype=torch.float32)
        self.sigma = torch.tensor(toy.PROCESS.sigma, dtype=torch.float32)

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        self.calls.append(role)
        alpha, sigma = self.alpha[timestep][:, None], self.sigma[timestep][:, None]
        own = {"mean": MEAN, "log_spread": torch.tensor(SPREAD).log()} if role == "base" else self.roles[role]
        mean, log_spread = own["mean"], own["log_spread"]
        variance = (2 * log_spread).exp()
        if role == "student":  # the PF-ODE map, whose one-step samples keep the spread
            gain = (variance / (alpha**2 * variance + sigma**2)).sqrt()
            return (x_t - alpha * (mean + gain * (x_t - alpha * mean))) / sigma
        return sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)

    def add_role(self, role: str, like: str | None = None) -> None:
        start = nn.ParameterDict({"mean": torch.zeros(16), "log_spread": torch.zeros(16)})
        self.roles[role] = copy.deepcopy(self.roles[like]) if like else start

    def drop_role(self, role: str) -> None:
        del self.roles[role]

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return dict(self.roles[role].items())

    def copy_role(self, src: str, dst: str) -> None:
        for new, old in zip(self.roles[src].values(), self.roles[dst].values(), strict=True):
            old.data.copy_(new.data)


def train(tmp_path: Any, iterations: int, passes: dict[str, int] | None = None, **options: Any) -> Gaussian:
    g = torch.Generator().manual_seed(5)
    data = LatentDataset([{"latents": MEAN + SPREAD * torch.randn(512, 16, generator=g)}], [""] * 512, {})
    one = {"method": "dmd", "iterations": iterations, "real_score": "base", "guidance_scale": [1.0, 1.0]}
    one |= {"anchor": [0.0, 0.0], "consistency": 0.0}
    settings = {"batch_size": 64, "learning_rate": 0.02, "watch_every": 0} | (passes or {})
    recipe = {"train": settings, "stages": [one | options]}
    return Trainer(parse_recipe(recipe), toy.COMPONENTS, data, tmp_path, backbone=Gaussian()).run()


def test_a_gaussian_student_moves_to_the_teachers_gaussian(tmp_path: Any) -> None:
    """From N(0, 1) to N(MEAN, SPREAD^2), mean and spread, with a fake score that is learned meanwhile."""
    model = train(tmp_path, 300, fake_learning_rate=0.05)
    student = model.roles["ema"]
    torch.testing.assert_close(student["mean"].data, MEAN, rtol=0, atol=0.06)
    torch.testing.assert_close(student["log_spread"].data.exp(), torch.full((16,), SPREAD), rtol=0.2, atol=0)
    # and the fake score knows the student's distribution
    torch.testing.assert_close(model.roles["fake"]["mean"].data, model.roles["student"]["mean"].data, rtol=0, atol=0.1)


def test_the_fake_score_has_a_clock_of_its_own(tmp_path: Any) -> None:
    model = train(tmp_path, 3, fake_updates=4)
    # a step: student, base, fake (scores), then 4 times student (samples) and fake (loss)
    assert model.calls == (["student", "base", "fake"] + ["student", "fake"] * 4) * 3


def fixed(tmp: Any = None, **options: Any) -> tuple[DMD, Gaussian]:
    model = Gaussian()
    for role in ("student", "fake", "start"):
        model.add_role(role)
    return DMD(stage(**options), Context(model, toy.PROCESS, {})), model


def batch(size: int) -> Batch:
    return Batch(MEAN + SPREAD * torch.randn(size, 16, generator=torch.Generator().manual_seed(1)), {})


def test_the_gradient_points_from_fake_to_real() -> None:
    """Student and fake at mean 0, the teacher at MEAN: gradient descent must move the student's mean towards MEAN."""
    method, model = fixed(real_score="base", guidance_scale=[1.0, 1.0])
    method.loss(batch(256), Draw((1,), torch.device("cpu"))).backward()
    step = -model.roles["student"]["mean"].grad
    assert torch.equal(step.sign(), MEAN.sign())
    # where fake and real agree there is nothing to gain: "tscd" is the student's own beginning
    method, model = fixed(real_score="tscd")
    method.loss(batch(64), Draw((1,), torch.device("cpu"))).backward()
    assert not model.roles["student"]["mean"].grad.any()


def test_the_loss_is_that_of_the_papers() -> None:
    """DMD2's expression, written out for one batch with the draws repeated."""
    method, model = fixed(real_score="base", guidance_scale=[3.0, 3.0], t_range=[0.4, 0.4])
    model.roles["student"]["mean"].data.fill_(0.2)
    loss = method.loss(batch(6), Draw((7, 7), torch.device("cpu")))
    draw = Draw((7, 7), torch.device("cpu"))
    z, noise = (draw.normal((6, 16), torch.zeros(1)) for _ in range(2))
    alpha, sigma = (float(v[399]) for v in (toy.PROCESS.alpha, toy.PROCESS.sigma))
    time = torch.full((6,), 399)
    a, s = toy.PROCESS.at(999)
    x = (z - s * model(z, torch.full((6,), 999), {}, role="student")) / a
    x_t = alpha * x + sigma * noise
    real, fake = ((x_t - sigma * model(x_t, time, {}, role=role)) / alpha for role in ("base", "fake"))
    # without a prompt's condition the guided output is the plain one
    direction = (fake - real) / (x - real).abs().mean(1, keepdim=True)
    expected = 0.5 * (x - (x - direction).detach()).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method.measures["diversity"], x.std(0, correction=0).square().mean().sqrt()
                               / batch(6).latents.std(0, correction=0).square().mean().sqrt())  # fmt: skip


def _number(value: Tensor) -> float:
    return float(value.detach())


def test_the_anchor_holds_the_student_at_its_beginning() -> None:
    method, model = fixed(real_score="tscd", anchor=[1.0, 0.5], anchor_steps=4)
    for name, value in (("student", 0.3), ("fake", 0.0), ("start", 0.0)):
        model.roles[name]["mean"].data.fill_(value)
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    x = z.clone()
    times = [999, 749, 499, 249]
    for t, s in zip(times, [*times[1:], None], strict=True):
        eps = model(x, torch.full((5,), t), {}, role="start")
        x_0 = (x - toy.PROCESS.sigma[t] * eps) / toy.PROCESS.alpha[t]
        x = x_0 if s is None else toy.PROCESS.alpha[s] * x_0 + toy.PROCESS.sigma[s] * eps
    torch.testing.assert_close(method._anchor(z, {}, Draw((0,), torch.device("cpu"))), x.float())
    values = [_number(method.loss(batch(32), Draw((3,), torch.device("cpu"), p))) for p in (0.0, 0.5)]
    method.stage = stage(real_score="tscd")
    bare = _number(method.loss(batch(32), Draw((3,), torch.device("cpu"))))
    assert values[0] - bare == pytest.approx((values[1] - bare) / 0.75, rel=1e-4) and values[0] > bare


@pytest.mark.parametrize("real_score", ["base", "tscd"])
def test_the_anchor_may_be_where_the_base_model_s_path_ends(real_score: str) -> None:
    """Guided as the real score is, from the same noise; by a linear network and textbook conversions."""
    scene, cpu = Scene("epsilon"), torch.device("cpu")
    options = {"method": "dmd", "real_score": real_score, "anchor": [1.0, 0.5], "anchor_to": "base", "anchor_steps": 5}
    method, net = built(scene, real_guidance_scale=[3.0, 3.0], consistency=0.0, **options)
    x, grid = scene.z, [999, 799, 599, 399, 199]
    for t, to in zip(grid, [*grid[1:], None], strict=True):
        at = np.full(SIZE, t)
        cond, empty = (scene.network(x, at, c, WEIGHTS["base"]) for c in (scene.c, scene.empty.expand(SIZE, 3)))
        x_0, eps = scene.split(x, empty + 3.0 * (cond - empty), at)
        x = x_0 if to is None else scene.land(x_0, eps, np.full(SIZE, to))
    net.evaluations = 0.0
    found = method._anchor(scene.z, {"c": scene.c}, Draw(KEY, cpu))
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)
    assert net.evaluations == 2 * 5 * SIZE and not found.requires_grad
    bare = method.stage.model_copy(update={"anchor": (0.0, 0.0)})
    assert method.stage.network_evaluations - bare.network_evaluations == 2 * 5
    assert method.stage.roles == (("fake", "start") if real_score == "tscd" else ("fake",))
    with pytest.raises(ValueError, match="anchor_to belongs to anchor above 0"):
        stage(real_score="base", anchor_to="base")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_share_s_loss_is_one_segment_s_with_the_guidance_of_the_stage(kind: str) -> None:
    scene, batch_of = Scene(kind), lambda scene: Batch(scene.x_0, {"c": scene.c})
    both = {"guidance_scale": [5.0, 5.0], "grid": 20}
    dmd, net = built(scene, method="dmd", real_score="base", real_guidance_scale=[1.0, 1.0], consistency=1.0, **both)
    same = {"segments": 1, "t_end_mix": 0.5, "offset_noise": 0.0, "pure_noise": 0.5}
    tscd, twin = built(scene, method="tscd", **same, **both)
    losses = [method.loss(batch_of(scene), Draw(KEY, torch.device("cpu"))) for method in (dmd, tscd)]
    assert torch.equal(*losses) and net.evaluations == twin.evaluations > 5 * SIZE
    other, _ = built(scene, method="tscd", **same, **both | {"guidance_scale": [4.0, 4.0]})
    assert not torch.equal(losses[0], other.loss(batch_of(scene), Draw(KEY, torch.device("cpu"))))


def test_a_share_of_the_batch_trains_on_the_consistency_loss() -> None:
    method, model = fixed(consistency=0.25, consistency_weight=2.0)
    sizes: list[int] = []

    def record(part: Batch, draw: Draw) -> Tensor:
        sizes.append(len(part.latents))
        return torch.tensor(10.0)

    method.tscd.loss = record  # type: ignore[method-assign]
    value = method.loss(batch(8), Draw((1,), torch.device("cpu")))
    assert sizes == [2] and value.item() == pytest.approx(20.0)
    assert method.tscd.grid.t_b.max() == 0 and method.tscd.teacher_role == "base"
    everything, model = fixed(consistency=1.0)
    model.add_role("ema")
    everything.loss(batch(8), Draw((1,), torch.device("cpu"))).backward()
    assert "fake" not in model.calls


@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_the_share_and_the_gradient_of_a_step_do_not_depend_on_its_passes(size: int) -> None:
    """20 samples in passes of `size`: 30 % of them train on the consistency loss, and the step's gradient is that of
    one pass with them all. A sample's loss is its number times the weight."""
    method, turns = fixed(consistency=0.3, consistency_weight=2.0)[0], 20 // size
    rows = torch.arange(1.0, 21.0)
    seen: dict[str, list[float]] = {"matching": [], "tscd": []}
    weight = torch.ones((), requires_grad=True)

    def of(name: str) -> Any:
        return lambda part, draw: seen[name].extend(part.latents[:, 0].tolist()) or weight * part.latents.mean()

    method._matching_loss, method.tscd.loss = of("matching"), of("tscd")  # type: ignore[method-assign]
    for turn in range(turns):
        part = Batch(rows[turn * size : (turn + 1) * size, None], {})
        draw = Draw((1, turn), torch.device("cpu"), 0.0, (turn, turns))
        (method.loss(part, draw) / turns).backward()
    assert sorted(seen["matching"] + seen["tscd"]) == rows.tolist() and len(seen["tscd"]) == 6
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(np.mean(seen["matching"]) + 2.0 * np.mean(seen["tscd"]), rel=1e-6)


def test_single_samples_share_the_passes_of_a_step(tmp_path: Any) -> None:
    passes = {"batch_size": 1, "accumulation": 10}
    model = train(tmp_path, 2, passes, consistency=0.3, fake_updates=1)
    # both losses ask the base model once; the matching loss the fake score as well, which then learns in as many passes
    assert [model.calls.count(role) for role in ("base", "fake")] == [2 * 10, 2 * (7 + 10)]


def test_a_step_without_room_for_the_share_is_refused() -> None:
    one = {"method": "dmd", "iterations": 1, "real_score": "base"}
    for share, word, rest in ((0.3, "none", 0), (0.6, "all", 1)):
        with pytest.raises(HypersdError, match=rf"stages\.0: .* is {word} of them; .* or set consistency = {rest}$"):
            parse_recipe({"train": {"batch_size": 1}, "stages": [one | {"consistency": share}]})
        parse_recipe({"train": {"batch_size": 1, "accumulation": 3}, "stages": [one | {"consistency": share}]})
    for share in (0.0, 1.0):
        parse_recipe({"train": {"batch_size": 1}, "stages": [one | {"consistency": share}]})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_fake_scores_target_is_what_the_network_ought_to_say(kind: str) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
    process = NoiseProcess.from_config(flow if kind == "flow" else toy.SCHEDULER | {"prediction_type": kind})
    t = np.array([0, 17, 500, 998])
    alpha, sigma = process.at(t)
    expected = {
        "epsilon": (0 * t, 1 + 0 * t), "sample": (1 + 0 * t, 0 * t), "v_prediction": (-sigma, alpha),
        "flow": (-1 + 0 * t, 1 + 0 * t),
    }[kind]  # fmt: skip
    np.testing.assert_allclose(network_target(process, t), np.stack(expected, -1), rtol=1e-9, atol=1e-9)


def test_the_file_serves_one_to_eight_steps() -> None:
    metadata = DMD.metadata(stage(), toy.PROCESS)
    assert metadata["solver"] == "lcm" and metadata["steps"] == "1" and metadata["method"] == "dmd"
    metadata = DMD.metadata(stage(consistency=0.3), toy.PROCESS)
    assert metadata["solver"] == "tcd" and metadata["steps"] == "1,2,3,4,5,6,7,8"
    assert len(sampler_for(toy.PROCESS, metadata, 5).timesteps) == 5
    assert json.loads(DMD.metadata(stage(timestep=800), toy.PROCESS)["timesteps"]) == {"1": [800]}


@pytest.mark.parametrize("timestep", [None, 800])
def test_sampling_ends_where_training_moved_the_sample(timestep: int | None) -> None:
    """Not at the noise that timestep 0 still has."""
    method, model = fixed(timestep=timestep)
    draw = Draw((5,), torch.device("cpu"))
    x = method.generate(batch(8), draw).detach()
    z = Draw((5,), torch.device("cpu")).normal((8, 16), x)
    table = sampler_for(toy.PROCESS, DMD.metadata(method.stage, toy.PROCESS))
    found = sample(lambda x_t, t: model(x_t, t, {}, role="student"), table, z)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_samples_that_are_all_alike_are_reported() -> None:
    method, _ = fixed()
    (monitor,) = method.monitors
    found = [monitor.add(step, {"diversity": 0.4 if step > 2 else 0.9}) for step in range(30)]
    assert [step for step, warning in enumerate(found) if warning] == [22]
    assert "stage dmd, step 22" in found[22] and "raise the stage's anchor" in found[22]


def test_the_real_score_may_have_a_guidance_of_its_own() -> None:
    both = stage(real_score="base", consistency=0.3, guidance_scale=[7.0, 9.0], real_guidance_scale=[1.0, 1.0])
    shared = stage(real_score="base", consistency=0.3, guidance_scale=[7.0, 9.0])
    assert both.score_guidance == (1.0, 1.0) and both.score_passes == 1 and both.teacher_passes == 2
    assert shared.score_guidance == (7.0, 9.0) and shared.score_passes == 2
    assert both.network_evaluations == pytest.approx(shared.network_evaluations - 0.7)
    with pytest.raises(ValueError, match="real_guidance_scale .* goes below 1"):
        stage(real_score="base", real_guidance_scale=[0.5, 1.0])

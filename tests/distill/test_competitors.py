"""LCM, TCD, PCM, TDD and PeRFlow: each loss against a second derivation, in float64, from the papers' formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.data import Batch
from hypersd.distill.method import Context, Draw
from hypersd.distill.methods import METHODS
from hypersd.distill.recipe import Recipe, parse_recipe
from hypersd.distill.segments import grid
from hypersd.distill.stages import STAGES
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.models.export import load_lora
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import denoiser, sample, sampler_for
from hypersd.sampling.timesteps import lcm_grid
from tests.distill import toy
from tests.distill.test_trainer import Stop, assert_same, losses, stop_at, toy_trainer, trainer

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
# the schedule of the SD family, written out
ABAR = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
WEIGHTS = {"base": 0.3, "student": -0.2, "ema": 0.7, "previous": 0.5, "fake": 0.1}
KEY = (3, 1, 4)
SIZE = 64


class Linear(nn.Module):
    """m = w[role] x_t + c (time / 1000); every role its own scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in WEIGHTS.items()})
        self.evaluations = 0.0

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {"w": self.w[role]}

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        self.evaluations += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return self.w[role] * x_t + (cond["c"] * timestep[:, None] / 1000)[:, :, None, None]


class Scene:
    """A batch, its noise, and the networks of `Linear` and textbook conversions by themselves."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        g = torch.Generator().manual_seed(0)
        self.x_0 = torch.randn(SIZE, 3, 2, 2, dtype=torch.float64, generator=g)
        self.c = torch.randn(SIZE, 3, dtype=torch.float64, generator=g)
        self.empty = torch.full((1, 3), 0.1, dtype=torch.float64)
        self.z = torch.randn(self.x_0.shape, dtype=torch.float64, generator=Draw(KEY, torch.device("cpu")).generator)
        if kind == "flow":
            sigma = np.arange(1, 1001) / 1000
            self.sigma = 3 * sigma / (1 + 2 * sigma)
            self.alpha = 1 - self.sigma
        else:
            self.alpha, self.sigma = np.sqrt(ABAR), np.sqrt(1 - ABAR)

    def level(self, t: np.ndarray) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(v[t])[:, None, None, None] for v in (self.alpha, self.sigma))  # type: ignore[return-value]

    def network(self, x: Tensor, t: np.ndarray, cond: Tensor, weight: Any) -> Tensor:
        fed = torch.tensor(self.sigma[t] * 1000 if self.kind == "flow" else t.astype(float))
        return weight * x + (cond * fed[:, None] / 1000)[:, :, None, None]

    def split(self, x: Tensor, m: Tensor, t: np.ndarray) -> tuple[Tensor, Tensor]:
        """(x_0, eps) of a network output."""
        alpha, sigma = self.level(t)
        if self.kind == "epsilon":
            return (x - sigma * m) / alpha, m
        if self.kind == "v_prediction":
            return alpha * x - sigma * m, sigma * x + alpha * m
        return x - sigma * m, x + (1 - sigma) * m

    def land(self, x_0: Tensor, eps: Tensor, s: np.ndarray) -> Tensor:
        alpha, sigma = self.level(s)
        return alpha * x_0 + sigma * eps

    def start(self, t: np.ndarray) -> Tensor:
        return self.land(self.x_0, self.z, t)

    def ddim(self, x: Tensor, t: np.ndarray, s: np.ndarray, w: float) -> Tensor:
        """The teacher's step; guidance as the LCM paper has it, c + w (c - u), in x_0 and eps."""
        cond = self.split(x, self.network(x, t, self.c, WEIGHTS["base"]), t)
        empty = self.split(x, self.network(x, t, self.empty.expand(SIZE, 3), WEIGHTS["base"]), t)
        x_0, eps = (c + w * (c - u) for c, u in zip(cond, empty, strict=True))
        return self.land(x_0, eps, s)


def built(scene: Scene, **options: Any) -> tuple[Any, Linear]:
    config = FLOW if scene.kind == "flow" else VP | {"prediction_type": scene.kind}
    (stage,) = parse_recipe({"train": {"init": "any"}, "stages": [{"iterations": 1} | options]}).stages
    net = Linear()
    context = Context(net, NoiseProcess.from_config(config), {"c": scene.empty})  # type: ignore[arg-type]
    return METHODS[type(stage)](stage, context), net


def run(scene: Scene, method: Any) -> tuple[Tensor, list[np.ndarray]]:
    """The method's loss after backward, and the points it drew."""
    drawn: list[np.ndarray] = []
    if hasattr(method, "points"):
        inner = method.points
        method.points = lambda *args: drawn.extend(inner(*args)) or tuple(drawn)
    loss = method.loss(Batch(scene.x_0, {"c": scene.c}), Draw(KEY, torch.device("cpu")))
    loss.backward()
    return loss, drawn


def check(loss: Tensor, net: Linear, expected: Tensor, student: Tensor) -> None:
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.w["student"].grad, student.grad, rtol=1e-9, atol=1e-12)
    assert net.w["ema"].grad is None and net.w["base"].grad is None


def huber(d: Tensor, c: float = 1e-3) -> Tensor:
    return ((d**2 + c**2).sqrt() - c).mean()


def free() -> Tensor:
    return torch.tensor(WEIGHTS["student"], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("target", ["online", "ema"])
def test_lcm(kind: str, target: str) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, method="lcm", guidance_scale=[7.5, 7.5], target=target)
    loss, (t, t_prev, _) = run(scene, method)
    assert set(t.tolist()) <= set(range(19, 1000, 20)) and len(set(t.tolist())) > 20
    assert t_prev.tolist() == [max(int(n) - 20, 0) if n > 19 else 0 for n in t]

    def consistency(x: Tensor, n: np.ndarray, weight: Any) -> Tensor:
        x_0, _ = scene.split(x, scene.network(x, n, scene.c, weight), n)
        scaled = torch.tensor(10.0 * n)[:, None, None, None]
        return 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25).sqrt() * x_0

    x_t = scene.start(t)
    x_prev = scene.ddim(x_t, t, t_prev, w=6.5)
    other = WEIGHTS["student" if target == "online" else "ema"]
    check(loss, net, huber(consistency(x_t, t, student) - consistency(x_prev, t_prev, other)), student)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_tcd(kind: str) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, method="tcd", guidance_scale=[4.0, 4.0])
    loss, (t, t_prev, s) = run(scene, method)
    assert set(t.tolist()) <= set(range(19, 1000, 20))
    assert t_prev.tolist() == [int(n) - 20 if n > 19 else 0 for n in t]
    assert (s >= 0).all() and (s <= t_prev).all() and len(set(s.tolist())) > 30
    assert (s % 20 != 19).any()  # any timestep, not of the grid alone
    x_t = scene.start(t)
    x_prev = scene.ddim(x_t, t, t_prev, w=3.0)
    ours = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, student), t), s)
    target = scene.land(*scene.split(x_prev, scene.network(x_prev, t_prev, scene.c, WEIGHTS["ema"]), t_prev), s)
    check(loss, net, huber(ours - target), student)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("phases", [8, 4, 1])
def test_pcm(kind: str, phases: int) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, method="pcm", phases=phases, guidance_scale=[5.5, 5.5])
    loss, (t, t_prev, _) = run(scene, method)
    grid = np.arange(1, 51) * 20 - 1
    before = np.array([0, *grid[:-1]])
    firsts = np.floor(np.linspace(0, 50, num=phases, endpoint=False)).astype(int)
    index = np.array([list(grid).index(n) for n in t])
    edge = np.array([before[firsts[firsts <= i].max()] for i in index])
    assert t_prev.tolist() == before[index].tolist()
    x_t = scene.start(t)
    x_prev = scene.ddim(x_t, t, t_prev, w=4.5)
    ours = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, student), t), edge)
    target = scene.land(*scene.split(x_prev, scene.network(x_prev, t_prev, scene.c, WEIGHTS["student"]), t_prev), edge)
    skip = torch.tensor(np.isin(index, firsts))[:, None, None, None]  # the boundary condition of each phase
    check(loss, net, huber(ours - torch.where(skip, x_prev, target)), student)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_tdd(kind: str) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, method="tdd")
    loss, (t, t_prev, s) = run(scene, method)
    assert set(t.tolist()) <= set(range(3, 1000, 4)) and t_prev.tolist() == [max(int(n) - 4, 0) for n in t]
    x_t = scene.start(t)
    x_prev = scene.ddim(x_t, t, t_prev, w=3.5)
    ours = scene.land(*scene.split(x_t, scene.network(x_t, t, scene.c, student), t), s)
    there = scene.land(*scene.split(x_prev, scene.network(x_prev, t_prev, scene.c, WEIGHTS["student"]), t_prev), s)
    there = torch.where(torch.tensor(s == t_prev)[:, None, None, None], x_prev, there)
    check(loss, net, huber(ours - there), student)


def test_tdd_targets() -> None:
    """Where sampling in 4 to 8 steps stops; from t', every one within reach of the nearest, equally often."""
    method, _ = built(Scene("epsilon"), method="tdd", target_noise=0.0)
    origin = np.arange(4, 1001, 4)[::-1] - 1
    stops = {0}
    for steps in range(4, 9):
        stops |= {int(origin[int(np.floor(i * 250 / steps))]) for i in range(1, steps)}
    assert method.targets.tolist() == sorted(stops)
    t, t_prev, end = method.points(np.random.default_rng(5), 60_000)
    for start in (999, 751, 503, 31):
        below = [s for s in sorted(stops) if s <= max(start - 4, 0)]
        allowed = [s for s in below if s >= below[-1] - 260]
        found, counts = np.unique(end[t == start], return_counts=True)
        assert found.tolist() == allowed
        assert counts.min() > 0.5 * counts.mean()
    noisy, _ = built(Scene("epsilon"), method="tdd", target_noise=0.3)
    ends = noisy.points(np.random.default_rng(5), 60_000)[2][t == 999]
    top = max(stops)
    assert 0.7 * 0.7 * top < ends.min() and ends.max() <= top and len(set(ends.tolist())) > 100


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize(("windows", "steps"), [(4, 8), (2, 3), (1, 5)])
def test_perflow(kind: str, windows: int, steps: int) -> None:
    scene, student = Scene(kind), free()
    method, net = built(scene, method="perflow", windows=windows, solver_steps=steps, guidance_scale=[7.5, 7.5])
    loss, _ = run(scene, method)
    p = np.random.default_rng(KEY).integers(0, 1000, SIZE) + 1  # time is p / 1000 in (0, 1]
    edges = [1000 * i // windows for i in range(windows + 1)]
    top = np.array([min(e for e in edges if e >= n) for n in p])
    bottom = np.array([max(e for e in edges if e < n) for n in p])
    if kind == "flow":  # time 0 is clean data
        scene.alpha, scene.sigma = np.append(scene.alpha, 1.0), np.append(scene.sigma, 0.0)
    else:  # time 0 has the level of the first index, as set_alpha_to_one = False has it
        scene.alpha, scene.sigma = (np.append(v, v[0]) for v in (scene.alpha, scene.sigma))
    z_s = scene.start(top - 1)
    z, times = z_s, [np.rint(top - 1 + (bottom - top) * i / steps).astype(int) for i in range(steps)]
    for now, then in zip(times, [*times[1:], bottom - 1], strict=True):
        z = scene.ddim(z, now, then, w=6.5)
    line = torch.tensor((p - top) / (bottom - top))[:, None, None, None]
    z_t = z_s + line * (z - z_s)
    m = scene.network(z_t, p - 1, scene.c, student)
    if kind == "flow":
        ours = m
        target = (z - z_s) / (scene.level(bottom - 1)[1] - scene.level(top - 1)[1])
    else:
        ours = scene.split(z_t, m, p - 1)[1]
        (a_s, b_s), (a_e, b_e) = scene.level(top - 1), scene.level(bottom - 1)
        scale = (a_e**2 / a_s**2).sqrt()
        target = (z - scale * z_s) / (b_e - (a_e**2 / a_s**2 * b_s**2).sqrt())
    check(loss, net, ((ours - target) ** 2).mean(), student)


def test_published_grids() -> None:
    stage = {"method": "pcm", "phases": 8, "iterations": 1}
    method, _ = built(Scene("epsilon"), **stage)
    grid = np.arange(19, 1000, 20)
    starts = [int(np.flatnonzero(method.grid.t_b == edge)[0]) for edge in np.unique(method.grid.t_b)]
    assert method.grid.t.tolist() == grid.tolist()
    assert starts == [0, 6, 12, 18, 25, 31, 37, 43]
    assert np.unique(method.grid.t_b).tolist() == [0, 119, 239, 359, 499, 619, 739, 859]
    table = sampled("pcm", phases=8)
    assert table.timesteps.tolist() == [999, 859, 739, 619, 499, 359, 239, 119]
    assert built(Scene("epsilon"), method="lcm")[0].grid.t.tolist() == grid.tolist()
    assert sampled("lcm", 4).timesteps.tolist() == [999, 759, 499, 259]
    assert sampled("tcd", 8).timesteps.tolist() == [999, 879, 759, 639, 499, 379, 259, 139]
    assert sampled("tdd", 4).timesteps.tolist() == [999, 751, 499, 251]
    assert sampled("perflow", 4).timesteps.tolist() == [999, 749, 499, 249]
    assert sampled("perflow", 8).timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


@pytest.mark.parametrize("name", ["lcm", "rg_lcd", "tcd", "tdd"])
def test_files_name_timesteps_that_were_trained(name: str) -> None:
    rewards = {"rewards": [{"kind": "a"}]} if name == "rg_lcd" else {}
    for points in (4, 6, 8, 25, 40, 50, 60, 64, 250, 300, 600, 1000):
        steps = {"sampling_steps": [4, min(8, points)]} if name == "tdd" else {}
        stage = STAGES[name].model_validate({"method": name, "iterations": 1, "grid": points} | rewards | steps)
        offered = json.loads(METHODS[type(stage)].metadata(stage, toy.PROCESS)["timesteps"])
        promised = range(4, min(8, points) + 1) if name == "tdd" else [n for n in (1, 2, 4, 8) if n <= points]
        assert [int(n) for n in offered] == list(promised)
        trained = set(grid(points).tolist())
        for n, timesteps in offered.items():
            assert len(timesteps) == int(n) and timesteps[0] == 999 and trained.issuperset(timesteps)
            if 1000 % points == 0:  # the published grids
                assert timesteps == lcm_grid(int(n), 1000, points).tolist()
    if name != "tcd":
        with pytest.raises(HypersdError, match=r"stages\.0: (grid = 3 has fewer points than the 4|sampling_steps)"):
            parse_recipe({"stages": [{"method": name, "iterations": 1, "grid": 3} | rewards]})


def test_phases_need_a_grid_point_each() -> None:
    stage = {"method": "pcm", "phases": 8, "iterations": 1}
    with pytest.raises(HypersdError, match=r"stages\.0: grid = 7 has fewer points than there are phases \(8\)"):
        parse_recipe({"stages": [stage | {"grid": 7}]})
    assert parse_recipe({"stages": [stage | {"grid": 8}]}).stages[0].name == "pcm-8"


def sampled(name: str, steps: int | None = None, **options: Any) -> Any:
    """The table that a method's metadata asks for."""
    stage = STAGES[name].model_validate({"method": name, "iterations": 1} | options)
    return sampler_for(toy.PROCESS, METHODS[type(stage)].metadata(stage, toy.PROCESS), steps)


def test_perflow_sampling_is_the_published_step() -> None:
    """pred_win_end and the velocity as PeRFlow's scheduler writes them, in times p / 1000."""
    table = sampled("perflow", 8, windows=4)
    for i, t in enumerate(table.timesteps.tolist()):
        now = (t + 1) / 1000
        following = 0.0 if i == 7 else (table.timesteps[i + 1] + 1) / 1000
        t_s, t_e = np.ceil(now * 4) / 4, np.ceil(now * 4) / 4 - 0.25
        a_s, a_e = ABAR[round(t_s * 1000) - 1], ABAR[max(round(t_e * 1000) - 1, 0)]
        lambda_s = (a_e / a_s) ** 0.5
        eta_s = (1 - a_e) ** 0.5 - (a_e / a_s * (1 - a_s)) ** 0.5
        below = lambda_s * (now - t_s) + (t_e - now)
        x, eps = 1.7, -0.6
        end = lambda_s * (t_e - t_s) / below * x + eta_s * (t_e - now) / below * eps
        expected = x + (following - now) * (end - x) / (t_e - now)
        np.testing.assert_allclose(table.coef[i, 0] * x + table.coef[i, 1] * eps, expected, rtol=1e-9)
    with pytest.raises(HypersdError, match="skip one of the 4 windows"):
        from hypersd.sampling.solvers import perflow

        perflow(toy.PROCESS, [999, 499], windows=4)


def test_perflow_without_a_line_from_pure_noise_is_refused() -> None:
    process = NoiseProcess.from_config(VP | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    stage = STAGES["perflow"].model_validate({"method": "perflow", "iterations": 1})
    with pytest.raises(HypersdError, match="perflow needs a schedule .* zero terminal SNR.*; use another method"):
        METHODS[type(stage)].metadata(stage, process)
    with pytest.raises(HypersdError, match="zero terminal SNR"):
        sampler_for(process, METHODS[type(stage)].metadata(stage, toy.PROCESS) | {"prediction_type": "v_prediction"})


STAGE: dict[str, dict[str, Any]] = {
    "tcd": {}, "lcm": {"target": "ema"}, "pcm": {"phases": 4}, "tdd": {"grid": 50}, "perflow": {"solver_steps": 2},
}  # fmt: skip


def recipe(name: str, iterations: int = 5, **train: Any) -> Recipe:
    base = {"batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 3}
    stage = {"method": name, "iterations": iterations, "guidance_scale": [2.0, 3.0]} | STAGE[name]
    return parse_recipe({"train": base | train, "lora": {"rank": 4, "alpha": 4.0}, "stages": [stage]})


@pytest.mark.parametrize("name", STAGE)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    r = recipe(name)
    whole = toy_trainer(r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        toy_trainer(r, tmp_path / "cut", progress=stop_at(r.stages[0].name, 4)).run()
    assert_same(whole, toy_trainer(r, tmp_path / "cut").run(resume=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 5


@pytest.mark.parametrize("name", STAGE)
def test_the_file_says_how_to_sample(tmp_path: Path, tiny_unet: Any, name: str) -> None:
    backbone = trainer(tiny_unet, recipe(name, 1), tmp_path).run()
    _, metadata = load_lora(tmp_path / "lora.safetensors")
    assert metadata["method"] == name
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    denoise = denoiser(backbone, {"encoder_hidden_states": torch.zeros(1, 16, 32)}, role="ema")
    for steps in metadata["steps"].split(","):
        table = sampler_for(toy.PROCESS, metadata, int(steps))
        assert len(table) == int(steps) and table.timesteps[0] == 999
        out = sample(denoise, table, x, generator=torch.Generator().manual_seed(3))
        assert out.shape == x.shape and out.isfinite().all()
    with pytest.raises(HypersdError, match="the LoRA was made for"):
        sampler_for(toy.PROCESS, metadata, 77)


@pytest.mark.parametrize("name", STAGE)
def test_network_evaluations_are_what_a_step_costs(name: str) -> None:
    scene = Scene("epsilon")
    method, net = built(scene, method=name, guidance_scale=[3.0, 3.0], **STAGE[name])
    run(scene, method)
    declared = method.stage.network_evaluations * SIZE
    assert 0.8 * declared < net.evaluations <= declared  # targets that are x_prev itself cost nothing


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("pcm", 4), ("tcd", 2)])
def test_training_straightens_the_mixture(tmp_path: Path, name: str, steps: int) -> None:
    options = {"method": name, "iterations": 600, "guidance_scale": [1.0, 1.0]} | STAGE[name]
    r = parse_recipe(
        {"train": {"batch_size": 256, "learning_rate": 2e-3, "checkpoint_every": 1000}, "stages": [options]}
    )
    model = Trainer(r, toy.COMPONENTS, toy.dataset(), tmp_path, backbone=toy.Mixture()).run()
    assert toy.few_step_error(model, steps) < 0.8 * toy.few_step_error(model, steps, "base")

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.data import Batch
from hypersd.distill.method import Context, Draw
from hypersd.distill.parts import guided_coef, perturbed_noise
from hypersd.distill.segments import SegmentGrid
from hypersd.distill.stages import TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import sampler_for
from hypersd.sampling.solvers import chord

VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}
KEY = (3, 1, 4)


class Linear(nn.Module):
    """m = w[role] x_t + c (time / 1000); every role its own scalar. Records the role and the size of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterDict({k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in WEIGHTS.items()})
        self.calls: list[tuple[str, int]] = []

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        self.calls.append((role, len(x_t)))
        return self.w[role] * x_t + (cond["c"] * timestep[:, None] / 1000)[:, :, None, None]


WEIGHTS = {"base": 0.3, "student": -0.2, "ema": 0.7, "previous": 0.45}


def stage(**options: Any) -> TSCDStage:
    defaults = {"method": "tscd", "segments": 4, "iterations": 1, "guidance_scale": [5.0, 5.0], "offset_noise": 0.0}
    return TSCDStage.model_validate(defaults | options)


def fixed(method: TSCD, t: list[int], t_prev: list[int], t_end: list[int]) -> TSCD:
    class Fixed(SegmentGrid):
        def sample(self, *args: Any) -> tuple[np.ndarray, ...]:  # type: ignore[override]
            return np.array(t), np.array(t_prev), np.array(t_end)

    method.grid = Fixed(method.grid.t, method.grid.t_prev, method.grid.t_b)
    return method


def x0_and_eps(kind: str, x: Tensor, m: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook conversions, written apart from NoiseProcess."""
    match kind:
        case "epsilon":
            return (x - sigma * m) / alpha, m
        case "v_prediction":
            return alpha * x - sigma * m, sigma * x + alpha * m
        case "sample":
            return m, (x - alpha * m) / sigma
        case _:
            return x - sigma * m, x + (1 - sigma) * m


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("loss", ["mse", "huber", "pseudo_huber", "l1"])
@pytest.mark.parametrize("options", [{}, {"target": "online"}, {"weighting": "inv_b2"}, {"teacher": "previous_stage"}])
def test_loss_and_gradient_equal_a_derivation_by_hand(kind: str, loss: str, options: dict[str, Any]) -> None:
    process = NoiseProcess.from_config(FLOW if kind == "flow" else VP | {"prediction_type": kind})
    net = Linear()
    inherits = options.get("teacher") == "previous_stage"
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator)
    c = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    uncond = {"c": torch.full((1, 3), 0.1, dtype=torch.float64)}
    context = Context(net, process, uncond, stage(segments=8) if inherits else None)
    t, t_prev, t_end = [999, 874, 474, 24], [974, 749, 449, 0], [800, 749, 249, 0]
    method = fixed(TSCD(stage(loss=loss, c=0.05, **options), context), t, t_prev, t_end)
    result = method.loss(Batch(x_0, {"c": c}), Draw(KEY, torch.device("cpu")))
    result.backward()

    def level(times: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = (torch.tensor(v)[:, None, None, None] for v in process.at(np.array(times)))
        return alpha, sigma, torch.tensor(process.network_timestep(np.array(times)))

    def network(x: Tensor, times: list[int], cond: Tensor, weight: Tensor) -> Tensor:
        return weight * x + (cond * level(times)[2][:, None] / 1000)[:, :, None, None]

    def jump(x: Tensor, m: Tensor, start: list[int], end: list[int]) -> Tensor:
        x0, eps = x0_and_eps(kind, x, m, *level(start)[:2])
        alpha, sigma, _ = level(end)
        same = torch.tensor([a == b for a, b in zip(start, end, strict=True)])[:, None, None, None]
        return torch.where(same, x, alpha * x0 + sigma * eps)

    z = torch.randn(x_0.shape, dtype=torch.float64, generator=Draw(KEY, torch.device("cpu")).generator)
    alpha, sigma, _ = level(t)
    x_t = alpha * x_0 + sigma * z
    w = {k: torch.tensor(v, dtype=torch.float64) for k, v in WEIGHTS.items()}
    if inherits:
        x_prev = jump(x_t, network(x_t, t, c, w["previous"]), t, t_prev)
    else:
        u = network(x_t, t, uncond["c"].expand(4, 3), w["base"])
        x_prev = jump(x_t, u + 5.0 * (network(x_t, t, c, w["base"]) - u), t, t_prev)
    student = w["student"].clone().requires_grad_()
    target = w["student"] if options.get("target") == "online" else w["ema"]
    d = jump(x_t, network(x_t, t, c, student), t, t_end) - jump(
        x_prev, network(x_prev, t_prev, c, target), t_prev, t_end
    )
    if options.get("weighting") == "inv_b2":
        (a_t, s_t, _), (a_s, s_s, _) = level(t), level(t_end)
        # d x_end / d m of the jump
        factor = {
            "epsilon": s_s - s_t * a_s / a_t, "v_prediction": a_t * s_s - s_t * a_s, "flow": s_s - s_t,
            "sample": a_s - s_s * a_t / s_t,
        }[kind]  # fmt: skip
        d = d / factor.abs()
    rho = {
        "mse": d**2,
        "l1": d.abs(),
        "pseudo_huber": (d**2 + 0.05**2).sqrt() - 0.05,
        "huber": torch.where(d.abs() <= 0.05, d**2 / 2, 0.05 * (d.abs() - 0.025)),
    }[loss].mean()
    rho.backward()
    torch.testing.assert_close(result, rho, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(net.w["student"].grad, student.grad, rtol=1e-9, atol=1e-12)
    assert net.w["ema"].grad is None and net.w["base"].grad is None
    target_role = "student" if options.get("target") == "online" else "ema"
    # guided teacher in one batch of 2 B; two of the four targets are x_prev itself and need no network
    assert net.calls == [("previous", 4) if inherits else ("base", 8), (target_role, 2), ("student", 4)]


def test_no_target_pass_where_every_end_is_the_solver_s() -> None:
    net = Linear()
    method = fixed(
        TSCD(stage(guidance_scale=[1.0, 1.0]), Context(net, NoiseProcess.from_config(VP), {})), [24], [0], [0]
    )
    batch = Batch(torch.ones(1, 3, 2, 2, dtype=torch.float64), {"c": torch.ones(1, 3, dtype=torch.float64)})
    method.loss(batch, Draw(KEY, torch.device("cpu")))
    assert net.calls == [("base", 1), ("student", 1)]  # guidance 1 is one teacher pass


def test_guidance_and_pure_noise_coefficients() -> None:
    process = NoiseProcess.from_config(VP)
    method = TSCD(stage(guidance_scale=[2.0, 6.0]), Context(Linear(), process, {}))
    t, t_prev = np.array([999, 500]), np.array([974, 475])
    jump = process.jump(t, t_prev)
    coef = guided_coef(jump, np.array([2.0, 6.0]))
    np.testing.assert_allclose(coef[:, 1], jump[:, 1] * [2, 6])
    np.testing.assert_allclose(coef[:, 1] + coef[:, 2], jump[:, 1])  # u + g (c - u) with c = u is u
    coef = method.diffuse_coef(t, np.array([True, False]))
    assert coef[0].tolist() == [0.0, 1.0] and coef[1].tolist() == process.diffuse(500).tolist()


def test_pure_noise_only_at_the_last_timestep_at_the_given_rate() -> None:
    process = NoiseProcess.from_config(VP)
    method = TSCD(stage(segments=1, grid=4, pure_noise=0.5, guidance_scale=[1.0, 1.0]), Context(Linear(), process, {}))
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    plain = method.diffuse_coef
    method.diffuse_coef = lambda t, pure: seen.append((t, pure)) or plain(t, pure)  # type: ignore[method-assign]
    batch = Batch(torch.zeros(4000, 1, 1, 1, dtype=torch.float64), {"c": torch.zeros(4000, 1, dtype=torch.float64)})
    method.loss(batch, Draw(KEY, torch.device("cpu")))
    t, pure = seen[0]
    assert not pure[t != 999].any() and abs(pure[t == 999].mean() - 0.5) < 0.06


def test_offset_noise_statistics() -> None:
    like = torch.empty(4000, 4, 6, 6)
    noise = perturbed_noise(like, 0.3, Draw(KEY, torch.device("cpu")))
    means = noise.mean(dim=(2, 3))  # variance 0.3^2 + 1/36
    assert abs(means.var() - (0.09 + 1 / 36)) < 0.005 and abs(noise.var() - 1.09) < 0.01
    within = noise - means[:, :, None, None]
    assert abs(within.var() * 36 / 35 - 1.0) < 0.01  # beside the offset it stays white, unit variance
    plain = perturbed_noise(like, 0.0, Draw(KEY, torch.device("cpu")))
    assert abs(plain.mean(dim=(2, 3)).var() - 1 / 36) < 0.002


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_inv_b2_trains_the_first_step_at_zero_terminal_snr(prediction: str) -> None:
    process = NoiseProcess.from_config(VP | {"prediction_type": prediction, "rescale_betas_zero_snr": True})
    assert process.alpha[-1] == 0
    method = TSCD(stage(segments=2, weighting="inv_b2"), Context(Linear(), process, {}))
    coef = method.loss_coef(np.array([999, 974]), np.array([974, 949]), np.array([499, 499]))
    assert np.isfinite(coef).all()
    np.testing.assert_allclose(np.abs(coef[:, 1]), 1.0)  # an error of the network's output counts as it is


def test_chord_values() -> None:
    """B^2 from the top of each segment to its boundary, for the SD1.5 schedule."""
    process = NoiseProcess.from_config(VP)
    _, b = chord(process, np.array([999, 999, 999, 999, 249, 499]), np.array([874, 749, 499, 0, 0, 0]))
    np.testing.assert_allclose(b**2, [0.987, 6.28, 46.9, 212.6, 0.441, 2.51], rtol=6e-3)


def test_sampling_metadata() -> None:
    process = NoiseProcess.from_config(VP)
    four = TSCD.metadata(stage(segments=4), process)
    assert four["solver"] == "ddim" and four["timesteps"] == '{"4": [999, 749, 499, 249]}' and four["steps"] == "4"
    one = TSCD.metadata(stage(segments=1), process)
    assert one["solver"] == "tcd" and one["prediction_type"] == "epsilon"
    for steps in (1, 2, 4, 8):  # what the sampler makes of it: the boundaries of the stages' segments
        expected = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]
        assert sampler_for(process, one, steps).timesteps.tolist() == expected
    assert sampler_for(process, four).timesteps.tolist() == [999, 749, 499, 249]

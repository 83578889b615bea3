"""The noise process: published constants, identities of the jump, an exact teacher."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models import NoiseProcess

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")


def vp(prediction="epsilon", **changes):
    return NoiseProcess.from_config(SD | {"prediction_type": prediction} | changes)


def flow(shift=3.0):
    return NoiseProcess.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift})


PROCESSES = [vp(p) for p in VP_PREDICTIONS] + [flow()]

# t, alpha_bar, alpha, sigma, sigma / alpha, log(alpha / sigma) of SD1.5 and SDXL
CONSTANTS = """
0 0.999150 0.99957 0.02915 0.0292 3.5347
19 0.982244 0.99108 0.13325 0.1345 2.0066
124 0.863408 0.92920 0.36958 0.3977 0.9219
249 0.675432 0.82185 0.56971 0.6932 0.3664
259 0.658976 0.81177 0.58397 0.7194 0.3294
374 0.466710 0.68316 0.73027 1.0690 -0.0667
399 0.426086 0.65275 0.75757 1.1606 -0.1489
499 0.277670 0.52694 0.84990 1.6129 -0.4780
624 0.138644 0.37235 0.92809 2.4925 -0.9133
749 0.056623 0.23796 0.97128 4.0817 -1.4065
759 0.052213 0.22850 0.97354 4.2606 -1.4494
800 0.036870 0.19201 0.98139 5.1110 -1.6314
874 0.018433 0.13577 0.99074 7.2974 -1.9875
879 0.017534 0.13242 0.99119 7.4854 -2.0130
999 0.004660 0.06826 0.99767 14.6146 -2.6820
"""


def test_schedule_constants():
    for line in CONSTANTS.strip().splitlines():
        t, *published = line.split()
        alpha, sigma = vp().at(int(t))
        computed = (alpha**2, alpha, sigma, sigma / alpha, np.log(alpha / sigma))
        for value, text in zip(computed, published, strict=True):
            digits = len(text.split(".")[1])
            assert abs(value - float(text)) <= 0.5000001 * 10**-digits, (t, text, value)


def test_levels_are_float64_and_frozen():
    process = vp()
    assert process.alpha.dtype == process.sigma.dtype == np.float64
    assert process.num_train_timesteps == 1000
    assert np.abs(process.alpha**2 + process.sigma**2 - 1).max() < 1e-15
    with pytest.raises(ValueError):
        process.alpha[0] = 1.0


def test_final_point():
    assert vp().at(-1) == vp().at(0)
    assert vp(set_alpha_to_one=True).at(-1) == (1.0, 0.0)
    assert flow().at(-1) == (1.0, 0.0)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_predictions_are_consistent(process):
    """From x_0 and eps make x_t and m; x0(), eps() and jump() must give them back at every level."""
    x_0, noise = np.random.default_rng(0).normal(size=2)
    t = np.arange(1000)
    alpha, sigma = process.at(t)
    c = process.diffuse(t)
    x_t = c[:, 0] * x_0 + c[:, 1] * noise
    m = {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x_0,
        "sample": x_0,
        "flow_prediction": noise - x_0,
    }[process.prediction_type]
    for coef, expected in ((process.x0(t), x_0), (process.eps(t), noise)):
        assert np.abs(coef[:, 0] * x_t + coef[:, 1] * m - expected).max() < 1e-11
    s = (t * 7) % 1000
    alpha_s, sigma_s = process.at(s)
    coef = process.jump(t, s)
    assert np.abs(coef[:, 0] * x_t + coef[:, 1] * m - alpha_s * x_0 - sigma_s * noise).max() < 1e-11


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.prediction_type)
def test_jump_to_itself_is_the_identity(process):
    t = np.arange(-1, 1000)
    assert np.array_equal(process.jump(t, t), np.tile([1.0, 0.0], (1001, 1)))


def test_three_forms_of_the_jump_agree():
    process = vp()
    t, s = (g.ravel() for g in np.meshgrid([19, 259, 499, 800, 999], [0, 19, 124, 499, 759]))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(t), process.at(s)
    x, eps = 0.7, -1.3
    x_0 = (x - sigma_t * eps) / alpha_t
    jump = process.jump(t, s) @ [x, eps]
    scaled = alpha_s / alpha_t * x + (sigma_s - sigma_t * alpha_s / alpha_t) * eps
    h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t)
    exponential = sigma_s / sigma_t * x - alpha_s * np.expm1(-h) * x_0
    assert np.abs(jump - (alpha_s * x_0 + sigma_s * eps)).max() < 1e-11
    assert np.abs(jump - scaled).max() < 1e-11
    assert np.abs(jump - exponential).max() < 1e-11


def test_jump_is_a_straight_line_in_the_noise_to_signal_plane():
    process, x, eps = vp(), 0.4, 1.7
    (alpha_t, sigma_t), s = process.at(999), np.arange(999)
    alpha_s, sigma_s = process.at(s)
    slope = (process.jump(999, s) @ [x, eps] / alpha_s - x / alpha_t) / (sigma_s / alpha_s - sigma_t / alpha_t)
    assert np.abs(slope - eps).max() < 1e-9


@pytest.mark.parametrize("process", [vp(), flow()], ids=["vp", "flow"])
def test_jumps_compose_for_a_constant_slope(process):
    """eps (or the velocity) constant along the path: two jumps are one."""
    x, m = 0.3, -0.8
    direct = process.jump(999, 124) @ [x, m]
    halfway = process.jump(999, 600) @ [x, m]
    assert abs(process.jump(600, 124) @ [halfway, m] - direct) < 1e-12


def test_flow_jump_is_euler_and_timesteps_are_those_of_diffusers():
    process = flow()
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert np.allclose(process.sigma, theirs.sigmas.numpy()[::-1], rtol=0, atol=5e-7)
    assert np.allclose(process.network_timestep(np.arange(1000)), theirs.timesteps.numpy()[::-1], rtol=0, atol=5e-4)
    _, sigma = process.at([900, 300])
    assert np.array_equal(process.jump(900, 300), [1.0, sigma[1] - sigma[0]])
    mu = 0.9
    dynamic = NoiseProcess.from_config({"shift": 1.0, "use_dynamic_shifting": True}, mu=mu)
    level = (np.arange(1000) + 1) / 1000
    assert np.abs(dynamic.sigma - np.exp(mu) / (np.exp(mu) + 1 / level - 1)).max() < 1e-15
    with pytest.raises(HypersdError, match="give mu"):
        NoiseProcess.from_config({"shift": 1.0, "use_dynamic_shifting": True})


@pytest.mark.parametrize("process", [vp(), flow()], ids=["vp", "flow"])
def test_renoising_is_variance_exact(process):
    """x_s = alpha_s x_0 + sigma_s eps re-noised to t has the signal and variance of x_t, for every s <= t."""
    s, t = (g.ravel() for g in np.meshgrid(np.arange(0, 990, 45), np.arange(0, 1000, 37)))
    s, t = s[s <= t], t[s <= t]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = process.at(s), process.at(t)
    scale, fresh = process.renoise(s, t).T
    assert np.abs(scale * alpha_s - alpha_t).max() < 1e-12
    assert np.abs((scale * sigma_s) ** 2 + fresh**2 - sigma_t**2).max() < 1e-12
    with pytest.raises(ValueError, match="cleaner"):
        process.renoise(500, 100)


@pytest.mark.parametrize("prediction", VP_PREDICTIONS)
def test_ddim_with_1000_steps_converges_to_the_exact_gaussian_map(prediction):
    """Data N(m, v): the ODE map is x_s = alpha_s m + sqrt((alpha_s^2 v + sigma_s^2) / (...)) (x_t - alpha_t m)."""
    mean, variance = 0.7, 0.25
    process = vp(prediction)

    def output(x, t):
        alpha, sigma = process.at(t)
        eps = sigma * (x - alpha * mean) / (alpha**2 * variance + sigma**2)
        x_0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "sample": x_0}[prediction]

    start, end = 999, 0
    x_t = np.linspace(-2, 2, 9)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.at(start), process.at(end)
    spread = (alpha_s**2 * variance + sigma_s**2) / (alpha_t**2 * variance + sigma_t**2)
    exact = alpha_s * mean + np.sqrt(spread) * (x_t - alpha_t * mean)
    errors = {}
    for steps in (10, 100, 999):
        grid = np.linspace(start, end, steps + 1).round().astype(int)
        x = x_t
        for t, s in zip(grid[:-1], grid[1:], strict=True):
            c = process.jump(t, s)
            x = c[0] * x + c[1] * output(x, t)
        errors[steps] = np.abs(x - exact).max()
    # first order: ten times the steps, a tenth of the error
    assert errors[999] < 3e-3 and errors[999] < errors[100] / 8 < errors[10] / 40, errors


def test_beta_schedules_match_diffusers():
    for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        config = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": schedule, "num_train_timesteps": 500}
        theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double().numpy()
        ours = NoiseProcess.from_config(config).alpha ** 2
        assert np.abs(ours / theirs - 1).max() < 1e-4 and np.abs(ours - theirs).max() < 1e-6
    betas = np.linspace(1e-4, 0.03, 77)
    process = NoiseProcess.from_config({"trained_betas": betas.tolist()})
    assert np.abs(process.alpha**2 - np.cumprod(1 - betas)).max() < 1e-15


def test_zero_terminal_snr():
    process = vp("v_prediction", rescale_betas_zero_snr=True)
    assert process.alpha[-1] == 0 and process.sigma[-1] == 1
    assert np.array_equal(process.x0(999), [0.0, -1.0])
    with pytest.raises(HypersdError, match="t = 999, where epsilon prediction is undefined"):
        vp("epsilon", rescale_betas_zero_snr=True)


def test_bad_input_is_one_clear_line():
    for config, message in [
        ({"prediction_type": "score"}, "prediction_type 'score'"),
        ({"beta_schedule": "cosmic"}, "beta_schedule 'cosmic'"),
        ({"trained_betas": [0.1, 2.0]}, "alpha_bar"),
        ({"trained_betas": [0.1, float("nan")]}, "alpha_bar"),
        ({"shift": -1.0}, "shift must be positive"),
        ({"_class_name": "EDMEulerScheduler"}, "scheduler EDMEulerScheduler is of the EDM family"),
        ({"sigma_data": 0.5, "sigma_min": 0.002}, "the scheduler config is of the EDM family"),
    ]:
        with pytest.raises(HypersdError, match=message) as error:
            NoiseProcess.from_config(config)
        assert "\n" not in str(error.value)
    for t in (1000, -2):
        with pytest.raises(ValueError, match=r"\[-1, 999\]"):
            vp().at(t)
    with pytest.raises(TypeError, match="integers"):
        vp().at(0.5)
    assert vp().jump(torch.tensor([5, 6]).numpy(), 3).shape == (2, 2)

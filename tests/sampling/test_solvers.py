"""Solvers as tables: the relations between DDIM, TCD, LCM and the one-step rule."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models import NoiseProcess
from hypersd.sampling import ddim, lcm, lcm_grid, tcd, trailing

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}
VP = NoiseProcess.from_config(SD)
FLOW = NoiseProcess.from_config({"shift": 3.0})


def test_ddim_rows_are_jumps():
    for process in (VP, FLOW):
        t = trailing(4)
        table = ddim(process, t)
        assert table.coef.dtype == np.float64 and table.coef.shape == (4, 5) and len(table) == 4
        assert np.array_equal(table.coef[:, :2], process.jump(t, np.append(t[1:], -1)))
        assert not table.coef[:, 2:].any()
    assert np.array_equal(ddim(VP, trailing(4)).timesteps, trailing(4))
    assert np.abs(ddim(FLOW, trailing(4)).timesteps - [1000, 900, 750, 500]).max() < 1e-9


def test_tcd_without_noise_is_ddim_on_its_grid():
    t = lcm_grid(4)
    table = tcd(VP, t, eta=0.0)
    assert np.abs(table.coef[:, :2] - VP.jump(t, np.append(t[1:], 0))).max() < 1e-15
    assert not table.coef[:, 2:].any()
    # the published models end at index 0, which is their final point
    assert np.abs(table.coef - ddim(VP, t).coef).max() < 1e-15


def test_tcd_at_eta_1_jumps_to_index_0_then_renoises():
    t = lcm_grid(4)
    coef = tcd(VP, t, eta=1.0).coef
    scale, fresh = VP.renoise(0, t[1:]).T
    assert np.abs(coef[:-1, :2] - VP.jump(t[:-1], 0) * scale[:, None]).max() < 1e-14
    assert np.abs(coef[:-1, 4] - fresh).max() < 1e-15
    assert np.array_equal(coef[-1], [*VP.jump(t[-1], 0), 0, 0, 0])


def test_one_step_tcd_does_not_depend_on_eta():
    tables = [tcd(VP, [999], eta=eta).coef for eta in (0.0, 0.3, 1.0)]
    assert np.array_equal(tables[0], tables[1]) and np.array_equal(tables[0], tables[2])


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("eta", [0.2, 0.5, 1.0])
def test_tcd_keeps_the_marginal_variance(process, eta):
    """With the true eps of x_t = alpha x_0 + sigma eps, every step lands on alpha_p x_0 plus variance sigma_p^2."""
    t = lcm_grid(8)
    p = np.append(t[1:], 0 if process.kind == "vp" else -1)
    coef = tcd(process, t, eta=eta).coef
    (alpha, sigma), (alpha_p, sigma_p) = process.at(t), process.at(p)
    # network output per unit of x_0 and of eps
    m_signal, m_noise = (np.zeros(8), np.ones(8)) if process.kind == "vp" else (-np.ones(8), np.ones(8))
    signal = coef[:, 0] * alpha + coef[:, 1] * m_signal
    noise = coef[:, 0] * sigma + coef[:, 1] * m_noise
    assert np.abs(signal - alpha_p).max() < 1e-12
    assert np.abs(noise**2 + coef[:, 4] ** 2 - sigma_p**2).max() < 1e-6
    assert (coef[:-1, 4] > 0).all() and coef[-1, 4] == 0


def test_ddim_with_noise_keeps_the_marginal_variance():
    t = trailing(8)
    coef = ddim(VP, t, eta=0.7).coef
    (alpha, sigma), (alpha_p, sigma_p) = VP.at(t), VP.at(np.append(t[1:], -1))
    assert np.abs(coef[:, 0] * alpha - alpha_p).max() < 1e-12
    assert np.abs((coef[:, 0] * sigma + coef[:, 1]) ** 2 + coef[:, 4] ** 2 - sigma_p**2).max() < 1e-12


def test_lcm_ends_at_the_clean_sample_and_renoises_before():
    t = lcm_grid(4)
    coef = lcm(VP, t).coef
    alpha_p, sigma_p = VP.at(t[1:])
    assert np.abs(coef[:-1, 4] - sigma_p).max() == 0 and coef[-1, 4] == 0
    assert np.abs(coef[:-1, :2] - alpha_p[:, None] * VP.x0(t[:-1])).max() < 1e-6
    assert np.abs(coef[-1, :2] - VP.x0(t[-1])).max() < 1e-6


def test_one_step_at_800():
    table = lcm(VP, [800])
    assert table.timesteps.tolist() == [800]
    assert abs(1 / table.coef[0, 0] - 0.19201) < 5e-6
    assert abs(-table.coef[0, 1] / table.coef[0, 0] - 0.98139) < 5e-6
    z, eps = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64)
    theirs = diffusers.LCMScheduler(**SD)
    theirs.set_timesteps(timesteps=[800])
    reference = theirs.step(eps, 800, z).prev_sample
    # diffusers keeps alpha_bar in float32
    assert (table.coef[0, 0] * z + table.coef[0, 1] * eps - reference).abs().max() < 2e-6 * reference.abs().max()


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 7.5])
def test_guidance_splits_the_network_column(guidance_scale):
    table = tcd(VP, lcm_grid(4), eta=0.3)
    guided = table.guided(guidance_scale)
    x, cond, uncond, noise = np.random.default_rng(0).normal(size=4)
    m = uncond + guidance_scale * (cond - uncond)
    assert np.abs(guided.coef @ [x, cond, uncond, 0, noise] - table.coef @ [x, m, 0, 0, noise]).max() < 1e-12
    assert guided.is_guided == (guidance_scale != 1.0)
    assert np.array_equal(table.guided(1.0).coef, table.coef)


def test_bad_grids_and_options_are_refused():
    for call, message in [
        (lambda: ddim(VP, []), "descending"),
        (lambda: ddim(VP, [1, 2]), "descending"),
        (lambda: tcd(VP, [999, 999]), "descending"),
        (lambda: lcm(VP, [0.5]), "integers"),
        (lambda: ddim(VP, [1000]), "0..999"),
        (lambda: ddim(VP, [5, -1]), "0..999"),
        (lambda: tcd(VP, [999], eta=1.1), "eta must be in"),
        (lambda: ddim(VP, [999], eta=-1), "eta must be 0"),
        (lambda: ddim(FLOW, [999], eta=0.5), "VP models only"),
        (lambda: ddim(VP, [999]).guided(2.0).guided(2.0), "guided already"),
        (lambda: ddim(VP, [999]).guided(float("nan")), "finite"),
    ]:
        with pytest.raises(HypersdError, match=message):
            call()

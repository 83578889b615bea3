"""A solver is a function that returns a table of float64 coefficients, one row of `affine_step` per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hypersd.errors import HypersdError
from hypersd.models.noise_process import NoiseProcess

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """S solver steps.

    timesteps (S,): what the network is fed, int64 for VP processes, float64 for flow. coef (S, 5) float64, in the order
    of `affine_step`: x_t, m conditional, m unconditional, history, noise. Column 2 is 0 in every row of a table without
    classifier-free guidance. `keep` (S, 5), of multistep solvers only: the same kind of row, for what a step hands to
    the next one as its history. `embedded_guidance`: what a network that is told its guidance (FLUX) is told.
    """

    timesteps: NDArray[np.int64] | Array
    coef: Array
    keep: Array | None = None
    embedded_guidance: float | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def is_guided(self) -> bool:
        """True where the unconditional output is needed."""
        return bool(self.coef[:, 2].any())

    def guided(self, guidance_scale: float) -> Table:
        """Classifier-free guidance m = u + g (c - u) (Ho & Salimans 2022), in the network's own output space.

        Every solver here is affine in m, so guidance only splits its coefficient: k1 -> g k1 and (1 - g) k1.
        g = 1 leaves the table as it is, with one network output per step.
        """
        if self.is_guided:
            raise HypersdError("the table is guided already")
        if not np.isfinite(guidance_scale):
            raise HypersdError(f"guidance_scale must be a finite number, got {guidance_scale}")
        keep = None if self.keep is None else _split(self.keep, guidance_scale)
        return replace(self, coef=_split(self.coef, guidance_scale), keep=keep)


def ddim(process: NoiseProcess, timesteps: Sequence[int] | ArrayLike, *, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, eq. 12, 16) along `timesteps`, the last step to the final point of the process.

    With eta = 0 every row is the first-order jump, so for flow processes this is Euler. eta in [0, 1] adds noise of
    variance eta^2 (1 - abar_p) / (1 - abar_t) (1 - abar_t / abar_p), VP only.
    """
    t = _grid(process, timesteps)
    return Table(process.network_timestep(t), ddim_rows(process, t, np.append(t[1:], -1), eta))


def ddim_rows(process: NoiseProcess, t: ArrayLike, p: ArrayLike, eta: float = 0.0) -> Array:
    """(..., 5): DDIM steps from t to p."""
    alpha_p, direction, std = ddim_parts(process, t, p, eta)
    return rows(alpha_p[..., None] * process.x0(t) + direction[..., None] * process.eps(t), noise=std)


def ddim_parts(process: NoiseProcess, t: ArrayLike, p: ArrayLike, eta: float = 0.0) -> tuple[Array, Array, Array]:
    """(a, b, c) with x_p = a x_0 + b eps + c noise."""
    if not eta >= 0:
        raise HypersdError(f"eta must be 0 or more, got {eta}")
    (alpha_t, sigma_t), (alpha_p, sigma_p) = process.at(t), process.at(p)
    if eta == 0:
        return alpha_p, sigma_p, np.zeros_like(alpha_p)
    if process.kind != "vp":
        raise HypersdError("DDIM with eta > 0 is defined for VP models only; use eta = 0 or the tcd solver")
    # a step that goes nowhere or backwards adds no noise
    variance = np.maximum((sigma_p / sigma_t) ** 2 * (1.0 - (alpha_t / alpha_p) ** 2), 0.0)
    std = eta * np.sqrt(variance)
    return alpha_p, np.sqrt(np.maximum(sigma_p**2 - std**2, 0.0)), std


def euler(process: NoiseProcess, sigmas: Sequence[float] | ArrayLike) -> Table:
    """Euler steps of a flow model along any noise levels `sigmas`, descending and within (0, 1], the last step to 0.

    Levels that belong to timesteps are `ddim`'s business; this is for grids between them (`flow_sigmas`).
    """
    if process.kind != "flow":
        raise HypersdError("the euler solver is for flow models; use ddim, which is the same for others")
    levels = np.asarray(sigmas, dtype=np.float64)
    if levels.ndim != 1 or not levels.size or not (np.diff([*levels, 0.0]) < 0).all() or levels[0] > 1.0:
        raise HypersdError(f"sigmas must descend within (0, 1], got {list(np.atleast_1d(levels))[:8]}")
    step = np.diff([*levels, 0.0])
    return Table(levels * process.num_train_timesteps, rows(np.stack((np.ones_like(step), step), axis=-1)))


def tcd(process: NoiseProcess, timesteps: Sequence[int] | ArrayLike, *, eta: float = 0.3) -> Table:
    """TCD (Zheng et al. 2024, strategic stochastic sampling): jump to s = floor((1 - eta) p), then re-noise up to p.

    p is the next timestep. eta = 0 is DDIM on this grid, eta = 1 jumps to index 0 every time. The last step has p = 0
    and no noise: a VP sample ends at index 0 (alpha_bar_0), a flow sample at sigma = 0.
    """
    t = _grid(process, timesteps)
    return Table(process.network_timestep(t), tcd_rows(process, t, eta))


def tcd_rows(process: NoiseProcess, t: NDArray[np.int64], eta: float) -> Array:
    """(S, 5): TCD steps along the grid t."""
    jump, noise = tcd_parts(process, t, np.append(t[1:], 0 if process.kind == "vp" else -1), eta)
    return rows(jump * noise[:, :1], noise=noise[:, 1])


def tcd_parts(process: NoiseProcess, t: ArrayLike, p: ArrayLike, eta: float) -> tuple[Array, Array]:
    """((..., 2), (..., 2)) for steps from t to p: x_s = j[0] x_t + j[1] m, then x_p = r[0] x_s + r[1] noise."""
    if not 0 <= eta <= 1:
        raise HypersdError(f"eta must be in [0, 1], got {eta}")
    p = np.asarray(p)
    # in float32, as every published TCD sampler: where (1 - eta) p is an integer, rounding decides the index
    s = np.floor(np.float32(1.0 - eta) * p.astype(np.float32)).astype(np.int64)
    s = np.where(p < 0, p, s)
    return process.jump(t, s), process.renoise(s, p)


def lcm(
    process: NoiseProcess,
    timesteps: Sequence[int] | ArrayLike,
    *,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Table:
    """LCM (Luo et al. 2023): x = c_skip x_t + c_out x_0, then re-noise to the next timestep; the last step stops at x.

    With timesteps [800] this is the rule of one-step models trained at t = 800: pure noise in, x_0 out.
    """
    t = _grid(process, timesteps)
    denoised = lcm_denoised(process, t, timestep_scaling, sigma_data)
    alpha_p, sigma_p = (np.append(level, end) for level, end in zip(process.at(t[1:]), (1.0, 0.0), strict=True))
    return Table(process.network_timestep(t), rows(alpha_p[:, None] * denoised, noise=sigma_p))


def lcm_denoised(process: NoiseProcess, t: ArrayLike, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> Array:
    """(..., 2): the consistency output c_skip x_t + c_out x_0 as coefficients of (x_t, m)."""
    skip, out = lcm_boundary(t, timestep_scaling, sigma_data)
    return out[..., None] * process.x0(t) + skip[..., None] * np.array([1.0, 0.0])


def lcm_boundary(t: ArrayLike, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Array, Array]:
    """(c_skip, c_out): c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = scaling * t, d = sigma_data."""
    u = np.asarray(t, dtype=np.float64) * timestep_scaling
    norm = u**2 + sigma_data**2
    return sigma_data**2 / norm, u / np.sqrt(norm)


def dpmpp_2m(process: NoiseProcess, timesteps: Sequence[int] | ArrayLike) -> Table:
    """DPM-Solver++ 2M, the midpoint form (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order in
    lambda = log(alpha / sigma) at one network evaluation a step.

        x_p = sigma_p / sigma_t x_t + (alpha_p - sigma_p alpha_t / sigma_t) D
        D = x_0 + h / (2 h_before) (x_0 - x_0 before),   h = lambda_p - lambda_t

    The first step is of first order (D = x_0), and so is the last, which goes to the final point of the process.
    """
    t = _grid(process, timesteps)
    (alpha_t, sigma_t), (alpha_p, sigma_p) = process.at(t), process.at(np.append(t[1:], -1))
    x, data = sigma_p / sigma_t, alpha_p - sigma_p * alpha_t / sigma_t
    before = np.zeros(len(t))  # the weight of (x_0 - x_0 before) in D
    with np.errstate(divide="ignore"):  # flow models start at alpha = 0, whose first step needs no lambda
        h = np.diff(np.log(alpha_t / sigma_t))
    if len(h) > 1:
        before[1:-1] = h[1:] / (2.0 * h[:-1])
    clean = process.x0(t)
    coef = rows(x[:, None] * np.array([1.0, 0.0]) + (data * (1.0 + before))[:, None] * clean, history=-data * before)
    return Table(process.network_timestep(t), coef, rows(clean))


def perflow(process: NoiseProcess, timesteps: Sequence[int] | ArrayLike, *, windows: int = 4) -> Table:
    """PeRFlow (Yan et al. 2024, section 3): within each of the windows the trajectory is a straight line.

    From t in a window with top s and bottom e, r = (s - t) / (s - e) down the line, the network's direction d gives the
    line's end x_e = (A x_t + (1 - r) B d) / (1 - r + r A), and a step to p covers (t - p) / (t - e) of what is left.
    A step must not cross the bottom of its window: sample with at least one timestep at the top of each.
    """
    t = _grid(process, timesteps)
    s, e = perflow_windows(t, windows, process.num_train_timesteps)
    p = np.append(t[1:], -1)
    if (p < e).any():
        raise HypersdError(f"timesteps {t.tolist()[:8]} skip one of the {windows} windows of this model; take more")
    scale, length = chord(process, s, e)
    r, covered = (s - t) / (s - e), (t - p) / (t - e)
    left = 1.0 - r + r * scale
    identity = np.array([1.0, 0.0])
    end = (scale / left)[:, None] * identity + ((1.0 - r) * length / left)[:, None] * direction(process, t)
    return Table(process.network_timestep(t), rows(identity + covered[:, None] * (end - identity)))


def perflow_windows(t: ArrayLike, windows: int, T: int = 1000) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(top, bottom) of each timestep's window, bottom < t <= top; the last bottom is -1, the final point."""
    edges = np.arange(windows + 1, dtype=np.int64) * T // windows - 1
    top = np.searchsorted(edges, np.asarray(t), side="left")
    return edges[top], edges[top - 1]


def chord(process: NoiseProcess, s: ArrayLike, e: ArrayLike) -> tuple[Array, Array]:
    """(A, B) with x_e = A x_s + B d, the first-order jump: d is the noise (VP) or the velocity (flow). So B is what an
    error of the network's estimate of d is multiplied by. Raises HypersdError where x_s is pure noise: no A."""
    (alpha_s, sigma_s), (alpha_e, sigma_e) = process.at(s), process.at(e)
    if process.kind == "flow":
        return np.ones_like(sigma_e), sigma_e - sigma_s
    if (alpha_s == 0).any():
        raise HypersdError(
            "perflow needs a schedule that keeps some signal in its last timestep (this one has zero terminal SNR); "
            "use another method"
        )
    return alpha_e / alpha_s, sigma_e - sigma_s * alpha_e / alpha_s


def direction(process: NoiseProcess, t: ArrayLike) -> Array:
    """(..., 2): the d of a `chord` as coefficients of (x_t, m)."""
    if process.kind == "flow":
        return np.zeros((*np.shape(t), 2)) + np.array([0.0, 1.0])
    return process.eps(t)


def rows(pair: Array, *, history: Array | float = 0.0, noise: Array | float = 0.0) -> Array:
    """(..., 5) rows of `affine_step` from (..., 2) coefficients of x_t and m."""
    coef = np.zeros((*pair.shape[:-1], 5))
    coef[..., :2], coef[..., 3], coef[..., 4] = pair, history, noise
    return coef


def _split(coef: Array, guidance_scale: float) -> Array:
    split = coef.copy()
    split[:, 1], split[:, 2] = guidance_scale * coef[:, 1], (1.0 - guidance_scale) * coef[:, 1]
    return split


def _grid(process: NoiseProcess, timesteps: Sequence[int] | ArrayLike) -> NDArray[np.int64]:
    t = np.asarray(timesteps)
    if t.ndim != 1 or not t.size or t.dtype.kind not in "iu" or (np.diff(t.astype(np.int64)) >= 0).any():
        raise HypersdError(f"timesteps must be integers in descending order, got {list(np.atleast_1d(t))[:8]}")
    if t[-1] < 0 or t[0] >= process.num_train_timesteps:
        raise HypersdError(f"timesteps must lie in 0..{process.num_train_timesteps - 1}, got {t[0]}..{t[-1]}")
    return t.astype(np.int64)

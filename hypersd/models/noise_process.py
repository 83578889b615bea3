"""The forward process x_t = alpha_t x_0 + sigma_t eps and everything that is affine in (x_t, m).

m is the raw network output. Whatever it predicts, the clean sample, the noise and the first-order jump between two
noise levels are c[0] x_t + c[1] m with scalars that depend on the timestep alone (DDIM: Song et al. 2021, eq. 12;
v-prediction: Salimans & Ho 2022; rectified flow: Liu et al. 2023). So this class hands out float64 coefficients and
never touches a tensor. Trainer and samplers both read them here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from hypersd.errors import HypersdError

Array = NDArray[np.float64]

_VP_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_OTHER_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """A discrete noise process with T = `num_train_timesteps` levels; index 0 is the cleanest, T - 1 the noisiest.

    alpha, sigma: float64, shape (T,). Wherever a timestep is taken, -1 means the final point of sampling,
    (final_alpha, final_sigma): alpha_0, sigma_0 for models whose scheduler says `set_alpha_to_one = False` (SD1.5,
    SDXL), 1 and 0 otherwise. `kind` is "vp" or "flow"; `prediction_type` says what the network outputs:
    "epsilon", "v_prediction", "sample" (VP) or "flow_prediction" (flow, v = eps - x_0). `shift` is the m of a flow
    schedule, sigma = m u / (1 + (m - 1) u) with u = (t + 1) / T; `is_dynamic` says that it comes from the picture size.
    Raises HypersdError for levels that leave a coefficient non-finite (epsilon prediction at zero terminal SNR), unless
    `is_partial` says that they will be left out: `undefined` names them.
    """

    kind: str
    prediction_type: str
    alpha: Array
    sigma: Array
    final_alpha: float
    final_sigma: float
    shift: float = 1.0
    is_dynamic: bool = False
    is_partial: bool = False

    def __post_init__(self) -> None:
        allowed = {"vp": _VP_PREDICTIONS, "flow": ("flow_prediction",)}.get(self.kind)
        if allowed is None:
            raise HypersdError(f"noise process kind {self.kind!r} is unknown; use 'vp' or 'flow'")
        if self.prediction_type not in allowed:
            raise HypersdError(
                f"prediction_type {self.prediction_type!r} does not fit a {self.kind} process; use {list(allowed)}"
            )
        alpha, sigma = (np.array(a, dtype=np.float64) for a in (self.alpha, self.sigma))
        if alpha.ndim != 1 or alpha.shape != sigma.shape or not len(alpha):
            raise HypersdError(f"alpha {alpha.shape} and sigma {sigma.shape} must be one vector each, of equal length")
        for values in (alpha, sigma):
            values.flags.writeable = False
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "sigma", sigma)
        if len(self.undefined) and not self.is_partial:
            t = self.undefined[-1]
            raise HypersdError(
                f"the noise schedule has alpha = {alpha[t]:.3g}, sigma = {sigma[t]:.3g} at t = {t}, where "
                f"{self.prediction_type} prediction is undefined; use v_prediction or drop rescale_betas_zero_snr"
            )

    @functools.cached_property
    def undefined(self) -> list[int]:
        """The levels at which x_t and m say nothing of x_0 or of eps."""
        levels = np.arange(len(self.alpha))
        with np.errstate(all="ignore"):
            finite = np.isfinite(self.x0(levels)).all(-1) & np.isfinite(self.eps(levels)).all(-1)
        return levels[~finite].tolist()

    @classmethod
    def from_config(
        cls,
        scheduler_config: Mapping[str, Any],
        *,
        mu: float | None = None,
        latent_size: tuple[int, int] | None = None,
    ) -> NoiseProcess:
        """The process of a diffusers scheduler config (a scheduler_config.json as a dict).

        A config with `shift`, `use_dynamic_shifting` or flow prediction is a flow model; anything else is VP with
        `beta_schedule` linear, scaled_linear or squaredcos_cap_v2, or `trained_betas`. Flow models with dynamic shift
        want `mu`, or `latent_size`, the (height, width) of the latents that it depends on (`dynamic_mu`). Raises
        HypersdError for what it cannot honour.
        """
        config = dict(scheduler_config)
        name = str(config.get("_class_name", ""))
        if name.startswith("EDM") or config.get("sigma_data") is not None:
            raise HypersdError(
                f"the scheduler {name or 'config'} is of the EDM family (sigma_data), whose networks take scaled "
                "inputs; only VP and flow models are supported"
            )
        prediction = config.get("prediction_type") or "epsilon"
        is_flow = "FlowMatch" in name or "shift" in config or "flow" in str(prediction)
        if is_flow or config.get("use_dynamic_shifting") or config.get("use_flow_sigmas"):
            return cls._flow(config, mu, latent_size)
        abar = torch.cumprod(1.0 - vp_betas(config), dim=0).numpy()
        return cls.from_alphas_cumprod(
            abar, prediction_type=prediction, set_alpha_to_one=bool(config.get("set_alpha_to_one", True))
        )

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: ArrayLike, *, prediction_type: str, set_alpha_to_one: bool, is_partial: bool = False
    ) -> NoiseProcess:
        """A VP process from alpha_bar_t = alpha_t^2, shape (T,)."""
        abar = np.asarray(alphas_cumprod, dtype=np.float64)
        if not ((abar >= 0) & (abar <= 1)).all():
            raise HypersdError(
                "the noise schedule leaves 0 <= alpha_bar <= 1; check beta_start, beta_end, trained_betas"
            )
        alpha, sigma = np.sqrt(abar), np.sqrt(1.0 - abar)
        final = (1.0, 0.0) if set_alpha_to_one else (float(alpha[0]), float(sigma[0]))
        return cls("vp", prediction_type, alpha, sigma, *final, is_partial=is_partial)

    @classmethod
    def _flow(cls, config: Mapping[str, Any], mu: float | None, latent_size: tuple[int, int] | None) -> NoiseProcess:
        for option in ("shift_terminal", "invert_sigmas", *_OTHER_SIGMAS):
            if config.get(option):
                raise HypersdError(f"the scheduler's {option} = {config[option]} is not supported for flow models")
        shift, is_dynamic = float(config.get("shift", 1.0)), bool(config.get("use_dynamic_shifting"))
        if is_dynamic:
            if mu is None and latent_size is None:
                raise HypersdError("this flow model shifts its schedule with the picture size; give mu or latent_size")
            mu = dynamic_mu(config, latent_size) if mu is None and latent_size is not None else mu
            assert mu is not None
            # e^mu / (e^mu + 1/sigma - 1) is the plain shift with factor e^mu
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        if not (math.isfinite(shift) and shift > 0):
            raise HypersdError(f"the flow shift must be positive, got {shift}")
        steps = int(config.get("num_train_timesteps", 1000))
        sigma = shifted(np.arange(1, steps + 1, dtype=np.float64) / steps, shift)
        return cls("flow", "flow_prediction", 1.0 - sigma, sigma, 1.0, 0.0, shift, is_dynamic)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alpha)

    def at(self, t: ArrayLike) -> tuple[Array, Array]:
        """(alpha_t, sigma_t) for integer timesteps of any shape, -1 for the final point."""
        index = np.asarray(t)
        if index.dtype.kind not in "iu":
            raise TypeError(f"timesteps must be integers, got {index.dtype}")
        if index.size and not (-1 <= index.min() and index.max() < self.num_train_timesteps):
            raise ValueError(
                f"timesteps must lie in [-1, {self.num_train_timesteps - 1}], got {index.min()}..{index.max()}"
            )
        # index -1 finds the appended final point
        return np.append(self.alpha, self.final_alpha)[index], np.append(self.sigma, self.final_sigma)[index]

    def network_timestep(self, t: ArrayLike) -> NDArray[Any]:
        """What the network is fed for index t: t itself (VP, int64), or T sigma_t (flow, float64)."""
        if self.kind == "vp":
            return np.asarray(t, dtype=np.int64)
        return self.at(t)[1] * self.num_train_timesteps

    def x0(self, t: ArrayLike) -> Array:
        """(..., 2): x_0 = c[..., 0] x_t + c[..., 1] m."""
        alpha, sigma = self.at(t)
        match self.prediction_type:
            case "epsilon":
                pair = 1.0 / alpha, -sigma / alpha
            case "v_prediction":
                pair = alpha, -sigma
            case "sample":
                pair = np.zeros_like(alpha), np.ones_like(alpha)
            case _:
                pair = np.ones_like(alpha), -sigma
        return np.stack(pair, axis=-1)

    def eps(self, t: ArrayLike) -> Array:
        """(..., 2): eps = c[..., 0] x_t + c[..., 1] m."""
        alpha, sigma = self.at(t)
        match self.prediction_type:
            case "epsilon":
                pair = np.zeros_like(alpha), np.ones_like(alpha)
            case "v_prediction":
                pair = sigma, alpha
            case "sample":
                pair = 1.0 / sigma, -alpha / sigma
            case _:
                pair = np.ones_like(alpha), alpha
        return np.stack(pair, axis=-1)

    def jump(self, t: ArrayLike, s: ArrayLike) -> Array:
        """(..., 2): the first-order jump x_s = alpha_s x_0 + sigma_s eps = c[..., 0] x_t + c[..., 1] m.

        t and s broadcast. The jump to the same level is exactly (1, 0).
        """
        t, s = np.broadcast_arrays(t, s)
        alpha_s, sigma_s = self.at(s)
        coef = alpha_s[..., None] * self.x0(t) + sigma_s[..., None] * self.eps(t)
        return np.where((t == s)[..., None], np.array([1.0, 0.0]), coef)

    def diffuse(self, t: ArrayLike) -> Array:
        """(..., 2): x_t = c[..., 0] x_0 + c[..., 1] noise."""
        return np.stack(self.at(t), axis=-1)

    def renoise(self, s: ArrayLike, t: ArrayLike) -> Array:
        """(..., 2): x_t = c[..., 0] x_s + c[..., 1] noise, from level s up to the noisier level t, variance exact.

        The scale is alpha_t / alpha_s and the fresh noise fills sigma_t^2 - (alpha_t sigma_s / alpha_s)^2, which for
        VP is 1 - alpha_bar_t / alpha_bar_s. Raises ValueError where t is cleaner than s.
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.at(s), self.at(t)
        scale = alpha_t / alpha_s
        variance = 1.0 - scale**2 if self.kind == "vp" else sigma_t**2 - (scale * sigma_s) ** 2
        if (variance < -1e-12).any():
            raise ValueError("renoise goes from a cleaner level to a noisier one; s lies above t")
        return np.stack((scale, np.sqrt(np.maximum(variance, 0.0))), axis=-1)


def shifted(sigma: ArrayLike, shift: float) -> Array:
    """m sigma / (1 + (m - 1) sigma), the time shift of flow models (Esser et al. 2024, eq. 23)."""
    sigma = np.asarray(sigma, dtype=np.float64)
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def dynamic_mu(config: Mapping[str, Any], latent_size: tuple[int, int]) -> float:
    """log of the shift of FLUX for latents (height, width): linear in the number of tokens, each 2x2 latents."""
    tokens = (latent_size[0] // 2) * (latent_size[1] // 2)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (tokens - few) / (many - few)


def vp_betas(config: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """beta, shape (T,), of a VP scheduler config, computed in `dtype` with the zero-terminal-SNR rescale applied."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(np.asarray(config["trained_betas"], dtype=np.float64)).to(dtype)
    elif schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=dtype)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=dtype) ** 2
    elif schedule == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, eq. 17
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = torch.from_numpy(np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)).to(dtype)
    else:
        raise HypersdError(
            f"beta_schedule {schedule!r} is unknown; use linear, scaled_linear, squaredcos_cap_v2 or trained_betas"
        )
    if config.get("rescale_betas_zero_snr"):
        # Lin et al. 2024, algorithm 1: shift sqrt(alpha_bar) so that the last is 0 and the first keeps its value
        root = torch.cumprod(1.0 - betas, dim=0).sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        abar = root**2
        betas = 1.0 - torch.cat((abar[:1], abar[1:] / abar[:-1]))
    return betas

"""A 2-D Gaussian mixture, its exact noise prediction and exact ODE map, and a denoiser whose adapters are small
MLPs."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from hypersd.distill.data import LatentDataset
from hypersd.models.noise_process import NoiseProcess

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
}
COMPONENTS = SimpleNamespace(scheduler_config=SCHEDULER, folder="toy", network=None)
PROCESS = NoiseProcess.from_config(SCHEDULER)
MEANS = torch.tensor([[1.5, 0.0], [-0.9, 1.2], [-0.6, -1.4], [0.5, 1.6]], dtype=torch.float64)
VARIANCE = 0.15**2


def exact_eps(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """E[eps | x_t] for the mixture: -sigma grad log p_t. x (B, 2), alpha and sigma (B, 1)."""
    variance = alpha**2 * VARIANCE + sigma**2
    away = x[:, None, :] - alpha[:, :, None] * MEANS.to(x.dtype)
    weight = torch.softmax(-0.5 * (away**2).sum(-1) / variance, dim=1)
    return sigma / variance * (weight[:, :, None] * away).sum(1)


def exact_map(x: Tensor, t: int = 999, s: int = 0, steps: int = 400) -> Tensor:
    """The probability-flow ODE from t to s, RK4 in log(sigma / alpha) on y = x / alpha: dy = eps dnu."""
    x = x.double()
    nu = np.geomspace(PROCESS.sigma[t] / PROCESS.alpha[t], PROCESS.sigma[s] / PROCESS.alpha[s], steps + 1)

    def slope(y: Tensor, n: float) -> Tensor:
        alpha = torch.full((len(y), 1), 1.0 / np.sqrt(1.0 + n * n), dtype=y.dtype)
        return exact_eps(y * alpha, alpha, n * alpha) * n

    y = x / PROCESS.alpha[t]
    for a, b in zip(np.log(nu[:-1]), np.log(nu[1:]), strict=True):
        h = b - a
        k1 = slope(y, np.exp(a))
        k2 = slope(y + h / 2 * k1, np.exp(a + h / 2))
        k3 = slope(y + h / 2 * k2, np.exp(a + h / 2))
        k4 = slope(y + h * k3, np.exp(b))
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y * PROCESS.alpha[s]


class Mixture(nn.Module):
    """base: the exact noise prediction. A role adds an MLP that starts at zero. Speaks the Backbone's interface."""

    def __init__(self, width: int = 64, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.width, self.dtype = width, dtype
        self.heads = nn.ModuleDict()
        self.register_buffer("alpha", torch.tensor(PROCESS.alpha, dtype=dtype)[:, None])
        self.register_buffer("sigma", torch.tensor(PROCESS.sigma, dtype=dtype)[:, None])
        self.calls: list[tuple[str, int]] = []

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        self.calls.append((role, len(x_t)))
        alpha, sigma = self.alpha[timestep], self.sigma[timestep]
        eps = exact_eps(x_t, alpha, sigma)
        if role == "base":
            return eps
        log_nu = torch.log(sigma / alpha)
        features = torch.cat([x_t, eps, log_nu, torch.sin(2 * log_nu), torch.cos(2 * log_nu)], dim=1)
        return eps + self.heads[role](features)

    def add_role(self, role: str, like: str | None = None) -> None:
        if like is not None:
            self.heads[role] = copy.deepcopy(self.heads[like])
            return
        w = self.width
        head = nn.Sequential(
            nn.Linear(7, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, 2)
        )
        nn.init.zeros_(head[-1].weight)
        nn.init.zeros_(head[-1].bias)
        self.heads[role] = head.to(self.dtype)

    def drop_role(self, role: str) -> None:
        del self.heads[role]

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return dict(self.heads[role].named_parameters())

    def copy_role(self, src: str, dst: str) -> None:
        self.lerp_role(dst, src, 1.0)

    def lerp_role(self, dst: str, src: str, weight: float) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.heads[dst].parameters()), list(self.heads[src].parameters()), weight)


def dataset(count: int = 20_000, dtype: torch.dtype = torch.float32) -> LatentDataset:
    """Samples of the mixture, without conditions."""
    rng = np.random.default_rng(7)
    x = MEANS.numpy()[rng.integers(0, len(MEANS), count)] + np.sqrt(VARIANCE) * rng.standard_normal((count, 2))
    return LatentDataset([{"latents": torch.tensor(x, dtype=dtype)}], [""] * count, {})


@functools.cache
def _reference() -> tuple[Tensor, Tensor]:
    start = torch.tensor(np.random.default_rng(11).standard_normal((2000, 2)))
    return start, exact_map(start)


def few_step_error(model: Mixture, steps: int, role: str = "ema") -> float:
    """RMS distance between `steps` trailing DDIM steps of `role` and the exact ODE map, from 2,000 fixed noises."""
    start, end = _reference()
    x = start.to(model.dtype)
    times = [round(1000 - i * 1000 / steps) - 1 for i in range(steps)] + [0]
    with torch.no_grad():
        for t, s in zip(times[:-1], times[1:], strict=True):
            m = model(x, torch.full((len(x),), t), {}, role=role)
            c = PROCESS.jump(t, s)
            x = c[0] * x + c[1] * m
    return float((x.double() - end).pow(2).sum(1).mean().sqrt())

"""Timestep grids, solvers as coefficient tables, the sampling loop, diffusers schedulers. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "lcm_grid": "timesteps",
    "leading": "timesteps",
    "linspace": "timesteps",
    "trailing": "timesteps",
    "Table": "solvers",
    "ddim": "solvers",
    "dpmpp_2m": "solvers",
    "lcm": "solvers",
    "tcd": "solvers",
    "PRESETS": "presets",
    "rules_for": "presets",
    "denoiser": "sampler",
    "sample": "sampler",
    "sampler_for": "sampler",
    "DDIMScheduler": "schedulers",
    "LCMScheduler": "schedulers",
    "TCDScheduler": "schedulers",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"hypersd.sampling.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hypersd.sampling' has no attribute {name!r}")

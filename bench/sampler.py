"""One solver step against diffusers' scheduler: the same output, the same noise from the same generator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling import schedulers, solvers

from .harness import OURS, Result, Runner, compare

DIFFUSERS = "diffusers"
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DDIM_ONLY = {"set_alpha_to_one": False, "clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1}
SHAPES = {
    "emoji_b32": (32, 4, 16, 16),
    "sd15_b1": (1, 4, 64, 64),
    "sd15_b4": (4, 4, 64, 64),
    "sdxl_b1": (1, 4, 128, 128),
}
SOLVERS = {"ddim": solvers.ddim, "tcd": solvers.tcd, "lcm": solvers.lcm}
STEPS, STEP = 4, 1


def _scheduler(module: Any, name: str, device: str = "cpu") -> Any:
    config = CONFIG | (DDIM_ONLY if name == "ddim" else {})
    scheduler = getattr(module, f"{name.upper()}Scheduler").from_config(config)
    scheduler.set_timesteps(STEPS, device=device)
    return scheduler


def _step(scheduler: Any, m: Tensor, x: Tensor) -> Callable[[], Tensor]:
    generator, timestep = torch.Generator(x.device), scheduler.timesteps[STEP]
    noisy = not type(scheduler).__name__.startswith("DDIM")

    def call() -> Tensor:
        if noisy:
            generator.manual_seed(0)
        scheduler._step_index = STEP
        return scheduler.step(m, timestep, x, generator=generator).prev_sample

    return call


def _affine(name: str, m: Tensor, x: Tensor) -> Callable[[], Tensor]:
    timesteps = _scheduler(diffusers, name).timesteps.numpy()
    process = NoiseProcess.from_config(CONFIG | {"set_alpha_to_one": name != "ddim", "prediction_type": "epsilon"})
    coef = torch.from_numpy(SOLVERS[name](process, timesteps).coef)[STEP]
    noisy, generator = bool(coef[4] != 0), torch.Generator(x.device)

    def call() -> Tensor:
        noise = None
        if noisy:
            generator.manual_seed(0)
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        return affine_step(x, m, coef, noise=noise)

    return call


def measure(
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    shapes: str | tuple[str, ...],
    peers: Sequence[str] | None,
    seconds: float,
) -> Iterable[list[Result]]:
    """affine_step with a row of the table, our scheduler class, and diffusers' class, each one step."""
    for name in SOLVERS:
        for shape_name, shape in SHAPES.items():
            if not shape_name.startswith(shapes):
                continue
            for dtype in dtypes:
                draw = torch.Generator().manual_seed(3)
                x, m = (torch.randn(shape, generator=draw).to(device, dtype) for _ in range(2))
                if dtype != torch.float32 and name != "ddim":
                    continue  # the noise of a 16-bit generator is not that of a float64 one: nothing to judge by
                with torch.random.fork_rng():
                    generator = torch.Generator(device).manual_seed(0)
                    noise = torch.randn(shape, generator=generator, dtype=dtype, device=device).double()
                exact = {"y": _exact(name, m.double(), x.double(), noise)}
                runners = {
                    OURS: Runner(_affine(name, m, x)),
                    "scheduler": Runner(_step(_scheduler(schedulers, name, device), m, x)),
                    DIFFUSERS: Runner(_step(_scheduler(diffusers, name, device), m, x)),
                }
                yield compare(
                    "sampler_step", f"{name}_{shape_name}", dtype, "fwd", exact, runners, seconds=seconds,
                    device=device, yardstick=DIFFUSERS, graphs=name == "ddim",  # a graph cannot seed a generator
                )  # fmt: skip


def _exact(name: str, m: Tensor, x: Tensor, noise: Tensor) -> Tensor:
    """diffusers' step in float64 with this noise."""
    scheduler = _scheduler(diffusers, name, str(x.device))
    scheduler.alphas_cumprod = _alphas(name)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    real, module.randn_tensor = module.randn_tensor, lambda *args, **kwargs: noise
    try:
        return _step(scheduler, m, x)()
    finally:
        module.randn_tensor = real


def _alphas(name: str) -> Tensor:
    betas = torch.linspace(CONFIG["beta_start"] ** 0.5, CONFIG["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)

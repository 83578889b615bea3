"""DDIMScheduler, TCDScheduler, LCMScheduler: diffusers' names and options over the coefficient tables of this package.

Use them as diffusers' own: `pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config)`. Every step is one
`affine_step` and reads nothing back from the device. For equal results the noise schedule is diffusers': betas and
alpha_bar in float32 (NoiseProcess.from_config, used for training, keeps float64; they differ by 1e-6 relative).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.kernels import affine_step
from hypersd.models.noise_process import NoiseProcess, vp_betas
from hypersd.sampling import solvers
from hypersd.sampling.timesteps import lcm_grid, leading, linspace, subsample, trailing

Generators = torch.Generator | list[torch.Generator] | None


class _AffineScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What the three have in common: the noise process, tables on the device, adding noise, clipping x_0."""

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    config: Any
    order = 1
    init_noise_sigma = 1.0

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers'. Raises HypersdError for a config of flow matching or EDM, whose noise levels these schedulers
        do not have."""
        given = {**config, **kwargs} if isinstance(config, dict) else kwargs
        other = "beta_start" not in given and ("shift" in given or "sigma_data" in given)
        if other or given.get("use_flow_sigmas"):
            raise HypersdError(
                f"{cls.__name__} is for models with betas (SD1.5, SDXL), and the config is one of "
                f"{'EDM' if 'sigma_data' in given else 'flow matching'}; keep the pipeline's own scheduler, or sample "
                "with hypersd.sampling.sample"
            )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _setup(self) -> None:
        config = self.config
        self.betas = vp_betas(config, torch.float32)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]
        self.process = NoiseProcess.from_alphas_cumprod(
            self.alphas_cumprod.numpy(),
            prediction_type=config.prediction_type,
            set_alpha_to_one=config.set_alpha_to_one,
            is_partial=True,  # few grids reach the last level, the one that may be undefined
        )
        self.num_inference_steps: int | None = None
        self._set_grid(np.arange(config.num_train_timesteps, dtype=np.int64)[::-1].copy(), None)

    def _set_grid(self, grid: NDArray[np.int64], device: str | torch.device | None) -> None:
        self._grid = grid
        self._tables: dict[Any, Tensor] = {}
        self.timesteps = torch.from_numpy(grid).to(device)
        self._seen = self.timesteps, _version(self.timesteps)

    @property
    def _is_grid(self) -> bool:
        """Whether `timesteps` are what they were set to; not assigned since, nor changed in place."""
        return self.timesteps is self._seen[0] and _version(self.timesteps) == self._seen[1]

    def _host(self, timestep: int | Tensor) -> int | None:
        """The timestep, where the host knows it: a number, or by its address an element of `timesteps`.

        Raises HypersdError for one that the model lacks, or at which it has no sample.
        """
        if not isinstance(timestep, Tensor):
            t = int(timestep)
        elif self._is_grid and timestep.device == self.timesteps.device and self.timesteps.is_contiguous():
            offset = timestep.data_ptr() - self.timesteps.data_ptr()
            if not 0 <= offset < self.timesteps.nbytes:
                return None
            t = int(self._grid[offset // self.timesteps.element_size()])
        else:
            return None
        if not 0 <= t < self.process.num_train_timesteps:
            raise HypersdError(f"timestep {t} is not one of the model's, 0..{self.process.num_train_timesteps - 1}")
        if t in self.process.undefined:
            raise HypersdError(
                f"timestep {t} is pure noise (rescale_betas_zero_snr), where {self.config.prediction_type} prediction "
                "says nothing of the picture; start below it (timestep_spacing='leading'), or use the model's own "
                "prediction_type if it is v_prediction"
            )
        return t

    def _table(self, key: Any, device: torch.device, make: Callable[[], NDArray[np.float64]]) -> Tensor:
        """Rows of affine_step on `device`, made once per `key` and grid."""
        found = self._tables.get((key, device))
        if found is None:
            with np.errstate(divide="ignore", invalid="ignore"):  # in rows of undefined levels
                found = self._tables[key, device] = torch.from_numpy(np.ascontiguousarray(make())).to(device)
        return found

    def _level(self, table: Tensor, timestep: int | Tensor) -> Tensor:
        """Row of level `timestep` out of all, looked up on the device: a tensor is never read by the host."""
        t = self._host(timestep)
        if t is None:
            assert isinstance(timestep, Tensor)
            return table.index_select(0, timestep.to(table.device).reshape(1))[0]
        return table[t]

    def _needs_steps(self) -> None:
        if self.num_inference_steps is None:
            raise HypersdError("the scheduler has no timesteps yet; call set_timesteps first")

    def _clip(self, x0: Tensor) -> Tensor:
        """Clamp to +-clip_sample_range, or dynamic thresholding (Saharia et al. 2022, 2.3)."""
        config = self.config
        if not config.thresholding:
            return x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        flat = x0.flatten(1).to(torch.promote_types(x0.dtype, torch.float32))
        limit = torch.quantile(flat.abs(), config.dynamic_thresholding_ratio, dim=1, keepdim=True)
        limit = limit.clamp(1.0, config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).view_as(x0).to(x0.dtype)

    @property
    def _clips(self) -> bool:
        return self.config.thresholding or self.config.clip_sample

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is: these schedulers do not scale the network input."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise; timesteps integer, shape (B,) or (1,)."""
        return self._diffuse("add_noise", original_samples, noise, timesteps, lambda c: c)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha_t noise - sigma_t x_0."""
        return self._diffuse("velocity", sample, noise, timesteps, lambda c: np.stack((-c[..., 1], c[..., 0]), -1))

    def _diffuse(self, key: str, x: Tensor, noise: Tensor, timesteps: Tensor, turn: Callable[..., Any]) -> Tensor:
        levels = np.arange(self.process.num_train_timesteps)
        table = self._table(key, x.device, lambda: solvers.rows(turn(self.process.diffuse(levels))))
        coef = table.index_select(0, timesteps.to(x.device).reshape(-1)).expand(len(x), 5)
        dtype = torch.promote_types(x.dtype, noise.dtype)
        return affine_step(x.to(dtype), noise.to(dtype), coef)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class DDIMScheduler(_AffineScheduler):
    """DDIM (Song et al. 2021). Options as diffusers' DDIMScheduler, plus custom timesteps in `set_timesteps`."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: NDArray[Any] | list[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._setup()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """The grid by step count and `timestep_spacing`, or the given descending list.

        A step goes from t to t - T // N, as in diffusers; along a custom list it goes to the next entry. Below 0 it
        ends at the final alpha_bar.
        """
        _exactly_one(num_inference_steps, timesteps)
        T = self.config.num_train_timesteps
        if timesteps is not None:
            grid = _custom(timesteps, T)
            # for each level the nearest listed one below it, -1 below the last
            position = np.searchsorted(grid[::-1], np.arange(T)) - 1
            self._previous = np.where(position >= 0, grid[::-1][position], -1)
        else:
            n = int(num_inference_steps)  # type: ignore[arg-type]
            match self.config.timestep_spacing:
                case "trailing":
                    grid = trailing(n, T)
                case "leading":
                    grid = leading(n, T, self.config.steps_offset)
                case "linspace":
                    grid = linspace(n, T)
                case other:
                    raise HypersdError(f"timestep_spacing {other!r} is unknown; use trailing, leading or linspace")
            self._previous = np.maximum(np.arange(T) - T // n, -1)
        self.num_inference_steps = len(grid)
        self._set_grid(grid, device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step; keeps no state, so timesteps may come in any order. Shapes and dtypes as `sample`."""
        self._needs_steps()
        if variance_noise is not None and generator is not None and eta > 0:
            raise ValueError("give either generator or variance_noise, not both")
        x, m = _promote(sample, model_output)
        noise = None
        if eta > 0:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(m.shape, generator=generator, device=m.device, dtype=model_output.dtype)
            noise = noise.to(x.dtype)
        t = np.arange(self.process.num_train_timesteps)
        x0 = affine_step(x, m, self._row("x0", timestep, x.device, lambda: solvers.rows(self.process.x0(t))))
        if not self._clips:
            row = self._row(
                ("step", eta), timestep, x.device, lambda: solvers.ddim_rows(self.process, t, self._previous, eta)
            )
            previous = affine_step(x, m, row, noise=noise)
        else:
            x0 = self._clip(x0)
            row = self._row(
                ("clipped", eta, use_clipped_model_output),
                timestep,
                x.device,
                lambda: self._clipped_rows(t, eta, use_clipped_model_output),
            )
            previous = affine_step(x, m, row, history=x0, noise=noise)
        if not return_dict:
            return previous, x0
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def _row(self, key: Any, timestep: int | Tensor, device: torch.device, make: Callable[..., Any]) -> Tensor:
        return self._level(self._table(key, device, make), timestep)

    def _clipped_rows(self, t: NDArray[np.int64], eta: float, use_clipped: bool) -> NDArray[np.float64]:
        """Rows over (x_t, m, -, clipped x_0, noise); with `use_clipped` eps is derived anew from the clipped x_0."""
        alpha_p, direction, std = solvers.ddim_parts(self.process, t, self._previous, eta)
        if not use_clipped:
            return solvers.rows(direction[:, None] * self.process.eps(t), history=alpha_p, noise=std)
        alpha_t, sigma_t = self.process.at(t)
        slope = direction / sigma_t
        return solvers.rows(np.stack((slope, 0 * slope), -1), history=alpha_p - slope * alpha_t, noise=std)


class _GridScheduler(_AffineScheduler):
    """Schedulers whose step depends on its place in the grid: LCM and TCD.

    As in diffusers a step starts from the timestep that it is given and goes to the one in `timesteps` after its place,
    which counts up from the first step's; step number `num_inference_steps` takes no noise. So `timesteps` may be
    assigned (and `num_inference_steps`, where there are more or fewer), and a step may be given any timestep.
    """

    def _setup(self) -> None:
        super()._setup()
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _read_grid(self) -> NDArray[np.int64]:
        """`timesteps` on the host, read again where they were assigned or changed in place."""
        if not self._is_grid:
            now = self.timesteps
            if not isinstance(now, Tensor) or now.dim() != 1 or now.dtype not in (torch.int64, torch.int32):
                raise HypersdError(
                    "the timesteps assigned to the scheduler are no integer tensor of one dimension; assign one, or "
                    "call set_timesteps(timesteps=...)"
                )
            self._grid, self._tables = _custom(now.tolist(), self.config.num_train_timesteps), {}
            self._seen = now, _version(now)
        return self._grid

    @property
    def step_index(self) -> int | None:
        """Place of the next step in `timesteps`; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the first step starts (pipelines set it for image to image)."""
        self._begin_index = begin_index

    def _set_steps(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        original_inference_steps: int | None,
        timesteps: Sequence[int] | None,
        strength: float,
        *,
        any_level: bool,
    ) -> None:
        _exactly_one(num_inference_steps, timesteps)
        T = self.config.num_train_timesteps
        if timesteps is not None:
            grid = _custom(timesteps, T)
            grid = grid[len(grid) - min(int(len(grid) * strength), len(grid)) :]
            self.num_inference_steps = len(grid)  # diffusers counts the steps left out, and LCM ends in noise
        else:
            n = self.num_inference_steps = int(num_inference_steps)  # type: ignore[arg-type]
            if any_level and original_inference_steps is not None:
                if n > original_inference_steps:
                    raise HypersdError(
                        f"num_inference_steps: {n} is larger than original_inference_steps, {original_inference_steps}"
                    )
                grid = subsample(np.arange(int(T * strength), dtype=np.int64), n)
            else:
                grid = lcm_grid(
                    n, T, original_inference_steps or self.config.original_inference_steps, strength=strength
                )
        self._set_grid(np.ascontiguousarray(grid), device)
        self._step_index = self._begin_index = None

    def index_for_timestep(self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Place of a timestep in the grid; the second one where `schedule_timesteps` has several.

        A timestep taken out of `timesteps` is recognised by its address, so a device tensor is not read by the host.
        """
        grid = self._read_grid() if schedule_timesteps is None else schedule_timesteps.cpu().numpy()
        t = self._host(timestep)
        t = int(timestep) if t is None else t
        found = np.flatnonzero(grid == t)
        if not len(found):
            raise HypersdError(f"timestep {t} is not one of the scheduler's {grid.tolist()[:16]}")
        return int(found[1 if len(found) > 1 else 0])

    def _begin_step(self, timestep: int | Tensor) -> int:
        self._needs_steps()
        grid = self._read_grid()
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        index = self._step_index
        if index >= len(grid):
            raise HypersdError(f"all {len(grid)} steps are done; call set_timesteps to start again")
        self._step_index = index + 1
        return index

    def _after_last(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the last step from t goes."""
        raise NotImplementedError

    def _row(
        self,
        key: Any,
        index: int,
        timestep: int | Tensor,
        device: torch.device,
        make: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]],
    ) -> Tensor:
        """The row of step `index` from `timestep`, out of `make(t, p)`, those of steps from t to p."""
        grid = self._grid
        if self._host(timestep) == grid[index]:
            after = np.append(grid[1:], self._after_last(grid[-1:]))
            return self._table(key, device, lambda: make(grid, after))[index]
        # another timestep, unknown to the host if it is a tensor: the rows of all levels
        t = np.arange(self.process.num_train_timesteps)
        after = np.full_like(t, grid[index + 1]) if index + 1 < len(grid) else self._after_last(t)
        return self._level(self._table((key, index), device, lambda: make(t, after)), timestep)


class TCDScheduler(_GridScheduler):
    """TCD (Zheng et al. 2024). Options as diffusers' TCDScheduler; like it, x_0 is never clipped."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: NDArray[Any] | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._setup()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """N points of the distillation grid, of all levels if `original_inference_steps` is given, or a custom list."""
        self._set_steps(num_inference_steps, device, original_inference_steps, timesteps, strength, any_level=True)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        """Jump to floor((1 - eta) p), re-noise to the next timestep p; the last step takes no noise. eta in [0, 1]."""
        index = self._begin_step(timestep)
        x, m = _promote(sample, model_output)
        row = self._row(("jump", eta), index, timestep, x.device, lambda t, p: solvers.rows(self._parts(t, p, eta)[0]))
        noised = previous = affine_step(x, m, row)
        if eta > 0 and index + 1 != self.num_inference_steps:
            noise = randn_tensor(m.shape, generator=generator, device=m.device, dtype=x.dtype)
            row = self._row(("step", eta), index, timestep, x.device, lambda t, p: self._step_rows(t, p, eta))
            previous = affine_step(x, m, row, noise=noise)
        if not return_dict:
            return previous, noised
        return TCDSchedulerOutput(prev_sample=previous, pred_noised_sample=noised)

    def _after_last(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.zeros_like(t)

    def _parts(self, t: NDArray[np.int64], p: NDArray[np.int64], eta: float) -> tuple[Any, Any]:
        return solvers.tcd_parts(self.process, t, p, eta)

    def _step_rows(self, t: NDArray[np.int64], p: NDArray[np.int64], eta: float) -> NDArray[np.float64]:
        jump, noise = self._parts(t, p, eta)
        return solvers.rows(jump * noise[:, :1], noise=noise[:, 1])


class LCMScheduler(_GridScheduler):
    """LCM (Luo et al. 2023). Options as diffusers' LCMScheduler."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: NDArray[Any] | list[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._setup()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """N points of the distillation grid, or a custom descending list such as [800]."""
        self._set_steps(num_inference_steps, device, original_inference_steps, timesteps, strength, any_level=False)

    def get_scalings_for_boundary_condition_discrete(self, timestep: int) -> tuple[float, float]:
        """(c_skip, c_out) at a timestep."""
        skip, out = solvers.lcm_boundary(int(timestep), self.config.timestep_scaling)
        return float(skip), float(out)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        """c_skip x_t + c_out x_0, then re-noise to the next timestep, in all but the last step."""
        index = self._begin_step(timestep)
        x, m = _promote(sample, model_output)
        x0 = None
        if self._clips:
            row = self._row("x0", index, timestep, x.device, lambda t, p: solvers.rows(self.process.x0(t)))
            x0 = self._clip(affine_step(x, m, row))
        row = self._row("denoised", index, timestep, x.device, lambda t, p: self._denoised_rows(t))
        denoised = previous = affine_step(x, m, row, history=x0)
        if index + 1 != self.num_inference_steps:
            noise = randn_tensor(m.shape, generator=generator, device=m.device, dtype=x.dtype)
            row = self._row("noise", index, timestep, x.device, lambda t, p: solvers.rows(self.process.diffuse(p)))
            previous = affine_step(denoised, noise, row)
        if not return_dict:
            return previous, denoised
        return LCMSchedulerOutput(prev_sample=previous, denoised=denoised)

    def _after_last(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        return t

    def _denoised_rows(self, t: NDArray[np.int64]) -> NDArray[np.float64]:
        scaling = self.config.timestep_scaling
        if not self._clips:
            return solvers.rows(solvers.lcm_denoised(self.process, t, scaling))
        skip, out = solvers.lcm_boundary(t, scaling)
        return solvers.rows(np.stack((skip, 0 * skip), -1), history=out)


def _promote(sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    return sample.to(dtype), model_output.to(dtype)


def _version(t: Any) -> int | None:
    """How often a tensor was changed in place; inference tensors do not count."""
    return None if not isinstance(t, Tensor) or t.is_inference() else t._version


def _exactly_one(num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
    if (num_inference_steps is None) == (timesteps is None):
        raise ValueError("give either num_inference_steps or timesteps")


def _custom(timesteps: Sequence[int], T: int) -> NDArray[np.int64]:
    grid = np.array([int(t) for t in timesteps], dtype=np.int64)
    if not grid.size or (np.diff(grid) >= 0).any() or grid[0] >= T or grid[-1] < 0:
        raise ValueError(f"timesteps must descend within 0..{T - 1}, got {grid.tolist()[:8]}")
    return grid

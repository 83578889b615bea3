"""The sampling loop: one network call and one `affine_step` per row of a table, nothing read back from the device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.kernels import affine_step
from hypersd.models.backbone import Backbone
from hypersd.models.networks import embeds_guidance
from hypersd.models.noise_process import NoiseProcess, shifted
from hypersd.sampling import solvers
from hypersd.sampling.solvers import Table
from hypersd.sampling.timesteps import flow_sigmas, lcm_grid, perflow_grid, trailing

# of each solver along timesteps: its grid of N steps where a file stores none, and what its metadata may set
SOLVERS: dict[str, tuple[Callable[..., Any], dict[str, type]]] = {
    "ddim": (trailing, {"eta": float}),
    "dpmpp_2m": (trailing, {}),
    "tcd": (lcm_grid, {"eta": float}),
    "lcm": (lcm_grid, {}),
    "perflow": (perflow_grid, {"windows": int}),
}
Denoise = Callable[..., Tensor | tuple[Tensor, Tensor]]


@torch.no_grad()
def sample(
    denoise: Denoise,
    table: Table,
    x_T: Tensor,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run the solver of `table` from x_T (B, C, H, W); returns the last x, same shape and dtype.

    denoise(x_t, timestep (B,)) gives the network output m, or (m conditional, m unconditional) for a guided table; the
    `embedded_guidance` of a table that has one is a third argument (B,), float32.
    Fresh noise is drawn per step from `generator` (one per sample if a list), only in rows that use it. progress(done,
    total) is called after every step. Keep x_T in float32: it is the accumulator, the network may run in 16 bit.
    Nothing is copied to or from a GPU (unless a generator is the host's), so the whole loop fits into a CUDA graph.
    """
    coef = torch.from_numpy(table.coef)  # on the host: the numbers of a row travel with the launch
    kind = torch.float32 if table.timesteps.dtype.kind == "f" else torch.int64
    is_guided, is_noisy = table.is_guided, table.coef[:, 4] != 0
    keep = None if table.keep is None else torch.from_numpy(table.keep)
    uses_history = [*(table.coef[1:, 3] != 0), False]
    x, history = x_T, None
    guidance = () if table.embedded_guidance is None else (table.embedded_guidance,)
    told = [torch.full((len(x),), value, dtype=torch.float32, device=x.device) for value in guidance]
    for i, t in enumerate(table.timesteps.tolist()):
        m = denoise(x, torch.full((len(x),), t, dtype=kind, device=x.device), *told)
        if isinstance(m, Tensor) is is_guided:
            wanted = "a pair (conditional, unconditional)" if is_guided else "one tensor"
            raise HypersdError(f"denoise must return {wanted} for this table")
        cond, uncond = m if is_guided else (m, None)
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype) if is_noisy[i] else None
        cond = cond.to(x.dtype)  # type: ignore[union-attr]
        uncond = None if uncond is None else uncond.to(x.dtype)
        x_t, x = x, affine_step(x, cond, coef[i], eps_uncond=uncond, history=history, noise=noise)
        history = affine_step(x_t, cond, keep[i], eps_uncond=uncond) if keep is not None and uses_history[i] else None
        if progress is not None:
            progress(i + 1, len(table))
    return x


def denoiser(
    backbone: Backbone,
    cond: Mapping[str, Any],
    *,
    null: Mapping[str, Any] | None = None,
    role: str | Sequence[str] = "student",
) -> Denoise:
    """A `denoise` for `sample`. With `null` both passes of classifier-free guidance run as one batch of 2 B. `role` may
    be a sequence of B roles, one for each sample.

    Text keys and values are projected in the first step and kept, where the network allows it (see TextCache). A
    network that is told its guidance is told that of the table, or else `cond`'s.
    """
    if null is not None and cond.keys() != null.keys():
        raise HypersdError(f"conditions {sorted(cond)} and null conditions {sorted(null)} differ")
    if null is not None and not isinstance(role, str):
        role = [*role, *role]
    both = cond if null is None else {name: torch.cat((cond[name], null[name])) for name in cond}
    keep = getattr(backbone, "text_cache", None)  # anything that acts like a Backbone will do
    conditions = keep(both, role=role) if keep else lambda: both

    def predict(x_t: Tensor, timestep: Tensor, *told: Tensor) -> Tensor:
        guidance = {"guidance": told[0]} if told else {}
        return backbone(x_t, timestep, {**conditions(), **guidance}, role=role)

    def predict_both(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        m = predict(*(torch.cat((each, each)) for each in arguments))
        return m[: len(m) // 2], m[len(m) // 2 :]

    return predict if null is None else predict_both


def with_guidance(table: Table, network: Any, guidance_scale: float) -> Table:
    """Guidance as the network takes it: as an input (guidance-distilled FLUX), or, above 1, from two passes."""
    if embeds_guidance(network):
        return replace(table, embedded_guidance=guidance_scale)
    return table.guided(guidance_scale) if guidance_scale > 1 else table


def offered_steps(metadata: Mapping[str, str]) -> list[int]:
    """The numbers of steps that a LoRA file is made for, ascending; none where it does not say. Raises HypersdError
    where they cannot be read."""
    try:
        found = sorted({int(n) for n in str(metadata.get("steps", "")).split(",") if n.strip()})
    except ValueError as error:
        raise HypersdError(f"the LoRA metadata cannot be read: steps: {error}") from None
    if found and found[0] < 1:
        raise HypersdError(f"the LoRA metadata cannot be read: steps = {metadata['steps']!r}")
    return found


def sampler_for(process: NoiseProcess, metadata: Mapping[str, str], steps: int | None = None) -> Table:
    """The table that a LoRA file asks for, from its safetensors metadata (see `hypersd.models.save_lora`).

    `steps` picks one of the step counts that the file names; the default is the largest. Guidance at or below 1 means
    none, as in diffusers. The solver "euler" goes along `sigmas`, which are yet to be shifted (as diffusers' pipelines
    take them), or else along `flow_sigmas`. Raises HypersdError for metadata that does not fit the process or cannot be
    read.
    """
    if metadata.get("prediction_type", process.prediction_type) != process.prediction_type:
        raise HypersdError(
            f"the LoRA was made for {metadata['prediction_type']} and the model predicts {process.prediction_type}"
        )
    solver = metadata.get("solver", "tcd")
    if solver not in (*SOLVERS, "euler"):
        raise HypersdError(f"the LoRA metadata names solver {solver!r}; known are {', '.join(SOLVERS)}, euler")
    spaced, options = SOLVERS.get(solver, (None, {}))
    offered = offered_steps(metadata)
    try:
        stored = json.loads(metadata.get("sigmas" if solver == "euler" else "timesteps", "null"))
        given = {name: kind(metadata[name]) for name, kind in options.items() if name in metadata}
        guidance = float(metadata.get("guidance_scale", 1.0))
        embedded = float(metadata["embedded_guidance"]) if "embedded_guidance" in metadata else None
        for name, value in {**given, "guidance_scale": guidance, "embedded_guidance": embedded or 0.0}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} = {value}")
    except ValueError as error:
        raise HypersdError(f"the LoRA metadata cannot be read: {error}") from None
    if steps is None:
        steps = offered[-1] if offered else len(stored) if isinstance(stored, list) else 4
    elif offered and steps not in offered:
        raise HypersdError(f"the LoRA was made for {offered} steps, not {steps}")
    grid = stored.get(str(steps)) if isinstance(stored, dict) else stored
    if grid is not None and not (isinstance(grid, list) and all(isinstance(t, int | float) for t in grid)):
        raise HypersdError(f"the LoRA metadata cannot be read: {grid!r} is no list of timesteps")
    if given.get("windows", 1) < 1:
        raise HypersdError(f"the LoRA metadata cannot be read: windows = {given['windows']}")
    if grid is not None and len(grid) != steps:
        grid = None
    if spaced is None:
        table = solvers.euler(process, flow_sigmas(process, steps) if grid is None else shifted(grid, process.shift))
    else:
        if grid is None:
            windows = (given.get("windows", 4),) if solver == "perflow" else ()
            grid = spaced(steps, *windows, process.num_train_timesteps)
        make: Callable[..., Table] = getattr(solvers, solver)
        table = make(process, np.asarray(grid), **given)
    table = replace(table, embedded_guidance=embedded)
    return table.guided(guidance) if guidance > 1 else table

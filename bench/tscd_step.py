"""One TSCD training step: ours, and the same arithmetic as a user of diffusers and PEFT writes it.

The peer follows the loops of diffusers' consistency-distillation scripts: three UNets (teacher; student and EMA target,
each with a PEFT adapter), in 16 bit under autocast, two teacher passes for guidance, predictions turned into x_0 and
eps and stepped by DDIM in eager torch, pseudo-Huber, AdamW, EMA over the adapter. Both sides get the same latents,
noise, timesteps and adapters; the loss and the gradient norm of the first step must agree before anything is timed.

Peak tensor memory is what torch's CPU allocator reports to the profiler: the running sum of every allocation and free
from before the models are built to the end of the second step (oneDNN's private scratch is outside it, on both sides);
on a GPU it is what torch's allocator there reports.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from hypersd.distill.data import Batch
from hypersd.distill.method import EMA, STUDENT, Draw
from hypersd.distill.recipe import Recipe
from hypersd.distill.segments import SegmentGrid
from hypersd.distill.trainer import Trainer
from hypersd.models.lora import LCM_TARGETS

from .harness import OURS, Result, percentiles
from .memory import peak_bytes

PEER = "diffusers+peft"
BATCH, RANK, TOKENS = 32, 32, 16
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction", "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
TRAIN = {"batch_size": BATCH, "learning_rate": 3e-4, "clip": 1.0, "ema_decay": 0.95, "checkpoint_every": 10**6}
TRAIN |= {"watch_every": 0}  # steps alone are compared
# as the shipped recipes of the embedded model train in bfloat16, and as any recipe does by default
SHIPPED: dict[torch.dtype, dict[str, str]] = {torch.bfloat16: {"gradient_checkpointing": "none"}, torch.float32: {}}
STAGE = {"method": "tscd", "segments": 8, "iterations": 1, "guidance_scale": [3.0, 3.0], "offset_noise": 0.0, "c": 1e-3}


def random_unet() -> UNet2DConditionModel:
    """The embedded model's UNet with random weights."""
    from hypersd.emoji.networks import new_unet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_unet().eval()


class RandomLatents:
    """A data set of noise: the time and memory of a step do not depend on the picture."""

    fingerprint = "noise"
    latent_size = (16, 16)

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(BATCH, 4, 16, 16, generator=generator)
        self.text = torch.randn(BATCH, TOKENS, width, generator=generator)
        self.uncond = {"encoder_hidden_states": torch.zeros(1, TOKENS, width)}

    def batch(self, step: int, batch_size: int, **_: Any) -> Batch:
        return Batch(self.latents, {"encoder_hidden_states": self.text})


@dataclass
class Draws:
    """The random numbers of one step."""

    t: np.ndarray
    t_prev: np.ndarray
    t_end: np.ndarray
    guidance: np.ndarray
    noise: Tensor


def draws(step: int, like: Tensor) -> Draws:
    """Those that our trainer draws in this step of its first stage."""
    draw = Draw((0, 0, step), like.device)
    t, t_prev, t_end = SegmentGrid.build(8, 40, 1000).sample(draw.host, len(like), "mixed", 0.25)
    guidance = draw.host.uniform(*STAGE["guidance_scale"], len(like))
    return Draws(t, t_prev, t_end, guidance, draw.normal(like.shape, like))


class PeerLoop:
    """The training loop of a diffusers + PEFT user."""

    def __init__(self, unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
        from peft import LoraConfig

        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LCM_TARGETS), lora_dropout=0.0)
        self.teacher = unet.to(dtype).requires_grad_(False)
        self.student, self.target = copy.deepcopy(self.teacher), copy.deepcopy(self.teacher)
        for network in (self.student, self.target):
            network.add_adapter(lora)
        for name, parameter in adapter(self.student).items():
            parameter.data = parameter.data.float()
            adapter(self.target)[name].data = parameter.data.clone()
        self.target.requires_grad_(False)
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        self.ema = [adapter(self.target)[name] for name in adapter(self.student)]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=TRAIN["learning_rate"], weight_decay=0.0)
        alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod
        alphas_cumprod = alphas_cumprod.to(unet.device)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.dtype = dtype

    def network(self, unet: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        x, text = x.to(self.dtype), text.to(self.dtype)
        # without autocast PEFT computes adapters in the dtype of their weights, which are float32
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return unet(x, t, encoder_hidden_states=text, return_dict=False)[0].float()

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def origin_and_noise(self, v: Tensor, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.at(t)
        return alpha * x - sigma * v, alpha * v + sigma * x

    def jump(self, x_0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = self.at(s)
        return alpha * x_0 + sigma * eps

    def loss(self, latents: Tensor, text: Tensor, uncond: Tensor, draw: Draws) -> Tensor:
        t, t_prev, t_end = (torch.from_numpy(index).to(latents.device) for index in (draw.t, draw.t_prev, draw.t_end))
        alpha, sigma = self.at(t)
        x_t = alpha * latents + sigma * draw.noise
        m = self.network(self.student, x_t, t, text)
        prediction = self.jump(*self.origin_and_noise(m, t, x_t), t_end)
        with torch.no_grad():
            w = torch.from_numpy(draw.guidance).float().view(-1, 1, 1, 1).to(latents.device)
            x0_cond, eps_cond = self.origin_and_noise(self.network(self.teacher, x_t, t, text), t, x_t)
            m_uncond = self.network(self.teacher, x_t, t, uncond.expand_as(text))
            x0_uncond, eps_uncond = self.origin_and_noise(m_uncond, t, x_t)
            x_0 = x0_uncond + w * (x0_cond - x0_uncond)
            eps = eps_uncond + w * (eps_cond - eps_uncond)
            x_prev = self.jump(x_0, eps, t_prev)
            m = self.network(self.target, x_prev, t_prev, text)
            target = self.jump(*self.origin_and_noise(m, t_prev, x_prev), t_end)
        return torch.mean(torch.sqrt((prediction - target) ** 2 + STAGE["c"] ** 2) - STAGE["c"])

    def step(self, latents: Tensor, text: Tensor, uncond: Tensor, draw: Draws) -> tuple[float, float]:
        loss = self.loss(latents, text, uncond, draw)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, TRAIN["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for target, source in zip(self.ema, self.parameters, strict=True):
                target.mul_(TRAIN["ema_decay"]).add_(source, alpha=1 - TRAIN["ema_decay"])
        return loss.item(), norm.item()


def adapter(unet: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".default", ""): p for name, p in unet.named_parameters() if ".lora_" in name}


def peer(unet: UNet2DConditionModel, dtype: torch.dtype, data: RandomLatents, start: dict[str, Tensor]) -> Callable:
    """step(number) -> (loss, gradient norm)."""
    loop = PeerLoop(unet, dtype)
    with torch.no_grad():
        for network in (loop.student, loop.target):
            for name, parameter in adapter(network).items():
                parameter.copy_(start[name])
    latents, text, uncond = (t.to(unet.device) for t in (data.latents, data.text, *data.uncond.values()))
    return lambda number: loop.step(latents, text, uncond, draws(number, latents))


def ours(
    unet: UNet2DConditionModel, dtype: torch.dtype, data: RandomLatents, start: dict[str, Tensor], steps: int,
    after: Callable[[int, float], None], folder: Path,
) -> Trainer:  # fmt: skip
    """Run the trainer as it ships for `steps` steps; after(number, loss) is called when each is done."""
    recipe = Recipe.model_validate(
        {
            "lora": {"rank": RANK, "alpha": float(RANK)},
            "train": TRAIN | SHIPPED[dtype] | {"dtype": str(dtype).removeprefix("torch.")},
            "stages": [STAGE | {"iterations": steps}],
        }
    )
    components = SimpleNamespace(network=unet, scheduler_config=SCHEDULE)
    trainer = Trainer(recipe, components, data, folder, progress=lambda stage, step, total, loss: after(step - 1, loss))  # type: ignore[arg-type]
    with torch.no_grad():
        for role in (STUDENT, EMA):
            for name, parameter in trainer.backbone.role_parameters(role).items():
                parameter.copy_(start[name].view(parameter.shape))
    trainer.run()
    return trainer


def logged(folder: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of the run in this folder."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["loss"], entry["grad_norm"]) for entry in entries]


def judge(own: tuple[float, float], peers: tuple[float, float], dtype: torch.dtype) -> tuple[str, float]:
    """(verdict, largest relative difference) of the loss and gradient norm of the same step."""
    apart = float(np.max([abs(a - b) / abs(b) for a, b in zip(own, peers, strict=True)]))  # NaN where one is
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    green = apart <= limit
    return "green" if green else f"red: loss or gradient norm differs by {apart:.1e}, allowed {limit:.0e}", apart


def initial_adapter(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Some adapter with b not 0, so that every gradient is at work."""
    from hypersd.models.backbone import Backbone
    from hypersd.models.lora import LoraSpec

    backbone = Backbone(copy.deepcopy(unet), LoraSpec(RANK, float(RANK)), roles=("student",))
    generator = torch.Generator().manual_seed(5)
    return {
        name: 0.05 * torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel())
        for name, p in backbone.role_parameters("student").items()
    }


def measure(
    *,
    device: str,
    dtypes: Sequence[torch.dtype],
    shapes: str | tuple[str, ...],
    peers: Sequence[str] | None,
    seconds: float,
) -> Iterable[list[Result]]:
    """Steps taken in turns: ours by the trainer as it ships, the peer's in between. At least 5, for 20 * seconds."""
    unet = random_unet().to(device)
    data = RandomLatents(unet.config.cross_attention_dim)
    start = initial_adapter(unet)
    for dtype in dtypes:
        yield _measure(unet, data, start, dtype, seconds, device)


def _measure(
    unet: UNet2DConditionModel,
    data: RandomLatents,
    start: dict[str, Tensor],
    dtype: torch.dtype,
    seconds: float,
    device: str = "cpu",
) -> list[Result]:
    peer_step: Callable | None = peer(copy.deepcopy(unet), dtype, data, start)
    times: dict[str, list[float]] = {OURS: [], PEER: []}
    found: dict[str, list[tuple[float, float]]] = {OURS: [], PEER: []}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    mark = time.perf_counter()

    def after(number: int, loss: float) -> None:
        nonlocal mark
        wait()
        times[OURS].append((time.perf_counter() - mark) * 1e6)
        begun = time.perf_counter()
        found[PEER].append(peer_step(number))  # type: ignore[misc]
        wait()
        times[PEER].append((time.perf_counter() - begun) * 1e6)
        mark = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        ours(copy.deepcopy(unet), dtype, data, start, 2, after, Path(folder))
        steps = max(5, round(20 * seconds / (1e-6 * (times[OURS][1] + times[PEER][1]))))
    peer_step = peer(copy.deepcopy(unet), dtype, data, start)
    times, found = {OURS: [], PEER: []}, {OURS: [], PEER: []}
    with tempfile.TemporaryDirectory() as folder:
        mark = time.perf_counter()
        ours(copy.deepcopy(unet), dtype, data, start, steps, after, Path(folder))
        found[OURS] = logged(Path(folder))
    peer_step = None  # its memory is not ours to measure

    verdict, apart = judge(found[OURS][0], found[PEER][0], dtype)

    def two_peer_steps() -> Any:
        step = peer(copy.deepcopy(unet), dtype, data, start)
        return step, step(0), step(1)

    def two_own_steps() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return ours(copy.deepcopy(unet), dtype, data, start, 2, lambda number, loss: None, Path(folder))

    rows = []
    for provider, run in ((OURS, two_own_steps), (PEER, two_peer_steps)):
        row = Result(
            "tscd_step", f"embedded_b{BATCH}", str(dtype).removeprefix("torch."), "step", provider, verdict, apart, None
        )
        if row.green:
            # the first step of either side allocates and warms up
            row.p20, row.p50, row.p80 = percentiles(times[provider][1:])
            row.rounds = len(times[provider]) - 1
            row.peak_bytes = peak_bytes(run, device)
        rows.append(row)
    for row in rows:
        row.over_ours = round(row.p50 / rows[0].p50, 3) if row.p50 and rows[0].p50 else None
        if row.peak_bytes and rows[0].peak_bytes:
            row.extra["memory_over_ours"] = round(row.peak_bytes / rows[0].peak_bytes, 3)
    return rows

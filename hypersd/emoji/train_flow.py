"""Trains the flow teacher, a small SD3Transformer2DModel, on the embedded model's latents and frozen text encoder:

    python -m hypersd.emoji.train_flow

Rectified flow (Liu et al. 2023): x_sigma = (1 - sigma) x_0 + sigma eps, velocity eps - x_0, sigma logit-normal (Esser
et al. 2024), 10 % caption dropout, EMA. It resumes where it was cut off and writes its 16-bit weights to `--out`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from hypersd.emoji import tokens
from hypersd.emoji.flow import FLOW, text_encoder
from hypersd.emoji.networks import flow_scheduler, new_transformer
from hypersd.emoji.train import (
    DEFAULT_WORK,
    Device,
    Horizon,
    Minutes,
    Pool,
    State,
    Work,
    Workers,
    cosine,
    fast_attention,
    half,
    update,
)


def conditions(encoder: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the transformer is told about token ids (B, 16), as SD3's pipeline puts it together: the last hidden states
    but one of both text encoders side by side, and their pooled outputs; both encoders are the same here."""
    with torch.no_grad():
        output = encoder(ids, output_hidden_states=True)
    states, pooled = output.hidden_states[-2], output.text_embeds
    return {"encoder_hidden_states": states.repeat(1, 1, 2), "pooled_projections": pooled.repeat(1, 2)}


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) levels sigma = sigmoid(z), z standard normal, one from each of `count` equal slices of probability."""
    uniform = torch.rand(count, generator=generator, device=generator.device)
    slices = (torch.arange(count, device=generator.device) + uniform) / count
    return torch.special.ndtri(slices.clamp(1e-6, 1 - 1e-6)).sigmoid()


def main(
    steps: int = 12000,
    batch: int = 64,
    peak: float = 1e-3,
    pool: Annotated[int, typer.Option(help="scenes whose latents are made beforehand")] = 60000,
    ema_decay: float = 0.999,
    dropout: float = 0.1,
    work: Work = DEFAULT_WORK / "flow",
    out: Annotated[Path, typer.Option(help="folder of transformer and scheduler")] = FLOW,
    device: Device = "cpu",
    seed: int = 3,
    workers: Workers = 1,
    minutes: Minutes = 0.0,
    save_every: int = 500,
) -> None:
    """Train the transformer; the text encoder is frozen."""
    torch.manual_seed(seed)
    model, average = new_transformer().to(device), new_transformer().to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    encoder = text_encoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = State(work / "transformer.safetensors", {"model": model, "average": average}, optimizer)
    data = Pool(work / "latents.safetensors", pool, seed, device, workers)
    null = tokens.encode(tokens.build(), [""]).to(device)
    began, began_step, recent = time.time(), state.step, []
    horizon = Horizon(steps, minutes, device)
    with fast_attention(device):
        while state.step < (steps := horizon.steps):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + state.step)
            optimizer.param_groups[0]["lr"] = cosine(state.step, steps, peak, warmup=min(300, steps // 20))
            latents, ids = data.batch(state.step, batch, seed)
            drop = torch.rand(batch, device=device, generator=generator) < dropout
            sigma = logit_normal(batch, generator)
            noise = torch.randn(latents.shape, device=device, generator=generator)
            x_t = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
            with torch.autocast(device, torch.bfloat16):
                told = conditions(encoder, torch.where(drop[:, None], null, ids))
                output = model(x_t, timestep=1000 * sigma, return_dict=False, **told)[0]
            loss = (output.float() - (noise - latents)).square().mean()
            update(loss, model, average, state, horizon, ema_decay)
            recent.append(loss.detach())
            if state.step % 50 == 0:
                speed = (state.step - began_step) / (time.time() - began)
                mean = torch.stack(recent).mean().item()
                print(f"flow {state.step}/{steps} loss {mean:.4f} {speed:.2f} it/s", flush=True)
                recent.clear()
            if state.step % save_every == 0 or state.step == steps:
                state.save()
                save(average, out)


def save(average: nn.Module, out: Path) -> None:
    """Write the averaged transformer, in float16, and the scheduler."""
    model = new_transformer()
    model.load_state_dict(average.state_dict())
    half(model)
    model.save_pretrained(out / "transformer")
    flow_scheduler().save_pretrained(out / "scheduler")


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    typer.run(main)

"""Trains the embedded model from nothing, in three commands (each resumes where it was cut off), in this order:

    python -m hypersd.emoji.train evaluators   reward and judge networks
    python -m hypersd.emoji.train vae          autoencoder 64x64x3 <-> 16x16x4
    python -m hypersd.emoji.train teacher      text encoder and UNet, v-prediction, 10 % caption dropout

and writes the diffusers folder and the evaluators to hypersd/emoji/weights in 16 bit. `--work` holds the resumable
state. Runs on CPU (bf16 autocast) and on CUDA; `--workers` processes draw the scenes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel

from hypersd.emoji import tokens
from hypersd.emoji.degrade import degrade
from hypersd.emoji.evaluators import SETS, Evaluator, solo_loss
from hypersd.emoji.evaluators import load as load_evaluator
from hypersd.emoji.networks import new_text_encoder, new_unet, new_vae, noise_scheduler
from hypersd.emoji.scenes import Scenes, render
from hypersd.emoji.weights import FOLDER
from hypersd.files import atomic_write

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="folder of the resumable state")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Warm = Annotated[bool, typer.Option(help="start from the shipped weights where the work folder has no state")]
Minutes = Annotated[float, typer.Option(help="if given, as many steps as fit; replaces --steps")]
Workers = Annotated[int, typer.Option(help="processes that draw scenes")]
DEFAULT_WORK = Path("out/emoji")
PERCEPTUAL = 0.2  # weight of the reward network's feature distance in the autoencoder's loss


class State:
    """Modules, their optimiser and a step counter, saved whole and atomically as one safetensors file."""

    def __init__(self, path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.modules, self.optimizer, self.step = path, modules, optimizer, 0
        if path.exists():
            saved = load_file(path)
            self.step = int(saved.pop("step"))
            for name, module in modules.items():
                part = {
                    key.removeprefix(name + "."): value for key, value in saved.items() if key.startswith(name + ".")
                }
                module.load_state_dict(part)
            slots = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, parameter in enumerate(slots):
                kinds = ("step", "exp_avg", "exp_avg_sq")
                state = {kind: saved[f"optimizer.{index}.{kind}"].to(parameter.device) for kind in kinds}
                optimizer.state[parameter] = state
            print(f"resumed {path} at step {self.step}", flush=True)

    def save(self) -> None:
        flat: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, module in self.modules.items():
            flat |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        slots = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(slots):
            for kind, value in self.optimizer.state[parameter].items():
                flat[f"optimizer.{index}.{kind}"] = torch.as_tensor(value)
        flat = {key: value.detach().cpu().contiguous().clone() for key, value in flat.items()}
        atomic_write(self.path, lambda file: save_file(flat, file))


class Numbered(Dataset):
    """make(0), make(1), ... as a data set."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def drawn(make: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Any]:
    """make(n) for each of `numbers`, in order, made ahead of time by worker processes."""
    return iter(
        DataLoader(
            Numbered(make),
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
    )


def to_tensor(images: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def feature_distance(critic: Evaluator, output: Tensor, images: Tensor) -> Tensor:
    """Mean squared distance of unit-length features, on both of the network's maps (LPIPS without its learned weights,
    Zhang et al. 2018)."""
    with torch.no_grad():
        wanted = critic.maps(images)
    pairs = zip(critic.maps(output), wanted, strict=True)
    unit = nn.functional.normalize
    return sum((unit(a.float(), dim=1) - unit(b.float(), dim=1)).square().sum(1).mean() for a, b in pairs)


def cosine(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class Horizon:
    """How many steps to train: `steps`, or what fits into `minutes` at the speed of steps 50 to 150 of this process."""

    def __init__(self, steps: int, minutes: float, device: str) -> None:
        self.steps, self.minutes, self.device = steps, minutes, device
        self.began, self.done, self.measured = time.time(), 0, 0.0

    def count(self, step: int) -> None:
        """Step number `step` is done."""
        self.done += 1
        if not self.minutes or self.done not in (50, 150):
            return
        if self.device == "cuda":
            torch.cuda.synchronize()
        if self.done == 50:
            self.measured = time.time()
            return
        now = time.time()
        rate = 100 / (now - self.measured)
        self.steps = step + int(rate * (60 * self.minutes - (now - self.began)))
        print(f"{self.steps} steps fit into {self.minutes} minutes at {rate:.2f} a second", flush=True)


def fast_attention(device: str) -> AbstractContextManager[None]:
    """On a CPU torch's fused attention is several times slower than plain products at 16 to 80 tokens, backward above
    all."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(SDPBackend.MATH if device == "cpu" else fused)


def update(
    loss: Tensor, model: nn.Module, average: nn.Module, state: State, horizon: Horizon, ema_decay: float
) -> None:
    """One clipped optimizer step, counted; then the average follows, the faster the younger it is."""
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    horizon.count(state.step)
    decay = min(ema_decay, (1 + state.step) / (10 + state.step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def half(module: nn.Module) -> nn.Module:
    return nn.Module.half(module)


@app.command()
def vae(
    steps: int = 2500,
    batch: int = 24,
    peak: float = 2e-3,
    work: Work = DEFAULT_WORK,
    device: Device = "cpu",
    seed: int = 1,
    warm: Warm = False,
    workers: Workers = 1,
    minutes: Minutes = 0.0,
) -> None:
    """Train the autoencoder: L1, L2, L1 of image gradients, distance in the reward network's features, and a very small
    KL term."""
    torch.manual_seed(seed)
    model = new_vae().to(device)
    if warm:
        model.load_state_dict(AutoencoderKL.from_pretrained(FOLDER / "vae").state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state = State(work / "vae.safetensors", {"vae": model}, optimizer)
    critic = load_evaluator("reward").to(device)
    began, horizon = time.time(), Horizon(steps, minutes, device)
    numbers = range(state.step, 10**9)
    for images in drawn(lambda index: render(seed, batch, start=index * batch).images, numbers, workers):
        steps = horizon.steps
        if state.step >= steps:
            break
        optimizer.param_groups[0]["lr"] = cosine(state.step, steps, peak)
        images = to_tensor(images, device)
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(images).latent_dist
            output = model.decode(posterior.sample()).sample
            seen = feature_distance(critic, output, images)
        output = output.float()
        edges = sum((torch.diff(output, dim=d) - torch.diff(images, dim=d)).abs().mean() for d in (2, 3))
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        pixels = (output - images).abs().mean() + (output - images).square().mean()
        loss = pixels + 0.5 * edges + PERCEPTUAL * seen + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state.step += 1
        horizon.count(state.step)
        if state.step % 25 == 0:
            psnr = -10 * math.log10(float((output.detach() - images).square().mean()) / 4)
            print(
                f"vae {state.step}/{steps} loss {loss.item():.4f} psnr {psnr:.2f} {time.time() - began:.0f} s",
                flush=True,
            )
        if state.step % 250 == 0 or state.step == steps:
            state.save()
    model.eval()
    with torch.no_grad():  # scaling_factor makes the latents' standard deviation 1
        sample = to_tensor(render(seed + 1, 256).images, device)
        latents = torch.cat([model.encode(part).latent_dist.mode() for part in sample.split(64)])
        output = torch.cat([model.decode(part).sample for part in latents.split(64)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    psnr = -10 * math.log10(float((output - sample).square().mean()) / 4)
    print(f"unseen scenes: psnr {psnr:.2f} dB, scaling factor {model.config.scaling_factor}", flush=True)
    half(model).save_pretrained(FOLDER / "vae")


@torch.no_grad()
def encode_latents(model: AutoencoderKL, images: np.ndarray, device: str) -> Tensor:
    size = 64 if device == "cpu" else 2048
    parts = [model.encode(part).latent_dist.mode() for part in to_tensor(images, device).split(size)]
    return torch.cat(parts) * model.config.scaling_factor


class Pool:
    """Latents (float16) and token ids of `count` scenes, made once and kept in the work folder."""

    def __init__(self, path: Path, count: int, seed: int, device: str, workers: int) -> None:
        if not path.exists():
            model = AutoencoderKL.from_pretrained(FOLDER / "vae").eval().to(device)
            tokenizer = tokens.build()
            latents, ids = (
                torch.empty(count, 4, 16, 16, dtype=torch.float16),
                torch.empty(count, tokens.LENGTH, dtype=torch.int16),
            )
            began, chunk = time.time(), 1024

            def make(number: int) -> tuple[np.ndarray, Tensor]:
                scenes = render(seed, min(chunk, count - number * chunk), start=number * chunk)
                return scenes.images, tokens.encode(tokenizer, scenes.captions).to(torch.int16)

            with torch.autocast(device, torch.bfloat16):
                chunks = range(-(-count // chunk))
                for number, (images, some_ids) in enumerate(drawn(make, chunks, workers)):
                    start = number * chunk
                    stop = start + len(some_ids)
                    latents[start:stop] = encode_latents(model, images, device).half().cpu()
                    ids[start:stop] = some_ids
                    print(f"latents {stop}/{count} {time.time() - began:.0f} s", flush=True)
            atomic_write(path, lambda file: save_file({"latents": latents, "ids": ids}, file))
        saved = load_file(path)
        self.latents, self.ids = saved["latents"].to(device), saved["ids"].to(device)

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        rows = np.random.Generator(np.random.PCG64([seed, step])).integers(0, len(self.ids), size)
        rows_t = torch.from_numpy(rows).to(self.ids.device)
        return self.latents[rows_t].float(), self.ids[rows_t].long()


@app.command()
def teacher(
    steps: int = 12000,
    batch: int = 64,
    peak: float = 1e-3,
    pool: int = 60000,
    ema_decay: float = 0.999,
    dropout: float = 0.1,
    work: Work = DEFAULT_WORK,
    device: Device = "cpu",
    seed: int = 2,
    warm: Warm = False,
    workers: Workers = 1,
    minutes: Minutes = 0.0,
    compile: Annotated[bool, typer.Option(help="run the UNet through torch.compile")] = False,
) -> None:
    """Train text encoder and UNet on latents: v-prediction, min-SNR-5 weights (Hang et al. 2023), EMA."""
    torch.manual_seed(seed)
    scheduler = noise_scheduler()
    alphas = scheduler.alphas_cumprod.to(device).sqrt()
    sigmas = (1 - scheduler.alphas_cumprod).to(device).sqrt()
    model = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder()}).to(device)
    average = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder()}).to(device).requires_grad_(False)
    if warm:
        model["unet"].load_state_dict(UNet2DConditionModel.from_pretrained(FOLDER / "unet").state_dict())
        model["text"].load_state_dict(CLIPTextModel.from_pretrained(FOLDER / "text_encoder").float().state_dict())
    average.load_state_dict(model.state_dict())
    unet = torch.compile(model["unet"]) if compile else model["unet"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    state = State(work / "teacher.safetensors", {"model": model, "average": average}, optimizer)
    data = Pool(work / "latents.safetensors", pool, seed, device, workers)
    null = tokens.encode(tokens.build(), [""]).to(device)
    began, began_step, recent = time.time(), state.step, []
    horizon = Horizon(steps, minutes, device)
    with fast_attention(device):
        while state.step < (steps := horizon.steps):
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + state.step)
            for group in optimizer.param_groups:
                group["lr"] = cosine(state.step, steps, peak, warmup=300)
            latents, ids = data.batch(state.step, batch, seed)
            drop = torch.rand(batch, device=device, generator=generator) < dropout
            ids = torch.where(drop[:, None], null, ids)
            # one timestep from each of `batch` equal slices: the loss is far less noisy than with independent draws
            slices = (
                torch.arange(batch, device=device) + torch.rand(batch, device=device, generator=generator)
            ) / batch
            timestep = (slices * 1000).long().clamp_(max=999)
            noise = torch.randn(latents.shape, device=device, generator=generator)
            alpha, sigma = alphas[timestep].view(-1, 1, 1, 1), sigmas[timestep].view(-1, 1, 1, 1)
            x_t, target = alpha * latents + sigma * noise, alpha * noise - sigma * latents
            with torch.autocast(device, torch.bfloat16):
                hidden = model["text"](ids).last_hidden_state
                output = unet(x_t, timestep, hidden, return_dict=False)[0]
            snr = (alpha / sigma).square()
            weight = snr.clamp(max=5) / (snr + 1) + 0.2  # the floor keeps the noisiest steps, which decide the layout
            loss = (weight * (output.float() - target).square()).mean()
            update(loss, model, average, state, horizon, ema_decay)
            recent.append(loss.detach())
            if state.step % 50 == 0:
                speed = (state.step - began_step) / (time.time() - began)
                print(
                    f"teacher {state.step}/{steps} loss {torch.stack(recent).mean().item():.4f} {speed:.2f} it/s",
                    flush=True,
                )
                recent.clear()
            if state.step % 500 == 0 or state.step == steps:
                state.save()
                save_teacher(average, scheduler)


@app.command()
def evaluators(
    steps: int = 6000,
    batch: int = 48,
    peak: float = 2e-3,
    work: Work = DEFAULT_WORK,
    device: Device = "cpu",
    only: str = "",
    workers: Workers = 1,
    minutes: Minutes = 0.0,
) -> None:
    """Train the reward and the judge set, each on its own scenes with its own seed and width."""
    for name, setup in SETS.items():
        if only and name != only:
            continue
        torch.manual_seed(setup["seed"])
        model = Evaluator(setup["wide"]).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        state = State(work / f"evaluator-{name}.safetensors", {"model": model}, optimizer)
        began, horizon = time.time(), Horizon(steps, minutes, device)
        stream = setup["stream"]
        numbers = range(state.step, 10**9)
        for scenes in drawn(lambda index, s=stream: render(s, batch, start=index * batch), numbers, workers):
            total = horizon.steps
            if state.step >= total:
                break
            generator = torch.Generator().manual_seed(setup["seed"] * 1_000_003 + state.step)
            optimizer.param_groups[0]["lr"] = cosine(state.step, total, peak)
            with torch.autocast(device, torch.bfloat16):
                losses = evaluator_losses(model, scenes, device, generator)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state.step += 1
            horizon.count(state.step)
            if state.step % 100 == 0:
                parts = " ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
                print(f"{name} {state.step}/{total} {parts} {time.time() - began:.0f} s", flush=True)
            if state.step % 500 == 0 or state.step == total:
                state.save()
        model.eval()
        flat = {key: value.detach().half().cpu().contiguous() for key, value in model.state_dict().items()}
        atomic_write(FOLDER / "evaluators" / f"{name}.safetensors", lambda file, flat=flat: save_file(flat, file))
        print(name, check_evaluator(model.float(), device), flush=True)


def evaluator_losses(model: Evaluator, scenes: Scenes, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    """SOLO, background, contrastive and preference losses of one batch of scenes."""
    clean = to_tensor(scenes.images, device)
    images = clean + 0.04 * torch.rand((), generator=generator).to(device) * torch.randn_like(clean)
    middle, top = model.maps(images)
    features = model.pooled(top)
    category, mask = model.segment_maps(middle, top)
    image, text = model.embed_images(features), model.embed_captions(scenes.captions)
    logits = model.log_temperature.clamp(max=4.0).exp() * image @ text.T
    # equal captions are not each other's negatives
    same = torch.tensor([[a == b for b in scenes.captions] for a in scenes.captions], device=device)
    target = same.float() / same.sum(1, keepdim=True)
    margin = model.preference(clean) - model.preference(degrade(clean, generator))
    return {
        "solo": solo_loss(category.float(), mask, scenes.objects, torch.from_numpy(scenes.masks).to(device)),
        "ground": nn.functional.cross_entropy(
            model.ground(features).float(), torch.from_numpy(scenes.background).to(device)
        ),
        "text": 0.5 * sum(nn.functional.cross_entropy(part.float(), target) for part in (logits, logits.T)),
        "taste": nn.functional.softplus(-margin.float()).mean() + 1e-3 * margin.float().square().mean(),
    }


@torch.no_grad()
def check_evaluator(model: Evaluator, device: str, count: int = 1000) -> dict[str, float]:
    """On unseen held-out scenes: objects among the top two, background, caption retrieval among 100, preference."""
    scenes = render(999, count, "heldout")
    images = to_tensor(scenes.images, device)
    hits = total = right = preferred = retrieved = 0
    for start in range(0, count, 100):
        part, things = images[start : start + 100], scenes.objects[start : start + 100]
        best = model.objects(part).topk(2, dim=1).indices.tolist()
        hits += sum(item in row for row, items in zip(best, things, strict=True) for item in items)
        total += sum(map(len, things))
        ground = torch.from_numpy(scenes.background[start : start + 100]).to(device)
        right += int((model.background(part).argmax(1) == ground).sum())
        similarity = (
            model.embed_images(model.features(part)) @ model.embed_captions(scenes.captions[start : start + 100]).T
        )
        retrieved += int((similarity.argmax(1).cpu() == torch.arange(100)).sum())
        spoiled = degrade(part, torch.Generator().manual_seed(start))
        preferred += int((model.preference(part) > model.preference(spoiled)).sum())
    return {
        "objects": hits / total,
        "background": right / count,
        "retrieval": retrieved / count,
        "preference": preferred / count,
    }


def save_teacher(average: nn.ModuleDict, scheduler: DDIMScheduler) -> None:
    """Write the averaged networks as a diffusers pipeline folder, in float16."""
    unet, text = new_unet(), new_text_encoder()
    unet.load_state_dict(average["unet"].state_dict())
    text.load_state_dict(average["text"].state_dict())
    half(unet).save_pretrained(FOLDER / "unet")
    half(text).save_pretrained(FOLDER / "text_encoder")
    tokens.save(FOLDER / "tokenizer")
    scheduler.save_pretrained(FOLDER / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    atomic_write(FOLDER / "model_index.json", lambda file: file.write_text(json.dumps(index, indent=2) + "\n"))


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    app()

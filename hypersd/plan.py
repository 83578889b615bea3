"""What a run will do and need, worked out from the recipe and the model's configs before any weight is read."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hypersd.distill.captions import pairs
from hypersd.distill.recipe import Recipe
from hypersd.models.backbone import Backbone
from hypersd.models.load import skeletons
from hypersd.models.lora import LoraSpec
from hypersd.models.networks import default_targets, first_half
from hypersd.resolve import model_folder

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Parameter counts, bytes and passes of a run. Memory counts weights and optimizer state, not activations."""
    folder = model_folder(recipe.model.path)
    parts = skeletons(folder)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    network, base = parts["network"], counts["network"]
    spec = LoraSpec(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets or default_targets(network))
    encoder = _encoder(network)  # before adapters are put into it
    trained, layers = base, 0
    if not recipe.train.full:
        backbone = Backbone(network, spec)
        trained, layers = sum(p.numel() for p in backbone.role_parameters("student").values()), len(backbone.slots)
    # student and EMA, and what each stage needs beside them; gradient and two Adam moments of what it trains
    held = [2 + stage.needs_previous + len(stage.roles) + 3 + 3 * ("fake" in stage.roles) for stage in recipe.stages]
    pictures = recipe.data.count
    if recipe.data.kind == "folder":
        pictures = len(pairs(recipe.data.path or "", recipe.data.captions))
    return {
        "model": str(folder),
        "pictures": pictures,
        "base_parameters": base,
        "trained_parameters": trained,
        "lora_layers": layers,  # 0: the whole network is trained
        "base_bytes": base * BYTES[recipe.train.dtype] + counts["vae"] * 4,
        # with the VAE in memory, and the network not yet, while pictures and captions are encoded
        "vae_bytes": counts["vae"] * 4,
        "text_bytes": sum(count * 4 for name, count in counts.items() if name.startswith("text_encoder")),
        "adapter_bytes": trained * 4 * max(held),  # fp32
        # a trained copy of the encoder with the same
        "critic_bytes": encoder * 4 * 4 * any(stage.copies_encoder for stage in recipe.stages),
        "stages": [
            {
                "name": stage.name,
                "steps": stage.iterations,
                "teacher": "rewards"
                if stage.method == "feedback"
                else "previous_stage"
                if stage.needs_previous
                else "base",
            }
            for stage in recipe.stages
        ],
        "samples_per_step": recipe.train.batch_size * recipe.train.accumulation,
    }


def _encoder(network: torch.nn.Module) -> int:
    """Parameters of a UNet up to its middle block, of a transformer with the first half of its blocks."""
    after = ("up_blocks", "conv_norm_out", "conv_out")
    with first_half(network):
        parts = [part for name, part in network.named_children() if name not in after]
        return sum(p.numel() for part in parts for p in part.parameters())


def show(plan: dict[str, Any], console: Console) -> None:
    """Print a plan for a person."""
    table = Table(title="plan", title_justify="left", title_style="bold")
    for name in ("stage", "optimizer steps", "samples", "teacher"):
        table.add_column(name, justify="left" if name in ("stage", "teacher") else "right")
    for stage in plan["stages"]:
        table.add_row(
            stage["name"], f"{stage['steps']:,}", f"{stage['steps'] * plan['samples_per_step']:,}", stage["teacher"]
        )
    console.print(table)
    mib = 2**20
    critic = f" + {plan['critic_bytes'] / mib:,.0f} MiB critic" if plan["critic_bytes"] else ""
    size, layers = f"{plan['trained_parameters'] / 1e6:,.2f} M parameters", plan["lora_layers"]
    trained = f"LoRA       {size} in {layers} layers" if layers else f"trained    {size}, the whole network"
    held = "adapters" if layers else "copies"
    console.print(
        f"model      {plan['model']}, {plan['base_parameters'] / 1e6:,.1f} M parameters\n"
        f"{trained}\n"
        f"data       {plan['pictures']:,} pictures\n"
        f"memory     {plan['base_bytes'] / mib:,.0f} MiB frozen + {plan['adapter_bytes'] / mib:,.0f} MiB {held} and "
        f"optimizer{critic}; activations come on top\n"
        f"encoding   {plan['text_bytes'] / mib:,.0f} MiB text encoders + {plan['vae_bytes'] / mib:,.0f} MiB VAE, "
        "before the network; not where the data is cached",
        highlight=False,
        soft_wrap=True,
    )

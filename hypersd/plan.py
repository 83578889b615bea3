"""What a run will do and need, worked out from the recipe and the model's configs before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from hypersd.distill.captions import pairs
from hypersd.distill.recipe import Recipe
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.load import network_folder
from hypersd.models.lora import LoraSpec
from hypersd.models.networks import default_targets
from hypersd.resolve import model_folder

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def network_skeleton(folder: Path) -> torch.nn.Module:
    """The model's network without its weights (meta device). HypersdError where its config is missing or wrong."""
    part, cls = network_folder(folder)
    path = part / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        with torch.device("meta"):
            return cls.from_config(config)  # type: ignore[attr-defined]
    except FileNotFoundError:
        raise HypersdError(f"{path} is missing; model.path must be a folder in the diffusers layout") from None
    except (ValueError, TypeError, OSError) as error:
        raise HypersdError(f"{path} does not describe a {cls.__name__}: {str(error).splitlines()[0]}") from None


def plan(recipe: Recipe) -> dict[str, Any]:
    """Parameter counts, bytes and passes of a run. Memory counts weights and optimizer state, not activations."""
    folder = model_folder(recipe.model.path)
    network = network_skeleton(folder)
    base = sum(p.numel() for p in network.parameters())
    spec = LoraSpec(recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets or default_targets(network))
    backbone = Backbone(network, spec)
    lora = sum(p.numel() for p in backbone.role_parameters("student").values())
    roles = 2 + any(stage.needs_previous and (i > 0 or stage.improves) for i, stage in enumerate(recipe.stages))
    roles += max(len(stage.roles) for stage in recipe.stages)
    others = sum(
        p.stat().st_size
        for part in ("vae", "text_encoder", "text_encoder_2")
        for p in (folder / part).glob("*.safetensors")
    )
    pictures = recipe.data.count
    if recipe.data.kind == "folder":
        pictures = len(pairs(recipe.data.path or "", recipe.data.captions))
    return {
        "model": str(folder),
        "pictures": pictures,
        "base_parameters": base,
        "lora_parameters": lora,
        "lora_layers": len(backbone.slots),
        "base_bytes": base * BYTES[recipe.train.dtype] + others,
        # adapters of every role; gradient and two Adam moments of the student: all fp32
        "adapter_bytes": lora * 4 * (roles + 3),
        "stages": [
            {
                "name": stage.name,
                "steps": stage.iterations,
                "teacher": "rewards"
                if stage.improves
                else "previous_stage"
                if stage.needs_previous and i > 0
                else "base",
            }
            for i, stage in enumerate(recipe.stages)
        ],
        "samples_per_step": recipe.train.batch_size * recipe.train.accumulation,
    }


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
    console.print(
        f"model      {plan['model']}, {plan['base_parameters'] / 1e6:,.1f} M parameters\n"
        f"LoRA       {plan['lora_parameters'] / 1e6:,.2f} M parameters in {plan['lora_layers']} layers\n"
        f"data       {plan['pictures']:,} pictures\n"
        f"memory     {plan['base_bytes'] / mib:,.0f} MiB frozen + {plan['adapter_bytes'] / mib:,.0f} MiB adapters and "
        "optimizer; activations come on top",
        highlight=False,
        soft_wrap=True,
    )

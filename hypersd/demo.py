"""The main job, whole: distil the embedded teacher into one LoRA, judge it at 1, 2, 4 and 8 steps beside the teacher,
report."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from hypersd import compare
from hypersd.compare import STEPS, TEACHER_STEPS, VARIETY
from hypersd.console import Progress
from hypersd.distill.recipe import Recipe, load_recipe
from hypersd.distill.stage import GuidedStage
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.evaluate.report import metrics_document, write_report
from hypersd.evaluate.run import evaluate
from hypersd.files import atomic_write
from hypersd.models.export import load_lora
from hypersd.resolve import (
    alone,
    check,
    has_bfloat16,
    load_dataset,
    load_model,
    load_rewards,
    pick_device,
    scene_references,
    writable,
)
from hypersd.sampling.sampler import sampler_for


@dataclass(frozen=True)
class Budget:
    """A shipped recipe, and how many pictures of each row are judged."""

    recipe: str
    samples: int


BUDGETS = {"quick": Budget("emoji-quick", 256), "full": Budget("emoji-full", 2048)}


def guidance_of(recipe: Recipe) -> float:
    """The teacher's guidance scale: the middle of the range that the first stage distils."""
    first = recipe.stages[0]
    return sum(first.guidance_scale) / 2 if isinstance(first, GuidedStage) else 1.0


def work_of(recipe: Recipe, samples: int) -> dict[str, float]:
    """Every phase of the demo in network evaluations of one picture; encoding a picture counts as one."""
    work: dict[str, float] = {"encode pictures": recipe.data.count}
    samples_of_a_step = recipe.train.batch_size * recipe.train.accumulation
    for stage in recipe.stages:
        cost = stage.iterations * samples_of_a_step * stage.network_evaluations
        work[stage.name] = work.get(stage.name, 0.0) + cost
    return work | compare.work_of(samples)


def read_losses(path: Path) -> list[dict[str, Any]]:
    """The trainer's log as plots.curves wants it: steps counted through all stages."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{"stage": row["stage"], "step": number, "loss": row["loss"]} for number, row in enumerate(rows, 1)]


def run(
    out: Path,
    budget: str = "quick",
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Run everything; returns the content of metrics.json. Training state and cached latents lie in out/training; with
    `resume` the training goes on from there. Raises HypersdError where it cannot, before anything is changed."""
    from hypersd.emoji import evaluators

    started = time.monotonic()
    plan = BUDGETS[budget]
    overrides = [] if has_bfloat16(pick_device(device)) else ["train.dtype=float32"]
    recipe = load_recipe(plan.recipe, overrides)
    seed = recipe.train.seed
    training = out / "training"
    if resume:
        try:
            check(recipe, training, resume=True)
        except HypersdError as error:
            raise HypersdError(f"--resume with budget {budget}: {error}", exit_code=error.exit_code) from None
    training = writable(writable(out) / "training")
    components = load_model(recipe.model.path, device)
    judge = evaluators.load("judge", components.device)
    with alone(training), Progress(work_of(recipe, plan.samples), console) as progress:
        dataset = load_dataset(
            recipe, components, training / "latents", lambda done, total: progress("encode pictures", done, total)
        )
        trainer = Trainer(
            recipe, components, dataset, training,
            progress=lambda stage, step, total, loss: progress(stage, step, total, f"loss {loss:.3g}"),
            **load_rewards(recipe, components),
        )  # fmt: skip
        backbone = trainer.run(resume=resume)
        reference, zero = scene_references(plan.samples, seed, VARIETY)
        process = components.noise_process()
        _, metadata = load_lora(training / "lora.safetensors")
        evaluation = evaluate(
            components, backbone, reference, judge, zero=zero, role=trainer.result, steps=STEPS,
            table=lambda steps: sampler_for(process, metadata, steps), teacher_steps=TEACHER_STEPS,
            guidance_scale=guidance_of(recipe), variety=VARIETY, seed=seed, judge_device=components.device,
            progress=lambda name, done, total: progress(f"judge {name}", done, total),
        )  # fmt: skip
    metrics = metrics_document(
        evaluation, features="emoji judge", samples=plan.samples, seconds=time.monotonic() - started,
        recipe=recipe.model_dump(mode="json"), seed=seed,
    )  # fmt: skip
    atomic_write(out / "lora.safetensors", lambda path: shutil.copyfile(training / "lora.safetensors", path))
    timings = {name: seconds for name, seconds in progress.seconds.items() if not name.startswith("judge ")}
    timings["judging"] = sum(progress.seconds.values()) - sum(timings.values())
    write_report(
        out, evaluation, metrics, losses=read_losses(training / "metrics.jsonl"), timings=timings,
        title="Emoji scenes in 1 to 8 steps", command=f"hypersd demo --budget {budget}", heldout=True,
    )  # fmt: skip
    return metrics

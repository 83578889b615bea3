"""A file of weights beside its teacher and the undistilled model, on scenes or on a folder of pictures."""

from __future__ import annotations

import inspect
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hypersd.console import Progress
from hypersd.errors import HypersdError
from hypersd.evaluate.effnet import effnet_lite0
from hypersd.evaluate.protocol import FeatureEvaluator
from hypersd.evaluate.report import metrics_document, write_report
from hypersd.evaluate.run import evaluate
from hypersd.resolve import folder_reference, is_embedded, load_with_lora, read_weights, scene_references, writable
from hypersd.sampling.sampler import offered_steps, sampler_for

STEPS = (1, 2, 4, 8)  # of files that do not say what they are made for
TEACHER_STEPS = 25  # with guidance: 50 network evaluations
VARIETY = (16, 4)  # captions, pictures of each


def work_of(samples: int, numbers: Sequence[int] = STEPS) -> dict[str, float]:
    """Every row of the table in network evaluations of one picture."""
    pictures = samples + VARIETY[0] * VARIETY[1]
    work = {"judge teacher": 2.0 * TEACHER_STEPS * pictures}
    for steps in numbers:
        work[f"judge undistilled/{steps}"] = 2.0 * steps * pictures
        work[f"judge student/{steps}"] = 1.0 * steps * pictures
    return work


def compare(
    lora: Path,
    model: str,
    out: Path,
    *,
    pictures: Path | None = None,
    captions: Path | None = None,
    features: str = "",
    samples: int = 512,
    guidance_scale: float = 3.0,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write the report into `out`; returns the content of metrics.json. The LoRA is judged at the numbers of steps that
    its file names.

    features: "judge" (the embedded model's evaluators) or "effnet-lite0"; the embedded model has "judge" unless told.
    """
    started = time.monotonic()
    command = _command(locals())
    features = features or ("judge" if is_embedded(model) else "effnet-lite0")
    if features not in ("judge", "effnet-lite0"):
        raise HypersdError(f"features {features!r} are unknown; use judge or effnet-lite0", exit_code=2)
    if not is_embedded(model) and pictures is None:
        raise HypersdError("real pictures to compare with are missing; name a folder with --pictures", exit_code=2)
    if pictures is None and captions is not None:
        raise HypersdError("--captions belong to the pictures of --pictures; name both or neither", exit_code=2)
    if not math.isfinite(guidance_scale):
        raise HypersdError(f"guidance_scale {guidance_scale} is not a number to guide with", exit_code=2)
    if features == "judge" and not is_embedded(model):
        raise HypersdError("the judge knows emoji scenes only; use --features effnet-lite0", exit_code=2)
    state, metadata = read_weights(lora)
    offered = offered_steps(metadata)
    numbers = tuple(offered) if offered and not set(STEPS) <= set(offered) else STEPS  # of 1 to 8 these tell enough
    extractor = effnet_lite0() if features == "effnet-lite0" else None
    out = writable(out)
    backbone, components, process = load_with_lora(model, state, metadata, device, dtype=dtype)
    tables = {steps: sampler_for(process, metadata, steps) for steps in numbers}
    if pictures is None:
        reference, zero = scene_references(samples, seed, VARIETY)
    else:
        reference, zero = folder_reference(pictures, captions, components, samples), None
    if extractor is not None:
        extractor.to(components.device)
    evaluator: Any = FeatureEvaluator(extractor) if extractor is not None else None
    if is_embedded(model):
        from hypersd.emoji import evaluators

        evaluator = evaluators.load("judge", components.device)
    count = len(reference.captions)
    with Progress(work_of(count, numbers), console) as progress:
        evaluation = evaluate(
            components, backbone, reference, evaluator, extractor=extractor, zero=zero, role="lora", steps=numbers,
            table=tables.__getitem__, teacher_steps=TEACHER_STEPS,
            guidance_scale=guidance_scale, variety=VARIETY, seed=seed, judge_device=components.device,
            progress=lambda name, done, total: progress(f"judge {name}", done, total),
        )  # fmt: skip
    recipe = {key: value for key, value in metadata.items() if key != "lora_adapter_metadata"}
    metrics = metrics_document(
        evaluation, features=features, samples=count, seconds=time.monotonic() - started, recipe=recipe, seed=seed
    )
    write_report(
        out, evaluation, metrics, timings={"judging": sum(progress.seconds.values())}, heldout=pictures is None,
        title=f"{lora.name} in {_few(numbers)}", command=command,
    )  # fmt: skip
    return metrics


def _few(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return "1 step" if numbers[0] == 1 else f"{numbers[0]} steps"
    return f"{numbers[0]} to {numbers[-1]} steps"


def _command(options: Mapping[str, Any]) -> str:
    """The command line that gives this report again."""
    words = ["hypersd", "evaluate", str(options["lora"])]
    for name, parameter in inspect.signature(compare).parameters.items():
        default = "embedded" if name == "model" else parameter.default
        if name not in ("lora", "console") and options[name] != default:
            words += [f"--{name.replace('_', '-')}", str(options[name])]
    return shlex.join(words)

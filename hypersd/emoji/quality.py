"""The teacher's quality table: is the embedded model good enough that few-step distillation of it means something?

    python -m hypersd.emoji.quality [--flow] [--samples 10000]

judges real scenes, their autoencoder reconstructions, the teacher at 50 network evaluations (25 guided DDIM steps) and
the same solver at 1, 2, 4 and 8 steps, on held-out captions, and checks four conditions: captions are followed, the
teacher is close to the autoencoder's floor, its pictures vary as real ones do, and fewer steps cost. The table
is kept beside the weights as quality.json and grows row by row, so that an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from hypersd.emoji import evaluators, flow_model_folder, model_folder
from hypersd.emoji.flow import FLOW
from hypersd.emoji.scenes import render, render_caption
from hypersd.emoji.weights import FOLDER
from hypersd.evaluate.generate import generate, to_float, to_uint8
from hypersd.evaluate.plots import grid
from hypersd.evaluate.run import Judge, Reference, batches
from hypersd.files import atomic_write
from hypersd.models.backbone import Backbone
from hypersd.models.load import load_components
from hypersd.models.prompts import decode_latents, encode_images
from hypersd.sampling.solvers import ddim
from hypersd.sampling.timesteps import trailing

TEACHER_STEPS = 25
STEPS = (1, 2, 4, 8)
VARIETY = (64, 8)  # captions, pictures of each


class BackgroundJudge:
    """The judge, which also counts how often the background's colour is recognised."""

    def __init__(self, judge: evaluators.Evaluator, background: np.ndarray) -> None:
        self.judge, self.background, self.hits = judge, torch.from_numpy(background), [0, 0]
        self.alignment, self.preference = judge.alignment, judge.preference

    def objects(self, images: Tensor) -> Tensor:
        seen = self.hits[1]
        wanted = self.background[seen : seen + len(images)]
        self.hits[0] += int((self.judge.background(images).argmax(1).cpu() == wanted).sum())
        self.hits[1] += len(images)
        return self.judge.objects(images)


def conditions(rows: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each condition with its figure, its bound and whether it holds."""
    real, teacher = rows["real"], rows["teacher"]
    shares = [teacher[key] / real[key] for key in ("objects", "background")]
    floor = teacher["frechet"] / rows["autoencoder"]["frechet"]
    variety = teacher["diversity"] / real["diversity"]
    four, one = (rows[f"undistilled/{steps}"]["frechet"] / teacher["frechet"] for steps in (4, 1))
    found = {
        "captions followed: objects, share of the rate in real scenes": (shares[0], ">= 0.9", shares[0] >= 0.9),
        "captions followed: background, share of the rate in real scenes": (shares[1], ">= 0.9", shares[1] >= 0.9),
        "Frechet distance over that of autoencoder reconstructions": (floor, "<= 2", floor <= 2),
        "distance between pictures of one caption over that of real scenes": (
            variety,
            "0.8-1.2",
            0.8 <= variety <= 1.2,
        ),
        "Frechet distance at 4 undistilled steps over 50 evaluations": (four, ">= 2", four >= 2),
        "Frechet distance at 1 undistilled step over 50 evaluations": (one, ">= 5", one >= 5),
    }
    return {name: {"figure": round(f, 3), "bound": bound, "holds": bool(ok)} for name, (f, bound, ok) in found.items()}


@torch.no_grad()
def measure(
    folder: Path, samples: int, guidance_scale: float, seed: int, dtype: torch.dtype, path: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Fill in the rows that `path` lacks for these weights and settings; returns the document."""
    parts = [file for file in folder.glob("*/*.safetensors") if "reward" not in file.name]
    files = sorted({*parts, FOLDER / "evaluators" / "judge.safetensors"})
    weights = b"".join(file.read_bytes() for file in files)
    settings = {
        "samples": samples,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": hashlib.sha256(weights).hexdigest()[:16],
    }
    document: dict[str, Any] = {**settings, "rows": {}}
    if path.exists():
        known = json.loads(path.read_text("utf-8"))
        if {key: known.get(key) for key in settings} == settings:
            document["rows"] = known["rows"]
    components = load_components(folder, dtype=dtype, device=device)
    size = 64 if device == "cpu" else 1000  # pictures at a time
    backbone = Backbone(components.network, roles=())
    process = components.noise_process()
    scenes, others = render(seed + 1_000_000, samples, "heldout"), render(seed + 2_000_000, samples, "heldout")
    judge = evaluators.load("judge", device)
    reference = Reference(scenes.images, scenes.captions, scenes.objects)
    groups, each = VARIETY
    varied = [caption for caption in scenes.captions[:groups] for _ in range(each)]
    real = Judge(judge, judge.features, reference, device=device).real

    def put(name: str, images: Iterable[np.ndarray], few: Iterable[np.ndarray], nfe: int, part: Any = scenes) -> None:
        if name in document["rows"]:
            return
        watching = BackgroundJudge(judge, part.background)
        counting = Judge(watching, judge.features, Reference(part.images, part.captions, part.objects), real, device)
        row, _ = counting.row(images, nfe)
        row["background"] = watching.hits[0] / watching.hits[1]
        row["diversity"] = counting.diversity(few, groups)
        document["rows"][name] = row
        atomic_write(path, lambda file: file.write_text(json.dumps(document, indent=1) + "\n", "utf-8"))
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)

    pictures = np.concatenate(
        [
            render_caption(scenes.objects[i], int(scenes.background[i]), seed + i, each)
            for i in range(min(groups, samples))
        ]
    )
    put("real", batches(others.images), batches(pictures), 0, others)
    put("autoencoder", *([_reconstruct(components, x) for x in batches(part)] for part in (scenes.images, pictures)), 0)
    for name, steps in [("teacher", TEACHER_STEPS), *((f"undistilled/{steps}", steps) for steps in STEPS)]:
        table = ddim(process, trailing(steps, process.num_train_timesteps)).guided(guidance_scale)
        put(
            name,
            generate(components, backbone, table, scenes.captions, seed=seed, batch_size=size),
            generate(components, backbone, table, varied, seed=seed + 1, batch_size=size),
            2 * steps,
        )
    document["conditions"] = conditions(document["rows"])
    atomic_write(path, lambda file: file.write_text(json.dumps(document, indent=1) + "\n", "utf-8"))
    return document


@torch.no_grad()
def draw(folder: Path, path: Path, guidance_scale: float, seed: int, count: int = 6) -> None:
    """A picture of held-out captions: two real scenes and four samples of the teacher for each."""
    components = load_components(folder)
    process, backbone = components.noise_process(), Backbone(components.network, roles=())
    table = ddim(process, trailing(TEACHER_STEPS, process.num_train_timesteps)).guided(guidance_scale)
    scenes = render(seed + 3_000_000, count, "heldout")
    things = zip(scenes.objects, scenes.background, strict=True)
    real = np.stack([render_caption(objects, int(ground), seed, 2) for objects, ground in things], 1)
    columns = {f"real scenes/{index}": column for index, column in enumerate(real)}
    for index in range(4):
        samples = generate(components, backbone, table, scenes.captions, seed=seed + index)
        columns[f"the teacher/{index}"] = np.concatenate(list(samples))
    image = grid(columns, scenes.captions, {}, labels=dict.fromkeys(columns, ""))
    atomic_write(path, lambda file: image.save(file, "PNG", optimize=True))


def _reconstruct(components: Any, images: np.ndarray) -> np.ndarray:
    return to_uint8(decode_latents(components, encode_images(components, to_float(images).to(components.device))))


def main(
    samples: Annotated[int, typer.Option(help="pictures a row")] = 10_000,
    guidance_scale: float = 2.5,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="sample in bfloat16, twice as fast on some CPUs")] = False,
    out: Annotated[Path | None, typer.Option(help="[default: quality.json beside the weights]")] = None,
    flow: Annotated[bool, typer.Option(help="the flow teacher instead")] = False,
    pictures: Annotated[Path | None, typer.Option(help="only draw samples of held-out captions to this PNG")] = None,
) -> None:
    """Measure the table and say which conditions hold."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    folder = flow_model_folder() if flow else model_folder()
    if pictures is not None:
        return draw(folder, pictures, guidance_scale, seed)
    path = out or (FLOW if flow else FOLDER) / "quality.json"
    document = measure(folder, samples, guidance_scale, seed, dtype, path, device)
    for name, found in document["conditions"].items():
        print(f"{'holds' if found['holds'] else 'FAILS'}  {found['figure']:8.3f}  {found['bound']:8}  {name}")


if __name__ == "__main__":
    typer.run(main)

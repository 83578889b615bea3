"""Rebuilds the paper's tables on the embedded model: trains and judges every variant, row by row, and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from hypersd.console import Progress
from hypersd.distill.recipe import Recipe, completed
from hypersd.distill.trainer import Trainer
from hypersd.errors import HypersdError
from hypersd.evaluate.generate import generate
from hypersd.evaluate.metrics import Moments, frechet_distance, paired_difference, resample
from hypersd.evaluate.paper import (
    COLUMNS,
    GUIDANCE,
    TEACHER,
    TEACHER_STEPS,
    UNDISTILLED,
    VARIANTS,
    Ledger,
    Variant,
    draw,
    evaluations_of,
    figures,
    recipe_of,
)
from hypersd.evaluate.report import finite, versions
from hypersd.evaluate.run import Judge
from hypersd.files import atomic_write
from hypersd.resolve import (
    EMBEDDED,
    has_bfloat16,
    load_dataset,
    load_model,
    load_rewards,
    load_with_lora,
    pick_device,
    read_lora,
    scene_references,
    writable,
)
from hypersd.sampling.sampler import sampler_for
from hypersd.sampling.solvers import ddim
from hypersd.sampling.timesteps import trailing

VARIETY = (64, 4)  # captions, pictures of each
CAPTIONS_SEED = 1  # every row is judged on the same captions; recipes were chosen on those of seed 0
MAIN = {"unified": (), "tscd": ("tcd",)}  # what is compared, and with which methods; none named: with all others
PAIRED = ("frechet", "alignment", "objects", "aesthetic")  # compared caption by caption
RESAMPLES = 200  # of the Frechet distance; 1,000 of the others, which are means over the captions


class Paper:
    """budget: network evaluations of each training; samples: captions of each row; seeds: of data, adapter and noise.

    Under `out`: budget-<budget>/seed-<seed>/<method>-<variant>, a folder for each training with its LoRA files and, per
    number of steps, the features and scores of every caption; the encoded pictures, shared by the trainings of a seed.
    Beside `rows`: comparisons, in a file of their own (`pairs_of`); and in a folder of its name what they need of each
    training, so that they do not need `out`.
    Any number of processes may share `out` and `rows`: each takes the trainings that no other is at.
    """

    def __init__(
        self,
        out: Path,
        rows: Path,
        *,
        budget: float,
        samples: int,
        overrides: Sequence[str] = (),
        device: str = "auto",
        console: Console | None = None,
    ) -> None:
        from hypersd.emoji import evaluators

        self.out, self.ledger, self.pairs = writable(out), Ledger(rows), Ledger(pairs_of(rows))
        self.budget, self.samples = budget, samples
        self.device, self.console = device, console
        bfloat16 = has_bfloat16(pick_device(device))
        self.overrides = [*overrides, *([] if bfloat16 else ["train.dtype=float32"])]
        reference, _ = scene_references(samples, CAPTIONS_SEED, (1, 1))
        evaluator = evaluators.load("judge", pick_device(device))
        self.judge = Judge(evaluator, evaluator.features, reference, device=pick_device(device))
        # of every row
        self.settings: dict[str, Any] = {"budget": budget, "samples": samples, "captions": CAPTIONS_SEED}

    def run(self, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
        """Add the rows that lack. Comparisons come last, over the seeds that both sides have."""
        wanted = [(variant, seed) for seed in seeds for variant in variants]
        taken = [each for each in wanted if not self.variant(*each, wait=False)]  # by other processes
        for each in taken:
            self.variant(*each, wait=True)
        with self.lock(self.out / "compare"):
            self.compare(variants, seeds)

    def variant(self, variant: Variant, seed: int, *, wait: bool) -> bool:
        """All rows of one training; False where another process is at it and this one does not wait."""
        try:
            with self.lock(self.folder(variant, seed), wait):
                for steps in variant.steps:
                    self.cell(variant, steps, seed)
        except Timeout:
            return False
        return True

    @staticmethod
    def lock(path: Path, wait: bool = True) -> BaseFileLock:
        """Held by one process at a time; set free by the system should that process die."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{path}.lock", timeout=-1 if wait else 0, is_singleton=False)

    def cell(self, variant: Variant, steps: int, seed: int) -> None:
        """One method at one number of steps with one seed: trained where it is not yet, judged, appended."""
        key = {"method": variant.method, "variant": variant.name, "steps": steps, "seed": seed}
        key |= self.settings
        self.ledger.read()
        missing = [table for table in variant.tables if not self.ledger.find(table=table, **key)]
        if not missing:
            return
        recipe = self.train(variant, seed) if variant.stages else None
        found = self.pictures(variant, steps, seed)
        features, scores = found["features"], {name: found[name] for name in COLUMNS if name in found}
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {name: float(values.nanmean()) for name, values in scores.items()}
        row["frechet"] = frechet_distance(Moments.of(features), self.judge.real)
        if variant.method != TEACHER:
            row["frechet_to_teacher"] = frechet_distance(Moments.of(features), Moments.of(self.teacher(seed)))
        row["diversity"] = float(found["diversity"])
        self.keep(variant, steps, seed, found)
        stages = self.stages_of(variant, recipe, steps)
        cost = {"train_seconds": 0.0, "network_evaluations": 0}
        if recipe is not None:
            cost = {
                "train_seconds": round(_seconds(self.folder(variant, seed), stages), 1),
                "network_evaluations": evaluations_of(recipe, stages),
            }
        about = {"features": "emoji judge", "recipe": recipe.model_dump(mode="json") if recipe else None}
        for table in missing:
            self.ledger.append(finite({"table": table} | key | row | cost | about | {"versions": versions()}))

    def train(self, variant: Variant, seed: int) -> Recipe:
        """Run the variant's training, or go on with it, or find it done."""
        recipe, folder = recipe_of(variant, self.budget, seed, self.overrides), self.folder(variant, seed)
        own, done = recipe.model_dump(mode="json"), folder / "recipe.json"
        if done.exists():
            if completed(json.loads(done.read_text("utf-8"))) != own:
                raise HypersdError(f"{folder} was trained by another recipe; remove it or choose another --out")
            return recipe
        components = load_model(EMBEDDED, self.device)
        work = {f"{variant.folder} {name}": float(steps) for name, steps in recipe.work.items()}
        with Progress(work, self.console) as progress:
            latents = self.out / f"latents-{seed}-{recipe.data.count}"
            with self.lock(latents):
                dataset = load_dataset(recipe, components, latents, lambda n, of: progress("encode pictures", n, of))
            trainer = Trainer(
                recipe, components, dataset, folder,
                progress=lambda stage, step, total, loss: progress(
                    f"{variant.folder} {stage}", step, total, f"loss {loss:.3g}"
                ),
                **load_rewards(recipe, components),
            )  # fmt: skip
            trainer.run(resume=trainer.checkpoint.exists())
        atomic_write(done, lambda path: path.write_text(json.dumps(own), "utf-8"))
        trainer.checkpoint.unlink()
        return recipe

    def pictures(self, variant: Variant, steps: int, seed: int) -> dict[str, Tensor]:
        """Features and scores of every caption, and the diversity, from a file or from fresh pictures."""
        name = f"{variant.judged}-{steps}-{self.samples}-captions-{CAPTIONS_SEED}.safetensors"
        path = self.folder(variant, seed) / name
        with self.lock(path):
            if not path.exists():
                found = self.sample(variant, steps, seed)
                atomic_write(path, lambda temporary: save_file(found, temporary))
            return load_file(path)

    def sample(self, variant: Variant, steps: int, seed: int) -> dict[str, Tensor]:
        """Fresh pictures, judged."""
        state, metadata, role = self.weights(variant, steps, seed)
        backbone, components, process = load_with_lora(EMBEDDED, state, metadata, self.device)
        if variant.method in (TEACHER, UNDISTILLED):
            table = ddim(process, trailing(steps, process.num_train_timesteps)).guided(GUIDANCE)
        else:
            table = sampler_for(process, metadata, steps)
        captions = self.judge.reference.captions
        groups = min(VARIETY[0], len(captions))
        varied = [caption for caption in captions[:groups] for _ in range(VARIETY[1])]
        with Progress(None, self.console) as progress, backbone.folded():

            def stream(texts: list[str], noise: int) -> Iterator[Any]:
                return generate(
                    components, backbone, table, texts, role=role, seed=noise,
                    progress=lambda done, total: progress(f"judge {variant.folder} {steps}", done, total),
                )  # fmt: skip

            features, scores = self.judge.measure(stream(captions, seed))
            diversity = self.judge.diversity(stream(varied, seed + 1_000_003), groups)
        return {"features": features, **scores, "diversity": torch.tensor(diversity)}

    def weights(self, variant: Variant, steps: int, seed: int) -> tuple[dict[str, Tensor], dict[str, str], str]:
        """(LoRA, its metadata, role); nothing for the model itself."""
        if not variant.stages:
            return {}, {}, "base"
        name = f"lora-{steps}step" if variant.by_stage else "lora"
        return *read_lora(self.folder(variant, seed) / f"{name}.safetensors"), "lora"

    def teacher(self, seed: int) -> Tensor:
        """Features of the teacher's pictures."""
        teacher = next(variant for variant in VARIANTS if variant.method == TEACHER)
        return self.pictures(teacher, TEACHER_STEPS, seed)["features"]

    def keep(self, variant: Variant, steps: int, seed: int, found: dict[str, Tensor]) -> None:
        """What comparisons need of one number of steps: the scores of every caption, the Frechet distance resampled."""
        path, kept = self.kept(variant, seed), self.comparable(variant, seed)
        kept |= {f"{steps}/{name}": values.float() for name, values in found.items() if name in PAIRED}
        kept[f"{steps}/frechet"] = resample(found["features"], self._frechet, resamples=RESAMPLES).float()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: save_file(kept, temporary))

    def comparable(self, variant: Variant, seed: int) -> dict[str, Tensor]:
        """<steps>/<column> -> what `keep` filed."""
        path = self.kept(variant, seed)
        return load_file(path) if path.exists() else {}

    def kept(self, variant: Variant, seed: int) -> Path:
        same = "-".join(f"{name}-{value:g}" for name, value in self.settings.items())
        name = f"{variant.folder}-by-stage" if variant.by_stage else variant.folder
        return self.ledger.path.with_suffix("") / same / f"seed-{seed}" / f"{name}.safetensors"

    def compare(self, variants: Sequence[Variant], seeds: Sequence[int]) -> None:
        """One row of `pairs` for each column of PAIRED; earlier ones over fewer seeds stay."""
        self.pairs.read()
        offered = [v for v in variants if "2" in v.tables and v.stages]
        found = {v.folder: {seed: self.comparable(v, seed) for seed in seeds} for v in offered}
        for main, other in product(offered, offered):
            rivals = MAIN.get(main.method)
            if rivals is None or main.method == other.method or (rivals and other.method not in rivals):
                continue
            ours, theirs = found[main.folder], found[other.folder]
            for steps, column in product(sorted(set(main.steps) & set(other.steps)), PAIRED):
                name = f"{steps}/{column}"
                both = [seed for seed in seeds if name in ours[seed] and name in theirs[seed]]
                key: dict[str, Any] = {"method": main.method, "variant": main.name}
                key |= {"against": other.folder, "steps": steps, "column": column, "seeds": both} | self.settings
                if both and not self.pairs.find(**key):
                    runs = [[_draws(side[seed][name], column) for seed in both] for side in (ours, theirs)]
                    values = paired_difference(*runs)
                    self.pairs.append(key | dict(zip(("difference", "low", "high"), values, strict=True)))

    def _frechet(self, features: Tensor) -> float:
        return frechet_distance(Moments.of(features), self.judge.real)

    def folder(self, variant: Variant, seed: int) -> Path:
        budget = f"budget-{self.budget:g}" if variant.stages else "budget-0"
        return self.out / budget / f"seed-{seed}" / variant.folder

    @staticmethod
    def stages_of(variant: Variant, recipe: Recipe | None, steps: int) -> int | None:
        """How many stages the weights have behind them that are judged at `steps`; None: all."""
        if recipe is None or not variant.by_stage:
            return None
        return 1 + [stage.steps for stage in recipe.stages].index(steps)


def choose(methods: Sequence[str]) -> list[Variant]:
    """The variants of these methods, "lcm", or single ones, "pcm-phases4"; all where none is named."""
    known = {name for variant in VARIANTS for name in (variant.method, variant.folder)}
    for name in methods:
        if name not in known:
            raise HypersdError(f"method {name!r} is unknown; known: {', '.join(sorted(known))}", exit_code=2)
    return [v for v in VARIANTS if not methods or v.method in methods or v.folder in methods]


def pairs_of(rows: Path) -> Path:
    """The file of comparisons beside a file of rows."""
    return rows.with_stem(f"{rows.stem}-pairs")


def write_page(rows: Path, page: Path) -> None:
    """Draw the tables from the files of rows and of comparisons; the figures, named after the page, stand beside it."""
    found = Ledger(rows).rows
    drawn = figures(found)
    names = {table: f"{page.stem}-{table}.png" for table in drawn}
    text = draw(found, Ledger(pairs_of(rows)).rows, names)
    for table, name in names.items():
        atomic_write(page.with_name(name), partial(Path.write_bytes, data=drawn[table]))
    atomic_write(page, lambda path: path.write_text(text, "utf-8"))


def _seconds(folder: Path, stages: int | None) -> float:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return sum(row["seconds"] for row in rows if stages is None or row["index"] < stages)


def _draws(kept: Tensor, column: str) -> Tensor:
    return kept if column == "frechet" else resample(kept)

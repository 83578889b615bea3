"""The few-step table: teacher, undistilled and student, the same captions from the same noise, judged alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.evaluate.generate import generate, to_float, to_uint8
from hypersd.evaluate.metrics import Moments, bootstrap_interval, diversity, frechet_distance, object_recall
from hypersd.models.backbone import Backbone
from hypersd.models.load import Components
from hypersd.models.prompts import decode_latents, encode_images
from hypersd.sampling.sampler import with_guidance
from hypersd.sampling.solvers import Table, ddim
from hypersd.sampling.timesteps import trailing

Progress = Callable[[str, int, int], None]  # row, pictures done, pictures in all
Row = dict[str, Any]
COLUMNS = ("nfe", "frechet", "alignment", "objects", "aesthetic", "diversity")


@dataclass(frozen=True)
class Reference:
    """Real pictures and their captions; the captions are what is sampled.

    images: (N, H, W, 3) uint8. objects: the known objects that each caption names, for `Evaluator.objects`.
    variety: (C, K, H, W, 3) uint8, K real pictures of each of the first C captions.
    """

    images: np.ndarray
    captions: list[str]
    objects: list[tuple[int, ...]] | None = None
    variety: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, values in (("captions", self.captions), ("lists of objects", self.objects)):
            if values is not None and len(values) != len(self.images):
                raise HypersdError(f"{len(self.images)} reference pictures but {len(values)} {name}", exit_code=2)


@dataclass
class Evaluation:
    """`rows`: {"teacher": row, "undistilled": {"1": row, ...}, "student": {...}, "reference": {...}}, rows of COLUMNS.

    `intervals` has the same keys with 95 % bootstrap intervals of the mean columns; `pictures` maps "teacher",
    "undistilled/4", "student/1" and so on to the first pictures of each row, (G, H, W, 3) uint8, captioned `captions`.
    """

    rows: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)

    def put(self, name: str, row: Row, intervals: Row) -> None:
        """File a row under "teacher" or "group/steps"."""
        group, _, key = name.partition("/")
        for tree, value in ((self.rows, row), (self.intervals, intervals)):
            if key:
                tree.setdefault(group, {})[key] = value
            else:
                tree[group] = value


class Judge:
    """Turns pictures of a reference's captions, in their order, into one row of the table."""

    def __init__(
        self,
        evaluator: Any,
        extractor: Callable[[Tensor], Tensor],
        reference: Reference,
        real: Moments | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.evaluator, self.extractor, self.reference, self.device = evaluator, extractor, reference, device
        self.real = real or Moments.of(self.features(batches(reference.images)))

    @torch.no_grad()
    def features(self, images: Iterable[np.ndarray]) -> Tensor:
        """(N, D) float32 of uint8 batches."""
        return torch.cat([self.extractor(to_float(batch).to(self.device)).float().cpu() for batch in images])

    def diversity(self, images: Iterable[np.ndarray], groups: int) -> float:
        """Of `groups` captions with the same number of pictures each, caption by caption."""
        features = self.features(images)
        return diversity(features.reshape(groups, -1, features.shape[1]))

    @torch.no_grad()
    def measure(self, images: Iterable[np.ndarray]) -> tuple[Tensor, dict[str, Tensor]]:
        """((N, D) float32 features, {column: (N,) float64} of what the evaluator can judge)."""
        features: list[Tensor] = []
        scores: dict[str, list[Tensor]] = {"alignment": [], "objects": [], "aesthetic": []}
        start = 0
        for batch in images:
            x, part = to_float(batch).to(self.device), slice(start, start + len(batch))
            features.append(self.extractor(x).float().cpu())
            for name, values in self._scores(x, part).items():
                scores[name].append(values.detach().double().cpu())
            start += len(batch)
        return torch.cat(features), {name: torch.cat(parts) for name, parts in scores.items() if parts}

    def row(self, images: Iterable[np.ndarray], nfe: int = 0) -> tuple[Row, Row]:
        """(row, intervals of its mean columns)."""
        features, scores = self.measure(images)
        row: Row = dict.fromkeys(COLUMNS) | {"nfe": nfe}
        row["frechet"] = frechet_distance(Moments.of(features), self.real)
        row |= {name: float(values.nanmean()) for name, values in scores.items()}
        return row, {name: list(bootstrap_interval(values)) for name, values in scores.items()}

    def _scores(self, images: Tensor, part: slice) -> dict[str, Tensor]:
        """One value per picture, of what the evaluator can judge."""
        evaluator, found = self.evaluator, {}
        if hasattr(evaluator, "alignment"):
            found["alignment"] = evaluator.alignment(images, self.reference.captions[part])
        if hasattr(evaluator, "objects") and self.reference.objects is not None:
            found["objects"] = object_recall(evaluator.objects(images).cpu(), self.reference.objects[part])
        if hasattr(evaluator, "preference"):
            found["aesthetic"] = evaluator.preference(images)
        return found


def batches(images: np.ndarray, size: int = 64) -> Iterator[np.ndarray]:
    """Slices of `images`."""
    return (images[start : start + size] for start in range(0, len(images), size))


def evaluate(
    components: Components,
    backbone: Backbone,
    reference: Reference,
    evaluator: Any,
    *,
    extractor: Callable[[Tensor], Tensor] | None = None,
    zero: Reference | None = None,
    role: str = "student",
    table: Callable[[int], Table] | None = None,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: int = 25,
    guidance_scale: float = 3.0,
    variety: tuple[int, int] = (16, 4),
    grid: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    judge_device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Sample and judge the teacher (guided, `teacher_steps` DDIM steps on trailing timesteps), the undistilled model
    (guided) and the student at each of `steps`, the last two by the solver of `table`.

    evaluator: see protocol.Evaluator; what it lacks stays None. extractor: replaces its features in the distance
    columns. table: number of steps -> coefficient table; DDIM on trailing timesteps unless given. zero: a second,
    independent set of real pictures; its row is what a perfect model would score. variety: (captions, pictures of each)
    for diversity. The first `grid` pictures of every row are kept. judge_device: where evaluator and extractor are.
    """
    process = components.noise_process()
    judge = Judge(evaluator, extractor or evaluator.features, reference, device=judge_device)
    result = Evaluation(captions=reference.captions[:grid])
    _judge_reals(result, judge, zero, components, backbone)
    count, grid = len(reference.captions), len(result.captions)
    groups = min(variety[0], count)
    varied = [caption for caption in reference.captions[:groups] for _ in range(variety[1])]

    def judged(name: str, table: Table, role: str) -> None:
        kept: list[np.ndarray] = []

        def stream(captions: Sequence[str], seed: int, before: int) -> Iterator[np.ndarray]:
            for batch in generate(components, backbone, table, captions, role=role, seed=seed, batch_size=batch_size):
                kept.append(batch[: max(grid - sum(map(len, kept)), 0)])
                yield batch
                before += len(batch)
                if progress is not None:
                    progress(name, before, count + len(varied))

        row, intervals = judge.row(stream(reference.captions, seed, 0), len(table) * (2 if table.is_guided else 1))
        result.pictures[name] = np.concatenate(kept)
        row["diversity"] = judge.diversity(stream(varied, seed + 1, count), groups)
        result.put(name, row, intervals)

    def on_trailing(steps: int) -> Table:
        return ddim(process, trailing(steps, process.num_train_timesteps))

    def guided(table: Table) -> Table:
        return with_guidance(table, backbone.network, guidance_scale)

    with backbone.folded():
        judged("teacher", guided(on_trailing(teacher_steps)), "base")
        for number in steps:
            few = (table or on_trailing)(number)
            judged(f"undistilled/{number}", few if few.is_guided else guided(few), "base")
            judged(f"student/{number}", few, role)
    return result


@torch.no_grad()
def _judge_reals(
    result: Evaluation, judge: Judge, zero: Reference | None, components: Components, backbone: Backbone
) -> None:
    """What a perfect model would score, and what one would score behind this autoencoder."""
    reference = judge.reference
    if zero is not None:
        row, intervals = Judge(judge.evaluator, judge.extractor, zero, judge.real, judge.device).row(
            batches(zero.images)
        )
        if reference.variety is not None:
            flat = reference.variety.reshape(-1, *reference.variety.shape[2:])
            row["diversity"] = judge.diversity(batches(flat), len(reference.variety))
        result.put("reference/real", row, intervals)
    decoded = (
        to_uint8(decode_latents(components, encode_images(components, to_float(batch).to(backbone.device))))
        for batch in batches(reference.images)
    )
    result.put("reference/autoencoder", *judge.row(decoded))

"""The few-step table: teacher, undistilled and student samples of the same captions from the same noise, judged alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.evaluate.metrics import Moments, bootstrap_interval, diversity, frechet_distance, object_recall
from hypersd.models.backbone import Backbone
from hypersd.models.load import Components, decode_latents, encode_images, encode_prompts
from hypersd.models.noise_process import NoiseProcess
from hypersd.sampling.sampler import sample
from hypersd.sampling.solvers import Table, ddim, tcd
from hypersd.sampling.timesteps import trailing

Progress = Callable[[str, int, int], None]  # what, done, total
COLUMNS = ("nfe", "frechet", "alignment", "objects", "aesthetic", "diversity")
SOLVERS: dict[str, Callable[..., Table]] = {"ddim": ddim, "tcd": tcd}


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
        if len(self.images) != len(self.captions):
            raise HypersdError(f"{len(self.images)} reference pictures but {len(self.captions)} captions", exit_code=2)
        if self.objects is not None and len(self.objects) != len(self.captions):
            raise HypersdError(f"objects of {len(self.objects)} captions, but {len(self.captions)} captions", exit_code=2)


@dataclass
class Evaluation:
    """`rows`: {"teacher": row, "undistilled": {"1": row, ...}, "student": {...}, "reference": {...}}; a row has COLUMNS.

    `intervals` has the same keys with 95 % bootstrap intervals of the mean columns; `pictures` maps "teacher",
    "undistilled/4", "student/1" and so on to the first pictures of each row, (G, H, W, 3) uint8, captioned `captions`.
    """

    rows: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, as a PNG would hold it."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(images: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def is_guided(table: Table) -> bool:
    """Whether the table takes two predictions per step, with and without the caption."""
    return bool(np.any(table.coef[:, 2] != 0))


@torch.no_grad()
def generate(
    components: Components,
    backbone: Backbone,
    table: Table,
    captions: Sequence[str],
    *,
    role: str = "base",
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Sample one picture per caption; yields (B, H, W, 3) uint8 batches.

    The initial noise of picture i depends on `seed` and i alone, so tables, roles and batch sizes share it.
    """
    parameter = next(backbone.parameters())
    config = components.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    guided = is_guided(table)
    empty = encode_prompts(components, [""]) if guided else {}
    for start in range(0, len(captions), batch_size):
        part = list(captions[start : start + batch_size])
        cond = encode_prompts(components, part)
        if guided:
            cond = {key: torch.cat([value, empty[key].expand_as(value)]) for key, value in cond.items()}

        def denoise(x_t: Tensor, timestep: Tensor | int, cond: dict[str, Tensor] = cond) -> Any:
            if not guided:
                return backbone(x_t, timestep, cond, role=role)
            if isinstance(timestep, Tensor) and timestep.ndim:
                timestep = torch.cat([timestep, timestep])
            return backbone(torch.cat([x_t, x_t]), timestep, cond, role=role).chunk(2)

        noise = torch.stack(
            [torch.randn(shape, generator=_generator(seed, start + i)) for i in range(len(part))]
        ).to(parameter)
        latents = sample(denoise, table, noise, generator=_generator(seed, start, 1))
        yield to_uint8(decode_latents(components, latents))
        if progress is not None:
            progress(min(start + batch_size, len(captions)), len(captions))


def _generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on these integers alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class _Judge:
    """Turns a stream of pictures into one row of the table."""

    def __init__(self, evaluator: Any, extractor: Callable[[Tensor], Tensor], reference: Reference) -> None:
        self.evaluator, self.extractor, self.reference = evaluator, extractor, reference
        self.real: Moments | None = None

    def features(self, images: Iterable[np.ndarray]) -> Tensor:
        return torch.cat([self.extractor(to_float(batch)).float().cpu() for batch in images])

    @torch.no_grad()
    def row(
        self, batches: Iterable[np.ndarray], variety: Iterable[np.ndarray] | None, groups: int, nfe: int, keep: int = 0
    ) -> tuple[dict[str, Any], dict[str, list[float]], np.ndarray]:
        """The row, its intervals and the first `keep` pictures."""
        features, kept = [], []
        scores: dict[str, list[Tensor]] = {"alignment": [], "objects": [], "aesthetic": []}
        start = 0
        for batch in batches:
            images, part = to_float(batch), slice(start, start + len(batch))
            features.append(self.extractor(images).float().cpu())
            if hasattr(self.evaluator, "alignment"):
                scores["alignment"].append(self.evaluator.alignment(images, self.reference.captions[part]))
            if hasattr(self.evaluator, "objects") and self.reference.objects is not None:
                logits = self.evaluator.objects(images)
                scores["objects"].append(object_recall(logits, self.reference.objects[part]))
            if hasattr(self.evaluator, "preference"):
                scores["aesthetic"].append(self.evaluator.preference(images))
            if start < keep:
                kept.append(batch[: keep - start])
            start += len(batch)
        moments = Moments.of(torch.cat(features))
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row["nfe"] = nfe
        row["frechet"] = None if self.real is None else frechet_distance(moments, self.real)
        intervals = {}
        for name, values in scores.items():
            if values:
                flat = torch.cat([v.detach().double().cpu() for v in values])
                row[name] = float(flat.nanmean())
                intervals[name] = list(bootstrap_interval(flat))
        if variety is not None and groups:
            flat = self.features(variety)
            row["diversity"] = diversity(flat.reshape(groups, -1, flat.shape[1]))
        return row, intervals, np.concatenate(kept) if kept else np.empty((0,))


def evaluate(
    components: Components,
    backbone: Backbone,
    reference: Reference,
    evaluator: Any,
    *,
    extractor: Callable[[Tensor], Tensor] | None = None,
    zero: Reference | None = None,
    role: str = "student",
    solver: str = "ddim",
    eta: float = 0.0,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher_steps: int = 25,
    guidance_scale: float = 3.0,
    variety: tuple[int, int] = (16, 4),
    grid: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Evaluation:
    """Sample and judge the teacher (guided, `teacher_steps` DDIM steps), the undistilled model (guided) and the student
    (one evaluation per step) at each of `steps`, all on trailing timesteps and, but for the teacher, the same solver.

    `extractor` replaces the evaluator's features in the distance columns. `zero` is a second, independent set of real
    pictures: its row is what a perfect model would score. `variety` is (captions, samples of each) for diversity.
    """
    if solver not in SOLVERS:
        raise HypersdError(f"solver {solver!r} is unknown; choose one of {', '.join(SOLVERS)}", exit_code=2)
    judge = _Judge(evaluator, extractor or evaluator.features, reference)
    process = NoiseProcess.from_config(components.scheduler_config)
    groups = min(variety[0], len(reference.captions)) if variety[1] > 1 else 0
    varied = [caption for caption in reference.captions[:groups] for _ in range(variety[1])]
    grid = min(grid, len(reference.captions))
    result = Evaluation(captions=reference.captions[:grid])

    def chunks(images: np.ndarray) -> Iterator[np.ndarray]:
        return (images[start : start + batch_size] for start in range(0, len(images), batch_size))

    def judged(name: str, table: Table, role: str) -> None:
        def report(done: int, total: int) -> None:
            if progress is not None:
                progress(name, done, total + len(varied))

        def report_variety(done: int, total: int) -> None:
            if progress is not None:
                progress(name, len(reference.captions) + done, len(reference.captions) + total)

        def stream(captions: Sequence[str], seed: int, report: Callable[[int, int], None]) -> Iterator[np.ndarray]:
            return generate(
                components, backbone, table, captions, role=role, seed=seed, batch_size=batch_size, progress=report
            )

        nfe = len(table.timesteps) * (2 if is_guided(table) else 1)
        row, intervals, pictures = judge.row(
            stream(reference.captions, seed, report), stream(varied, seed + 1, report_variety), groups, nfe, grid
        )
        _put(result.rows, name, row)
        _put(result.intervals, name, intervals)
        result.pictures[name] = pictures

    with torch.no_grad():
        judge.real = Moments.of(judge.features(chunks(reference.images)))
        real_variety, real_groups = None, 0
        if reference.variety is not None:
            real_groups = len(reference.variety)
            real_variety = chunks(reference.variety.reshape(-1, *reference.variety.shape[2:]))
        if zero is not None:
            second = _Judge(evaluator, judge.extractor, zero)
            second.real = judge.real
            row, intervals, _ = second.row(chunks(zero.images), real_variety, real_groups, 0)
            _put(result.rows, "reference/real", row)
            _put(result.intervals, "reference/real", intervals)
        decoded = (
            to_uint8(decode_latents(components, encode_images(components, to_float(batch).to(_device(backbone)))))
            for batch in chunks(reference.images)
        )
        row, intervals, _ = judge.row(decoded, None, 0, 0)
        _put(result.rows, "reference/autoencoder", row)
        _put(result.intervals, "reference/autoencoder", intervals)

    total = process.num_train_timesteps
    judged("teacher", ddim(process, trailing(teacher_steps, total)).guided(guidance_scale), "base")
    for count in steps:
        table = SOLVERS[solver](process, trailing(count, total), eta=eta)
        judged(f"undistilled/{count}", table.guided(guidance_scale), "base")
        judged(f"student/{count}", table, role)
    return result


def _device(module: torch.nn.Module) -> torch.device:
    return next(module.parameters()).device


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    head, _, tail = path.partition("/")
    if tail:
        tree.setdefault(head, {})[tail] = value
    else:
        tree[head] = value

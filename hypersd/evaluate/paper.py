"""The paper's tables in miniature: what is trained, the file of rows, and the page drawn from it.

A variant is one training of one method; every variant spends the same budget, counted in network evaluations of one
sample (forward 1, backward 2). One row of the file is one (table, method, variant, steps, seed).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hypersd.distill.recipe import Recipe, load_recipe, parse_recipe
from hypersd.errors import HypersdError
from hypersd.sampling.timesteps import trailing

TEACHER, UNDISTILLED = "teacher", "undistilled"
GUIDANCE, TEACHER_STEPS = 2.5, 25
STEPS = (1, 2, 4, 8)
BASE = "emoji-full"  # the complete recipe; its model, data, adapter and optimizer are every variant's
SHORT = "emoji-quick"  # the recipe for budgets such as those here
LADDER = (8, 4, 2, 1)
TABLES = {
    "2": "Every method at 1, 2, 4 and 8 steps",
    "3": "TCD and TSCD, with and without feedback",
    "4": "One LoRA for every number of steps",
    "5": "Score distillation: alone, after TCD, after TSCD",
    "teacher": "TSCD: who teaches the later stages",
    "t_end": "TSCD: where the two jumps meet",
    "k": "TSCD: the numbers of segments",
    "distance": "TSCD: the distance",
    "N": "TSCD: points of the solver's grid",
}
REWARDS = [{"kind": "scene_alignment", "weight": 0.3}, {"kind": "judge_preference", "weight": 0.0}]  # of rg_lcd
PCM_CRITIC = {"method": "pcm", "adversarial_weight": 0.1}  # its authors' weight
COLUMNS = ("frechet", "frechet_to_teacher", "alignment", "objects", "aesthetic", "diversity")
LOWER_IS_BETTER = ("frechet", "frechet_to_teacher")


@dataclass(frozen=True)
class Variant:
    """stages: of the recipe, without iterations; each gets its share of the budget (equal ones unless given).

    steps: the numbers of sampling steps that are judged. by_stage: at k steps the weights that the stage for k steps
    ended with, and not the last stage's. trained_as: the name of the variant whose training this one shares.
    data: overrides of the recipe's section.
    """

    tables: tuple[str, ...]
    method: str
    name: str = ""
    stages: tuple[Mapping[str, Any], ...] = ()
    steps: tuple[int, ...] = STEPS
    shares: tuple[float, ...] = ()
    by_stage: bool = False
    trained_as: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Of the training."""
        name = (self.trained_as or self.name).replace("=", "").replace(" ", "-")
        return f"{self.method}-{name}" if name else self.method

    @property
    def judged(self) -> str:
        """Begins the names of the files with what was judged."""
        return "judged-by-stage" if self.by_stage else "judged"


def shipped(name: str, method: str) -> list[dict[str, Any]]:
    """The recipe's stages of one method, with their iterations."""
    stages = [stage.model_dump(mode="json", exclude_unset=True) for stage in load_recipe(name).stages]
    return [stage for stage in stages if stage["method"] == method]


def head(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """All of a recipe but its stages."""
    return load_recipe(BASE, overrides).model_dump(mode="json", exclude={"stages"}, exclude_none=True)


def guided(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The base model teaches every method with the same guidance."""
    taught = stage["method"] != "feedback" and stage.get("teacher") != "previous_stage"
    return ({"guidance_scale": [GUIDANCE, GUIDANCE]} if taught else {}) | dict(stage)


def costs(stages: Sequence[Mapping[str, Any]]) -> list[float]:
    """Network evaluations of each stage, of one sample a step."""
    recipe = parse_recipe(head() | {"stages": [guided(stage) for stage in stages]}, "stages")
    return [stage.iterations * stage.network_evaluations for stage in recipe.stages]


def weighed(
    tables: tuple[str, ...], method: str, name: str, stages: Sequence[dict[str, Any]], **options: Any
) -> Variant:
    """Stages whose shares of the budget are those that their iterations cost."""
    each = costs(stages)
    return Variant(tables, method, name, untimed(stages), shares=tuple(cost / sum(each) for cost in each), **options)


def untimed(stages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    return tuple({key: value for key, value in stage.items() if key != "iterations"} for stage in stages)


def ladder(*numbers: int, **options: Any) -> list[dict[str, Any]]:
    """TSCD stages with these numbers of segments, otherwise as shipped; the first has none before it to teach it."""
    stages = [stage for stage in shipped(SHORT, "tscd") if stage["segments"] in numbers]
    first = {key: value for key, value in stages[0].items() if key not in ("teacher", "grid")}
    return [stage | options for stage in (first, *stages[1:])]


def ablations() -> list[Variant]:
    def one(table: str, name: str, *numbers: int, **options: Any) -> Variant:
        return weighed((table,), "tscd", name, ladder(*(numbers or LADDER), **options))

    every = ("2", "3", "4", "5", "k", "teacher", "t_end", "distance", "N")
    return [
        weighed(every, "tscd", "8-4-2-1", ladder(*LADDER)),
        weighed(("3",), "tscd", "8-4-2-1 by stage", ladder(*LADDER), by_stage=True, trained_as="8-4-2-1"),
        Variant(("2", "3"), "tscd", "equal shares", untimed(ladder(*LADDER))),
        Variant(("2", "3"), "tscd", "equal shares boundary", untimed(ladder(*LADDER, t_end="boundary"))),
        one("k", "1", 1),
        one("k", "4-1", 4, 1),
        one("teacher", "base", teacher="base"),
        *(one("t_end", f"t_end={policy}", t_end=policy) for policy in ("uniform", "boundary")),
        *(one("distance", loss, loss=loss) for loss in ("mse", "huber", "l1")),
        one("distance", "inv_b2", weighting="inv_b2"),
        *(one("distance", f"critic {kind}", critic=kind, staged_weights=True) for kind in ("features", "encoder")),
        *(one("N", f"N={n}", grid=n) for n in (20, 40, 200)),
    ]


def lightning(steps: int) -> Variant:
    """From the base model to 8 steps (16 for 8) by the mean square error, then halving with a critic, with the paper's
    further starts and noise levels for two steps and one. The error stays beside the critic's opinion: within such a
    budget the critic alone hardly moves the student (two steps, 10,000 evaluations: Frechet distance 11.7, not 10.1).
    """
    first = 2 * steps if steps == 8 else 8
    common = {"method": "lightning", "adversarial_weight": 0.01}
    stages: list[dict[str, Any]] = [
        {"method": "lightning", "teacher": "base", "teacher_steps": 4 * first, "student_steps": first}
    ]
    while (now := stages[-1]["student_steps"]) > steps:
        few = {"starts": 4, "critic_levels": [0.01, 0.25, 0.5, 0.75]} if now <= 4 else {}
        stages.append(common | {"teacher_steps": now, "student_steps": now // 2} | few)
    return Variant(("2",), "lightning", f"steps={steps}", tuple(stages), (steps,))


def dmd2(steps: int) -> Variant:
    """From the base model, sampled at the trailing timesteps. Two updates of the fake score keep up with a small model;
    with five, and a third of the learning rate, a small budget buys too few steps of the student."""
    stage = {"method": "dmd2", "timesteps": trailing(steps).tolist(), "fake_updates": 2}
    return Variant(("2",), "dmd2", f"steps={steps}", (stage,), (steps,))


def dmd2_warm() -> Variant:
    """One step as its authors have it: fed at 399, after a regression on the teacher's pairs."""
    stage = {"method": "dmd2", "timesteps": [399], "fake_updates": 2, "regression": 0.25, "regression_steps": 10}
    return Variant(("2",), "dmd2", "regression steps=1", (stage,), (1,))


def unified() -> list[Variant]:
    """One LoRA for every number of steps: TSCD, and what may follow it, as in the shipped recipes; the same after TCD,
    at TSCD's cost; and score distillation alone."""
    tscd, feedback, dmd = ladder(*LADDER), shipped(SHORT, "feedback"), shipped(BASE, "dmd")
    tcd: list[dict[str, Any]] = [{"method": "tcd", "iterations": 1}]
    tcd[0]["iterations"] = round(sum(costs(tscd)) / sum(costs(tcd)))
    scale = sum(costs(tscd)) / sum(costs(shipped(BASE, "tscd")))
    dmd[0]["iterations"] = round(scale * dmd[0]["iterations"])
    # from the base model nothing keeps other step counts, and there is no beginning worth an anchor
    alone = [dmd[0] | {"anchor": [0.0, 0.0], "consistency": 0.0}]
    return [
        weighed(("2", "3", "4"), "unified", "TSCD+feedback", tscd + feedback),
        weighed(("3",), "unified", "TCD+feedback", tcd + feedback),
        weighed(("4", "5"), "unified", "TSCD+DMD", tscd + dmd),
        weighed(("5",), "unified", "TCD+DMD", tcd + dmd),
        weighed(("5",), "unified", "DMD", alone, steps=(1,)),
        weighed(("2", "4"), "unified", "TSCD+DMD+feedback", tscd + dmd + feedback),
    ]


VARIANTS: list[Variant] = [
    Variant(("2",), TEACHER, steps=(TEACHER_STEPS,)),
    Variant(("2",), UNDISTILLED),
    Variant(("2",), "lcm", stages=({"method": "lcm"},)),
    Variant(("2", "3", "5"), "tcd", stages=({"method": "tcd"},)),
    # weights that are made for one number of steps get the whole budget for each
    *(Variant(("2",), "pcm", f"phases={k}", ({"method": "pcm", "phases": k},), (k,)) for k in STEPS),
    *(Variant(("2",), "pcm", f"critic phases={k}", (PCM_CRITIC | {"phases": k},), (k,)) for k in STEPS),
    Variant(("2",), "tdd", stages=({"method": "tdd", "sampling_steps": [1, 8]},)),
    *(Variant(("2",), "perflow", f"windows={k}", ({"method": "perflow", "windows": k},), (k,)) for k in STEPS),
    *(lightning(k) for k in STEPS),
    *(dmd2(k) for k in STEPS),
    dmd2_warm(),
    Variant(("2",), "rg_lcd", stages=({"method": "rg_lcd", "rewards": REWARDS},)),
    Variant(("2",), "rg_lcd", "latent proxy", stages=({"method": "rg_lcd", "rewards": REWARDS, "proxy": True},)),
    *unified(),
    *ablations(),
]


def recipe_of(variant: Variant, budget: float, seed: int, overrides: Sequence[str] = ()) -> Recipe:
    """The variant's recipe: iterations so that the run costs `budget` network evaluations, at least one a stage. The
    warm-up takes at most a quarter of the shortest stage."""
    document = head(overrides)
    document["train"]["seed"] = seed
    document["data"] |= dict(variant.data)
    batch = document["train"]["batch_size"] * document["train"]["accumulation"]
    stages = [guided(stage) | {"iterations": 1} for stage in variant.stages]
    typed = parse_recipe(document | {"stages": stages}, variant.folder).stages
    shares = variant.shares or (1.0 / len(stages),) * len(stages)
    for stage, one, share in zip(stages, typed, shares, strict=True):
        stage["iterations"] = max(1, round(share * budget / (batch * one.network_evaluations)))
    shortest = min((stage["iterations"] for stage in stages), default=0)
    document["train"]["warmup"] = min(document["train"]["warmup"], shortest // 4)
    return parse_recipe(document | {"stages": stages}, variant.folder)


def evaluations_of(recipe: Recipe, stages: int | None = None) -> int:
    """What the first `stages` stages cost in network evaluations; all unless given."""
    batch = recipe.train.batch_size * recipe.train.accumulation
    return round(sum(stage.iterations * batch * stage.network_evaluations for stage in recipe.stages[:stages]))


class Ledger:
    """The file of rows, JSON lines: read, and appended to row by row, so that an interrupted run goes on, and so that
    several processes may append to one file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.read()

    def read(self) -> None:
        """Again, with what others have appended."""
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            for number, line in enumerate(self.path.read_text("utf-8").splitlines(), 1):
                try:
                    self.rows.append(json.loads(line))
                except json.JSONDecodeError:
                    raise HypersdError(
                        f"{self.path} line {number} is cut short or not JSON; remove that line"
                    ) from None

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows whose columns have these values."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]

    def append(self, row: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:  # one write: rows of two processes never mix
                file.write((json.dumps(row) + "\n").encode())
                os.fsync(file.fileno())
        except OSError as error:
            raise HypersdError(f"cannot write {self.path}: {error.strerror or error}") from None
        self.rows.append(row)


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Mean and standard deviation over the seeds."""
    found = [value for value in values if value is not None]
    if not found:
        return "–"
    mean = f"{np.mean(found):.{digits}g}"
    return mean if len(found) == 1 else f"{mean} ± {np.std(found, ddof=1):.2g}"


def label(method: str, variant: str) -> str:
    return f"{method} ({variant})" if variant else method


def draw(
    rows: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[str, str] | None = None,
) -> str:
    """The page, Markdown, of the rows of a Ledger and of the comparisons in another. pictures: table -> the file of its
    figure, if there is one."""
    if not rows:
        raise HypersdError("there are no rows to draw; run `hypersd evaluate paper` first")
    lines = ["# The paper's tables in miniature", ""]
    groups = alike(rows)
    for same in groups:
        budget, samples, features = (same[0][name] for name in ("budget", "samples", "features"))
        seeds = sorted({row["seed"] for row in same})
        over = f"mean and standard deviation over the seeds {', '.join(map(str, seeds))}; without one, a single seed"
        lines += [
            f"Each training spends {budget:,.0f} network evaluations of one sample (forward 1, backward 2). "
            f"{samples:,} pictures a row, features: {features}; {over if seeds[1:] else 'one seed'}. "
            "Written by `hypersd evaluate paper --draw`.",
            "",
            "Equal evaluations are not equal time: decoding and rewards, which only feedback and rg_lcd need, are not "
            "counted; `train_seconds` is in every row. The shares of TSCD and of the unified LoRA were chosen by trial "
            "trainings with another seed, judged on other captions than these (docs/measured_facts.md); the other "
            "methods had fewer such trials. PCM is there without its critic and with it, DMD2 of one step as it is, "
            "fed at 999, and as its authors train it, fed at 399 after a regression on the teacher's pairs.",
            "",
        ]
        for table, title in TABLES.items():
            found = [row for row in same if row["table"] == table]
            lines += _table(title, found, (pictures or {}).get(table, "") if same is groups[-1] else "")
            done = {(row["method"], row["variant"]) for row in found}
            missing = [
                label(v.method, v.name) for v in VARIANTS if table in v.tables and (v.method, v.name) not in done
            ]
            lines += [f"Not measured: {', '.join(missing)}.", ""] if found and missing else []
    lines += _pairs(pairs)
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, rows: Sequence[Mapping[str, Any]], picture: str) -> list[str]:
    if not rows:
        return []
    names = ("Frechet", "to the teacher", "alignment", "objects", "aesthetic", "diversity", "evaluations")
    figure = [f"![{title}: quality over sampling steps]({picture})", ""] if picture else []
    lines = [f"## {title}", "", *figure, "| steps | method | " + " | ".join(names) + " |"]
    lines.append("| --- " * 2 + "| ---: " * len(names) + "|")
    keys = dict.fromkeys((row["steps"], row["method"], row["variant"]) for row in rows)
    for steps, method, variant in sorted(keys, key=lambda key: key[0]):
        cell = [row for row in rows if (row["steps"], row["method"], row["variant"]) == (steps, method, variant)]
        values = [spread(row[column] for row in cell) for column in COLUMNS]
        values.append(f"{cell[0]['network_evaluations']:,}")
        lines.append(f"| {steps} | {label(method, variant)} | " + " | ".join(values) + " |")
    return [*lines, ""]


def alike(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The tables' rows, those with the same budget, pictures, features and captions together; the largest come last."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("budget", "samples", "features", "captions"))
        groups.setdefault(key, []).append(row)
    return [groups[key] for key in sorted(groups)]


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Table -> its figure, PNG, of the last group of rows."""
    from hypersd.evaluate.plots import comparison

    found = {}
    same = (alike(rows) or [[]])[-1]
    known = _lines(same, "2")
    for table in TABLES:
        named = {label(*key): line for key, line in _lines(same, table).items() if key[0] not in (TEACHER, UNDISTILLED)}
        if len(named) < 2:
            continue
        usual = next((name for name in named if name.startswith("tscd")), next(iter(named)))
        strong = next((name for name in named if name.startswith("unified")), usual)
        found[table] = comparison(named, known.get((TEACHER, ""), {}), known.get((UNDISTILLED, ""), {}), strong)
    return found


def _lines(rows: Sequence[Mapping[str, Any]], table: str) -> dict[tuple[str, str], Any]:
    """(method, variant) -> column -> steps -> each seed's value. Weights for one number of steps each are one line."""
    single = {(v.method, v.name) for v in VARIANTS if len(v.steps) == 1 and "=" in v.name}
    found: dict[tuple[str, str], Any] = {}
    for row in rows:
        if row["table"] != table:
            continue
        key = (row["method"], row["variant"])
        if key in single:
            key = (row["method"], " ".join(word for word in row["variant"].split() if "=" not in word))
        for column in COLUMNS:
            if row[column] is not None:
                found.setdefault(key, {}).setdefault(column, {}).setdefault(row["steps"], []).append(row[column])
    return found


def _pairs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    best: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: len(row.get("seeds", ()))):  # of each pair that with the most seeds
        name = label(row["method"], row["variant"])
        best[row["steps"], row["against"], name, row["column"]] = row
    counts: dict[tuple[Any, ...], list[str]] = {}
    for (steps, _, method, column), row in sorted(best.items()):
        counts.setdefault((steps, method, column), []).append(verdict(row))
    lines = ["## Differences, paired over captions", ""]
    lines += ["How many of the others the method differs from, with an interval that leaves out 0.", ""]
    lines += [
        "| steps | method | column | better than | undecided | worse than |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for (steps, method, column), found in counts.items():
        each = " | ".join(str(found.count(name)) for name in ("better", "undecided", "worse"))
        lines.append(f"| {steps} | {method} | {column} | {each} |")
    lines += ["", "| steps | method | against | column | difference | 95 % | seeds |"]
    lines.append("| --- | --- | --- | --- | ---: | --- | ---: |")
    for (_, _, method, _), row in sorted(best.items()):
        lines.append(
            f"| {row['steps']} | {method} | {row['against']} | {row['column']} | {row['difference']:+.3g} "
            f"| {row['low']:+.3g} to {row['high']:+.3g} | {len(row['seeds'])} |"
        )
    return [*lines, ""]


def verdict(pair: Mapping[str, Any]) -> str:
    """By the interval of the difference: better, worse or undecided."""
    if pair["low"] <= 0.0 <= pair["high"]:
        return "undecided"
    return "better" if (pair["high"] < 0.0) == (pair["column"] in LOWER_IS_BETTER) else "worse"

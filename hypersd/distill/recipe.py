"""The recipe: everything that a distillation run depends on, typed, and checked before anything is loaded.

A recipe is a TOML file with the sections [model], [data], [lora], [train] and a list of [[stages]]. Each stage names
its `method`; what a stage of each method may say stands in stages.py.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from hypersd.distill.stage import Beta, NonNegative, Positive, Probability, Section
from hypersd.distill.stages import STAGES, Stage
from hypersd.errors import HypersdError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Model(Section):
    """`path`: a folder in the diffusers layout, or "embedded", or "embedded-flow"."""

    path: str = "embedded"


class Data(Section):
    """`kind = "folder"`: pictures under `path` with captions (a CSV or JSONL file, or a .txt beside each picture);
    `kind = "scenes"`: `count` rendered scenes of the embedded model."""

    kind: Literal["scenes", "folder"] = "scenes"
    path: str | None = None
    captions: str | None = None  # the CSV or JSONL file; None: found in the folder
    count: Positive = 4096
    resolution: Positive | None = None  # pixels; None: the model's own
    cache: str | None = None  # folder of the encoded latents; None: under the run's folder
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"  # of the cache
    caption_dropout: Probability = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.kind == "scenes":
            self._belong('data.kind = "folder"', "path", "captions", "resolution")
        elif self.path is None:
            raise ValueError('kind = "folder" needs path, the folder with the pictures')
        return self


class Lora(Section):
    """`targets`: names of layers that get an adapter; None: the LCM-LoRA set of attention, feed-forward and
    convolution."""

    rank: Positive = 64
    alpha: Annotated[float, Field(gt=0)] = 64.0
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None


class Train(Section):
    """`batch_size` is one forward pass; `accumulation` passes make one optimizer step. `init`: a finished LoRA file
    that the first stage starts from; None: it starts as the base model. `full`: train every weight of the network, from
    the base model with `init` merged into it, instead of a LoRA (hypersd.models' FullBackbone says what that takes)."""

    init: str | None = None
    full: bool = False
    batch_size: Positive = 32
    accumulation: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen base; adapters and jumps are float32 either way
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: NonNegative = 1.0  # largest gradient norm; 0: only measured
    warmup: Annotated[int, Field(ge=0)] = 0  # steps of linear warm-up at the start of each stage
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"  # after it, from there to the stage's last step
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    # what is computed again in backward: nothing, the feed-forward layers (memory for next to no time), every block
    gradient_checkpointing: Literal["none", "feed_forward", "full"] = "feed_forward"
    checkpoint_every: Positive = 500  # steps; a stage's end always writes one
    watch_every: Annotated[int, Field(ge=0)] = 50  # steps between looks at samples (distill.probe); 0: no looks
    log_every: Positive = 10  # steps between the moments when a GPU is asked for its loss
    threads: Positive | None = None  # of torch on a CPU; None: torch's choice


class Recipe(Section):
    model: Model = Model()
    data: Data = Data()
    lora: Lora = Lora()
    train: Train = Train()
    stages: Annotated[list[Stage], Field(min_length=1)]

    @model_validator(mode="after")
    def _full_has_no_lora(self) -> Recipe:
        if not self.train.full:
            return self
        # a recipe that was written down has every key
        said = [name for name in Lora.model_fields if getattr(self.lora, name) != getattr(Lora(), name)]
        if said:
            raise ValueError(f"lora.{said[0]} and train.full = true exclude each other; leave one out")
        for i, stage in enumerate(self.stages):
            if stage.is_separate:
                raise ValueError(
                    f'stages.{i}: train.full = true has no separate LoRA to train; set adapter = "continue"'
                )
        return self

    @model_validator(mode="after")
    def _stages_follow(self) -> Recipe:
        first = self.stages[0]
        if first.needs_previous and not first.improves:  # there is none: the base model teaches it, with guidance
            self.stages[0] = first.model_copy(update={"teacher": "base"})
        for i, stage in enumerate(self.stages):
            if i == 0 and stage.improves and self.train.init is None:
                ways = ["set train.init", "put a stage before it", *([f"say {stage.alone}"] if stage.alone else [])]
                raise ValueError(f"stages.0: {stage.method} improves weights: {', '.join(ways[:-1])}, or {ways[-1]}")
            if stage.is_separate and i < len(self.stages) - 1:
                raise ValueError(
                    f'stages.{i}: a separate LoRA ends the recipe; put it last or set adapter = "continue"'
                )
            try:
                stage.check(self.train.batch_size * self.train.accumulation)
                if stage.needs_previous and i > 0:
                    stage.follow(self.stages[i - 1])
            except ValueError as error:
                raise ValueError(f"stages.{i}: {error}") from None
        return self

    @property
    def names(self) -> list[str]:
        """Of the stages, no two alike."""
        return _distinct([stage.name for stage in self.stages])

    @property
    def work(self) -> dict[str, int]:
        """The optimizer steps of each stage, by its name in `names`."""
        return dict(zip(self.names, (stage.iterations for stage in self.stages), strict=True))

    @property
    def files(self) -> list[str]:
        """Names of the LoRA files that the stages end with, no two alike."""
        return _distinct([stage.file for stage in self.stages])


def _distinct(names: list[str]) -> list[str]:
    """A later stage's name that is taken gets the stage's number behind it."""
    return [f"{name}-stage{i}" if name in names[:i] else name for i, name in enumerate(names)]


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("hypersd.distill") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a TOML file. Each override is "a.b=c" ("train.batch_size=16", "stages.0.iterations=10");
    c is read as TOML, and as a plain string where it is not TOML.

    Raises HypersdError (exit code 2) with one line: the file, the key's path, what was found and what is allowed.
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped():
        text = (resources.files("hypersd.distill") / "recipes" / f"{name_or_path}.toml").read_text("utf-8")
    else:
        try:
            text = path.read_text("utf-8-sig")
        except FileNotFoundError:
            near = _nearest(str(name_or_path), shipped())
            raise _error(
                f"no recipe {name_or_path}: neither a file nor a shipped one ({', '.join(shipped())}){near}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise _error(f"cannot read recipe {path}: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _error(f"{name_or_path}: not valid TOML: {error}") from None
    for override in overrides:
        _override(document, override)
    return parse_recipe(document, str(name_or_path))


def parse_recipe(document: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as nested dictionaries; `source` begins the error line."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise _error(f"{source}: {_one_line(error, document)}") from None


def completed(document: dict[str, Any]) -> dict[str, Any]:
    """A recipe that was written down earlier, with the defaults of keys that did not exist yet; one that is no longer
    valid stays as it is."""
    try:
        return parse_recipe(document).model_dump(mode="json")
    except HypersdError:
        return document


def _error(message: str) -> HypersdError:
    return HypersdError(message, exit_code=2)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise _error(f"override {override!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    node: Any = document
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(parts[:i])
                raise _error(f"override {override!r}: {where} has entries 0 to {len(node) - 1}, found {part!r}")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last:
                node.setdefault(part, {})
        else:
            raise _error(f"override {override!r}: {'.'.join(parts[:i])} is a value, not a section")
        if last:
            node[index] = value
        else:
            node = node[index]


def _one_line(error: ValidationError, document: dict[str, Any]) -> str:
    """The first problem of a validation error: an unknown key before anything else, for it often explains the rest."""
    problems = error.errors(include_url=False)
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    where = ".".join(str(part) for i, part in enumerate(problem["loc"]) if not _is_tag(problem["loc"], i))
    if problem["type"] == "extra_forbidden":
        allowed = _keys(problem["loc"][:-1])
        line = f"{where}: unknown key{_nearest(str(problem['loc'][-1]), allowed)}; allowed: {', '.join(allowed)}"
    elif problem["type"] == "union_tag_not_found":
        line = f"{where}.method: missing; one of {', '.join(STAGES)}"
    elif problem["type"] == "union_tag_invalid":
        found = str(problem["ctx"]["tag"])
        line = f"{where}.method: found {found!r}, should be one of {', '.join(STAGES)}{_nearest(found, STAGES)}"
    elif problem["type"] == "missing":
        line = f"{where}: missing; this key has no default"
    elif problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        line = f"{where}: {message}" if where else message
    else:
        expected = re.sub(r"^(Input|List|Tuple|String) should", "should", problem["msg"])
        expected = re.sub(
            r"a valid dictionary or instance of \w+", "a section", expected.replace("a valid tuple", "a list")
        )
        expected = re.sub(r" after validation, not \d+", "", expected)
        found = repr(problem["input"])
        near = _nearest(str(problem["input"]), re.findall(r"'([^']*)'", problem["msg"]))
        line = f"{where}: found {found if len(found) < 60 else found[:57] + '...'}, {expected}{near}"
    more = len(problems) - 1
    return line + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _is_tag(location: Sequence[str | int], index: int) -> bool:
    """Behind the number of a stage, pydantic puts the method that it was read as."""
    return index == 2 and location[0] == "stages" and location[2] in STAGES


def _keys(location: Sequence[str | int]) -> list[str]:
    """The keys that the section at `location` may have."""
    section: type[BaseModel] = Recipe
    for i, part in enumerate(location):
        if _is_tag(location, i):
            section = STAGES[str(part)]
        elif isinstance(part, str) and not (part == "stages" and i + 1 < len(location)):
            section = next(kind for kind in _kinds(section.model_fields[part].annotation) if _is_section(kind))
    return list(section.model_fields)


def _kinds(annotation: Any) -> list[Any]:
    """The classes within an annotation: of a list its items', of a union all."""
    inner = get_args(annotation)
    return [kind for part in inner for kind in _kinds(part)] if inner else [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nearest(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""

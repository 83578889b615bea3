"""Whether a run may go on from a checkpoint: the recipe that made it and the one that resumes it must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypersd.distill.recipe import Recipe, completed
from hypersd.errors import HypersdError

# what may differ between the recipe of a checkpoint and the one that resumes it
FREE = ("checkpoint_every", "watch_every", "log_every", "threads")


def check_recipe(state: dict[str, Any], recipe: Recipe, path: Path, *, from_good: bool = False) -> None:
    """Raises HypersdError (exit code 2) where a run by `recipe` cannot go on from `state` of the checkpoint `path`."""
    old, new = completed(state["recipe"]), recipe.model_dump(mode="json")
    stage, step = state["stage"], state["step"]
    if from_good:
        old, new = (_begun(one, stage, step) for one in (old, new))
    _same_recipe(old, new, path)
    if stage < len(recipe.stages) and step > recipe.stages[stage].iterations:
        raise HypersdError(f"{path} has {step} steps of stage {stage}, the recipe fewer", exit_code=2)


def _begun(recipe: dict[str, Any], stage: int, step: int) -> dict[str, Any]:
    """The part of a recipe that a run is bound to after `step` steps of a stage, whatever the rest will say."""
    bound = {section: recipe[section] for section in ("model", "data", "lora")}
    under_way = [{"method": one["method"]} for one in recipe["stages"][stage : stage + 1] if step > 0]
    return bound | {"stages": recipe["stages"][:stage] + under_way}


def _same_recipe(old: dict[str, Any], new: dict[str, Any], path: Path, where: str = "") -> None:
    for key in {**old, **new}:
        a, b, name = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            _same_recipe(a, b, path, f"{name}.")
        elif (
            isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(isinstance(x, dict) for x in a + b)
        ):
            _same_recipe(dict(enumerate(a)), dict(enumerate(b)), path, f"{name}.")  # type: ignore[arg-type]
        elif a != b and key not in FREE:
            raise HypersdError(
                f"{path} was made with {name} = {a}, the recipe says {b}; resume needs the same recipe", exit_code=2
            )

"""metrics.jsonl: one line per optimizer step."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hypersd.errors import HypersdError


class Log:
    """Holds device tensors until `flush` asks for their values, so that a GPU is not waited for at every step.

    `keep` = (stage index, step) where a resumed run goes on: later lines are dropped, without it all are.
    """

    def __init__(self, path: Path, keep: tuple[int, int] | None) -> None:
        self.path, self.pending = path, []  # type: ignore[var-annotated]
        kept = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if keep is not None and path.exists():
                for line in path.read_text("utf-8").splitlines():
                    row = _parse(line)
                    if row is not None and (row["index"], row["step"]) < keep:
                        kept += line + "\n"
            path.write_text(kept, "utf-8")
        except OSError as error:
            raise HypersdError(f"cannot write {path}: {error.strerror or error}") from None

    def add(
        self, index: int, stage: str, step: int, loss: Tensor, norm: Tensor, started: float,
        measures: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One step; `measures` are the method's further numbers."""
        self.pending.append((index, stage, step, loss, norm, time.perf_counter() - started, dict(measures or {})))

    def flush(self, after_step: Callable[[int, dict[str, float]], str | None] | None = None) -> float:
        """Write what is pending and return the newest loss. Raises HypersdError when one is not finite.

        after_step(step, measures) may answer with a warning; it goes to stderr, through the logger "hypersd", and into
        the step's line.
        """
        lines, problem = "", None
        for index, stage, step, loss, norm, seconds, measures in self.pending:
            loss, norm = float(loss), float(norm)
            numbers = {name: float(value) for name, value in measures.items()}
            astray = next((name for name, value in numbers.items() if not math.isfinite(value)), None)
            if not (math.isfinite(loss) and math.isfinite(norm)) or astray:
                other = f", {astray} {numbers[astray]}" if astray else ""
                problem = (
                    f"stage {stage}, step {step}: the loss is {loss}, its gradient {norm}{other}; the last checkpoint "
                    "is intact; lower train.learning_rate or the guidance scale"
                )
                break
            row = {"index": index, "stage": stage, "step": step, "loss": loss, "grad_norm": norm}
            row |= {"seconds": round(seconds, 6)}
            if numbers:
                row["measures"] = numbers
            warning = after_step(step, numbers) if after_step is not None and numbers else None
            if warning:
                row["warning"] = warning
                logging.getLogger("hypersd").warning("%s", warning)
            lines += json.dumps(row) + "\n"
        self.pending.clear()
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise HypersdError(f"cannot write {self.path}: {error.strerror or error}") from None
        if problem:
            raise HypersdError(problem)
        return loss


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # a line cut short when the run was killed

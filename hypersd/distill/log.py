"""metrics.jsonl: one line per optimizer step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.files import atomic_write


class Log:
    """Holds device tensors until `flush` asks for their values, so that a GPU is not waited for at every step.

    `keep` = (stage index, step) where a resumed run goes on: later lines are dropped, without it all are. `kept`: what
    the lines before it say. Without a path nothing is written or kept.
    """

    def __init__(self, path: Path | None, keep: tuple[int, int] | None) -> None:
        self.path, self.pending = path, []  # type: ignore[var-annotated]
        self.kept: list[dict[str, Any]] = []
        kept = ""
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if keep is not None and path.exists():
                for line in path.read_text("utf-8").splitlines():
                    row = _parse(line)
                    if row is not None and (row["index"], row["step"]) < keep:
                        kept += line + "\n"
                        self.kept.append(row)
            if kept:
                atomic_write(path, lambda temporary: temporary.write_text(kept, "utf-8"))
            else:
                path.write_text("", "utf-8")
        except OSError as error:
            raise HypersdError(f"cannot write {path}: {error.strerror or error}") from None

    def add(
        self, index: int, stage: str, step: int, loss: Tensor, norm: Tensor, started: float,
        measures: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """One step; `measures` are the method's further numbers."""
        self.pending.append((index, stage, step, loss, norm, time.perf_counter() - started, dict(measures or {})))

    def flush(self, check: Callable[[dict[str, Any]], str | None] | None = None) -> float:
        """Write what is pending and return the newest loss.

        check(line) may answer with a warning, which goes into the line, or raise HypersdError, which stops the run:
        that line is not written.
        """
        lines, problem = "", None
        for index, stage, step, loss, norm, seconds, measures in self.pending:
            row = {"index": index, "stage": stage, "step": step, "loss": float(loss), "grad_norm": float(norm)}
            row |= {"seconds": round(seconds, 6)}
            if measures:
                row["measures"] = {name: float(value) for name, value in measures.items()}
            try:
                warning = check(row) if check is not None else None
            except HypersdError as error:
                problem = error
                break
            if warning:
                row["warning"] = warning
            lines += json.dumps(row) + "\n"
        self.pending.clear()
        try:
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(lines)
        except OSError as error:
            raise HypersdError(f"cannot write {self.path}: {error.strerror or error}") from None
        if problem is not None:
            raise problem
        return row["loss"]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None  # a line cut short when the run was killed

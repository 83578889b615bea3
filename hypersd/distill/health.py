"""Watching a run while it runs: a measure that stays where no healthy run has it is reported, with step and remedy,
and the newest checkpoint from before the trouble is kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hypersd.distill.checkpoint import keep_as, read_state
from hypersd.errors import HypersdError


class Monitor(Protocol):
    """Looks at the measures of every step in turn."""

    good_at: int  # the newest step that it looked at, if it found that one good; else -1

    def add(self, step: int, measures: Mapping[str, float]) -> str | None:
        """Count one step; a one-line warning with the step and the remedy, or None."""


@dataclass(frozen=True)
class Alarm:
    """Rings when a measure was outside [low, high] `patience` times on end."""

    measure: str
    says: str
    remedy: str
    low: float = -math.inf
    high: float = math.inf
    patience: int = 50


class Health:
    """Checks the measures of each step against alarms, each of which rings once. A step may lack a measure."""

    def __init__(self, alarms: Sequence[Alarm], stage: str) -> None:
        self.alarms, self.stage = tuple(alarms), stage
        self.good_at = -1
        self._astray: list[int | None] = [None] * len(self.alarms)  # times on end; None: never measured
        self._good_at = [-1] * len(self.alarms)

    def add(self, step: int, measures: Mapping[str, float]) -> str | None:
        """Count one step; a one-line warning with the step and the remedy, or None."""
        warnings = []
        for i, alarm in enumerate(self.alarms):
            value, astray = measures.get(alarm.measure), self._astray[i] or 0
            if value is None or astray >= alarm.patience:
                continue
            is_in = alarm.low <= value <= alarm.high
            self._astray[i] = 0 if is_in else astray + 1
            self._good_at[i] = step if is_in else -1
            if self._astray[i] == alarm.patience:
                often = f", {alarm.patience} times on end" if alarm.patience > 1 else ""
                warnings.append(
                    f"stage {self.stage}, step {step}: {alarm.says} ({alarm.measure} {value:.3g}{often}); "
                    f"{alarm.remedy}"
                )
        known = [good for good, astray in zip(self._good_at, self._astray, strict=True) if astray is not None]
        self.good_at = min(known, default=step)
        return "; ".join(warnings) or None


class Guard:
    """What every line of a run's log goes through before it is written.

    It stops the run at a number that is not finite, asks the monitors, and sees to it that `good`, a second name of a
    checkpoint, is the newest one that each of them found good, then or later. Some look at every step and some now and
    then: it is the newest look of each that counts. Once one of them has warned, that file stays as it is.
    history: the lines that a resumed run goes on from. Without `keeps` it only looks for numbers that are not finite.
    """

    def __init__(self, checkpoint: Path, history: Sequence[Mapping[str, Any]] = (), *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.checkpoint, self.good, self.history = checkpoint, good_name(checkpoint), history
        self.has_warned = any("warning" in row for row in history)
        self.monitors: tuple[Monitor, ...] = ()
        self.saved_at = 0  # steps done in the newest checkpoint

    def begin(self, stage: int, monitors: Iterable[Monitor], saved_at: int = 0) -> None:
        """A stage begins, or goes on from a checkpoint after `saved_at` steps; its monitors are told what they have
        seen before."""
        self.saved_at = saved_at
        self.monitors = tuple(monitors) if self.keeps else ()
        before = [row for row in self.history if row["index"] == stage]
        for row in before:
            self._ask(row)
        if not before:
            self._keep()  # what the stage begins with

    def check(self, row: Mapping[str, Any]) -> str | None:
        """A warning for this line of the log, or None; every checkpoint that exists is from before it. HypersdError
        where a number is not finite."""
        numbers = {"loss": row["loss"], "gradient": row["grad_norm"], **row.get("measures", {})}
        broken = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if broken:
            raise HypersdError(
                f"stage {row['stage']}, step {row['step']}: {', '.join(broken)}; the newest checkpoint is "
                f"intact; lower train.learning_rate or the guidance scale and {self._way_back()}"
            )
        warning = self._ask(row)
        if warning:
            self.has_warned = True
            warning = f"{warning}; to undo it, {self._way_back()}"
            logging.getLogger("hypersd").warning("%s", warning)
        elif all(monitor.good_at + 1 >= self.saved_at for monitor in self.monitors):  # a look is after its step
            self._keep()
        return warning

    def saved(self, step: int) -> None:
        """There is a new checkpoint, after so many steps of the stage."""
        self.saved_at = step

    def end(self) -> None:
        """The run is over. Where nothing was wrong there is nothing to go back to."""
        if self.keeps and not self.has_warned:
            self.good.unlink(missing_ok=True)

    def _ask(self, row: Mapping[str, Any]) -> str | None:
        found = [monitor.add(row["step"], row.get("measures", {})) for monitor in self.monitors]
        return "; ".join(warning for warning in found if warning) or None

    def _keep(self) -> None:
        if self.keeps and not self.has_warned and self.checkpoint.exists():
            keep_as(self.checkpoint, self.good)

    def _way_back(self) -> str:
        if not self.good.exists():
            return "start again: there is no checkpoint from before it"
        state = read_state(self.good)
        where = f"{state['recipe']['stages'][state['stage']]['method']} stage, step {state['step']}"
        return f"go on from the last good checkpoint, {self.good} ({where}), with --from-good"


def good_name(checkpoint: Path) -> Path:
    """Where the last good one is kept beside a checkpoint."""
    return checkpoint.with_name("checkpoint.good.safetensors")

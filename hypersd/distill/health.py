"""Watching a run while it runs: a measure that stays where no healthy run has it is reported, with step and remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Alarm:
    """Rings when a measure has been outside [low, high] for `patience` steps on end."""

    measure: str
    says: str
    remedy: str
    low: float = -math.inf
    high: float = math.inf
    patience: int = 50


class Health:
    """Checks the measures of each step against alarms, each of which rings once."""

    def __init__(self, alarms: Sequence[Alarm], stage: str) -> None:
        self.alarms, self.stage = tuple(alarms), stage
        self._astray = [0] * len(self.alarms)  # steps on end

    def add(self, step: int, measures: Mapping[str, float]) -> str | None:
        """Count one step; a one-line warning with the step and the remedy, or None."""
        warnings = []
        for i, alarm in enumerate(self.alarms):
            value = measures.get(alarm.measure)
            if value is None or self._astray[i] >= alarm.patience:
                continue
            self._astray[i] = 0 if alarm.low <= value <= alarm.high else self._astray[i] + 1
            if self._astray[i] == alarm.patience:
                warnings.append(
                    f"stage {self.stage}, step {step}: {alarm.says} ({alarm.measure} {value:.3g} for "
                    f"{alarm.patience} steps); {alarm.remedy}"
                )
        return "; ".join(warnings) or None

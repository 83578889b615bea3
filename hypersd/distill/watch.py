"""Tells over-optimisation: what is optimised goes on rising while an independent measure of the same thing falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

SIGNIFICANT = 2.5  # standard errors of a difference of two block means


class Watch:
    """Compares means over blocks of `every` steps.

    An independent measure has fallen when its block lies significantly below the best of the blocks before; a reward
    has risen when it lies significantly above what it was in that best block. Both at once is over-optimisation. Each
    independent measure is reported once. A step is found good when it ends a block that no watched measure has had a
    better one before; `good_at` is that of the newest block, or -1.
    """

    def __init__(self, optimised: Sequence[str], watched: Sequence[str], every: int, stage: str) -> None:
        self.optimised, self.watched, self.every, self.stage = tuple(optimised), tuple(watched), every, stage
        self._values: dict[str, list[float]] = {name: [] for name in (*optimised, *watched)}
        self._blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in self._values}
        self._reported: set[str] = set()
        self.good_at = -1

    def add(self, step: int, measures: Mapping[str, float]) -> str | None:
        """Count one step's means; a one-line warning with the step and the remedy, or None."""
        if not self.watched:
            self.good_at = step
        for name, values in self._values.items():
            values.append(float(measures[name]))
        if not self._values or len(next(iter(self._values.values()))) < self.every:
            return None
        for name, values in self._values.items():
            error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            self._blocks[name].append((float(np.mean(values)), error))
            values.clear()
        best_yet = all(self._blocks[name][-1][0] == max(self._blocks[name])[0] for name in self.watched)
        self.good_at = step if best_yet else -1
        for name in self.watched:
            if name in self._reported:
                continue
            blocks = self._blocks[name]
            best = max(range(len(blocks)), key=lambda i: blocks[i][0])
            risen = [r for r in self.optimised if _above(self._blocks[r][-1], self._blocks[r][best])]
            if risen and _above(blocks[best], blocks[-1]):
                self._reported.add(name)
                good, reward = (best + 1) * self.every, self._blocks[risen[0]]
                return (
                    f"stage {self.stage}, step {step}: {risen[0]} still rises ({reward[best][0]:.3g} to "
                    f"{reward[-1][0]:.3g}) while the independent {name} falls ({blocks[best][0]:.3g} at step {good}, "
                    f"now {blocks[-1][0]:.3g}): over-optimisation; stop near step {good}, or lower the rewards' "
                    "weights or thresholds, or raise the stage's anchor"
                )
        return None


def _above(high: tuple[float, float], low: tuple[float, float]) -> bool:
    return high[0] - low[0] > SIGNIFICANT * math.hypot(high[1], low[1])

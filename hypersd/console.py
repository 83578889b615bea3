"""Progress for a person: which phase, how far, how long still. Bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

QUIET_SECONDS = 30.0  # between lines where there is no terminal


def duration(seconds: float) -> str:
    """For instance "45 s", "3 min 20 s", "1 h 05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """`progress(phase, done, total, note)` from anywhere within `with Progress(...)`.

    work: the phases that are expected and how much work each is, in any unit; with it the time left counts them all.
    """

    def __init__(self, work: Mapping[str, float] | None = None, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.work = dict(work or {})
        self.seconds: dict[str, float] = {}  # of each phase, in order; what passes before a report counts for its phase
        self._shares = dict.fromkeys(self.work, 0.0)
        self._tasks: dict[str, TaskID] = {}
        self._bars: Bars | None = None
        self._current = ""

    def __enter__(self) -> Progress:
        self._started = self._last = self._said = time.monotonic()
        if self.console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                speed_estimate_period=120,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        if phase != self._current and self._current in self._tasks and self._bars is not None:
            self._bars.update(self._tasks[self._current], note="")
        self._current = phase
        if total and phase in self._shares:
            for earlier in list(self.work)[: list(self.work).index(phase)]:
                self._shares[earlier] = 1.0  # over, or skipped: what it would make was there already
            self._shares[phase] = done / total
        left = self.remaining()
        overall = f"about {duration(left)} left in all" if left is not None else ""
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=total, note="")
            self._bars.update(
                self._tasks[phase],
                completed=done,
                total=total,
                note="  ".join(part for part in (note, overall) if part),
            )
        elif done == total or now - self._said > QUIET_SECONDS:
            self._said = now
            of = f"{done}/{total}" if total else str(done)
            parts = [f"{phase}: {of} in {duration(self.seconds[phase])}", note, overall]
            self.console.print(", ".join(part for part in parts if part), highlight=False, soft_wrap=True)

    def remaining(self) -> float | None:
        """Seconds left in all, by the work done so far; None before there is anything to go by."""
        whole = sum(self.work.values())
        share = sum(self.work[name] * part for name, part in self._shares.items()) / whole if whole else 0.0
        return (time.monotonic() - self._started) * (1 - share) / share if share > 0.01 else None

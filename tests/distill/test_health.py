from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hypersd.distill.checkpoint import keep_as, load_checkpoint, save_checkpoint
from hypersd.distill.health import Alarm, Guard, Health
from hypersd.distill.watch import Watch
from hypersd.errors import HypersdError

WINS = Alarm("accuracy", "the critic always wins", "lower its learning rate", high=0.9, patience=3)
FLAT = Alarm("diversity", "the samples are all alike", "raise the anchor", low=0.5, patience=2)


def warnings(health: Health, measure: str, values: list[float]) -> dict[int, str]:
    found = {step: health.add(step, {measure: value}) for step, value in enumerate(values)}
    return {step: warning for step, warning in found.items() if warning is not None}


def test_a_measure_that_stays_astray_warns_once_with_step_and_remedy() -> None:
    accuracy = [0.5, 0.95, 0.95, 0.9, 1.0, 0.95, 0.91, 1.0, 1.0, 0.2, 1.0, 1.0, 1.0]
    assert warnings(Health([WINS, FLAT], "tscd-2"), "accuracy", accuracy) == {
        6: "stage tscd-2, step 6: the critic always wins (accuracy 0.91, 3 times on end); lower its learning rate"
    }


def test_every_alarm_watches_its_own_measure() -> None:
    health = Health([WINS, FLAT], "dmd")
    diversity = [0.9, 0.6, 0.4, 0.3, 0.2]
    found = [health.add(step, {"accuracy": 1.0, "diversity": d}) for step, d in enumerate(diversity)]
    assert [warning is not None for warning in found] == [False, False, True, True, False]
    assert found[3] is not None and "all alike (diversity 0.3, 2 times on end); raise the anchor" in found[3]


def test_both_ring_in_one_line() -> None:
    health = Health([WINS, FLAT], "dmd")
    found = [health.add(step, {"accuracy": 1.0, "diversity": 0.6 if step == 0 else 0.1}) for step in range(3)]
    assert found[:2] == [None, None] and found[2] is not None
    assert "critic always wins" in found[2] and "all alike" in found[2] and "\n" not in found[2]


def test_good_is_the_oldest_of_the_newest_looks_at_every_known_measure() -> None:
    health = Health([WINS, FLAT], "dmd")
    rows: list[dict[str, float]] = [{}, {"accuracy": 0.5}, {"accuracy": 0.95}, {}, {"accuracy": 0.5}]
    rows += [{"accuracy": 0.5, "diversity": 0.6}, {"accuracy": 0.5}, {"accuracy": 0.5, "diversity": 0.4}]
    found = []
    for step, row in enumerate(rows):
        assert health.add(step, row) is None
        found.append(health.good_at)
    assert found == [0, 1, -1, -1, 4, 5, 5, -1]  # at the seventh diversity was not looked at


def row(step: int, index: int = 0, **measures: float) -> dict[str, Any]:
    return {"index": index, "stage": "dmd", "step": step, "loss": 1.0, "grad_norm": 1.0, "measures": measures}


def save(path: Path, step: int) -> None:
    state = {"stage": 0, "step": step, "recipe": {"stages": [{"method": "dmd"}]}}
    save_checkpoint(path, {"step": torch.tensor([step])}, state)


def good_step(guard: Guard) -> int | None:
    return int(load_checkpoint(guard.good)[0]["step"]) if guard.good.exists() else None


def test_the_newest_checkpoint_from_before_the_trouble_is_kept(tmp_path: Path) -> None:
    """Checkpoints at every second step. Astray at step 3 alone: nothing. From step 7 on: what was saved at 6 stays, not
    what is saved at 8, before the warning, though the measure recovers and other alarms and stages follow."""
    flat = replace(FLAT, patience=3)
    path = tmp_path / "checkpoint.safetensors"
    guard = Guard(path)
    guard.begin(0, [Health([flat], "dmd")])
    assert good_step(guard) is None
    rows, kept, warned = [], [], []
    for step in range(12):
        if step and step % 2 == 0:
            save(path, step)
            guard.saved(step)
        rows.append(row(step, diversity=0.1 if step == 3 or step in (7, 8, 9) else 0.9))
        warned.append(guard.check(rows[-1]))
        kept.append(good_step(guard))
    assert kept == [None, None, 2, 2, 4, 4, 6, 6, 6, 6, 6, 6]
    (warning,) = [w for w in warned if w]
    assert warned[9] == warning and "raise the anchor; to undo it, go on from the last good" in warning
    assert f"{guard.good} (dmd stage, step 6), with --from-good" in warning and "\n" not in warning
    guard.begin(1, [])
    guard.check(row(0, 1))
    guard.end()
    assert good_step(guard) == 6
    rows[9]["warning"] = warning
    again = Guard(path, rows)  # a resumed run knows
    again.begin(0, [Health([flat], "dmd")])
    again.end()
    assert good_step(again) == 6
    before = Guard(path, rows[:9])  # steps 7 and 8 were astray, and one more is enough
    before.begin(0, [Health([flat], "dmd")])
    assert good_step(before) == 6 and before.check(row(9, diversity=0.1)) is not None


def test_monitors_that_look_at_different_times_vouch_together(tmp_path: Path) -> None:
    """One looks after every 15th step, one after every 50th; the checkpoint of step 100 is good once both have seen
    it, the second in the very step before it."""
    path = tmp_path / "checkpoint.safetensors"
    guard, watch = Guard(path), Watch([], ["judge"], 15, "feedback")
    guard.begin(0, [watch, Health([replace(FLAT, patience=2)], "feedback")])
    kept = []
    for step in range(150):
        if step == 100:
            save(path, step)
            guard.saved(step)
        looked = {"diversity": 0.9 if step < 140 else 0.1} if step % 50 == 49 else {}
        assert guard.check(row(step, judge=0.01 * step, **looked)) is None
        kept.append(good_step(guard))
    assert kept[:104] == [None] * 104 and kept[104:] == [100] * 46


def test_a_healthy_run_leaves_no_second_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save(path, 2)
    guard = Guard(path)
    guard.begin(0, [])
    assert good_step(guard) == 2 and guard.good.samefile(path)  # no second copy on the disk
    guard.end()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors"]


def test_a_number_that_is_not_finite_stops_and_says_where_to_go_back_to(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    guard = Guard(path)
    with pytest.raises(HypersdError, match="step 3: critic_loss nan; .*start again: there is no checkpoint"):
        guard.check(row(3, critic_loss=float("nan"), diversity=0.2))
    save(path, 2)
    guard.begin(0, [])
    with pytest.raises(HypersdError, match="step 3: loss inf; .*lower .*learning_rate.* step 2"):
        guard.check(row(3) | {"loss": float("inf")})


def test_a_second_name_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any) -> None:
        raise OSError("not supported")

    path, other = tmp_path / "checkpoint.safetensors", tmp_path / "other.safetensors"
    save(path, 2)
    monkeypatch.setattr(os, "link", refuse)
    keep_as(path, other)
    assert not other.samefile(path) and other.read_bytes() == path.read_bytes()
    monkeypatch.undo()
    keep_as(path, other)
    keep_as(path, other)
    assert other.samefile(path)
    save(path, 4)
    assert int(load_checkpoint(other)[0]["step"]) == 2 and len(list(tmp_path.iterdir())) == 2

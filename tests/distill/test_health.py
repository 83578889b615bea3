from __future__ import annotations

from hypersd.distill.health import Alarm, Health

WINS = Alarm("accuracy", "the critic always wins", "lower its learning rate", high=0.9, patience=3)
FLAT = Alarm("diversity", "the samples are all alike", "raise the anchor", low=0.5, patience=2)


def warnings(health: Health, measure: str, values: list[float]) -> dict[int, str]:
    found = {step: health.add(step, {measure: value}) for step, value in enumerate(values)}
    return {step: warning for step, warning in found.items() if warning is not None}


def test_a_measure_that_stays_astray_warns_once_with_step_and_remedy() -> None:
    accuracy = [0.5, 0.95, 0.95, 0.9, 1.0, 0.95, 0.91, 1.0, 1.0, 0.2, 1.0, 1.0, 1.0]
    assert warnings(Health([WINS, FLAT], "tscd-2"), "accuracy", accuracy) == {
        6: "stage tscd-2, step 6: the critic always wins (accuracy 0.91 for 3 steps); lower its learning rate"
    }


def test_every_alarm_watches_its_own_measure() -> None:
    health = Health([WINS, FLAT], "dmd")
    diversity = [0.9, 0.6, 0.4, 0.3, 0.2]
    found = [health.add(step, {"accuracy": 1.0, "diversity": d}) for step, d in enumerate(diversity)]
    assert [warning is not None for warning in found] == [False, False, True, True, False]
    assert found[3] is not None and "all alike (diversity 0.3 for 2 steps); raise the anchor" in found[3]


def test_both_ring_in_one_line() -> None:
    health = Health([WINS, FLAT], "dmd")
    found = [health.add(step, {"accuracy": 1.0, "diversity": 0.6 if step == 0 else 0.1}) for step in range(3)]
    assert found[:2] == [None, None] and found[2] is not None
    assert "critic always wins" in found[2] and "all alike" in found[2] and "\n" not in found[2]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.health import Health
from hypersd.distill.probe import NOISES, Probe, alarms, frechet
from hypersd.distill.recipe import Recipe, parse_recipe
from hypersd.distill.stages import FeedbackStage, TSCDStage
from hypersd.evaluate.metrics import Moments, frechet_distance
from hypersd.models.noise_process import NoiseProcess
from tests.distill import toy
from tests.distill.test_trainer import Stop, assert_same, losses, stop_at, toy_trainer

X0 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"}
SAID = {"solver": "ddim", "steps": "1", "timesteps": "[999]", "prediction_type": "sample"}


@pytest.mark.parametrize(("count", "features"), [(40, 6), (8, 30)])
def test_frechet_is_the_evaluation_s(count: int, features: int) -> None:
    g = torch.Generator().manual_seed(0)
    one = torch.randn(count, features, generator=g, dtype=torch.float64)
    two = 0.3 + 1.5 * torch.randn(count, features, generator=g, dtype=torch.float64)
    expected = frechet_distance(Moments.of(one), Moments.of(two))
    assert float(frechet(one, two)) == pytest.approx(expected, rel=1e-6)
    assert float(frechet(one, one)) == pytest.approx(0.0, abs=1e-9)


class Scaled(nn.Module):
    """Says that x_0 is scale x_t + shift: a pair per role. "base" says 0."""

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        scale, shift = {"base": (0.0, 0.0), "start": (1.0, 0.0), "far": (1.0, 2.0), "alike": (0.25, 0.0)}[role]
        return scale * x_t + shift


def test_measures_of_known_samples() -> None:
    """One step, so that x_0 = scale z + shift, and the correction is -x_0: moved by 2 in each of D cells, or scaled by
    1/4 towards 0."""
    z = torch.randn(4 * NOISES, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    cells = z.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)).flatten(1).double()
    variance = cells.var(0).sum()
    probe = Probe(
        Scaled(), NoiseProcess.from_config(X0), toy_pictures(), {}, SAID,  # type: ignore[arg-type]
        seed=5, batch_size=6, device=torch.device("cpu"),
    )  # fmt: skip
    assert probe.look("far") == {}
    probe.begin("start")
    same, far, alike = ({k: float(v) for k, v in probe.look(role).items()} for role in ("start", "far", "alike"))
    assert same == pytest.approx({"variety": 1.0, "drift": 0.0}, abs=1e-6)
    assert far["variety"] == pytest.approx(1.0) and far["drift"] == pytest.approx(float(4 * 32 / variance), rel=1e-4)
    shrunk = float(0.75**2 * (variance + cells.mean(0).square().sum()) / variance)
    assert alike["variety"] == pytest.approx(0.25, rel=1e-5) and alike["drift"] == pytest.approx(shrunk, rel=1e-4)


def toy_pictures() -> Any:
    from hypersd.distill.data import LatentDataset

    return LatentDataset([{"latents": torch.zeros(9, 2, 8, 8)}], ["a"] * 9, {})


def test_only_feedback_is_to_stay_where_it_began() -> None:
    term = {"kind": "brightness", "threshold": 2.0}
    feedback = FeedbackStage.model_validate(
        {"method": "feedback", "iterations": 1, "rewards": [term], "rollout": [2], "max_drift": 0.5}
    )
    tscd = TSCDStage.model_validate({"method": "tscd", "segments": 1, "iterations": 1})
    health = Health(alarms(feedback), "feedback")
    assert health.add(9, {"variety": 0.9, "drift": 0.4}) is None and health.good_at == 9
    assert health.add(10, {}) is None and health.good_at == 9  # nobody looked
    warning = health.add(19, {"variety": 0.9, "drift": 0.6})
    assert warning is not None and "step 19" in warning and "raise the stage's anchor" in warning
    assert [alarm.measure for alarm in alarms(tscd)] == ["variety"]


def recipe(*after: dict[str, Any], **train: Any) -> Recipe:
    tscd = {"method": "tscd", "segments": 1, "iterations": 30, "guidance_scale": [1.0, 1.0]}
    base = {"batch_size": 64, "learning_rate": 3e-3, "ema_decay": 0.8, "checkpoint_every": 10, "watch_every": 15}
    return parse_recipe({"train": base | train, "stages": [tscd, *after]})


def measured(out: Path) -> list[tuple[str, int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"], r["measures"]["variety"]) for r in rows if "variety" in r.get("measures", {})]


def warnings(out: Path) -> list[str]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["warning"] for row in rows if "warning" in row]


DMD = {"method": "dmd", "iterations": 60, "learning_rate": 1e-2, "real_score": "base", "guidance_scale": [1.0, 1.0]}


def test_score_distillation_without_a_fake_score_collapses_and_says_so(tmp_path: Path) -> None:
    """With a fake score that does not learn and nothing else to hold them, all samples run to the nearest mode. As the
    stage is meant, none of the alarms rings."""
    bad = {"fake_learning_rate": 1e-9, "anchor": [0.0, 0.0], "consistency": 0.0}
    toy_trainer(recipe(DMD | bad), tmp_path / "bad").run()
    seen = measured(tmp_path / "bad")
    assert [row[:2] for row in seen] == [("tscd-1", 14), ("tscd-1", 29), *(("dmd", step) for step in (14, 29, 44, 59))]
    assert all(0.9 < value < 1.1 for stage, _, value in seen if stage == "tscd-1") and seen[-1][2] < 0.5
    text = " ".join(warnings(tmp_path / "bad"))
    assert "stage dmd" in text and "stage tscd" not in text and "samples of one caption have become alike" in text
    toy_trainer(recipe(DMD | {"fake_learning_rate": 1e-2}), tmp_path / "good").run()
    assert warnings(tmp_path / "good") == [] and all(0.9 < value < 1.1 for _, _, value in measured(tmp_path / "good"))


@pytest.mark.parametrize("step", [20, 25])
def test_looks_change_nothing_and_survive_a_resume(tmp_path: Path, step: int) -> None:
    watched, alone = (toy_trainer(recipe(watch_every=n), tmp_path / str(n)).run() for n in (15, 0))
    assert_same(watched, alone)
    assert losses(tmp_path / "15") == losses(tmp_path / "0") and measured(tmp_path / "0") == []
    with pytest.raises(Stop):
        toy_trainer(recipe(), tmp_path / "cut", progress=stop_at("tscd-1", step)).run()
    toy_trainer(recipe(), tmp_path / "cut").run(resume=True)
    assert measured(tmp_path / "cut") == measured(tmp_path / "15")
    with pytest.raises(Stop):
        toy_trainer(recipe(watch_every=0), tmp_path / "late", progress=stop_at("tscd-1", step)).run()
    toy_trainer(recipe(), tmp_path / "late").run(resume=True)  # what the stage began with is not known
    assert measured(tmp_path / "late") == []


def test_a_picture_s_noise_depends_on_no_batch_size() -> None:
    data, process = toy.dataset(50), toy.PROCESS
    model = toy.Mixture(8)
    model.add_role("ema")
    said = {"solver": "ddim", "steps": "2", "timesteps": "[999, 499]", "prediction_type": "epsilon"}
    probes = [
        Probe(model, process, data, {}, said, seed=1, batch_size=size, device=torch.device("cpu")) for size in (5, 64)
    ]
    for probe in probes:
        probe.begin("ema")
    torch.testing.assert_close(probes[0].start, probes[1].start, rtol=1e-5, atol=1e-6)

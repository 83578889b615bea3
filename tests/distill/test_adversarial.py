from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersd.distill.data import Batch
from hypersd.distill.method import Context, Draw
from hypersd.distill.stages import TSCDStage
from hypersd.distill.tscd import TSCD
from hypersd.models.backbone import Backbone
from hypersd.models.noise_process import NoiseProcess
from tests.distill import toy
from tests.distill.test_trainer import losses, recipe, trainer

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "num_train_timesteps": 1000}


@pytest.mark.parametrize("config", [toy.SCHEDULER, FLOW], ids=["vp", "flow"])
def test_diffusing_again_keeps_the_variance(config: dict[str, Any]) -> None:
    """Signal and noise of x_a are those of a clean picture diffused to t_a."""
    process = NoiseProcess.from_config(config)
    t_end, t_a = np.array([0, 249, 499, 600]), np.array([240, 249, 990, 610])
    (alpha_e, sigma_e), (alpha_a, sigma_a) = process.at(t_end), process.at(t_a)
    scale, fresh = process.renoise(t_end, t_a).T
    np.testing.assert_allclose(scale * alpha_e, alpha_a, rtol=1e-6)
    np.testing.assert_allclose((scale * sigma_e) ** 2 + fresh**2, sigma_a**2, rtol=1e-6, atol=1e-9)


def adversarial(weight: float) -> Any:
    r = recipe(2, iterations=4, train={"checkpoint_every": 2})
    stages = [stage.model_copy(update={"adversarial_weight": weight}) for stage in r.stages]
    return r.model_copy(update={"stages": stages})


def test_training_with_a_critic(tiny_unet: Any, tmp_path: Path) -> None:
    run = trainer(tiny_unet, adversarial(0.1), tmp_path)
    run.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(set(row["measures"]) == {"critic_accuracy", "critic_loss"} for row in rows)
    assert all(0.0 <= row["measures"]["critic_accuracy"] <= 1.0 for row in rows)
    assert len(losses(tmp_path)) == 4


def test_the_critics_opinion_is_a_second_term(tiny_unet: Any) -> None:
    backbone = Backbone(tiny_unet, roles=("student", "ema"))
    context = Context(backbone, toy.PROCESS, {})
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = Batch(x, {"encoder_hidden_states": torch.zeros(3, 16, 32)})
    base = {"method": "tscd", "segments": 2, "iterations": 1, "guidance_scale": [1.0, 1.0]}
    values = []
    for options in ({}, {"adversarial_weight": 1.0}, {"adversarial_weight": 2.0, "consistency_weight": 0.0}):
        torch.manual_seed(3)
        method = TSCD(TSCDStage.model_validate(base | options), context)
        values.append(method.loss(batch, Draw((5,), torch.device("cpu"))))
    plain, both, opinion = (value.item() for value in values)
    assert both == pytest.approx(plain + opinion / 2, rel=1e-5) and opinion != 0
    values[2].backward()
    assert any(p.grad is not None and p.grad.any() for p in backbone.role_parameters("student").values())
    warned = [method.after_step(step, {"critic_accuracy": 0.99}) for step in range(120)]
    assert [step for step, warning in enumerate(warned) if warning] == [99]
    assert "stage tscd-2, step 99" in warned[99] and "lower the stage's critic_learning_rate" in warned[99]

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.data import Batch
from hypersd.distill.feedback import Feedback, grid_below, hinge
from hypersd.distill.method import Context, Draw
from hypersd.distill.recipe import parse_recipe
from hypersd.distill.stages import FeedbackStage
from hypersd.distill.trainer import Trainer
from hypersd.distill.watch import Watch
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.export import load_lora
from hypersd.models.lora import LoraSpec
from hypersd.models.noise_process import NoiseProcess
from hypersd.models.rewards import Reward
from tests.conftest import make_unet, make_vae
from tests.distill import toy
from tests.distill.test_trainer import Stop, assert_same, latents, losses, stop_at

X0 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"}


def stage(**options: Any) -> FeedbackStage:
    term = {"kind": "brightness", "weight": 1.0, "threshold": 2.0}
    defaults = {"method": "feedback", "iterations": 1, "rewards": [term], "rollout": [2], "gradient_step": "last"}
    return FeedbackStage.model_validate(defaults | options)


class Levels(nn.Module):
    """Predicts x_0 directly: a constant per role, whatever it is shown. "p+q" predicts the sum."""

    def __init__(self, **levels: float) -> None:
        super().__init__()
        self.level = nn.ParameterDict(
            {k: nn.Parameter(torch.tensor(v, dtype=torch.float64)) for k, v in levels.items()}
        )
        self.calls: list[tuple[str, int, bool]] = []

    def forward(self, x_t: Tensor, timestep: Tensor, cond: dict[str, Tensor], *, role: str = "base") -> Tensor:
        self.calls.append((role, int(timestep[0]), torch.is_grad_enabled()))
        return torch.ones_like(x_t) * sum(self.level[part] for part in role.split("+"))  # type: ignore[return-value]

    def role_parameters(self, role: str) -> dict[str, nn.Parameter]:
        return {"level": self.level[role]}


def brightness(images: Tensor, captions: Any) -> Tensor:
    return images.mean((1, 2, 3))


def method(net: Levels, s: FeedbackStage, **rewards: Reward) -> Feedback:
    process = NoiseProcess.from_config(X0)
    context = Context(net, process, {}, None, lambda z: 3.0 * z, {"brightness": brightness} | rewards)
    return Feedback(s, context)


def batch(count: int = 4) -> Batch:
    return Batch(torch.zeros(count, 1, 2, 2, dtype=torch.float64), {}, ["a"] * count, np.arange(count))


def draw(number: int = 0) -> Draw:
    return Draw((0, 0, number), torch.device("cpu"))


def test_hinge_by_hand() -> None:
    """Half of the batch above its threshold: no pull from there, 1/4 from each of the others."""
    reward = torch.tensor([1.0, 2.5, 2.0, -1.0], requires_grad=True)
    loss = hinge(reward, 2.0)
    assert loss.item() == (1.0 + 0.0 + 0.0 + 3.0) / 4
    (gradient,) = torch.autograd.grad(loss, reward)
    assert gradient.tolist() == [-0.25, 0.0, 0.0, -0.25]


def test_the_loss_of_a_known_student() -> None:
    """The student's x_0' is its level, decoding triples it: L = max(0, 2 - 3 level), dL = -3, and 0 above 2/3."""
    net = Levels(student=0.1, previous=0.3)
    feedback = method(net, stage(eta=0.0))
    loss = feedback.loss(batch(), draw())
    loss.backward()
    assert loss.item() == pytest.approx(2.0 - 3.0 * 0.4, rel=1e-6)
    assert net.level["student"].grad.item() == pytest.approx(-3.0, rel=1e-6)
    assert net.level["previous"].grad is None
    assert feedback.measures["brightness"].item() == pytest.approx(1.2)
    assert net.calls == [("previous+student", 999, False), ("previous+student", 499, True)]
    net = Levels(student=0.5, previous=0.3)
    loss = method(net, stage()).loss(batch(), draw())
    loss.backward()
    assert loss.item() == 0.0 and net.level["student"].grad.item() == 0.0


def test_a_watched_reward_is_measured_and_has_no_gradient() -> None:
    seen = []

    def other(images: Tensor, captions: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), list(captions)))
        return -brightness(images, captions)

    terms = [{"kind": "brightness", "threshold": 2.0, "weight": 0.5}, {"kind": "other", "weight": 0.0}]
    net = Levels(student=0.2)
    feedback = method(net, stage(adapter="continue", rewards=terms), other=other)
    feedback.loss(batch(), draw()).backward()
    assert seen == [(False, ["a"] * 4)]
    assert float(feedback.measures["other"]) == pytest.approx(-float(feedback.measures["brightness"]))
    assert net.level["student"].grad.item() == pytest.approx(-0.5 * 3.0, rel=0.05)


def test_the_anchor_pulls_back_to_the_weights_before() -> None:
    """x_0' - x_0'' is the student's own level, squared: gradient 2 w level (in x_0; no reward left to pull)."""
    net = Levels(student=0.7, previous=1.0)
    loss = method(net, stage(anchor=0.5)).loss(batch(), draw())
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.49, rel=1e-6)
    assert net.level["student"].grad.item() == pytest.approx(2 * 0.5 * 0.7, rel=1e-6)
    assert net.calls[-2:] == [("previous+student", 499, True), ("previous", 499, False)]


def test_structure_starts_from_the_pictures_themselves() -> None:
    """Diffused to the first step below start T; the segmenter is given the batch's own numbers."""
    given = []

    def structure(images: Tensor, indices: np.ndarray) -> Tensor:
        given.append(indices.tolist())
        return images.square().mean()

    net = Levels(student=0.2, previous=0.0)
    s = stage(rewards=[], structure={"kind": "scenes", "weight": 0.1, "start": 0.6}, rollout=[4])
    feedback = Feedback(s, Context(net, NoiseProcess.from_config(X0), {}, None, lambda z: 3.0 * z, {}, structure))
    loss = feedback.loss(batch(), draw())
    assert [t for _, t, _ in net.calls] == [499, 249] and given == [[0, 1, 2, 3]]
    assert loss.item() == pytest.approx(0.1 * 0.36, rel=1e-6)
    assert float(feedback.measures["structure"]) == pytest.approx(-0.36, rel=1e-6)
    loss.backward()
    assert net.level["student"].grad.item() == pytest.approx(0.1 * 2 * 9 * 0.2, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
def test_what_structure_starts_from_is_the_picture_with_the_noise_of_its_level(steps: int) -> None:
    """alpha x_0 + sigma n at the first step, of the picture's own n."""
    net, process, seen = Levels(student=0.2, previous=0.0), NoiseProcess.from_config(X0), []
    inner = net.forward
    net.forward = lambda x_t, *args, **kwargs: seen.append(x_t) or inner(x_t, *args, **kwargs)  # type: ignore
    structure = {"kind": "scenes", "weight": 0.1, "start": 0.5}
    s = stage(rewards=[], structure=structure, rollout=[steps], gradient_step="any")
    loss = lambda images, indices: images.square().mean()  # noqa: E731
    feedback = Feedback(s, Context(net, process, {}, None, lambda z: z, {}, loss))
    pictures = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    feedback.loss(Batch(pictures, {}, ["a"] * 4, np.arange(4)), draw())
    noise = draw().normal(pictures.shape, pictures)
    expected = float(process.alpha[499]) * pictures + float(process.sigma[499]) * noise
    torch.testing.assert_close(seen[0], expected, rtol=1e-9, atol=1e-9)


def test_which_step_has_the_gradient() -> None:
    def drawn(policy: str, steps: int) -> set[int]:
        net = Levels(student=0.2, previous=0.0)
        feedback = method(net, stage(gradient_step=policy, rollout=[steps]))
        for number in range(100):
            feedback.loss(batch(1), draw(number))
        return {steps - (time + 1) * steps // 1000 for _, time, graded in net.calls if graded}

    assert drawn("any", 8) == set(range(8)) and drawn("last_half", 8) == {4, 5, 6, 7} and drawn("last", 8) == {7}
    assert drawn("any", 1) == drawn("last_half", 1) == {0}
    process = NoiseProcess.from_config(X0)
    assert grid_below(np.array([999, 749, 499, 249]), 0.5, process).tolist() == [499, 249]
    assert grid_below(np.array([999]), 0.5, process).tolist() == [499]  # one step: from half way itself


@pytest.mark.parametrize("policy", ["last_half", "any", "last"])
def test_network_evaluations_are_what_a_step_costs(policy: str) -> None:
    """On average over the roll-outs and the steps with the gradient, of the rewards' and of the structure's."""
    structure = {"kind": "scenes", "weight": 0.1, "start": 0.5}
    s = stage(rollout=[1, 1, 2, 4, 8], gradient_step=policy, anchor=0.5, structure=structure)
    net, process = Levels(student=0.2, previous=0.0), NoiseProcess.from_config(X0)
    rewards = {"brightness": brightness}
    feedback = Feedback(s, Context(net, process, {}, None, lambda z: z, rewards, lambda images, indices: images.mean()))
    for number in range(1000):
        feedback.loss(batch(1), draw(number))
    counted = sum(3 if graded else 1 for _, _, graded in net.calls) / 1000
    assert counted == pytest.approx(s.network_evaluations, rel=0.02)
    alone = stage(rollout=[1, 1, 2, 4, 8], gradient_step=policy, anchor=0.5)
    assert alone.network_evaluations < s.network_evaluations < 2 * alone.network_evaluations


def test_metadata_and_wrong_stages() -> None:
    process = NoiseProcess.from_config(X0)
    said = Feedback.metadata(stage(rollout=[4, 1]), process)
    assert said["steps"] == "1,2,3,4" and said["solver"] == "tcd" and said["eta"] == "0.3"
    grids = {"1": [999], "2": [999, 499], "3": [999, 666, 332], "4": [999, 749, 499, 249]}
    assert json.loads(said["timesteps"]) == grids
    assert Feedback.metadata(stage(rollout=[4, 1], solver="ddim"), process)["steps"] == "1,4"
    assert Feedback.metadata(stage(solver="ddim"), process)["eta"] == "0"
    net = Levels(student=0.0, previous=0.0)
    with pytest.raises(HypersdError, match="the stage wants brightness, but no such reward"):
        Feedback(stage(), Context(net, process, {}, None, lambda z: z))
    with pytest.raises(HypersdError, match="decoded to pictures"):
        Feedback(stage(), Context(net, process, {}))

    def refused(**options: Any) -> str:
        document = {"method": "feedback", "iterations": 1} | options
        train = document.pop("train", {"init": "lora.safetensors"})
        with pytest.raises(HypersdError) as caught:
            parse_recipe({"train": train, "stages": [document, *document.pop("then", [])]})
        return str(caught.value)

    term = {"kind": "aesthetic", "threshold": 6.0}
    assert "stages.0: nothing to learn from" in refused(rewards=[term | {"weight": 0.0}])
    assert "aesthetic needs a threshold" in refused(rewards=[{"kind": "aesthetic"}])
    assert "reward aesthetic is there twice" in refused(rewards=[term, term])
    assert "set train.init" in refused(rewards=[term], train={})
    tscd = {"method": "tscd", "segments": 1, "iterations": 1}
    assert "a separate LoRA ends the recipe" in refused(rewards=[term], then=[tscd])
    message = refused(rewards=[term | {"tresh": 1.0}])
    assert "stages.0.rewards.0.tresh: unknown key" in message and "threshold" in message


def test_over_optimisation_is_reported_with_step_and_remedy() -> None:
    """The reward rises all the way; the judge rises for 20 steps and then falls."""
    rng = np.random.default_rng(1)
    watch = Watch(["taste"], ["judge"], 10, "feedback")
    said, good = [], []
    for step in range(60):
        judge = 0.1 * step if step < 20 else 2.0 - 0.1 * (step - 20)
        noise = 0.05 * rng.standard_normal(2)
        message = watch.add(step, {"taste": 0.1 * step + noise[0], "judge": judge + noise[1], "more": 1.0})
        if message:
            said.append((step, message))
        if watch.good_at == step:
            good.append(step)
    assert good == [9, 19, 29]  # ends of the blocks up to the best one
    assert len(said) == 1 and said[0][0] == 39
    text = said[0][1]
    assert "stage feedback, step 39: taste still rises" in text and "the independent judge falls" in text
    assert "stop near step 20" in text or "stop near step 30" in text
    assert "anchor" in text and "\n" not in text


def test_noise_and_a_common_fall_are_no_over_optimisation() -> None:
    rng = np.random.default_rng(2)
    watch = Watch(["taste"], ["judge"], 20, "feedback")
    both_fall = Watch(["taste"], ["judge"], 20, "feedback")
    for step in range(400):
        a, b = rng.standard_normal(2)
        assert watch.add(step, {"taste": 0.02 * step + a, "judge": b}) is None
        assert both_fall.add(step, {"taste": -0.1 * step + a, "judge": -0.1 * step + b}) is None


def recipe(train: dict[str, Any], *before: dict[str, Any], **options: Any) -> Any:
    terms = [{"kind": "brightness", "threshold": 5.0}, {"kind": "darkness", "weight": 0.0}]
    feedback = {"method": "feedback", "iterations": 4, "rollout": [1, 2], "rewards": terms, "anchor": 0.01} | options
    base = {"batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 3, "watch_every": 0}
    return parse_recipe({"train": base | train, "lora": {"rank": 4, "alpha": 2.0}, "stages": [*before, feedback]})


TSCD = {"method": "tscd", "segments": 1, "iterations": 3, "guidance_scale": [3.0, 3.0]}
REWARDS = {"brightness": brightness, "darkness": lambda images, captions: -brightness(images, captions)}


def run(r: Any, out: Path, resume: bool = False, **options: Any) -> Trainer:
    vae = make_vae().requires_grad_(False)
    components = SimpleNamespace(network=make_unet(), vae=vae, scheduler_config=toy.SCHEDULER)
    trainer = Trainer(r, components, latents(), out, rewards=REWARDS, **options)
    trainer.run(resume=resume)
    return trainer


def test_a_lora_of_its_own_on_frozen_weights_and_the_merged_file(tmp_path: Path) -> None:
    """TSCD, then feedback: the weights before stay as they were, and lora.safetensors is exactly the sum of both."""
    trainer = run(recipe({}, TSCD), tmp_path)
    assert trainer.result == "previous+ema"
    before, metadata = load_lora(tmp_path / "lora-1step.safetensors")
    own, _ = load_lora(tmp_path / "lora-feedback.safetensors")
    merged, merged_metadata = load_lora(tmp_path / "lora.safetensors")
    previous = trainer.backbone.lora_state_dict("previous")
    assert all(torch.equal(previous[k], before[k]) for k in previous)
    assert max(float(v.abs().max()) for k, v in own.items() if "lora_B" in k) > 0
    for key in (k for k in merged if k.endswith("lora_A.weight")):
        b_key = key.replace("lora_A", "lora_B")
        wanted = sum(0.5 * s[b_key].double().flatten(1) @ s[key].double().flatten(1) for s in (before, own))
        got = merged[b_key].double().flatten(1) @ merged[key].double().flatten(1)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)
    assert (
        merged_metadata["method"] == "feedback" and merged_metadata["steps"] == "1,2" and merged_metadata["rank"] == "8"
    )
    # the same from the file of the distilled LoRA, in a run of its own
    again = run(recipe({"init": str(tmp_path / "lora-1step.safetensors")}), tmp_path / "again")
    assert all(torch.equal(v, before[k]) for k, v in again.backbone.lora_state_dict("previous").items())
    assert (tmp_path / "again" / "lora.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["measures"]["brightness"] == pytest.approx(-row["measures"]["darkness"]) for row in rows)


def test_continuing_goes_on_with_the_weights(tmp_path: Path) -> None:
    one = run(recipe({}, TSCD, adapter="continue"), tmp_path)
    assert one.result == "ema" and "previous" in one.backbone.roles  # kept for the anchor
    init = str(tmp_path / "lora-1step.safetensors")
    two = run(recipe({"init": init}, adapter="continue", anchor=0.0), tmp_path / "two")
    assert "previous" not in two.backbone.roles
    state, metadata = load_lora(tmp_path / "two" / "lora.safetensors")
    first, _ = load_lora(Path(init))
    assert metadata["rank"] == "4" and state.keys() == first.keys()
    gap = max(float((state[k] - first[k]).abs().max()) for k in first)
    assert 0 < gap < 0.02  # four steps of 1e-3 away from where it began


@pytest.mark.parametrize(("name", "step"), [("feedback", 2), ("feedback", 4)])
def test_resume_gives_the_bits_of_an_unbroken_run(tmp_path: Path, name: str, step: int) -> None:
    r = recipe({}, TSCD, iterations=5)
    whole = run(r, tmp_path / "whole")
    with pytest.raises(Stop):
        run(r, tmp_path / "cut", progress=stop_at(name, step))
    resumed = run(r, tmp_path / "cut", resume=True)
    assert_same(whole.backbone, resumed.backbone)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    init = recipe({"init": str(tmp_path / "whole" / "lora-1step.safetensors")}, iterations=5)
    with pytest.raises(Stop):
        run(init, tmp_path / "file", progress=stop_at("feedback", 4))
    again = run(init, tmp_path / "file", resume=True)
    whole = run(init, tmp_path / "file_whole")
    assert_same(whole.backbone, again.backbone)


def test_the_picture_grows_brighter_and_the_watched_opposite_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real network and decoder; darkness is watched and is the opposite of what is optimised."""
    train = {"learning_rate": 3e-3, "batch_size": 4, "watch_every": 5}
    r = recipe(train, TSCD, iterations=25, anchor=0.0, check_every=5, max_drift=1.0)
    with caplog.at_level(logging.WARNING, logger="hypersd"):
        run(r, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][3:]
    blocks = np.reshape([row["measures"]["brightness"] for row in rows], (5, 5)).mean(1)
    assert (np.diff(blocks) > 0).all() and blocks[-1] - blocks[0] > 0.008
    messages = [row["warning"] for row in rows if "warning" in row]
    assert len(messages) == 2 and "independent darkness falls" in messages[0]
    drift = [row["measures"]["drift"] for row in rows if "drift" in row["measures"]]
    assert drift[0] < 0.01 and drift == sorted(drift) and drift[-1] > 1.0
    assert "the samples leave what the model was trained on" in messages[1]
    assert messages == [record.getMessage() for record in caplog.records if record.name == "hypersd"]


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    other = Backbone(make_unet(block_out_channels=(32, 96)), LoraSpec(4, 2.0))
    from hypersd.models.export import save_lora

    path = save_lora(tmp_path / "other.safetensors", other, "student")
    with pytest.raises(HypersdError, match="not for this model; see train.init"):
        run(recipe({"init": str(path)}), tmp_path / "run")

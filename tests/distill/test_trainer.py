from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from hypersd.distill.checkpoint import load_checkpoint
from hypersd.distill.data import LatentDataset
from hypersd.distill.flat import FlatAdamW
from hypersd.distill.health import Alarm, Health
from hypersd.distill.method import Auxiliary
from hypersd.distill.methods import METHODS
from hypersd.distill.recipe import Recipe, parse_recipe
from hypersd.distill.stages import TSCDStage
from hypersd.distill.trainer import Trainer
from hypersd.distill.tscd import TSCD
from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.export import load_lora
from tests.conftest import full_disk
from tests.distill import toy


def recipe(*segments: int, iterations: int = 4, train: dict[str, Any] | None = None, **options: Any) -> Recipe:
    stages = [{"method": "tscd", "segments": k, "iterations": iterations} | options for k in segments]
    base = {"batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 3, "watch_every": 0}
    return parse_recipe({"train": base | (train or {}), "lora": {"rank": 4, "alpha": 4.0}, "stages": stages})


def latents(count: int = 12, width: int = 32) -> LatentDataset:
    g = torch.Generator().manual_seed(9)
    cond = {"encoder_hidden_states": torch.randn(count, 16, width, generator=g)}
    uncond = {"encoder_hidden_states": torch.randn(1, 16, width, generator=g)}
    return LatentDataset([{"latents": torch.randn(count, 4, 16, 16, generator=g), **cond}], ["x"] * count, uncond)


def trainer(unet: torch.nn.Module, r: Recipe, out: Path, **options: Any) -> Trainer:
    return Trainer(r, SimpleNamespace(network=unet, scheduler_config=toy.SCHEDULER), latents(), out, **options)


def toy_trainer(r: Recipe, out: Path, **options: Any) -> Trainer:
    return Trainer(r, toy.COMPONENTS, toy.dataset(500), out, backbone=toy.Mixture(16), **options)


def weights(backbone: Any, role: str = "ema") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in backbone.role_parameters(role).items()}


def losses(out: Path) -> list[tuple[int, int, float, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["index"], row["step"], row["loss"], row["grad_norm"]) for row in rows]


class Stop(Exception):
    pass


def stop_at(stage: str, step: int) -> Any:
    def progress(name: str, done: int, total: int, loss: float) -> None:
        if (name, done) == (stage, step):
            raise Stop

    return progress


def assert_same(a: Any, b: Any) -> None:
    for role in ("student", "ema"):
        one, two = weights(a, role), weights(b, role)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize(("stage", "step"), [("tscd-4", 4), ("tscd-2", 5)])
def test_resume_gives_the_bits_of_an_unbroken_run(tiny_unet: Any, tmp_path: Path, stage: str, step: int) -> None:
    """Killed without a word between two checkpoints, also in a stage whose teacher is the stage before."""
    r = recipe(4, 2, iterations=6, teacher="previous_stage", grid=16, train={"accumulation": 2})
    nets = [tiny_unet, copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)]
    whole = trainer(nets[0], r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        trainer(nets[1], r, tmp_path / "cut", progress=stop_at(stage, step)).run()
    resumed = trainer(nets[2], r, tmp_path / "cut").run(resume=True)
    assert_same(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 12
    for name in ("lora-4step", "lora-2step", "lora"):
        a, b = (load_lora(tmp_path / run / f"{name}.safetensors") for run in ("whole", "cut"))
        assert a[1] == b[1] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


class WithCritic(TSCD):
    """A method that trains a bare parameter beside the student, 3 steps for each of the student's."""

    newest: ClassVar[WithCritic]

    def __init__(self, stage: Any, context: Any) -> None:
        super().__init__(stage, context)
        self.value = torch.nn.Parameter(torch.rand(3))
        self.seen: dict[str, list[Any]] = {"student": [], "critic": []}
        self.measures: dict[str, torch.Tensor] = {}
        self.warned: list[tuple[int, dict[str, float]]] = []
        self.monitors, self.good_at = [self], 10**9
        WithCritic.newest = self

    def auxiliaries(self) -> list[Auxiliary]:
        return [Auxiliary("critic", {"value": self.value}, self.critic_loss, 0.5, updates=3, betas=(0.0, 0.9))]

    def loss(self, batch: Any, draw: Any) -> torch.Tensor:
        self.seen["student"].append(batch.latents)
        assert not self.value.requires_grad
        self.measures["value"] = self.value.detach().mean()
        return super().loss(batch, draw) + self.value.sum()

    def critic_loss(self, batch: Any, draw: Any) -> torch.Tensor:
        self.seen["critic"].append((batch.latents, draw.progress, self.value.detach().clone()))
        student = list(self.context.backbone.role_parameters("student").values())
        assert not any(p.requires_grad for p in student)
        noise = draw.normal((3,), self.value)
        return (self.value * (1.0 + 0.5 * noise.tanh())).sum() + sum(p.sum() for p in student)

    def add(self, step: int, measures: dict[str, float]) -> str | None:
        self.warned.append((step, measures))
        return "the critic is a number" if step == 1 else None


def test_auxiliaries_have_their_own_clock_rate_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(METHODS, TSCDStage, WithCritic)
    with caplog.at_level("WARNING", "hypersd"):
        toy_trainer(recipe(2, iterations=2, train={"warmup": 2}), tmp_path).run()
    method = WithCritic.newest
    seen = method.seen
    assert len(seen["student"]) == 2 and [progress for _, progress, _ in seen["critic"]] == [0.0] * 3 + [0.5] * 3
    batches = [*seen["student"], *(latents for latents, _, _ in seen["critic"])]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
    # all gradients are positive; Adam without momentum moves by lr g / rms(g), and warm-up halves the first three steps
    values = torch.stack([value for _, _, value in seen["critic"]])
    moved = values[:-1] - values[1:]
    torch.testing.assert_close(moved[0], torch.full((3,), 0.25))
    assert (moved[:3] > 0.05).all() and (moved[:3] < 0.5).all() and (moved[3:] > 0.1).all() and (moved[3:] < 1).all()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(row["measures"]) for row in rows] == [{"value", "critic_loss"}] * 2
    assert method.warned == [(row["step"], row["measures"]) for row in rows]
    assert rows[1]["warning"].startswith("the critic is a number; to undo it, start again") and "warning" not in rows[0]
    assert [record.getMessage() for record in caplog.records] == [rows[1]["warning"]]


@pytest.mark.parametrize("step", [4, 5])
def test_resume_brings_back_the_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setitem(METHODS, TSCDStage, WithCritic)
    r = recipe(2, iterations=6, train={"checkpoint_every": 3, "accumulation": 2})
    whole = toy_trainer(r, tmp_path / "whole").run()
    value = WithCritic.newest.value
    with pytest.raises(Stop):
        toy_trainer(r, tmp_path / "cut", progress=stop_at("tscd-2", step)).run()
    resumed = toy_trainer(r, tmp_path / "cut").run(resume=True)
    assert len(WithCritic.newest.seen["student"]) == 2 * 3
    assert_same(whole, resumed)
    assert torch.equal(value, WithCritic.newest.value) and losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize("step", [4, 5])
def test_resume_brings_back_auxiliaries_and_frozen_roles(tmp_path: Path, step: int) -> None:
    """A stage with a fake score on a clock of its own and a frozen copy of its start, killed off its checkpoints."""
    stages = [{"method": "tscd", "segments": 1, "iterations": 2}]
    stages += [{"method": "dmd", "iterations": 6, "fake_updates": 2, "fake_learning_rate": 3e-3}]
    base = {"batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 3, "accumulation": 2}
    r = parse_recipe({"train": base, "stages": stages})
    whole = toy_trainer(r, tmp_path / "whole").run()
    with pytest.raises(Stop):
        toy_trainer(r, tmp_path / "cut", progress=stop_at("dmd", step)).run()
    resumed = toy_trainer(r, tmp_path / "cut").run(resume=True)
    assert_same(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    for role in ("fake", "start"):
        one, two = weights(whole, role), weights(resumed, role)
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(weights(whole, "fake")[k], weights(whole, "start")[k]) for k in weights(whole, "start"))


def test_a_critic_that_breaks_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(WithCritic):
        def critic_loss(self, batch: Any, draw: Any) -> torch.Tensor:
            return self.value.sum() * (math.nan if draw.progress > 0.6 else 1.0)

    monkeypatch.setitem(METHODS, TSCDStage, Broken)
    r = recipe(2, iterations=4, train={"checkpoint_every": 1})
    with pytest.raises(HypersdError, match="step 3: critic_loss nan; the newest checkpoint is intact"):
        toy_trainer(r, tmp_path).run()
    monkeypatch.setitem(METHODS, TSCDStage, WithCritic)
    toy_trainer(r, tmp_path).run(resume=True)
    assert len(WithCritic.newest.seen["student"]) == 1


def test_resume_of_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    r = recipe(2, 1)
    done = toy_trainer(r, tmp_path).run()
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert_same(done, toy_trainer(r, tmp_path).run(resume=True))
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path: Path, number: int) -> None:
    r = recipe(2, 1, iterations=8, train={"checkpoint_every": 100})

    def progress(name: str, done: int, total: int, loss: float) -> None:
        if (name, done) == ("tscd-1", 2):
            os.kill(os.getpid(), number)  # handled before the next step's end

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(HypersdError, match="stopped in stage tscd-1 after step [23]; the state is saved"):
        toy_trainer(r, tmp_path / "cut", progress=progress).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert_same(toy_trainer(r, tmp_path / "cut").run(resume=True), toy_trainer(r, tmp_path / "whole").run())


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    r = recipe(2)
    with pytest.raises(HypersdError, match="no checkpoint"):
        toy_trainer(r, tmp_path).run(resume=True)
    toy_trainer(r, tmp_path).run()
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(HypersdError, match="damaged or cut short"):
        toy_trainer(r, tmp_path).run(resume=True)
    path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(HypersdError, match="checksum"):
        toy_trainer(r, tmp_path).run(resume=True)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(HypersdError, match="not a checkpoint"):
        toy_trainer(r, tmp_path).run(resume=True)
    path.write_bytes(whole)
    with pytest.raises(HypersdError, match="made with train.learning_rate = 0.001, the recipe says 0.002") as caught:
        toy_trainer(recipe(2, train={"learning_rate": 2e-3}), tmp_path).run(resume=True)
    assert caught.value.exit_code == 2
    with pytest.raises(HypersdError, match="other training data"):
        Trainer(r, toy.COMPONENTS, toy.dataset(501), tmp_path, backbone=toy.Mixture(16)).run(resume=True)
    with pytest.raises(HypersdError, match="of another model"):
        Trainer(r, toy.COMPONENTS, toy.dataset(500), tmp_path, backbone=toy.Mixture(8)).run(resume=True)


def test_a_checkpoint_from_before_a_key_existed_resumes_with_its_default(tmp_path: Path) -> None:
    older = toy_trainer(recipe(2), tmp_path)
    identity = older._identity()
    del identity["recipe"]["train"]["lr_scheduler"]
    older._identity = lambda: identity  # type: ignore[method-assign]
    older.run()
    toy_trainer(recipe(2), tmp_path).run(resume=True)
    with pytest.raises(HypersdError, match="made with train.lr_scheduler = constant, the recipe says linear"):
        toy_trainer(recipe(2, train={"lr_scheduler": "linear"}), tmp_path).run(resume=True)


def test_a_fresh_run_keeps_the_checkpoint_of_an_older_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(recipe(2), tmp_path).run()
    old = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(Stop):
        toy_trainer(recipe(2), tmp_path, progress=stop_at("tscd-2", 1)).run()
    assert (tmp_path / "checkpoint.old.safetensors").read_bytes() == old
    assert len((tmp_path / "metrics.old.jsonl").read_text().splitlines()) == 4
    toy_trainer(recipe(2), tmp_path).run()
    with caplog.at_level("WARNING", "hypersd"), pytest.raises(Stop):
        toy_trainer(recipe(2), tmp_path, progress=stop_at("tscd-2", 1)).run()
    assert (tmp_path / "checkpoint.old.safetensors").read_bytes() == old
    assert "checkpoint.safetensors of an earlier run is now checkpoint.old-2.safetensors" in caplog.text
    with pytest.raises(HypersdError, match="no checkpoint"):
        toy_trainer(recipe(2), tmp_path).run(resume=True)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    r = recipe(2, iterations=7)
    full = ExitStack()

    def full_later(stage: str, step: int, total: int, loss: float) -> None:
        if step == 4:  # the first checkpoint is written
            full.enter_context(full_disk(2000))

    with full, pytest.raises(HypersdError, match="cannot write .*checkpoint.safetensors.*File too large.*free space"):
        toy_trainer(r, tmp_path / "cut", progress=full_later).run()
    names = ["checkpoint.good.safetensors", "checkpoint.safetensors", "metrics.jsonl"]
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == names
    assert_same(toy_trainer(r, tmp_path / "cut").run(resume=True), toy_trainer(r, tmp_path / "whole").run())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    r = recipe(2, iterations=9)
    broken = toy_trainer(r, tmp_path)
    forward = broken.backbone.forward

    def poison(x_t: Any, timestep: Any, cond: Any, *, role: str = "base") -> Any:
        m = forward(x_t, timestep, cond, role=role)
        return m * torch.nan if broken.step == 5 else m

    broken.backbone.forward = poison
    with pytest.raises(HypersdError, match="stage tscd-2, step 5: loss nan, gradient nan; .*step 3"):
        broken.run()
    assert all(p.isfinite().all() for p in weights(broken.backbone, "student").values())
    assert len(losses(tmp_path)) == 5
    assert_same(toy_trainer(r, tmp_path).run(resume=True), toy_trainer(r, tmp_path / "whole").run())


class Hasty(TSCD):
    """Goes wrong where the rate is high: from step 5 on its measure is astray."""

    def __init__(self, stage: Any, context: Any) -> None:
        super().__init__(stage, context)
        self.monitors = [Health([Alarm("value", "too hasty", "lower train.learning_rate", high=1.0, patience=2)], "x")]

    def loss(self, batch: Any, draw: Any) -> torch.Tensor:
        rate = self.stage.learning_rate
        self.measures["value"] = torch.tensor(2.0 if rate and draw.progress >= 0.5 else 0.5)
        return super().loss(batch, draw)


def test_a_run_goes_back_to_before_a_warning_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps, a checkpoint at each second one; astray from step 5 on, so that the state after 4 is good."""
    monkeypatch.setitem(METHODS, TSCDStage, Hasty)
    train = {"checkpoint_every": 2}
    hasty, calm = recipe(2, 1, iterations=10, train=train, learning_rate=0.1), recipe(2, 1, iterations=10, train=train)
    good = tmp_path / "run" / "checkpoint.good.safetensors"
    with pytest.raises(Stop):
        toy_trainer(hasty, tmp_path / "run", progress=stop_at("tscd-1", 3)).run()
    warnings = [
        json.loads(line).get("warning") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step for step, warning in enumerate(warnings) if warning] == [6]
    assert f"{good} (tscd stage, step 4), with --from-good" in warnings[6]
    state = good.read_bytes()
    toy_trainer(hasty, tmp_path / "run").run(resume=True)  # which changes nothing about it, though all is well again
    assert good.read_bytes() == state and len(losses(tmp_path / "run")) == 20

    with pytest.raises(HypersdError, match="made with stages.0.learning_rate = 0.1"):
        toy_trainer(calm, tmp_path / "run").run(resume=True)
    wrong = recipe(2, 1, iterations=3, train=train)
    with pytest.raises(HypersdError, match="has 4 steps of stage 0, the recipe fewer"):
        toy_trainer(wrong, tmp_path / "run").run(from_good=True)
    other = recipe(2, 1, iterations=10, train={"dtype": "bfloat16"}).model_copy(
        update={"lora": calm.lora.model_copy(update={"rank": 8})}
    )
    with pytest.raises(HypersdError, match="made with lora.rank = 4"):
        toy_trainer(other, tmp_path / "run").run(from_good=True)
    before = losses(tmp_path / "run")[:4]
    back = toy_trainer(calm, tmp_path / "run")
    back.run(from_good=True)
    rows = losses(tmp_path / "run")
    assert rows[:4] == before and [row[:2] for row in rows] == [(i, step) for i in (0, 1) for step in range(10)]
    assert "warning" not in (tmp_path / "run" / "metrics.jsonl").read_text() and not good.exists()
    assert weights(back.backbone) != {} and math.isfinite(rows[-1][2])
    with pytest.raises(HypersdError, match="no checkpoint .*checkpoint.good.safetensors"):
        toy_trainer(calm, tmp_path / "run").run(from_good=True)


@pytest.mark.parametrize("way", ["resume", "from_good"])
def test_a_run_that_went_back_may_be_killed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Before its first checkpoint: the state that it went back to is the newest now, under the remedied recipe."""
    monkeypatch.setitem(METHODS, TSCDStage, Hasty)
    train = {"checkpoint_every": 4}
    hasty, calm = recipe(2, 1, iterations=10, train=train, learning_rate=0.1), recipe(2, 1, iterations=10, train=train)
    with pytest.raises(Stop):
        toy_trainer(hasty, tmp_path, progress=stop_at("tscd-1", 3)).run()
    good, newest = tmp_path / "checkpoint.good.safetensors", tmp_path / "checkpoint.safetensors"
    tensors, bad = load_checkpoint(good)[0], newest.read_bytes()
    whole = toy_trainer(calm, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    shutil.copy(good, tmp_path / "whole")
    shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "whole")
    whole.run(from_good=True)
    stop = stop_at("tscd-2", 5)
    with pytest.raises(Stop):
        toy_trainer(calm, tmp_path, progress=stop).run(from_good=True)
    assert (tmp_path / "checkpoint.old.safetensors").read_bytes() == bad
    for path in (good, newest):
        again, state = load_checkpoint(path)
        assert (state["stage"], state["step"]) == (0, 4) and again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert_same(whole.backbone, toy_trainer(calm, tmp_path).run(**{way: True}))


class Unwatched(WithCritic):
    def __init__(self, stage: Any, context: Any) -> None:
        super().__init__(stage, context)
        self.monitors = []


def test_the_critic_of_a_stage_is_gone_when_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be half of a network, with two moments: there is no room for two."""
    monkeypatch.setitem(METHODS, TSCDStage, Unwatched)
    alive: list[list[bool]] = []
    made: list[weakref.ref[Any]] = []

    def begin(self: Trainer, stage: Any) -> None:
        alive.append([ref() is not None for ref in made])
        made.append(weakref.ref(WithCritic.newest.value))
        del WithCritic.newest

    monkeypatch.setattr(Trainer, "_begin_looks", begin)
    run = toy_trainer(recipe(2, 1, iterations=2), tmp_path)
    run.run()
    assert alive == [[], [False]] and run.auxiliaries == [] and not hasattr(run, "optimizer")


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"warmup": 4}, [1 / 4, 2 / 4, 3 / 4]),
        ({"warmup": 1, "lr_scheduler": "linear"}, [1, 1, 1 / 2]),
        ({"lr_scheduler": "cosine"}, [1, 3 / 4, 1 / 4]),
        ({"clip": 0}, [1, 1, 1]),
    ],
)
def test_ema_and_optimizer_follow_the_recipe(
    schedule: dict[str, Any], factors: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps recomputed: the learning rate's schedule, clipping, AdamW with decay, EMA."""
    train = {"ema_decay": 0.8, "clip": 0.05, "weight_decay": 0.1, "betas": [0.8, 0.9], "accumulation": 2} | schedule
    t = toy_trainer(recipe(2, iterations=3, train=train), tmp_path)
    start = weights(t.backbone)
    history, grads, inner = [start], [], FlatAdamW.step

    def record(self: FlatAdamW, rate: float) -> torch.Tensor:
        norm = torch.sqrt(sum((p.grad**2).sum() for p in t.parameters.values()))  # type: ignore[arg-type]
        assert norm > 0.05  # clipping is at work
        scale = 0.05 / (norm + 1e-6) if t.recipe.train.clip else 1.0
        grads.append({k: p.grad * scale for k, p in t.parameters.items()})
        result = inner(self, rate)
        history.append(weights(t.backbone, "student"))
        return result

    monkeypatch.setattr(FlatAdamW, "step", record)
    t.run()
    ema, m, v, w = start, *({k: torch.zeros_like(p) for k, p in start.items()} for _ in range(2)), start
    for step, grad in enumerate(grads, 1):
        lr = 1e-3 * factors[step - 1]
        for k, g in grad.items():
            m[k], v[k] = 0.8 * m[k] + 0.2 * g, 0.9 * v[k] + 0.1 * g**2
            update = (m[k] / (1 - 0.8**step)) / ((v[k] / (1 - 0.9**step)).sqrt() + 1e-8)
            w = w | {k: w[k] * (1 - lr * 0.1) - lr * update}
        torch.testing.assert_close(history[step], w, rtol=1e-4, atol=1e-7)
        ema = {k: 0.8 * ema[k] + 0.2 * history[step][k] for k in ema}
    torch.testing.assert_close(weights(t.backbone), ema)


class Sum(TSCD):
    """The sum of the student's weights: every gradient is 1."""

    def loss(self, batch: Any, draw: Any) -> torch.Tensor:
        return sum(p.sum() for p in self.context.backbone.role_parameters("student").values())  # type: ignore[return-value]


def test_the_passes_of_a_step_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, TSCDStage, Sum)
    t = toy_trainer(recipe(2, iterations=1, train={"accumulation": 4}), tmp_path)
    start = weights(t.backbone, "student").values()
    t.run()
    ((_, _, loss, norm),) = losses(tmp_path)
    assert loss == pytest.approx(float(sum(p.sum() for p in start)))
    assert norm == pytest.approx(sum(p.numel() for p in start) ** 0.5)


def test_stages_hand_over_from_the_ema(tmp_path: Path) -> None:
    t = toy_trainer(recipe(4, 2, teacher="previous_stage", grid=16), tmp_path)
    ends: dict[str, Any] = {}
    begins: list[dict[str, Any]] = []
    begin = t._begin_stage

    def record() -> Any:
        ends.update(weights(t.backbone, "ema"))
        method = begin()
        begins.append({role: weights(t.backbone, role) for role in ("student", "ema")} | {"end": dict(ends)})
        return method

    t._begin_stage = record  # type: ignore[method-assign]
    backbone = t.run()
    second = begins[1]
    assert all(torch.equal(second["student"][k], second["end"][k]) for k in second["end"])
    assert all(torch.equal(weights(backbone, "previous")[k], second["end"][k]) for k in second["end"])
    roles = {role for role, _ in backbone.calls}
    assert roles == {"base", "student", "ema", "previous"}
    half = len(backbone.calls) // 2
    assert "previous" not in {role for role, _ in backbone.calls[: half - 1]}
    assert "base" not in {role for role, _ in backbone.calls[half + 1 :]}  # the second stage never asks the base


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import make_unet

    grads, saved, step = [], [], FlatAdamW.step

    def record(self: FlatAdamW, rate: float) -> torch.Tensor:
        grads.append({k: p.grad for k, p in self.weights.parameters.items()})
        return step(self, rate)

    monkeypatch.setattr(FlatAdamW, "step", record)
    for kind in ("none", "feed_forward", "full"):
        r = recipe(4, iterations=1, train={"gradient_checkpointing": kind, "clip": 1e9})
        t = trainer(make_unet(), r, tmp_path / kind)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():  # an adapter that does something, and a target that differs from it
            for role in ("student", "ema"):
                for p in t.backbone.role_parameters(role).values():
                    p.add_(0.02 * torch.randn(p.shape, generator=g))
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            t.run()
        saved.append(sum(kept.values()))
    assert saved[0] > 1.1 * saved[1] > 1.1 * 1.1 * saved[2]  # bytes kept for backward
    assert max(g.abs().max() for g in grads[0].values()) > 1e-5
    for other in grads[1:]:
        assert grads[0].keys() == other.keys()
        for k in grads[0]:
            torch.testing.assert_close(grads[0][k], other[k], rtol=1e-4, atol=1e-8)


def test_exports_and_bfloat16(tiny_unet: Any, tmp_path: Path) -> None:
    r = recipe(2, 1, iterations=2, train={"dtype": "bfloat16"})
    backbone = trainer(tiny_unet, r, tmp_path).run()
    assert isinstance(backbone, Backbone) and backbone.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in weights(backbone).values())
    state, metadata = load_lora(tmp_path / "lora.safetensors")
    assert metadata["solver"] == "tcd" and metadata["rank"] == "4"
    expected = backbone.lora_state_dict("ema")
    assert all(torch.equal(state[k], expected[k]) for k in expected)
    two, metadata = load_lora(tmp_path / "lora-2step.safetensors")
    assert metadata["steps"] == "2" and any(not torch.equal(two[k], state[k]) for k in two)


def test_stages_for_the_same_number_of_steps_keep_their_files_and_progress(tiny_unet: Any, tmp_path: Path) -> None:
    r = recipe(1, 2, 1, iterations=2)
    assert r.work == {"tscd-1": 2, "tscd-2": 2, "tscd-1-stage2": 2}
    told: list[tuple[str, int]] = []
    ends: list[dict[str, torch.Tensor]] = []

    def progress(stage: str, step: int, total: int, loss: float) -> None:
        told.append((stage, step))
        if step == total:
            ends.append({k: v.clone() for k, v in run.backbone.lora_state_dict("ema").items()})

    run = trainer(tiny_unet, r, tmp_path, progress=progress)
    run.run()
    assert told == [(name, step) for name in r.work for step in (1, 2)]
    for name, end in zip(("lora-1step", "lora-2step", "lora-1step-stage2"), ends, strict=True):
        state, _ = load_lora(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(state[k], end[k]) for k in end)
    assert any(not torch.equal(ends[0][k], ends[2][k]) for k in ends[0])


def test_the_seed_decides_and_the_global_generator_is_left_alone(tiny_unet: Any, tmp_path: Path) -> None:
    torch.manual_seed(77)
    state = torch.get_rng_state()
    t = trainer(tiny_unet, recipe(1, iterations=1), tmp_path)
    t.run()
    assert torch.equal(torch.get_rng_state(), state)
    results = []
    for seed in (0, 0, 1):
        results.append(weights(toy_trainer(recipe(1, train={"seed": seed}), tmp_path / str(len(results))).run()))
    # the toy adapter draws its start from the seed too
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
    assert any(not torch.equal(results[0][k], results[2][k]) for k in results[0])

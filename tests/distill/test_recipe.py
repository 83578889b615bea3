from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hypersd.distill.recipe import Recipe, completed, load_recipe, parse_recipe, shipped
from hypersd.errors import HypersdError


def line(*args: object) -> str:
    with pytest.raises(HypersdError) as caught:
        load_recipe(*args)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_shipped_recipes_are_the_paper_s_stages() -> None:
    emoji = ["emoji-1step", "emoji-cfg", "emoji-feedback", "emoji-flow", "emoji-full", "emoji-quick"]
    assert shipped() == [*emoji, "flux", "sd15", "sd15-feedback", "sd3", "sdxl", "sdxl-1step", "sdxl-feedback"]
    tscd = ["tscd-8", "tscd-4", "tscd-2", "tscd-1"]
    for name in shipped():
        if name.endswith("-feedback"):  # it begins with a finished LoRA
            assert [stage.name for stage in load_recipe(name).stages] == ["feedback"]
            continue
        if name.endswith("-1step"):  # one step from 800 by a whole network, and nothing else
            (stage,), train = load_recipe(name).stages, load_recipe(name).train
            assert stage.timestep == 800 and stage.consistency == 0 and stage.roles == ("fake",) and train.full
            continue
        if name == "emoji-cfg":  # guidance is left to the sampler
            (stage,), data = load_recipe(name).stages, load_recipe(name).data
            assert stage.name == "tscd-8" and stage.guidance_scale == (1.0, 1.0) and stage.sampling_guidance == 2.5
            assert 0.1 <= data.caption_dropout <= 0.2 and stage.teacher_passes == 1
            continue
        after = {"emoji-quick": ["feedback"], "emoji-full": ["dmd", "feedback"], "sd15": ["dmd"], "sdxl": ["dmd"]}
        assert [stage.name for stage in load_recipe(name).stages] == tscd + after.get(name, [])
    for name in ("flux", "sd15", "sd3", "sdxl", "sdxl-1step"):
        train = load_recipe(name).train
        assert train.batch_size * train.accumulation == 512 and train.learning_rate == 1e-6
    for name in ("sd15-feedback", "sdxl-feedback"):
        (stage,), train = load_recipe(name).stages, load_recipe(name).train
        assert train.batch_size * train.accumulation == 64 and train.learning_rate == 1e-5  # ReFL's
        wanted = [(term.kind, term.threshold, term.weight) for term in stage.rewards]
        assert wanted == [("imagereward", 2.0, 1e-3), ("aesthetic", 6.0, 1e-3), ("pickscore", None, 0.0)]
        assert stage.structure.kind == "solo" and stage.is_separate and train.init == f"out/{name[:4]}/lora.safetensors"
    for name in ("sd15", "sdxl"):
        weights = [stage.weights for stage in load_recipe(name).stages if stage.name in tscd]
        assert weights == [(1.0, 0.0), (1.0, 0.1), (0.5, 0.2), (0.25, 0.3)]


@pytest.mark.parametrize("stage", [{"method": "tscd", "segments": 8}, {"method": "perflow"}])
def test_what_was_taught_with_guidance_is_not_guided_again(stage: dict[str, Any]) -> None:
    one = stage | {"iterations": 1, "sampling_guidance": 2.5}
    assert parse_recipe({"stages": [one | {"guidance_scale": [1.0, 1.0]}]}).stages[0].sampling_guidance == 2.5
    with pytest.raises(HypersdError, match=r"would guide twice what guidance_scale = \[7.0, 9.0\] has taught"):
        parse_recipe({"stages": [one]})


def test_overrides() -> None:
    recipe = load_recipe(
        "emoji-quick",
        [
            "train.batch_size=16",
            "stages.0.iterations = 10",
            "model.path=some/folder",
            "stages.3.guidance_scale=[1, 2.5]",
            "train.clip=0.5",
        ],
    )
    assert recipe.train.batch_size == 16 and recipe.stages[0].iterations == 10 and recipe.model.path == "some/folder"
    assert recipe.stages[3].guidance_scale == (1.0, 2.5) and recipe.train.clip == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=3", "train.batchsize: unknown key; did you mean 'batch_size'?"),
        ("stages.1.segment=3", "stages.1.segment: unknown key; did you mean 'segments'?"),
        ("tran.seed=3", "tran: unknown key; did you mean 'train'?; allowed: model, data, lora, train, stages"),
        ("train.batch_size=abc", "train.batch_size: found 'abc', should be a valid integer"),
        ("train.batch_size=1.5", "train.batch_size: found 1.5, should be a valid integer"),
        ("train.batch_size=0", "train.batch_size: found 0, should be greater than or equal to 1"),
        ("train.seed=9223372036854775808", "train.seed: found 9223372036854775808, should be less than 922"),
        ("train.learning_rate=nan", "train.learning_rate: found nan, should be a finite number"),
        ("train.gradient_checkpointing=1", "found 1, should be 'none', 'feed_forward' or 'full'"),
        (
            "stages.0.method=tscx",
            "stages.0.method: found 'tscx', should be one of tscd, tcd, lcm, pcm, tdd, perflow, lightning, dmd2,"
            " rg_lcd, dmd, feedback; did you mean 'tscd'?",
        ),
        ("stages.0.guidance_scale=[3, 1]", "stages.0: guidance_scale [3.0, 1.0] is not a range"),
        (
            "stages.0.guidance_scale=[0, 0]",
            "stages.0: guidance_scale [0.0, 0.0] goes below 1, towards the empty caption; use [1, 1] for no guidance",
        ),
        ("stages.0.guidance_scale=[0.5, 7]", "stages.0: guidance_scale [0.5, 7.0] goes below 1"),
        ("stages.0.grid=4", "stages.0: grid = 4 has fewer points than there are segments (8)"),
        ("stages.9.grid=4", "stages has entries 0 to 4, found '9'"),
        ("model=3", "model: found 3, should be a section"),
        ("model.path.x=3", "model.path is a value, not a section"),
        ("data.kind=folder", 'data: kind = "folder" needs path'),
        ("batch_size", "'batch_size' is not of the form section.key=value"),
    ],
)
def test_wrong_overrides_say_what_and_where(override: str, expected: str) -> None:
    assert expected in line("emoji-quick", [override])


def test_weights_that_are_all_zero_are_refused() -> None:
    stage = {"method": "tscd", "segments": 4, "iterations": 1, "consistency_weight": 0.0}
    with pytest.raises(HypersdError, match=r"stages\.0: nothing to learn from: consistency_weight and adv"):
        parse_recipe({"stages": [stage]})
    assert parse_recipe({"stages": [stage | {"adversarial_weight": 1.0}]}).stages[0].weights == (0.0, 1.0)  # type: ignore[union-attr]


TSCD = {"method": "tscd", "segments": 2}
DMD = {"method": "dmd", "consistency": 0.0}
BASE_DMD = DMD | {"real_score": "base"}


@pytest.mark.parametrize(
    ("stage", "idle", "belongs_to", "useful"),
    [
        (TSCD, {"critic": "encoder"}, "adversarial_weight above 0 or staged_weights", {"staged_weights": True}),
        (TSCD, {"adaptive": True}, "adversarial_weight above 0 or staged_weights", {"adversarial_weight": 0.1}),
        (TSCD, {"critic_warmup": 0.5}, "adversarial_weight above 0 or staged", {"adversarial_weight": 0.1}),
        (TSCD, {"critic_learning_rate": 1e-3}, "adversarial_weight above 0 or staged", {"adversarial_weight": 0.1}),
        (TSCD | {"adversarial_weight": 0.1}, {"unconditional": 0.5}, 'critic = "encoder"', {"critic": "encoder"}),
        (BASE_DMD, {"critic_weight": 0.1}, "adversarial_weight above 0", {"adversarial_weight": 0.1}),
        (BASE_DMD, {"consistency_weight": 0.5}, "consistency above 0", {"consistency": 0.5}),
        (DMD, {"guidance_scale": [2.0, 2.0]}, 'real_score = "base" or consistency', {"real_score": "base"}),
        (DMD, {"grid": 20}, 'real_score = "base" or consistency', {"consistency": 0.5}),
        (
            {"method": "dmd2", "adversarial_weight": 0.0},
            {"critic_weight": 0.1},
            "adversarial_weight above 0",
            {"adversarial_weight": 0.1},
        ),
        (
            {"method": "lightning", "student_steps": 1, "teacher_steps": 2},
            {"critic_levels": [0.5]},
            "adversarial_weight above 0",
            {"adversarial_weight": 0.1},
        ),
    ],
)
def test_options_without_effect_are_refused(
    stage: dict[str, Any], idle: dict[str, Any], belongs_to: str, useful: dict[str, Any]
) -> None:
    """Unless they are what they would be anyway: a recipe that was written down says all of them."""

    def parsed(*options: dict[str, Any]) -> Recipe:
        one = {"iterations": 1} | stage | {key: value for those in options for key, value in those.items()}
        return parse_recipe({"train": {"init": "lora.safetensors"}, "stages": [one]})

    (name,) = idle
    with pytest.raises(HypersdError, match=rf"^recipe: stages\.0: {name} belongs to {belongs_to}.*; set that too, or"):
        parsed(idle)
    assert getattr(parsed(idle, useful).stages[0], name) is not None
    whole = parsed().model_dump(mode="json")
    assert completed(whole) == whole == parse_recipe(whole).model_dump(mode="json")


def test_data_without_effect_is_refused() -> None:
    for override in ("path=pictures", "captions=captions.csv", "resolution=64"):
        name = override.partition("=")[0]
        expected = f'data: {name} belongs to data.kind = "folder"; set that too, or leave {name} out'
        assert expected in line("emoji-quick", [f"data.{override}"])
    assert load_recipe("emoji-quick", ["data.path=pictures", "data.kind=folder"]).data.path


@pytest.mark.parametrize("solver", ["ddim", "tcd"])
def test_what_was_written_down_is_completed(solver: str) -> None:
    """By a key that a later version has."""
    term = {"kind": "aesthetic", "threshold": 6.0}
    stage = {"method": "feedback", "iterations": 1, "solver": solver, "rewards": [term]}
    whole = parse_recipe({"train": {"init": "lora.safetensors"}, "stages": [stage]}).model_dump(mode="json")
    earlier = {**whole, "train": {k: v for k, v in whole["train"].items() if k != "lr_scheduler"}}
    assert completed(earlier) == whole
    if solver == "ddim":
        with pytest.raises(HypersdError, match='eta belongs to solver = "tcd"'):
            parse_recipe({"train": {"init": "lora.safetensors"}, "stages": [stage | {"eta": 0.5}]})


def test_previous_stage_teacher_needs_a_fine_enough_grid() -> None:
    stages = [
        {"method": "tscd", "segments": 8, "iterations": 1},
        {"method": "tscd", "segments": 4, "iterations": 1, "grid": 6, "teacher": "previous_stage"},
    ]
    with pytest.raises(HypersdError, match="teacher with 8 segments"):
        parse_recipe({"stages": stages})
    stages[1]["grid"] = 8
    assert parse_recipe({"stages": stages}).stages[1].name == "tscd-4"


def test_a_first_stage_is_taught_by_the_base_model() -> None:
    """There is none before it; guidance takes the base model's second pass, and is counted."""
    stage = {"method": "tscd", "segments": 2, "iterations": 1, "teacher": "previous_stage"}
    first, second = parse_recipe({"stages": [stage, stage]}).stages
    assert (first.teacher, second.teacher) == ("base", "previous_stage")  # type: ignore[union-attr]
    assert first == parse_recipe({"stages": [stage | {"teacher": "base"}]}).stages[0]
    assert first.network_evaluations == 2 + 1 + 3 and second.network_evaluations == 1 + 1 + 3


def test_a_whole_network_has_no_adapter() -> None:
    dmd = {"method": "dmd", "iterations": 1, "real_score": "base"}
    feedback = {"method": "feedback", "iterations": 1, "rewards": [{"kind": "aesthetic", "threshold": 6.0}]}
    document = {"train": {"full": True}, "stages": [dmd]}
    whole = parse_recipe(document)
    assert completed(whole.model_dump(mode="json")) == whole.model_dump(mode="json")
    with pytest.raises(HypersdError, match=r"lora\.rank and train\.full = true exclude each other"):
        parse_recipe(document | {"lora": {"rank": 32}})
    with pytest.raises(HypersdError, match=r'stages\.1: train\.full = true has no separate LoRA.*adapter = "continue"'):
        parse_recipe(document | {"stages": [dmd, feedback]})
    parse_recipe(document | {"stages": [dmd, feedback | {"adapter": "continue"}]})


def test_files(tmp_path: Path) -> None:
    assert "did you mean 'emoji-quick'?" in line("emoji-quik")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\nseed = 1")
    assert f"{broken}: not valid TOML" in line(broken) and "line 1" in line(broken)
    assert "cannot read recipe" in line(tmp_path)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot read recipe" in line(broken)
    marked = tmp_path / "marked.toml"
    marked.write_text('\ufeff[[stages]]\nmethod = "lcm"\niterations = 3\n', "utf-8")
    assert load_recipe(marked).stages[0].iterations == 3
    broken.write_text("[train]\nseed = 1\n")
    assert "stages: missing" in line(broken)
    broken.write_text('[[stages]]\nmethod = "tscd"\nsegments = 8\niterations = 5\n')
    assert load_recipe(broken).stages[0].grid == 40


def test_a_dmd_stage() -> None:
    with pytest.raises(HypersdError, match=r"stages\.0\.fake_update: unknown key; did you mean 'fake_updates'\?"):
        parse_recipe({"stages": [{"method": "dmd", "iterations": 1, "fake_update": 3}]})
    with pytest.raises(HypersdError, match=r"stages\.0: t_range \[0\.9, 0\.1\] is not a range"):
        parse_recipe({"stages": [{"method": "dmd", "iterations": 1, "t_range": [0.9, 0.1]}]})
    alone = parse_recipe({"stages": [{"method": "dmd", "iterations": 1, "real_score": "base"}]})
    with pytest.raises(HypersdError) as caught:
        parse_recipe({"stages": [{"method": "dmd", "iterations": 1}]})
    assert str(caught.value) == (
        'recipe: stages.0: dmd improves weights: set train.init, put a stage before it, or say real_score = "base"'
    )
    parse_recipe({"train": {"init": "lora.safetensors"}, "stages": [{"method": "dmd", "iterations": 1}]})
    assert alone.stages[0].file == "lora-dmd" and alone.stages[0].roles == ("fake", "start")

"""hypersd's schedulers against diffusers' own, in float64, with the same noise from the same generator."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from hypersd import sampling
from hypersd.errors import HypersdError

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 25, 50]


def pair(name: str, **options):
    """(ours, theirs); theirs with its float32 alpha_bar promoted, so that it too computes in float64."""
    ours, theirs = (getattr(lib, name)(**(CONFIG | options)) for lib in (sampling, diffusers))
    for part in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part)), part
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = (
        theirs.alphas_cumprod.double(),
        theirs.final_alpha_cumprod.double(),
    )
    return ours, theirs


def outputs(scheduler, dtype=torch.float64, **step):
    """All outputs of a run with made-up network outputs, with the same generator for every scheduler."""
    inputs, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 6, 5, generator=inputs, dtype=torch.float64).to(dtype)
    results = []
    for t in scheduler.timesteps:
        m = torch.randn(x.shape, generator=inputs, dtype=torch.float64).to(dtype)
        x, other = scheduler.step(m, t, x, generator=noise, return_dict=False, **step)
        results += [x, other]
    return results, noise.get_state()


def assert_same(ours, theirs, tolerance=1e-10, **step):
    assert torch.equal(ours.timesteps, theirs.timesteps)
    (a, state_a), (b, state_b) = outputs(ours, **step), outputs(theirs, **step)
    for mine, reference in zip(a, b, strict=True):
        assert mine.dtype == reference.dtype
        scale = reference.abs().max().clamp(min=1.0)
        assert (mine - reference).abs().max() <= tolerance * scale
    assert torch.equal(state_a, state_b)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_equals_diffusers(prediction, to_one):
    for spacing in ("trailing", "leading", "linspace"):
        options = {"prediction_type": prediction, "set_alpha_to_one": to_one, "timestep_spacing": spacing}
        ours, theirs = pair("DDIMScheduler", **options)
        for steps in STEPS:
            for scheduler in (ours, theirs):
                scheduler.set_timesteps(steps)
            for eta in (0.0, 0.6):
                assert_same(ours, theirs, eta=eta)


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.7}, {"thresholding": True}])
@pytest.mark.parametrize("use_clipped", [False, True])
def test_ddim_clipping_equals_diffusers(options, use_clipped):
    options = {"sample_max_value": 1.5} | options
    ours, theirs = pair("DDIMScheduler", timestep_spacing="trailing", **options)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    assert_same(ours, theirs, eta=0.3, use_clipped_model_output=use_clipped)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["TCDScheduler", "LCMScheduler"])
def test_grid_schedulers_equal_diffusers(name, prediction):
    for to_one in (True, False):
        ours, theirs = pair(name, prediction_type=prediction, set_alpha_to_one=to_one)
        for steps in STEPS:
            for eta in (0.0, 0.2, 0.3, 0.5, 1.0) if name == "TCDScheduler" else (None,):
                for scheduler in (ours, theirs):
                    scheduler.set_timesteps(steps)
                # diffusers computes LCM's boundary scalings in float32
                options = {"tolerance": 1e-6} if eta is None else {"eta": eta}
                assert_same(ours, theirs, **options)


@pytest.mark.parametrize("name", ["TCDScheduler", "LCMScheduler"])
@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [800], [999, 123, 7], [0]])
def test_custom_timesteps_equal_diffusers(name, timesteps):
    ours, theirs = pair(name)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=timesteps)
    assert ours.timesteps.tolist() == timesteps
    assert_same(ours, theirs, tolerance=1e-6)


def test_strength_and_begin_index_equal_diffusers():
    for name in ("TCDScheduler", "LCMScheduler"):
        ours, theirs = pair(name)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(4, strength=0.6)
        assert_same(ours, theirs, tolerance=1e-6)
        results = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
            scheduler.set_begin_index(2)
            x = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(1, 2, 4, 4)
            generator = torch.Generator().manual_seed(3)
            for t in scheduler.timesteps[2:]:
                x = scheduler.step(x.sin(), t, x, generator=generator).prev_sample
            assert scheduler.step_index == 6
            results.append(x)
        assert (results[0] - results[1]).abs().max() < 1e-6


def assigned(*values: int, steps: int | None = None, dtype=torch.int64):
    def prepare(scheduler):
        scheduler.timesteps = torch.tensor(values, dtype=dtype)
        scheduler.num_inference_steps = steps or scheduler.num_inference_steps
        return scheduler.timesteps

    return prepare


def of_pipelines(scheduler):
    """StableDiffusionImg2ImgPipeline.get_timesteps at strength 0.5."""
    scheduler.set_begin_index(2)
    return scheduler.timesteps[2:]


def cut(scheduler):
    scheduler.timesteps = scheduler.timesteps[1:]
    return scheduler.timesteps


def changed_in_place(scheduler):
    scheduler.step(torch.zeros(1), 999, torch.zeros(1))
    scheduler.timesteps[1:3] = torch.tensor([700, 400])
    scheduler._step_index = None
    return scheduler.timesteps


# four steps were set; then this is done and steps are taken at the timesteps it returns
USES = {
    "begin index": of_pipelines,
    "no begin index": lambda scheduler: scheduler.timesteps[2:],
    "as many": assigned(900, 600, 300, 100),
    "32 bit": assigned(900, 600, 300, 100, dtype=torch.int32),
    "fewer": assigned(900, 300),
    "fewer and their number": assigned(900, 300, steps=2),
    "more": assigned(900, 800, 600, 500, 300, 100),
    "more and their number": assigned(900, 800, 600, 500, 300, 100, steps=6),
    "cut": cut,
    "in place": changed_in_place,
    "out of order": lambda scheduler: scheduler.timesteps[[0, 2, 1, 3]],
    "off the grid": lambda scheduler: torch.tensor([999, 555, 7]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["TCDScheduler", "LCMScheduler"])
@pytest.mark.parametrize("as_int", [False, True])
def test_timesteps_of_the_users_equal_diffusers(name, use, as_int):
    results = []
    for scheduler in pair(name, set_alpha_to_one=False):
        scheduler.set_timesteps(4)
        steps = USES[use](scheduler)
        inputs, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        x, found = torch.randn(1, 4, 3, 3, generator=inputs, dtype=torch.float64), []
        for t in steps.tolist() if as_int else steps:
            m = torch.randn(x.shape, generator=inputs, dtype=torch.float64)
            x, other = scheduler.step(m, t, x, generator=noise, return_dict=False)
            found += [x, other]
        results.append((torch.stack(found), scheduler.step_index, noise.get_state()))
    (ours, *state), (theirs, *reference) = results
    # diffusers computes LCM's boundary scalings in float32 where the timestep is a tensor
    tolerance = 1e-6 if name == "LCMScheduler" and not as_int else 1e-11
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert state[0] == reference[0] and torch.equal(state[1], reference[1])


@pytest.mark.parametrize("name", ["TCDScheduler", "LCMScheduler"])
def test_strength_cuts_a_custom_list_to_steps_that_end_without_noise(name):
    """diffusers goes on counting the steps that were left out: its LCM ends in noise."""
    ours, whole = pair(name)[0], pair(name)[0]
    ours.set_timesteps(timesteps=[999, 700, 300, 100], strength=0.5)
    whole.set_timesteps(timesteps=[300, 100])
    assert_same(ours, whole)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([900.0, 100.0]), "no integer tensor of one dimension; assign one, or call set_timesteps"),
        ([900, 100], "no integer tensor of one dimension"),
        (torch.tensor([[900, 100]]), "no integer tensor of one dimension"),
        (torch.tensor([100, 900]), "must descend within 0..999"),
        (torch.tensor([900, 900]), "must descend within 0..999"),
        (torch.tensor([900, -1]), "must descend within 0..999"),
    ],
)
@pytest.mark.parametrize("name", ["TCDScheduler", "LCMScheduler"])
def test_wrong_timesteps_are_one_clear_line(name, wrong, message):
    scheduler, x = getattr(sampling, name)(), torch.zeros(1, 4, 2, 2)
    scheduler.set_timesteps(2)
    scheduler.timesteps = wrong
    with pytest.raises((HypersdError, ValueError), match=message):
        scheduler.step(x, 900, x)


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler", "LCMScheduler"])
def test_a_timestep_that_the_model_lacks_is_refused(name):
    scheduler, x = getattr(sampling, name)(), torch.zeros(1, 4, 2, 2)
    scheduler.set_timesteps(2)
    if name != "DDIMScheduler":
        scheduler.set_begin_index(0)
    for t in (-1, 1000):
        with pytest.raises(HypersdError, match=f"timestep {t} is not one of the model's, 0..999"):
            scheduler.step(x, t, x)


def test_adding_noise_and_velocity_equal_diffusers():
    for name in ("DDIMScheduler", "TCDScheduler", "LCMScheduler"):
        ours, theirs = pair(name)
        x, noise = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
        t = torch.tensor([0, 500, 999])
        for method in ("add_noise", "get_velocity"):
            difference = getattr(ours, method)(x, noise, t) - getattr(theirs, method)(x, noise, t)
            assert difference.abs().max() < 1e-12
        one = ours.add_noise(x, noise, torch.tensor([700]))
        assert torch.allclose(one, theirs.add_noise(x, noise, torch.tensor([700])), rtol=0, atol=1e-12)
        assert len(ours) == len(theirs) == 1000 and ours.order == 1 and ours.init_noise_sigma == 1.0
        assert ours.scale_model_input(x, 5) is x


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_beta_schedules_equal_diffusers(schedule):
    for rescale in (False, True):
        pair("DDIMScheduler", beta_schedule=schedule, rescale_betas_zero_snr=rescale, prediction_type="v_prediction")
    pair("DDIMScheduler", trained_betas=np.linspace(1e-4, 0.02, 1000).tolist())


def test_zero_terminal_snr_is_handled_for_v():
    ours, theirs = pair(
        "DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    assert_same(ours, theirs)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler", "LCMScheduler"])
def test_zero_terminal_snr_with_epsilon_is_refused_at_pure_noise_alone(name, tmp_path):
    ours, theirs = pair(name, rescale_betas_zero_snr=True)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_config(type(ours).load_config(tmp_path))
    assert again.config.rescale_betas_zero_snr and again.config.prediction_type == "epsilon"
    for scheduler in (again, theirs):
        if name == "DDIMScheduler":  # spaced as the config says, "leading"
            scheduler.set_timesteps(4)
        else:
            scheduler.set_timesteps(timesteps=[998, 500, 100])
    assert_same(again, theirs, tolerance=1e-6)
    x = torch.zeros(1, 4, 2, 2)
    again.set_timesteps(timesteps=[999, 500])
    for t in (999, again.timesteps[0]):
        with pytest.raises(HypersdError, match="timestep 999 is pure noise .*epsilon prediction says nothing"):
            again.step(x, t, x)


def test_16_bit_is_as_close_as_diffusers():
    for dtype in (torch.float16, torch.bfloat16):
        ours, theirs = pair("DDIMScheduler", timestep_spacing="trailing")
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(4)
        exact = [v.double() for v in outputs(theirs)[0]]
        first, reference = (outputs(s, dtype)[0] for s in (ours, theirs))
        assert first[0].dtype == dtype
        # only the first step has the same inputs in all runs; x0 there is about 14 times as large as x
        error, bound = ((run[0].double() - exact[0]).abs().max() for run in (first, reference))
        assert error <= 2 * bound


def test_config_round_trip(tmp_path):
    theirs = diffusers.DDIMScheduler(**CONFIG, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction")
    ours = sampling.TCDScheduler.from_config(theirs.config, original_inference_steps=40)
    assert (ours.config.prediction_type, ours.config.beta_end, ours.config.set_alpha_to_one) == (
        "v_prediction",
        0.012,
        False,
    )
    ours.save_pretrained(tmp_path)
    again = sampling.TCDScheduler.from_pretrained(tmp_path)
    public = [{k: v for k, v in c.config.items() if not k.startswith("_")} for c in (ours, again)]
    assert public[0] == public[1]
    assert again.config.original_inference_steps == 40
    back = diffusers.DDIMScheduler.from_config(sampling.DDIMScheduler.from_config(theirs.config).config)
    assert torch.equal(back.alphas_cumprod, theirs.alphas_cumprod) and back.config.steps_offset == 1


def test_no_step_reads_the_device(monkeypatch):
    """Any conversion of a tensor to a Python value fails inside step; on a GPU each would be a stall."""

    def stall(self, *args):
        raise AssertionError("a step read a tensor back to the host")

    x, m = torch.randn(2, 1, 4, 4, 4)
    for name in ("DDIMScheduler", "TCDScheduler", "LCMScheduler"):
        scheduler = getattr(sampling, name)(**CONFIG)
        scheduler.set_timesteps(4)
        # the last is no element of the scheduler's tensor
        timesteps = [*scheduler.timesteps[:3], scheduler.timesteps[3].clone()]
        with monkeypatch.context() as patch:
            for method in ("item", "__int__", "__bool__", "__float__", "__index__", "tolist", "numpy"):
                patch.setattr(torch.Tensor, method, stall)
            for t in timesteps:
                out = scheduler.step(m, t, x).prev_sample
        assert out.isfinite().all()


def test_wrong_use_is_one_clear_line():
    scheduler = sampling.TCDScheduler()
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(HypersdError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="either"):
        scheduler.set_timesteps(4, timesteps=[999])
    with pytest.raises(ValueError, match="descend"):
        scheduler.set_timesteps(timesteps=[1, 2])
    with pytest.raises(HypersdError, match="do not fit a grid of 50"):
        scheduler.set_timesteps(51)
    scheduler.set_timesteps(2)
    with pytest.raises(HypersdError, match="eta"):
        scheduler.step(x, 999, x, eta=1.2)
    scheduler.set_timesteps(2)
    with pytest.raises(HypersdError, match="123"):
        scheduler.step(x, 123, x)
    with pytest.raises(HypersdError, match="beta_schedule 'cosmic'"):
        sampling.DDIMScheduler(beta_schedule="cosmic")
    with pytest.raises(HypersdError, match="prediction_type 'score'"):
        sampling.LCMScheduler(prediction_type="score")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("FlowMatchHeunDiscreteScheduler", "flow matching"),
        ("EDMEulerScheduler", "EDM"),
    ],
)
@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler", "LCMScheduler"])
def test_the_config_of_another_kind_of_noise_is_refused(name, other, what):
    config = getattr(diffusers, other)().config
    with pytest.raises(HypersdError, match=f"the config is one of {what}; keep .*hypersd.sampling.sample"):
        getattr(sampling, name).from_config(config)


def test_more_steps_than_levels_are_refused():
    with pytest.raises(HypersdError, match="num_inference_steps: 4 is larger than original_inference_steps, 2"):
        sampling.TCDScheduler().set_timesteps(4, original_inference_steps=2)


def test_wider_noise_stays_wider():
    x, noise, t = torch.randn(2, 4, 8, 8).half(), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    ours, theirs = (module.DDIMScheduler().add_noise(x, noise, t) for module in (sampling, diffusers))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler", "LCMScheduler"])
def test_inside_a_diffusers_pipeline(name, tiny_sd_folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_sd_folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for library in (sampling, diffusers):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, timestep_spacing="trailing")
        options = {"eta": 0.5} if name != "LCMScheduler" else {}
        generator = torch.Generator().manual_seed(0)
        call = dict(num_inference_steps=3, guidance_scale=2.0, output_type="latent", generator=generator, **options)
        pictures.append(pipe("a fox", **call).images)
    assert (pictures[0] - pictures[1]).abs().max() < 1e-3 * pictures[1].abs().max()

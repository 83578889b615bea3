from __future__ import annotations

import numpy as np
import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.evaluate.metrics import (
    Moments,
    bootstrap_interval,
    diversity,
    frechet_distance,
    kernel_distance,
    object_recall,
    paired_difference,
    resample,
)


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> Moments:
    """Moments set by hand, as of infinitely many samples."""
    moments = Moments(len(mean))
    moments.count, moments.mean = 2, mean.double()
    moments._scatter = covariance.double()
    return moments


def test_running_moments_equal_those_of_all_at_once():
    x = torch.randn(257, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    moments = Moments(7)
    for part in x.split(50):
        moments.update(part)
    moments.update(x[:0])
    assert moments.count == 257
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(x.double().T), rtol=1e-10, atol=1e-12)


def test_frechet_distance_of_axis_aligned_gaussians():
    s1, s2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.5, 3.0])
    mean = torch.tensor([1.0, -2.0, 0.5])
    closed = mean.square().sum() + (s1 - s2).square().sum()
    value = frechet_distance(gaussian(torch.zeros(3), s1.square().diag()), gaussian(mean, s2.square().diag()))
    assert value == pytest.approx(float(closed), rel=1e-12)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    # In two dimensions tr (C1 C2)^1/2 = sqrt(tr(C1 C2) + 2 sqrt(det C1 det C2)).
    c1, c2 = torch.tensor([[2.0, 0.8], [0.8, 1.0]]), torch.tensor([[0.5, -0.3], [-0.3, 3.0]])
    cross = ((c1 @ c2).trace() + 2 * (torch.det(c1) * torch.det(c2)).sqrt()).sqrt()
    closed = float(c1.trace() + c2.trace() - 2 * cross)
    a, b = gaussian(torch.zeros(2), c1), gaussian(torch.zeros(2), c2)
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(closed, rel=1e-6)


def test_frechet_distance_is_zero_on_itself_even_with_fewer_samples_than_features():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(Moments.of(x), Moments.of(x + 0.5)) == pytest.approx(64 * 0.25, rel=1e-6)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    def draw(seed: int, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)) + shift

    values = np.array([kernel_distance(draw(2 * i), draw(2 * i + 1)) for i in range(100)])
    assert abs(values.mean()) < 3 * values.std() / 10  # zero within three standard errors
    assert (values < 0).any()  # a biased estimate never is
    shifted = np.array([kernel_distance(draw(i), draw(500 + i, 1.0)) for i in range(10)])
    assert shifted.min() > values.max()


def test_kernel_distance_equals_the_definition_whatever_the_block():
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 4 + 1) ** 3)

    xx = sum(k(x[i], x[j]) for i in range(9) for j in range(9) if i != j) / 72
    yy = sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    xy = sum(k(a, b) for a in x for b in y) / 54
    for block in (1, 4, 1024):
        assert kernel_distance(x, y, block=block) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_diversity_is_the_mean_distance_within_a_caption():
    group = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    assert diversity(group) == pytest.approx((10 / 3 + 0) / 2)
    with pytest.raises(HypersdError, match="at least 2 samples"):
        diversity(torch.zeros(3, 1, 4))


def test_object_recall_counts_the_captioned_among_the_top():
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.0], [5.0, 0.0, 4.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    recall = object_recall(logits, [(0, 1), (0, 1), (0,), ()])
    assert recall[:3].tolist() == [1.0, 0.5, 0.0]
    assert torch.isnan(recall[3])
    with pytest.raises(HypersdError, match="4 pictures, but objects of 1"):
        object_recall(logits, [(0,)])


def test_bootstrap_interval_has_the_width_of_the_normal_one_and_repeats():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert bootstrap_interval(torch.from_numpy(values)) == (low, high)
    assert bootstrap_interval(np.array([1.0, 1.0, np.nan])) == (1.0, 1.0)


def test_paired_draws_see_a_shift_that_the_spread_of_captions_hides():
    rng = np.random.default_rng(0)
    hard = rng.normal(0.0, 10.0, 400)  # what a caption is worth, in both
    first, second = ([torch.from_numpy(hard + shift + rng.normal(0, 0.5, 400)) for _ in range(2)] for shift in (0.3, 0))
    ours, theirs = ([resample(run) for run in runs] for runs in (first, second))
    difference, low, high = paired_difference(ours, theirs)
    assert difference == pytest.approx(float(torch.stack(first).mean() - torch.stack(second).mean()))
    # two runs a side, independent noise: the variance of a caption's difference is 4 * 0.25 / 4
    assert 0.2 < low < difference < high < 0.4
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
    assert paired_difference(theirs, ours) == pytest.approx((-difference, -high, -low))
    assert paired_difference(ours, ours) == (0.0, 0.0, 0.0)
    # draws of other captions would not be paired
    others = [resample(run, seed=1) for run in second]
    _, low, high = paired_difference(ours, others)
    assert high - low > 1.0


def test_the_interval_of_a_distance_lies_around_its_estimate():
    """Draws with replacement raise a Frechet distance of few pictures, the more so the more these vary."""
    generator = torch.Generator().manual_seed(0)
    real = gaussian(torch.zeros(16), torch.eye(16))
    runs = []
    for scale in (1.0, 0.1):
        x = scale * torch.randn(64, 16, generator=generator)
        runs.append([resample(x, lambda rows: frechet_distance(Moments.of(rows), real), resamples=100)])
    draws = (runs[0][0] - runs[1][0]).numpy()
    assert draws[1:].min() > draws[0]
    difference, low, high = paired_difference(*runs)
    ends = np.quantile(draws[1:], [0.025, 0.975])
    assert difference == draws[0] and (low, high) == pytest.approx(tuple(ends - draws[1:].mean() + draws[0]))
    assert low < difference < high


@pytest.mark.parametrize("row", [0, 3])
def test_every_caption_is_drawn_as_often_as_any_other(row):
    share = resample(torch.eye(4)[:, row], resamples=2000)[1:].mean()
    assert float(share) == pytest.approx(0.25, abs=0.02)


def test_resampling_a_distance():
    real = gaussian(torch.zeros(2), torch.eye(2))
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((500, 2)))
    x = x - x.mean(0)
    near, far = (
        resample(x + torch.tensor([shift, 0.0]), lambda rows: frechet_distance(Moments.of(rows), real), resamples=200)
        for shift in (0.2, 0.5)
    )
    assert near.shape == (201,) and near.dtype == torch.float64
    difference, low, high = paired_difference([near], [far])
    assert low < difference < high < 0 and difference == pytest.approx(0.2**2 - 0.5**2, abs=0.05)
    with pytest.raises(HypersdError, match="the same draws, got .3, 201. of them"):
        paired_difference([near], [near[:3]])
    with pytest.raises(HypersdError, match="the same draws"):
        paired_difference([near], [])


def test_broken_features_are_refused():
    with pytest.raises(HypersdError, match="NaN or infinity"):
        Moments.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(HypersdError, match="at least 2 pictures, not 1"):
        _ = Moments.of(torch.ones(1, 2)).covariance

"""score_gradient: the normalised direction of distribution matching, and what it makes of numbers that have none."""

from __future__ import annotations

import pytest
import torch

from hypersd.kernels import score_gradient, use

IMPLEMENTATIONS = ("auto", "reference")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_worked_out_by_hand(name):
    x, x_real, x_fake = (
        torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        torch.zeros(2, 2),
        torch.tensor([[3.0, -6.0], [1.0, 1.0]]),
    )
    x[1] = 4.0
    with use(name):
        assert score_gradient(x, x_real, x_fake).tolist() == [[2.0, -4.0], [0.25, 0.25]]
        weight = torch.tensor([0.5, 8.0]).double()
        assert score_gradient(x, x_real, x_fake, weight=weight).tolist() == [[1.0, -2.0], [2.0, 2.0]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_is_finite_whatever_comes_in(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x, x_real, x_fake = (torch.randn(6, 4, 5, generator=generator).to(dtype) for _ in range(3))
    with use(name):
        plain = score_gradient(x, x_real, x_fake)
    x_real[0] = x[0]  # nothing left to normalise by
    x[1, 0, 0] = torch.nan
    x_real[2, 1, 1] = torch.inf
    x_fake[3, 2, 2] = -torch.inf
    x[4] = x_real[4]
    x[4, 0, 0] += torch.finfo(dtype).eps  # a quotient too large for 16 bits, perhaps
    x_fake[4] = torch.finfo(dtype).max / 4
    with use(name):
        found = score_gradient(x, x_real, x_fake)
    assert found.isfinite().all()
    assert not found[:3].any() and found[3, 2, 2] == 0
    x_fake[3, 2, 2] = x_real[3, 2, 2]
    torch.testing.assert_close(found[3], score_gradient(x, x_real, x_fake)[3])
    assert torch.equal(found[5], plain[5])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_has_no_gradient(name):
    x = torch.randn(2, 3, requires_grad=True)
    with use(name):
        assert not score_gradient(x, x.detach() + 1, x * 2).requires_grad


def test_scale_of_all_three_does_not_matter():
    x, x_real, x_fake = (torch.randn(3, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(score_gradient(7 * x, 7 * x_real, 7 * x_fake), score_gradient(x, x_real, x_fake))


def test_a_weight_that_is_not_finite_is_refused():
    x = torch.randn(2, 3)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"weight: got {value}, expected finite"):
            score_gradient(x, x + 1, x - 1, weight=torch.tensor([value, 1.0]))


def test_bad_input_is_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"x_fake: got shape \(2, 4\), expected \(2, 3\) as x"):
        score_gradient(x, x, torch.zeros(2, 4))
    with pytest.raises(TypeError, match="x_real: got torch.int64"):
        score_gradient(x, x.long(), x)
    with pytest.raises(ValueError, match=r"weight: got shape \(3,\), expected \(2,\)"):
        score_gradient(x, x, x, weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"weight: got shape \(\), expected \(2,\)"):
        score_gradient(x, x, x, weight=torch.tensor(1.0))

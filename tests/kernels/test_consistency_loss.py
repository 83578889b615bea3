"""What is peculiar to consistency_loss: torch's own losses, its identities, its limits, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hypersd.kernels import consistency_loss
from hypersd.kernels.consistency_loss import KINDS

pytestmark = pytest.mark.usefixtures("device")


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    names = ("eps_student", "x_t", "eps_target", "x_s")
    return {name: torch.randn(shape, dtype=dtype) for name in names} | {"coef": torch.randn(shape[0], 4).double()}


def landings(v: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    p0, p1, q0, q1 = (k.reshape(-1, *[1] * (v["x_t"].dim() - 1)) for k in v["coef"].unbind(1))
    return p0 * v["x_t"] + p1 * v["eps_student"], q0 * v["x_s"] + q1 * v["eps_target"]


TORCHS_OWN = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": lambda a, b: F.huber_loss(a, b, delta=0.3),
    "pseudo_huber": lambda a, b: (torch.sqrt((a - b) ** 2 + 0.3**2) - 0.3).mean(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_torchs_loss_between_the_two_landings(kind):
    v = inputs(3, 4, 6, 5)
    v["eps_student"].requires_grad_()
    expected = TORCHS_OWN[kind](*landings(v))
    found = consistency_loss(**v, kind=kind, c=0.3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, v["eps_student"])[0] for y in (found, expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_and_flat_where_the_landings_agree(kind, dtype):
    v = inputs(2, 3, 40, dtype=dtype)
    v |= {"x_s": v["x_t"], "eps_target": v["eps_student"].clone(), "coef": v["coef"][:, :2].repeat(1, 2)}
    leaf = v.pop("eps_student").requires_grad_()
    loss = consistency_loss(leaf, **v, kind=kind)
    loss.backward()
    assert loss.item() == 0.0 and not leaf.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_reductions(kind):
    v, weight = inputs(4, 3, 7, 5), torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
    each = consistency_loss(**v, kind=kind, reduction="none")
    assert each.shape == (4,)
    one = [consistency_loss(**{n: t[i : i + 1] for n, t in v.items()}, kind=kind) for i in range(4)]
    torch.testing.assert_close(each, torch.stack(one))
    torch.testing.assert_close(consistency_loss(**v, kind=kind), each.mean())
    torch.testing.assert_close(consistency_loss(**v, kind=kind, weight=weight, reduction="none"), each * weight)
    torch.testing.assert_close(consistency_loss(**v, kind=kind, weight=weight), (each * weight).mean())


def test_scales_as_the_kind_says():
    v = inputs(2, 3, 5)
    scaled = v | {"coef": 3 * v["coef"]}
    torch.testing.assert_close(consistency_loss(**scaled, kind="mse"), 9 * consistency_loss(**v, kind="mse"))
    torch.testing.assert_close(consistency_loss(**scaled, kind="l1"), 3 * consistency_loss(**v, kind="l1"))
    huber = consistency_loss(**scaled, kind="pseudo_huber", c=3e-3)
    torch.testing.assert_close(huber, 3 * consistency_loss(**v, kind="pseudo_huber", c=1e-3))


def test_pseudo_huber_runs_from_square_to_absolute():
    v = inputs(2, 3, 50)
    l1, mse = (consistency_loss(**v, kind=kind).item() for kind in ("l1", "mse"))
    assert consistency_loss(**v, c=1e-9).item() == pytest.approx(l1, rel=1e-6)
    assert consistency_loss(**v, c=1e4).item() == pytest.approx(mse / 2e4, rel=1e-6)


def test_small_differences_do_not_cancel():
    """d = 1e-6 under c = 1e-3: sqrt(d^2 + c^2) - c is 5e-10, which the naive form loses in float32."""
    x = torch.zeros(1, 1000)
    eps = torch.full((1, 1000), 1e-6)
    coef = torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64)
    loss = consistency_loss(eps.requires_grad_(), x, x, x, coef, c=1e-3)
    assert loss.item() == pytest.approx(5e-10, rel=1e-4)
    (grad,) = torch.autograd.grad(loss, eps)
    assert grad.sum().item() == pytest.approx(1e-3, rel=1e-4)


def test_float16_gradients_do_not_underflow_before_the_loss_scale():
    """2^20 elements: each gradient is near 1e-6, below float16's normals, until the loss scale multiplies it."""
    v = inputs(4, 4, 256, 256, dtype=torch.float16)
    v["coef"] = torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64).repeat(4, 1)
    leaf = v.pop("eps_student").requires_grad_()
    (2.0**16 * consistency_loss(leaf, **v)).backward()
    exact = leaf.detach().double() / torch.sqrt(leaf.detach().double() ** 2 + 1e-6) * 2.0**16 / leaf.numel()
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("d", "p1", "upstream"), [(300.0, 20.0, 1e-3), (3e-6, 0.01, 65536.0)])
def test_float16_slopes_have_float32s_range(d, p1, upstream):
    """2 p1 d is 12,000 and 6e-8; times p1 and the upstream gradient it is what float16 holds, before it is not."""
    x, coef = torch.zeros(1, 4, dtype=torch.float16), torch.tensor([[0.0, p1, 0, 0]], dtype=torch.float64)
    leaf = torch.full_like(x, d / p1).requires_grad_()
    (upstream * consistency_loss(leaf, x, x, x, coef, kind="mse")).backward()
    exact = upstream * 2 * p1**2 * leaf.detach().double() / 4
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=2e-3, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_square_that_overflows_is_no_negative_loss(dtype):
    x, coef = torch.zeros(1, 40, dtype=dtype), torch.tensor([[0.0, 1, 0, 0]], dtype=torch.float64)
    assert consistency_loss(torch.full_like(x, math.inf), x, x, x, coef).isnan()


def test_gradient_flows_into_the_student_alone():
    v = {name: t.requires_grad_() for name, t in inputs(2, 3, 4).items()}
    consistency_loss(**v).backward()
    assert [name for name, t in v.items() if t.grad is not None] == ["eps_student"]


def test_no_gradient_is_written_when_none_is_wanted():
    from hypersd.kernels._op import OPS
    from tests.kernels.checks import Recorder

    v = inputs(2, 3, 4)
    for wanted in (False, True):
        with Recorder() as record:
            consistency_loss(**(v | {"eps_student": v["eps_student"].clone().requires_grad_(wanted)}))
        ((_, args),) = record.calls
        assert args[-1] is wanted
    loss, slope = OPS["consistency_loss"].raw(*args[:-1], False)
    assert slope.numel() == 0 and loss.shape == ()


def test_nothing_to_average_is_nan_as_in_torch():
    assert math.isnan(consistency_loss(**inputs(0, 4, 8)).item())
    assert consistency_loss(**inputs(0, 4, 8), reduction="none").shape == (0,)
    assert consistency_loss(**inputs(2, 0, 8), reduction="none").isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"kind": "l2"}, ValueError, r"kind: got 'l2', expected one of \('mse', 'huber', 'pseudo_huber', 'l1'\)"),
        ({"reduction": "sum"}, ValueError, r"reduction: got 'sum', expected one of \('mean', 'none'\)"),
        ({"c": 0.0}, ValueError, "c: got 0.0, expected a positive number"),
        ({"c": float("nan")}, ValueError, "c: got nan, expected -inf to inf, finite"),
        ({"eps_student": "no"}, TypeError, "eps_student: got str, expected a tensor"),
        ({"x_s": torch.zeros(3, 3)}, ValueError, r"x_s: got shape \(3, 3\), expected \(2, 3\) as eps_student"),
        ({"coef": torch.zeros(2, 5).double()}, ValueError, r"coef: got shape \(2, 5\), expected \(2, 4\) or \(4,\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: got shape \(3,\), expected \(2,\)"),
        ({"weight": torch.zeros(2, dtype=torch.int32)}, TypeError, "weight: got torch.int32, expected torch.float64"),
    ],
)
def test_refuses_with_the_arguments_name(change, error, words):
    with pytest.raises(error, match=words):
        consistency_loss(**(inputs(2, 3) | change))

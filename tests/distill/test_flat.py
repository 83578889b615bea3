"""Flat buffers and their optimizer against torch's, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hypersd.distill.flat import ALIGN, Flat, FlatAdamW
from hypersd.errors import HypersdError

SHAPES = {"a": (5, 7), "b": (3,), "c": (2, 3, 3, 3), "d": (64, 16)}
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def parameters(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in SHAPES.items()}


def loss(values: dict[str, nn.Parameter], step: int) -> Tensor:
    return sum(((p - step) ** 2 * (i + 1)).sum() for i, p in enumerate(values.values()))


def test_parameters_become_views_and_keep_their_values():
    own, before = parameters(0), parameters(0)
    flat = Flat(own)
    for name, parameter in own.items():
        assert torch.equal(parameter, before[name]) and parameter.is_contiguous()
        assert (parameter.data_ptr() - flat.data.data_ptr()) % (ALIGN * 8) == 0
    flat.data.zero_()
    assert all(not p.any() for p in own.values())


def test_mixed_dtypes_are_refused():
    mixed = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2, dtype=torch.float64))}
    with pytest.raises(HypersdError, match="one dtype and device"):
        Flat(mixed)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_steps_are_those_of_torch(clip):
    own, own_ema, plain, plain_ema = parameters(0), parameters(1), parameters(0), parameters(1)
    ours = FlatAdamW(own, own_ema, **OPTIONS, ema_decay=0.9, clip=clip)
    torchs = torch.optim.AdamW(plain.values(), lr=0.0, **OPTIONS)
    for step in range(4):
        rate = 1e-2 * (step + 1)
        loss(own, step).backward()
        norm = ours.step(rate)
        torchs.zero_grad()
        loss(plain, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.values(), clip or torch.inf)
        torchs.param_groups[0]["lr"] = rate
        torchs.step()
        with torch.no_grad():
            for average, parameter in zip(plain_ema.values(), plain.values(), strict=True):
                average.lerp_(parameter, 0.1)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for name in SHAPES:
        torch.testing.assert_close(own[name], plain[name], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(own_ema[name], plain_ema[name], rtol=1e-12, atol=1e-13)


def test_without_an_average_the_steps_are_the_same():
    with_average, without = parameters(0), parameters(0)
    both = (
        FlatAdamW(with_average, parameters(1), **OPTIONS, ema_decay=0.9, clip=1.0),
        FlatAdamW(without, **OPTIONS, clip=1.0),
    )
    for step in range(3):
        for ours, own in zip(both, (with_average, without), strict=True):
            ours.zero_grad()
            loss(own, step).backward()
            ours.step(1e-2)
    assert all(torch.equal(with_average[name], without[name]) for name in SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(*(ours.state_dict().values() for ours in both), strict=True))


def test_a_step_takes_what_several_passes_left_and_uses_it_up():
    own = parameters(0)
    ours = FlatAdamW(own, parameters(1), **OPTIONS, ema_decay=0.9)
    loss(own, 1).backward()
    loss(own, 1).backward()
    exact = [4 * (own[name].detach() - 1) * (i + 1) for i, name in enumerate(SHAPES)]
    norm = ours.step(1e-2)
    torch.testing.assert_close(norm, torch.sqrt(sum((g**2).sum() for g in exact)), rtol=1e-12, atol=0)
    assert all(p.grad is None for p in own.values())


def test_a_gradient_that_is_missing_counts_as_zero():
    own, plain = parameters(0), parameters(0)
    ours, torchs = FlatAdamW(own, **OPTIONS), torch.optim.AdamW(plain.values(), lr=1e-2, **OPTIONS)
    for those in (own, plain):
        loss(those, 1).backward()
    first = next(iter(SHAPES))
    own[first].grad = None
    plain[first].grad = torch.zeros_like(plain[first])
    ours.step(1e-2)
    torchs.step()
    for name in SHAPES:
        torch.testing.assert_close(own[name], plain[name], rtol=1e-12, atol=1e-13)


def test_a_step_counts_as_a_change_of_every_parameter():
    own, ema = parameters(0), parameters(1)
    ours = FlatAdamW(own, ema, **OPTIONS, ema_decay=0.9)
    before = [p._version for p in (*own.values(), *ema.values())]
    loss(own, 1).backward()
    ours.step(1e-2)
    assert all(p._version > old for p, old in zip((*own.values(), *ema.values()), before, strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing():
    own, ema = parameters(0, torch.float32), parameters(1, torch.float32)
    ours = FlatAdamW(own, ema, **OPTIONS, ema_decay=0.9, clip=1.0)
    for parameter in own.values():
        parameter.grad = torch.ones_like(parameter)
    next(iter(own.values())).grad.view(-1)[-1] = torch.inf
    assert ours.step(1e-2).isinf()
    for values, seed in ((own, 0), (ema, 1)):
        assert all(torch.equal(values[name], p) for name, p in parameters(seed, torch.float32).items())
    assert not ours.exp_avg.any() and not ours.exp_avg_sq.any()


def test_a_resumed_run_has_the_same_bits():
    def train(ours: FlatAdamW, own: dict[str, nn.Parameter], first: int, last: int) -> None:
        for step in range(first, last):
            ours.zero_grad()
            loss(own, step).backward()
            ours.step(1e-2)

    whole, ema = parameters(0, torch.float32), parameters(1, torch.float32)
    unbroken = FlatAdamW(whole, ema, **OPTIONS, ema_decay=0.9, clip=1.0)
    train(unbroken, whole, 0, 3)
    saved = {k: v.clone() for k, v in unbroken.state_dict().items()}
    first, second = ({n: nn.Parameter(p.detach().clone()) for n, p in values.items()} for values in (whole, ema))
    train(unbroken, whole, 3, 6)
    resumed = FlatAdamW(first, second, **OPTIONS, ema_decay=0.9, clip=1.0)
    resumed.load_state_dict(saved, 3)
    train(resumed, first, 3, 6)
    assert all(torch.equal(first[n], whole[n]) and torch.equal(second[n], ema[n]) for n in SHAPES)
    with pytest.raises(HypersdError, match="exp_avg/a is missing or has another shape"):
        resumed.load_state_dict({}, 3)


def test_other_names_are_refused():
    with pytest.raises(HypersdError, match="different names or shapes"):
        FlatAdamW(parameters(0), {"x": nn.Parameter(torch.zeros(1))}, **OPTIONS, ema_decay=0.9)

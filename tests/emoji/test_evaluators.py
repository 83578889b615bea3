from __future__ import annotations

import numpy as np
import pytest
import torch

from hypersd.emoji.degrade import KINDS, degrade
from hypersd.emoji.evaluators import GRID, Evaluator, solo_loss, solo_targets
from hypersd.emoji.scenes import render
from hypersd.emoji.train import to_tensor


def square(top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_solo_targets_of_a_hand_made_mask() -> None:
    masks = torch.stack([square(8, 40, 16), square(0, 0, 2)])[None]
    target, rows, cells, wanted = solo_targets([(7, 3)], masks, classes=10)
    # centre (48, 16); a fifth of a 16-pixel box is +-1.6 pixels, so the cells on both sides of the line 48 and 16
    assert set(cells.tolist()) == {v * GRID + u for v in (1, 2) for u in (5, 6)}
    assert target[0, 7].sum() == 4 and target.sum() == 4  # the second object is hidden but for four pixels
    assert rows.tolist() == [0, 0, 0, 0]
    assert torch.equal(wanted[0] > 0.5, masks[0, 0, ::2, ::2])


def test_solo_loss_is_least_at_the_truth() -> None:
    masks = torch.stack([square(8, 40, 16), torch.zeros(64, 64, dtype=torch.bool)])[None]
    target, rows, cells, wanted = solo_targets([(7,)], masks, classes=10)
    category = (target * 2 - 1) * 20
    mask = torch.full((1, GRID * GRID, 32, 32), -20.0)
    mask[rows, cells] = (wanted * 2 - 1) * 20
    truth = solo_loss(category, mask, [(7,)], masks)
    assert truth < 1e-3
    assert solo_loss(-category, mask, [(7,)], masks) > 1
    assert solo_loss(category, -mask, [(7,)], masks) > 1


def test_solo_loss_without_objects_is_the_focal_loss_alone() -> None:
    category = torch.zeros(1, 10, GRID, GRID)
    loss = solo_loss(category, torch.zeros(1, 64, 32, 32), [()], torch.zeros(1, 2, 64, 64, dtype=torch.bool))
    # each of 640 cells: 0.75 * 0.5^2 * ln 2
    assert loss.item() == pytest.approx(640 * 0.75 * 0.25 * np.log(2), rel=1e-6)


def test_every_score_has_a_gradient_in_the_picture() -> None:
    torch.manual_seed(0)
    model = Evaluator(96)
    scenes = render(3, 2)
    for score in (
        lambda x: model.objects(x),
        lambda x: model.background(x),
        lambda x: model.alignment(x, scenes.captions),
        lambda x: model.preference(x),
        lambda x: model.structure_loss(x, scenes.objects, torch.from_numpy(scenes.masks)),
    ):
        images = to_tensor(scenes.images).requires_grad_()
        value = score(images)
        assert torch.isfinite(value).all()
        (gradient,) = torch.autograd.grad(value.sum(), images)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_degradations_grow_with_their_strength(kind) -> None:
    torch.manual_seed(0)
    images = to_tensor(render(4, 8).images)
    weak, strong = ((kind(images, strength) - images).abs().mean().item() for strength in (0.0, 1.0))
    assert 0 < weak < strong


def test_degrade_keeps_shape_and_range() -> None:
    images = to_tensor(render(4, 20).images)
    spoiled = degrade(images, torch.Generator().manual_seed(0))
    assert spoiled.shape == images.shape and spoiled.abs().max() <= 1
    assert ((spoiled - images).abs().mean((1, 2, 3)) > 1e-3).all()

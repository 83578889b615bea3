from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hypersd.errors import HypersdError
from hypersd.models.rewards import Instances
from hypersd.models.solo import GRIDS, Solo, dice_loss, focal_loss, level_targets, load_solo, positive_cells, solo_loss


def box(top: int, left: int, height: int, width: int, size: int = 128) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_focal_loss_by_hand() -> None:
    logits, target = torch.tensor([0.0, math.log(3.0)]), torch.tensor([1.0, 0.0])
    # p = 1/2 for the object: 0.25 (1/2)^2 ln 2; p = 3/4 where nothing is: 0.75 (3/4)^2 ln 4
    wanted = (0.25 * 0.25 * math.log(2) + 0.75 * 0.5625 * math.log(4)) / (3 + 1)
    assert float(focal_loss(logits, target, 3)) == pytest.approx(wanted, rel=1e-6)


def test_dice_loss_by_hand() -> None:
    masks = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    logits = torch.full((1, 2, 2), 0.0)  # p = 1/2 everywhere: <p,g> = 1, |p|^2 = 1, |g|^2 = 2
    assert float(dice_loss(logits, masks)) == pytest.approx(1 - 2 / (3 + 2e-3), rel=1e-6)
    right = (masks * 2 - 1) * 30
    assert float(dice_loss(right, masks)) < 1e-3 and float(dice_loss(-right, masks)) > 0.999


def test_the_cells_of_hand_made_masks() -> None:
    # 128 pixels, 16 cells of 8: rows 32..47 have their centre at 39.5 and a middle fifth of 37.9..41.1, cells 4 and 5;
    # columns 64..73 have theirs at 68.5, 67.5..69.5, cell 8
    assert positive_cells(box(32, 64, 16, 10)[None], 16, (128, 128)) == [[4, 5, 8, 8]]
    # a whole picture: the middle fifth spans 50.7..76.3, cells 6 to 9, but at most one from the centre's own, 7
    assert positive_cells(box(0, 0, 128, 128)[None], 16, (128, 128)) == [[6, 8, 6, 8]]
    # an L: most of its pixels are in its foot, so the centre of mass lies low
    shape = box(0, 0, 96, 8) | box(88, 0, 8, 96)
    ((top, bottom, left, right),) = positive_cells(shape[None], 16, (128, 128))
    rows = (96 * 8 * 47.5 + 8 * 88 * 91.5) / (96 * 8 + 8 * 88)
    assert top <= int(rows / 8) <= bottom and left == right - 2 and bottom - top == 2
    # the corner's neighbours outside of the grid do not exist
    assert positive_cells(box(0, 0, 2, 2)[None], 16, (128, 128)) == [[0, 0, 0, 0]]
    # the grid divides the padded picture, not the mask
    assert positive_cells(box(32, 64, 16, 10)[None], 16, (256, 256)) == [[2, 2, 4, 4]]


def test_targets_of_a_level() -> None:
    masks = torch.stack([box(32, 64, 16, 16), box(0, 0, 120, 120), box(32, 64, 16, 16)])
    target = torch.zeros(5, GRIDS[0], GRIDS[0])
    cells, wanted = level_targets(0, [3, 1, 4], masks, target, (128, 128), (32, 32))
    # the 120-pixel object (range 48 to 384) is not the first level's (1 to 96); 40 cells of 3.2 pixels, centre 39.5 and
    # 71.5, middle fifth 37.9..41.1 (cells 11, 12) and 69.9..73.1 (cells 21, 22); the later object takes them all
    assert sorted(cells.tolist()) == [11 * 40 + 21, 11 * 40 + 22, 12 * 40 + 21, 12 * 40 + 22]
    assert target[4].sum() == 4 and target.sum() == 4
    assert wanted.shape == (4, 32, 32) and all(torch.equal(mask, masks[0, ::4, ::4]) for mask in wanted)
    target = torch.zeros(5, GRIDS[1], GRIDS[1])
    cells, _ = level_targets(1, [3, 1, 4], masks, target, (128, 128), (32, 32))
    assert target[1].sum() == len(cells) == 9 and target.sum() == 9
    cells, wanted = level_targets(4, [3, 1, 4], masks, torch.zeros(5, 12, 12), (128, 128), (8, 8))
    assert len(cells) == 0 and wanted.shape == (0, 8, 8)


def test_the_loss_is_least_at_the_truth() -> None:
    masks = [torch.stack([box(32, 64, 16, 16)]), torch.zeros(0, 128, 128, dtype=torch.bool)]
    labels = [[2], []]
    shapes = [(32, 32), (32, 32), (16, 16), (8, 8), (8, 8)]
    cells = [torch.full((2, 5, grid, grid), -20.0) for grid in GRIDS]
    drawn = [torch.zeros(2, grid * grid, *shape) for grid, shape in zip(GRIDS, shapes, strict=True)]
    for level in range(5):
        target = torch.zeros(5, GRIDS[level], GRIDS[level])
        chosen, wanted = level_targets(level, labels[0], masks[0], target, (128, 128), shapes[level])
        cells[level][0] += 40 * target
        drawn[level][0, chosen] = (wanted.float() * 2 - 1) * 20
    assert float(solo_loss(cells, drawn, labels, masks)) < 1e-3
    assert float(solo_loss([-c for c in cells], drawn, labels, masks)) > 10
    assert float(solo_loss(cells, [-d for d in drawn], labels, masks)) > 2.9  # dice 1, three times
    # without an object: focal alone, over a divisor of one
    empty = [torch.zeros(1, 5, grid, grid) for grid in GRIDS]
    loss = float(solo_loss(empty, [d[:1] for d in drawn], [[]], [masks[1]]))
    assert loss == pytest.approx(5 * sum(g * g for g in GRIDS) * 0.75 * 0.25 * math.log(2), rel=1e-5)


@pytest.fixture(scope="module")
def solo() -> Solo:
    torch.manual_seed(0)
    return Solo().eval().requires_grad_(False)


def test_keys_and_shapes_are_those_of_the_public_file(solo: Solo, tmp_path: Path) -> None:
    state = solo.state_dict()
    expected = {
        "backbone.conv1.weight": (64, 3, 7, 7),
        "backbone.bn1.running_mean": (64,),
        "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "backbone.layer3.5.conv2.weight": (256, 256, 3, 3),
        "backbone.layer4.2.bn3.num_batches_tracked": (),
        "neck.lateral_convs.3.conv.weight": (256, 2048, 1, 1),
        "neck.fpn_convs.0.conv.bias": (256,),
        "mask_head.mask_convs.0.conv.weight": (256, 258, 3, 3),
        "mask_head.mask_convs.6.gn.weight": (256,),
        "mask_head.cls_convs.0.conv.weight": (256, 256, 3, 3),
        "mask_head.conv_mask_list.0.weight": (1600, 256, 1, 1),
        "mask_head.conv_mask_list.4.bias": (144,),
        "mask_head.conv_cls.weight": (80, 256, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected
    # 53 convolutions and norms of five tensors; 8 convolutions with bias; 14 with GroupNorm; 5 + 1 last layers
    assert len(state) == 53 * 6 + 8 * 2 + 14 * 3 + 6 * 2
    backbone = sum(p.numel() for n, p in solo.named_parameters() if n.startswith("backbone."))
    assert backbone == 25_557_032 - 2_049_000  # ResNet-50 without its classifier
    path = tmp_path / "solo.safetensors"
    save_file(state, path)
    loaded = load_solo(path)
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    for a, b in zip(solo.predict(images), loaded.predict(images), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    save_file({**state, "mask_head.conv_cls.weight": torch.zeros(3)}, path)
    with pytest.raises(HypersdError, match=r"mask_head.conv_cls.weight has shape \(3,\), not \(80, 256, 3, 3\)"):
        load_solo(path)
    save_file({name: t for name, t in state.items() if "fpn_convs.2" not in name}, path)
    with pytest.raises(HypersdError, match="lacks neck.fpn_convs.2.conv.weight; it must be a safetensors file of mmd"):
        load_solo(path)
    path.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(HypersdError, match="is a pickle, not safetensors"):
        load_solo(path)


def by_hand(state: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """SOLO's class and mask logits from the public file's names and the papers' words; pictures of a multiple of 32."""

    def bn(name: str, x: Tensor) -> Tensor:
        scale = state[f"{name}.weight"] / (state[f"{name}.running_var"] + 1e-5).sqrt()
        shift = state[f"{name}.bias"] - scale * state[f"{name}.running_mean"]
        return scale[:, None, None] * x + shift[:, None, None]

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def gn(name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (32, -1)).flatten(2)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, unbiased=False, keepdim=True)
        x = ((groups - mean) / (var + 1e-5).sqrt()).view_as(x)
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def scaled(x: Tensor, size: Any) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear")

    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    x = ((images + 1) / 2 * 255 - mean[:, None, None]) / std[:, None, None]
    x = F.max_pool2d(bn("backbone.bn1", conv("backbone.conv1", x, 2)).relu(), 3, 2, 1)
    maps = []
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            at, stride = f"backbone.layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = bn(f"{at}.bn1", conv(f"{at}.conv1", x)).relu()
            y = bn(f"{at}.bn2", conv(f"{at}.conv2", y, stride)).relu()
            y = bn(f"{at}.bn3", conv(f"{at}.conv3", y))
            x = (y + (bn(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride)) if block == 0 else x)).relu()
        maps.append(x)
    tops = [conv(f"neck.lateral_convs.{i}.conv", m) for i, m in enumerate(maps)]
    for i in (2, 1, 0):
        tops[i] = tops[i] + tops[i + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    levels = [conv(f"neck.fpn_convs.{i}.conv", top) for i, top in enumerate(tops)]
    levels.append(levels[3][:, :, ::2, ::2])
    levels[0], levels[4] = scaled(levels[0], levels[1].shape[2:]), scaled(levels[4], levels[3].shape[2:])
    cells, drawn = [], []
    for i, (x, grid) in enumerate(zip(levels, (40, 36, 24, 16, 12), strict=True)):
        high, wide = x.shape[2:]
        across = torch.linspace(-1, 1, wide).expand(len(x), 1, high, wide)
        down = torch.linspace(-1, 1, high)[:, None].expand(len(x), 1, high, wide)
        mask, cell = torch.cat([x, across, down], 1), scaled(x, grid)
        for j in range(7):
            mask = gn(f"mask_head.mask_convs.{j}.gn", conv(f"mask_head.mask_convs.{j}.conv", mask)).relu()
            cell = gn(f"mask_head.cls_convs.{j}.gn", conv(f"mask_head.cls_convs.{j}.conv", cell)).relu()
        drawn.append(conv(f"mask_head.conv_mask_list.{i}", scaled(mask, (2 * high, 2 * wide))))
        cells.append(conv("mask_head.conv_cls", cell))
    return cells, drawn


def test_the_network_is_solo_s_own() -> None:
    """Against a second derivation, with statistics in the norms that are no ones and zeros."""
    torch.manual_seed(3)
    model = Solo().eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "gn.weight", "downsample.1.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.uniform_(-0.2, 0.2)
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for found, expected in zip(model.predict(images), by_hand(model.state_dict(), images), strict=True):
        for level, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert min(float(level.std()) for level in expected) > 0.01


def test_shapes_of_the_levels_and_the_gradient_in_the_picture(solo: Solo) -> None:
    """A picture that is no multiple of 32 is padded; the gradient reaches its pixels, and no weight."""
    images = (torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(1)) * 2 - 1).requires_grad_()
    cells, drawn = solo.predict(images)
    assert [tuple(c.shape) for c in cells] == [(2, 80, g, g) for g in GRIDS]
    sides = [(24, 24), (24, 24), (12, 12), (6, 6), (6, 6)]  # of 96 x 96: twice the resolution of strides 8, 8, 16, 32
    assert [tuple(d.shape) for d in drawn] == [(2, g * g, *side) for g, side in zip(GRIDS, sides, strict=True)]
    mask = torch.zeros(1, 96, 80, dtype=torch.bool)
    mask[0, 20:60, 30:70] = True
    instances = [Instances(torch.tensor([7]), mask), Instances(torch.zeros(0, dtype=torch.long), mask[:0])]
    loss = solo(images, instances)
    (gradient,) = torch.autograd.grad(loss, images)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() > 0
    assert all(not p.requires_grad for p in solo.parameters())
    scaled = Solo(resolution=160)
    scaled.load_state_dict(solo.state_dict())
    with torch.no_grad():
        assert float(scaled.eval()(images, instances)) != float(loss)
    with pytest.raises(HypersdError, match="do not fit pictures"):
        solo(images, [Instances(torch.tensor([7]), mask[:, :50]), instances[1]])

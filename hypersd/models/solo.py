"""SOLO, instance segmentation by locations (Wang et al. 2020), ResNet-50 with FPN, as a frozen measure of structure.

A picture is divided into a grid of cells on each of five levels. The cell that holds the centre of an object says its
class, and one mask channel for each cell draws it. Weights are those of mmdetection's public files
`solo_r50_fpn_{1x,3x}_coco` (not the decoupled ones), rewritten as safetensors once, where they are trusted:

    state = torch.load("solo_r50_fpn_3x_coco_20210901_012353-11d224d7.pth", weights_only=True)["state_dict"]
    safetensors.torch.save_file(state, "solo_r50_fpn_3x_coco.safetensors")

Module names are therefore mmdetection's. The embedded model's small SOLO shares the losses and the choice of cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.errors import HypersdError
from hypersd.models.rewards import Instances
from hypersd.models.rewards.files import load_weights

STRIDES = (8, 8, 16, 32, 32)  # of the levels as the head sees them
GRIDS = (40, 36, 24, 16, 12)  # cells a side
SCALES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))  # pixels, sqrt of the box's area
CENTRE = 0.2  # the part of an object's box that counts as its centre
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, of 255


def focal_loss(logits: Tensor, target: Tensor, positives: int) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), gamma 2, alpha 0.25, summed and divided by `positives` + 1. `target` holds
    0 and 1 in the shape of `logits`."""
    probability = logits.sigmoid()
    agreement = torch.where(target > 0, probability, 1 - probability)
    balance = torch.where(target > 0, 0.25, 0.75)
    cross = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (balance * (1 - agreement).square() * cross).sum() / (positives + 1)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """(n,): 1 - 2 <p, g> / (|p|^2 + |g|^2 + 2e-3) with p = sigmoid(logits), of masks g (n, H, W)."""
    p, g = logits.sigmoid().flatten(1), masks.to(logits).flatten(1)
    return 1 - 2 * (p * g).sum(1) / (p.square().sum(1) + g.square().sum(1) + 2e-3)


def positive_cells(masks: Tensor, grid: int, size: tuple[int, int]) -> list[list[int]]:
    """The cells of each mask (n, H, W) bool that answer for it, as [top, bottom, left, right], ends included.

    Those that the middle fifth of the box around the centre of mass touches, at most one away from the centre's own
    cell. `size` is the picture's, in the masks' pixels, that the grid divides. The masks must not be empty.
    """
    found = []
    for axis, pixels in ((2, size[0]), (1, size[1])):
        line = masks.sum(axis).double()  # (n, rows), then (n, columns): visible pixels in each
        place = torch.arange(line.shape[1], dtype=torch.float64, device=masks.device)
        centre = (line * place).sum(1) / line.sum(1)
        length = _extent(line > 0).sum(1)
        cell, low, high = (
            (at * grid / pixels).floor() for at in (centre, centre - CENTRE / 2 * length, centre + CENTRE / 2 * length)
        )
        found += [torch.maximum(low, cell - 1).clamp(min=0), torch.minimum(high, cell + 1).clamp(max=grid - 1)]
    return torch.stack(found, 1).long().tolist()


def _extent(hit: Tensor) -> Tensor:
    """From the first to the last true entry of each row."""
    forward, backward = hit.long().cumsum(1) > 0, hit.flip(1).long().cumsum(1).flip(1) > 0
    return forward & backward


class Solo(nn.Module):
    """`solo(images, instances)` is the training loss, focal + 3 dice, on pictures (B, 3, H, W) in [-1, 1]; masks have
    the pictures' size, labels are numbers below `num_classes` (of COCO's 80, in the order of their ids).

    `resolution`: pixels that the shorter side is scaled to; None leaves pictures as they are.
    """

    def __init__(
        self, num_classes: int = 80, *, width: int = 256, convs: int = 7, resolution: int | None = None
    ) -> None:
        super().__init__()
        self.num_classes, self.resolution = num_classes, resolution
        self.backbone, self.neck = ResNet50(), Pyramid(width)
        self.mask_head = Head(num_classes, width, convs)

    def forward(self, images: Tensor, instances: Sequence[Instances]) -> Tensor:
        """The scalar loss, differentiable in the pictures."""
        masks = [each.masks.to(images.device) for each in instances]
        if self.resolution is not None:
            factor = self.resolution / min(images.shape[2:])
            size = [round(side * factor) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
            masks = [F.interpolate(m[:, None].float(), size)[:, 0] > 0.5 for m in masks]
        for mask in masks:
            if mask.shape[1:] != images.shape[2:]:
                raise HypersdError(f"masks {tuple(mask.shape)} do not fit pictures {tuple(images.shape)}")
        cells, drawn = self.predict(images)
        return solo_loss(cells, drawn, [each.labels.tolist() for each in instances], masks)

    def predict(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of each level: class logits (B, num_classes, g, g) and mask logits (B, g^2, h, w)."""
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (MEAN, STD))
        pixels = ((images.float() + 1) * 127.5 - mean) / std
        height, width = pixels.shape[2:]
        return self.mask_head(self.neck(self.backbone(F.pad(pixels, (0, -width % 32, 0, -height % 32)))))


def solo_loss(
    cells: Sequence[Tensor], drawn: Sequence[Tensor], labels: Sequence[Sequence[int]], masks: Sequence[Tensor]
) -> Tensor:
    """SOLO's loss over levels: focal over all cells / (positives + 1) + 3 times the mean dice of positive cells.

    cells, drawn: see `Solo.predict`; labels and masks (n, H, W) bool of each picture.
    """
    # the padded picture, whose grids these are; the masks of the first level are at half its stride
    size = (drawn[0].shape[2] * STRIDES[0] // 2, drawn[0].shape[3] * STRIDES[0] // 2)
    targets = [torch.zeros_like(level) for level in cells]
    dice: list[Tensor] = []
    for level, target in enumerate(targets):
        for row, (names, own) in enumerate(zip(labels, masks, strict=True)):
            chosen, wanted = level_targets(level, names, own, target[row], size, drawn[level].shape[2:])
            if len(chosen):
                dice.append(dice_loss(drawn[level][row, chosen].float(), wanted))
    positives = sum(map(len, dice))
    logits = torch.cat([level.float().flatten() for level in cells])
    loss = focal_loss(logits, torch.cat([t.float().flatten() for t in targets]), positives)
    return loss + 3 * torch.cat(dice).mean() if dice else loss


def level_targets(
    level: int, labels: Sequence[int], masks: Tensor, target: Tensor, size: tuple[int, int], shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Fill one picture's class target (num_classes, g, g) of one level; returns (numbers of the positive cells, their
    mask targets (m, *shape)). An object belongs to the levels whose range holds the square root of its box's area; a
    cell that two objects claim is the later one's."""
    grid, (low, high) = GRIDS[level], SCALES[level]
    area = _extent(masks.any(2)).sum(1) * _extent(masks.any(1)).sum(1)  # of the box
    inside = ((area.double().sqrt() >= low) & (area.double().sqrt() <= high)).nonzero().flatten().tolist()
    small = torch.zeros(len(inside), *shape, dtype=torch.bool, device=masks.device)
    owner: dict[tuple[int, int], int] = {}
    if inside:
        factor = 2 / STRIDES[level]
        scaled = F.interpolate(
            masks[inside, None].float(), scale_factor=factor, mode="bilinear", align_corners=False
        )[:, 0]  # fmt: skip
        small[:, : scaled.shape[1], : scaled.shape[2]] = scaled[:, : shape[0], : shape[1]] >= 0.5
        for slot, (top, bottom, left, right) in enumerate(positive_cells(masks[inside], grid, size)):
            owner |= {(v, u): slot for v in range(top, bottom + 1) for u in range(left, right + 1)}
    for (v, u), slot in owner.items():
        target[labels[inside[slot]], v, u] = 1
    numbers = torch.tensor([v * grid + u for v, u in owner], dtype=torch.long, device=masks.device)
    return numbers, small[list(owner.values())]


class Head(nn.Module):
    """Class and mask branch, shared by the levels."""

    def __init__(self, num_classes: int, width: int, convs: int) -> None:
        super().__init__()
        first = [width + 2] + [width] * (convs - 1)  # two coordinates join the mask branch
        self.mask_convs = nn.ModuleList(_NormedConv(inputs, width) for inputs in first)
        self.cls_convs = nn.ModuleList(_NormedConv(width, width) for _ in range(convs))
        self.conv_mask_list = nn.ModuleList(nn.Conv2d(width, grid * grid, 1) for grid in GRIDS)
        self.conv_cls = nn.Conv2d(width, num_classes, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        levels = [_resize(levels[0], levels[1]), *levels[1:-1], _resize(levels[-1], levels[-2])]
        cells, masks = [], []
        for x, grid, last in zip(levels, GRIDS, self.conv_mask_list, strict=True):
            drawn = torch.cat([x, _coordinates(x)], 1)
            for layer in self.mask_convs:
                drawn = layer(drawn)
            masks.append(last(F.interpolate(drawn, scale_factor=2, mode="bilinear", align_corners=False)))
            cell = F.interpolate(x, (grid, grid), mode="bilinear", align_corners=False)
            for layer in self.cls_convs:
                cell = layer(cell)
            cells.append(self.conv_cls(cell))
        return cells, masks


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _coordinates(x: Tensor) -> Tensor:
    """(B, 2, H, W): x and y in [-1, 1]."""
    rows, columns = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[2:])
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([u, v]).expand(len(x), -1, -1, -1)


class _NormedConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(min(32, outputs), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gn(self.conv(x)))


class _PlainConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Pyramid(nn.Module):
    """FPN (Lin et al. 2017): four levels of stride 4 to 32, and the last once more at half its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_PlainConv(inputs, width, 1) for inputs in (256, 512, 1024, 2048))
        self.fpn_convs = nn.ModuleList(_PlainConv(width, width, 3) for _ in range(4))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [layer(x) for layer, x in zip(self.lateral_convs, maps, strict=True)]
        for fine in (2, 1, 0):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], levels[fine].shape[2:], mode="nearest")
        outputs = [layer(x) for layer, x in zip(self.fpn_convs, levels, strict=True)]
        return [*outputs, F.max_pool2d(outputs[-1], 1, stride=2)]


class ResNet50(nn.Module):
    """He et al. 2016 with the stride in the 3x3 convolution; returns C2 to C5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for number, (blocks, width, stride) in enumerate(((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)), 1):
            inputs = 64 if number == 1 else 2 * width
            layer = [_Bottleneck(inputs, width, stride)] + [_Bottleneck(4 * width, width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*layer))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = []
        for number in (1, 2, 3, 4):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def load_solo(path: str | Path, device: str | torch.device = "cpu", *, resolution: int | None = None) -> Solo:
    """SOLO from a safetensors file with mmdetection's keys (see above), frozen, its batch norms in evaluation.

    Raises HypersdError for a missing, pickled or truncated file, and for keys or shapes of another model.
    """
    with torch.device("meta"):
        model = Solo(resolution=resolution)
    load_weights(model, Path(path), "a safetensors file of mmdetection's solo_r50_fpn")
    return model.eval().requires_grad_(False).to(device)

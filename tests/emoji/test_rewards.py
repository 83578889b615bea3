from __future__ import annotations

import numpy as np
import pytest
import torch

from hypersd.emoji import evaluators, rewards
from hypersd.emoji.degrade import blur
from hypersd.emoji.scenes import render
from hypersd.errors import HypersdError
from hypersd.evaluate.generate import to_float


def test_rewards_are_the_reward_set_s_and_never_the_judge_s() -> None:
    scenes = render(3, 4)
    images = to_float(scenes.images)
    reward, judge = (evaluators.load(name, torch.device("cpu")) for name in ("reward", "judge"))
    taste, fit = (rewards.load(f"scene_{kind}", 1.0) for kind in ("preference", "alignment"))
    assert torch.equal(taste(images, scenes.captions), reward.preference(images))
    assert torch.equal(fit(images, scenes.captions), reward.alignment(images, scenes.captions))
    watched = rewards.load("judge_preference", 0.0)
    assert torch.equal(watched(images, scenes.captions), judge.preference(images))
    for kind in rewards.WATCHED:
        with pytest.raises(HypersdError, match="judges and is never optimised"):
            rewards.load(kind, 1e-6)
    with pytest.raises(HypersdError, match="the embedded model has scene_alignment"):
        rewards.load("aesthetic", 1.0)


def test_structure_knows_the_scenes_by_their_numbers() -> None:
    """The loss is least for the scene itself, more when it is blurred, most for another scene's instances."""
    loss = rewards.structure(seed=5)
    numbers = np.array([2, 40, 17, 3])
    images = to_float(np.concatenate([render(5, 1, "train", int(n)).images for n in numbers])).requires_grad_()
    own = loss(images, numbers)
    (gradient,) = torch.autograd.grad(own, images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0 and torch.isfinite(gradient).all()
    with torch.no_grad():
        assert float(own) < float(loss(blur(images, 1.0), numbers)) < float(loss(images, numbers[::-1]))

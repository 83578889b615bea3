from __future__ import annotations

from typing import Any

import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.critic import Critic, accuracy, critic_loss, generator_loss


def draw(mean: float, seed: int, count: int = 16) -> torch.Tensor:
    return mean + 0.5 * torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_it_learns_to_tell_two_gaussians_apart(tiny_unet: Any) -> None:
    backbone = Backbone(tiny_unet, roles=())
    frozen = {name: p.clone() for name, p in backbone.named_parameters()}
    torch.manual_seed(0)
    critic = Critic(backbone)
    time, cond = torch.full((16,), 200), {"encoder_hidden_states": torch.zeros(16, 16, 32)}
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.0, 0.999))
    for step in range(25):
        loss = critic_loss(*(critic(draw(mean, 2 * step + i), time, cond) for i, mean in enumerate((0.4, -0.4))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (critic(draw(mean, 900 + i), time, cond) for i, mean in enumerate((0.4, -0.4)))
    assert accuracy(real, fake) > 0.9 and accuracy(fake, real) < 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in backbone.named_parameters())
    # and the fakes learn where the real ones are: downhill is towards them
    x = draw(-0.4, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(generator_loss(critic(x, time, cond)), x)
    with torch.no_grad():
        moved = critic(x - 100.0 * gradient / gradient.abs().mean() * 1e-3, time, cond)
        assert generator_loss(moved) < generator_loss(critic(x, time, cond))


def test_hinge() -> None:
    real, fake = (
        [torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0]])],
        [torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0]])],
    )
    # first head: (0 + 0.5) / 2 + (0 + 1) / 2; second: 0 + 2
    assert critic_loss(real, fake).item() == pytest.approx((0.75 + 2.0) / 2)
    assert generator_loss(fake).item() == pytest.approx(-(-1.5 + 1.0) / 2)


def test_another_network_is_refused() -> None:
    with pytest.raises(HypersdError, match="adversarial_weight = 0"):
        Critic(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

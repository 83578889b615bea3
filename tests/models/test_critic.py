from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.critic import Critic, accuracy, critic_loss, generator_loss
from tests.conftest import make_flux, make_sd3


def draw(mean: float, seed: int, count: int = 16) -> torch.Tensor:
    return mean + 0.5 * torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


CONDITIONS = {
    "tiny_unet": {"encoder_hidden_states": torch.zeros(16, 16, 32)},
    "sd3": {"encoder_hidden_states": torch.zeros(16, 6, 64), "pooled_projections": torch.zeros(16, 64)},
    "flux": {"encoder_hidden_states": torch.zeros(16, 6, 32), "pooled_projections": torch.zeros(16, 32)},
}
MAKE = {"sd3": make_sd3, "flux": make_flux}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_it_learns_to_tell_two_gaussians_apart(kind: str, request: Any) -> None:
    """Their means are not flat: the norm at a head's entry takes away what all places of a channel share."""

    def sample(mean: float, seed: int) -> torch.Tensor:
        return draw(0.0, seed) + mean * torch.linspace(-2, 2, 16)

    backbone = Backbone(MAKE[kind]() if kind in MAKE else request.getfixturevalue(kind), roles=())
    frozen = {name: p.clone() for name, p in backbone.named_parameters()}
    torch.manual_seed(0)
    critic = Critic(backbone)
    time, cond = torch.full((16,), 200), CONDITIONS[kind]
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.0, 0.999))
    for step in range(25):
        loss = critic_loss(*(critic(sample(mean, 2 * step + i), time, cond) for i, mean in enumerate((0.4, -0.4))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (critic(sample(mean, 900 + i), time, cond) for i, mean in enumerate((0.4, -0.4)))
    assert accuracy(real, fake) > 0.9 and accuracy(fake, real) < 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in backbone.named_parameters())
    # and the fakes learn where the real ones are: downhill is towards them
    x = sample(-0.4, 7).requires_grad_()
    (gradient,) = torch.autograd.grad(generator_loss(critic(x, time, cond)), x)
    with torch.no_grad():
        moved = critic(x - 100.0 * gradient / gradient.abs().mean() * 1e-3, time, cond)
        assert generator_loss(moved) < generator_loss(critic(x, time, cond))


@pytest.mark.parametrize("kind", MAKE)
def test_a_patch_of_the_picture_is_a_place_of_the_score(kind: str) -> None:
    """Of a latent that is not square, and where blocks are computed again."""
    backbone = Backbone(MAKE[kind](), roles=())
    backbone.recompute_feed_forward()
    backbone.enable_gradient_checkpointing()
    critic = Critic(backbone)
    cond = {name: value[:1] for name, value in CONDITIONS[kind].items()}
    x = torch.zeros(1, 4, 8, 16)
    seen: list[torch.Tensor] = []
    handle = critic.heads[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for row, column in ((None, None), (2, 5)):
        if row is not None:
            x[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = 3.0
        scores = critic(x.requires_grad_(), torch.tensor([500]), cond)
        assert all(score.shape == (1, 1, 4, 8) for score in scores)
        x = x.detach().clone()
    handle.remove()
    change = (seen[1] - seen[0]).square().sum(1)[0]
    assert divmod(int(change.argmax()), 8) == (2, 5)


def test_a_deep_transformer_has_heads_on_some_of_its_blocks() -> None:
    flux = make_flux(num_layers=19, num_single_layers=38)
    critic = Critic(Backbone(flux, roles=()))
    assert len(critic.heads) == 24
    order = [*flux.transformer_blocks, *flux.single_transformer_blocks]
    chosen = [next(i for i, block in enumerate(order) if block is found) for found in critic._blocks]
    assert chosen[-1] == 56 and {b - a for a, b in pairwise(chosen)} == {2, 3}


def test_hinge() -> None:
    real, fake = (
        [torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0]])],
        [torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0]])],
    )
    # first head: (0 + 0.5) / 2 + (0 + 1) / 2; second: 0 + 2
    assert critic_loss(real, fake).item() == pytest.approx((0.75 + 2.0) / 2)
    assert generator_loss(fake).item() == pytest.approx(-(-1.5 + 1.0) / 2)


def test_another_network_is_refused() -> None:
    with pytest.raises(HypersdError, match="needs a UNet or a transformer of SD3 or FLUX, not Linear"):
        Critic(SimpleNamespace(network=torch.nn.Linear(2, 2)))  # type: ignore[arg-type]

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hypersd.errors import HypersdError
from hypersd.models.backbone import Backbone
from hypersd.models.critic import Critic, accuracy
from hypersd.models.encoder_critic import (
    BottleneckCritic,
    EncoderCritic,
    log_critic_loss,
    log_generator_loss,
)
from tests.conftest import make_flux, make_sd3, make_unet
from tests.models.test_critic import draw

COND = {"encoder_hidden_states": torch.zeros(6, 16, 32)}
TIME = torch.full((6,), 200)


def middle(network: Any, backbone: Any, *args: Any, **options: Any) -> torch.Tensor:
    """The middle block's output in a whole forward pass."""
    found = []
    hook = network.mid_block.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        backbone(*args, **options)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("kind", ["tiny_unet", "tiny_sdxl_unet"])
def test_the_copy_sees_what_the_network_s_middle_block_sees(kind: str, request: Any) -> None:
    unet = request.getfixturevalue(kind)
    backbone = Backbone(unet, roles=("student",))
    for parameter in backbone.role_parameters("student").values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    x, time, cond = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([10, 900]),
        {"encoder_hidden_states": torch.randn(2, 16, 32)},
    )
    if kind == "tiny_sdxl_unet":
        cond = {"encoder_hidden_states": torch.randn(2, 16, 64), "text_embeds": torch.randn(2, 32)}
        cond["time_ids"] = torch.full((2, 6), 16)
    critic = EncoderCritic(backbone)
    base = middle(unet, backbone, x, time, cond)
    student = middle(unet, backbone, x, time, cond, role="student")
    torch.testing.assert_close(critic.features(x, time, cond), base)
    assert not torch.allclose(base, student)
    head = BottleneckCritic(backbone, "student")
    torch.testing.assert_close(head(x, time, cond), head.head(student))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in critic.parameters())
    names = [name for name, _ in critic.named_parameters()]
    assert not any("up_blocks" in name or "student" in name for name in names)
    assert not any(a is b for a in critic.parameters() for b in backbone.parameters())


@pytest.mark.parametrize("make", [make_sd3, make_flux])
def test_of_a_transformer_they_see_what_the_first_half_of_its_blocks_sees(make: Any) -> None:
    depth = {"num_layers": 4} if make is make_sd3 else {"num_layers": 1, "num_single_layers": 2}
    network = make(**depth)
    last = network.transformer_blocks[1] if make is make_sd3 else network.single_transformer_blocks[0]
    beyond = network.transformer_blocks[2] if make is make_sd3 else network.single_transformer_blocks[1]
    backbone = Backbone(network, roles=("student",))
    for parameter in backbone.role_parameters("student").values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    width = 64 if make is make_sd3 else 32
    x, time = torch.randn(2, 4, 8, 16), torch.tensor([10, 900])
    cond = {"encoder_hidden_states": torch.randn(2, 6, width), "pooled_projections": torch.randn(2, width)}
    expected = {}
    for role in ("base", "student"):
        found: list[Any] = []
        hook = last.register_forward_hook(lambda module, inputs, output, found=found: found.append(output[1]))
        with torch.no_grad():
            backbone(x, time, cond, role=role)
        hook.remove()
        expected[role] = found[0].transpose(1, 2).reshape(2, 32, 4, 8)
    critic, head = EncoderCritic(backbone), BottleneckCritic(backbone, "student")
    ran: list[Any] = []
    hook = beyond.register_forward_hook(lambda *_: ran.append(None))
    torch.testing.assert_close(critic.features(x, time, cond), expected["base"])
    torch.testing.assert_close(head(x, time, cond), head.head(expected["student"]))
    assert not ran and not torch.allclose(expected["base"], expected["student"])
    backbone(x, time, cond)
    assert ran, "the whole network is back"
    hook.remove()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in critic.parameters())
    own, whole = ({name for name, _ in module.named_parameters()} for module in (critic.network, network))
    assert own and not any("student" in name for name in own) and len(own) < len(whole)
    assert not any(a is b for a in critic.parameters() for b in backbone.parameters())
    # in bfloat16, with gradients through a network that computes its blocks again
    network.to(torch.bfloat16)
    backbone.fuse()
    backbone.enable_gradient_checkpointing()
    x.requires_grad_()
    start = critic.features(x, time, cond)
    (critic.score(start, None).sum() + head(x, time, cond).sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    moved = [p for p in backbone.role_parameters("student").values() if p.grad is not None and p.grad.any()]
    assert moved and all(p.grad is not None for p in head.head[0].parameters())


def test_the_copy_survives_fused_and_recomputing_layers_in_bfloat16(tiny_unet: Any, tiny_batch: Any) -> None:
    x, time, cond = tiny_batch
    tiny_unet.to(torch.bfloat16)
    backbone = Backbone(tiny_unet, roles=())
    plain = EncoderCritic(backbone).features(x, time, cond)
    backbone.fuse()
    backbone.recompute_feed_forward()
    backbone.enable_gradient_checkpointing()
    torch.manual_seed(0)
    critic = EncoderCritic(backbone)
    found = critic.features(x, time, cond)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    critic.score(found, None).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critic.parameters())
    assert not any(p.grad is not None for p in backbone.parameters())


def test_it_learns_to_tell_two_gaussians_apart(tiny_unet: Any) -> None:
    """And pulls the fakes to the real ones; the frozen network stays as it is."""
    backbone = Backbone(tiny_unet, roles=())
    frozen = {name: p.clone() for name, p in backbone.named_parameters()}
    torch.manual_seed(0)
    critic = EncoderCritic(backbone)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.99))

    def scores(step: int) -> list[torch.Tensor]:
        start = critic.features(draw(0.0, 5000 + step, 6), TIME, COND)
        return [
            critic.score(critic.features(draw(m, 2 * step + i, 6), TIME, COND), start)
            for i, m in enumerate((0.4, -0.4))
        ]

    for step in range(12):
        loss = log_critic_loss(*scores(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = scores(900)
    assert accuracy([real], [fake]) > 0.9 and accuracy([fake], [real]) < 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in backbone.named_parameters())
    x = draw(-0.4, 7, 6).requires_grad_()
    opinion = log_generator_loss(critic.score(critic.features(x, TIME, COND), None))
    (gradient,) = torch.autograd.grad(opinion, x)
    with torch.no_grad():
        moved = critic.features(x - 0.1 * gradient / gradient.abs().mean(), TIME, COND)
        assert log_generator_loss(critic.score(moved, None)) < opinion


def test_a_head_on_the_bottleneck_learns_with_the_role_s_adapter(tiny_unet: Any) -> None:
    backbone = Backbone(tiny_unet, roles=("fake", "other"))
    torch.manual_seed(0)
    critic = BottleneckCritic(backbone, "fake")
    assert all(name.startswith("head.") for name, _ in critic.named_parameters())
    trained = [*critic.parameters(), *backbone.role_parameters("fake").values()]
    optimizer = torch.optim.Adam(trained, 3e-3, betas=(0.0, 0.999))
    for step in range(15):
        loss = log_critic_loss(*(critic(draw(m, 2 * step + i, 6), TIME, COND) for i, m in enumerate((0.8, -0.8))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = (critic(draw(m, 900 + i, 6), TIME, COND) for i, m in enumerate((0.8, -0.8)))
    assert accuracy([real], [fake]) > 0.9
    assert any(p.any() for n, p in backbone.role_parameters("fake").items() if "lora_B" in n)
    assert all(p.grad is None for p in backbone.role_parameters("other").values())


def test_the_log_losses() -> None:
    real, fake = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [-3.0]])
    s = torch.sigmoid
    expected = -torch.log(s(real)).mean() - torch.log(1 - s(fake)).mean()
    torch.testing.assert_close(log_critic_loss(real, fake), expected)
    torch.testing.assert_close(log_generator_loss(fake), -torch.log(s(fake)).mean())
    # non-saturating: a fake that is surely told has the full gradient
    x = torch.tensor([[-20.0]], requires_grad=True)
    log_generator_loss(x).backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(-1.0)


def test_another_network_is_refused() -> None:
    other = SimpleNamespace(network=torch.nn.Linear(2, 2))
    for make in (EncoderCritic, lambda network: BottleneckCritic(network, "fake")):
        with pytest.raises(HypersdError, match="needs a UNet or a transformer of SD3 or FLUX"):
            make(other)  # type: ignore[arg-type]


def test_a_unet_without_a_middle_block_is_refused() -> None:
    backbone = Backbone(make_unet(mid_block_type=None))
    for make in (EncoderCritic, lambda network: BottleneckCritic(network, "student"), Critic):
        with pytest.raises(HypersdError, match="a critic needs a UNet with a middle block, .* mid_block_type is null"):
            make(backbone)

"""The adversarial method: its losses as formulas, and which noise each of them adds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from model.base import Parts
from model.discriminator import AdversarialConfig, DiscriminatorOutput
from model.gan import GAN, GANConfig
from model.types import Batch, Conditioning, Denoiser
from tests.gaussian import Exact, Samples, batch_of, drawn_noise, fast_streams

SHAPE, SIZE = (2, 3, 4, 4), 6
REAL_MEAN = 5.0


@dataclass(eq=False)
class Linear:
    """A discriminator whose logit is the mean of x; it keeps what it was asked."""

    asked: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(
        self, net: Denoiser, x: Tensor, sigma: Tensor, conditioning: Conditioning
    ) -> DiscriminatorOutput:
        del net
        assert len(conditioning.text) == len(x)
        self.asked.append((x.detach(), sigma))
        return DiscriminatorOutput(x.flatten(1).mean(1), torch.ones(len(x)))


def build(*, relativistic: bool) -> tuple[GAN, Linear, Samples]:
    samples, heads = Samples(fast_streams(SIZE, "samples").samples.randn(SHAPE)), Linear()
    networks = {"generator": samples, "critic": Exact(), "discriminator": heads}
    config = GANConfig(adversarial=AdversarialConfig(relativistic=relativistic))
    return GAN(config, Parts(networks, samples.rollout)), heads, samples


def real() -> Batch:
    x0 = REAL_MEAN + torch.randn((SIZE, *SHAPE), generator=torch.Generator().manual_seed(1))
    return replace(batch_of(SIZE), x0=x0)


def noise_in(asked: tuple[Tensor, Tensor], x0: Tensor) -> Tensor:
    """What was added to x0."""
    x, sigma = asked
    level = sigma[:, :, None, None, None]
    return (x - (1.0 - level) * x0) / level


def test_the_plain_generators_loss_is_the_written_one() -> None:
    method, _, samples = build(relativistic=False)
    loss = method.generator_loss(real(), fast_streams(SIZE, "loss")).loss
    at = drawn_noise(method.config, fast_streams(SIZE, "loss"), SHAPE)
    logits = at.noised(samples.x0.detach()).mean(1)
    assert float(loss.detach()) == pytest.approx(float(softplus(-logits).mean()), rel=1e-5)


def test_the_plain_generators_gradient_is_the_written_one() -> None:
    method, _, samples = build(relativistic=False)
    method.generator_loss(real(), fast_streams(SIZE, "loss")).loss.backward()
    at = drawn_noise(method.config, fast_streams(SIZE, "loss"), SHAPE)
    logits = at.noised(samples.x0.detach()).mean(1)
    slope = -torch.sigmoid(-logits) / SIZE * (1.0 - at.sigma[:, 0]) / samples.x0[0].numel()
    expected = slope.view(-1, 1, 1, 1, 1).expand_as(samples.x0)
    assert (samples.x0.grad - expected).norm() < 1e-5 * expected.norm()


def test_the_relativistic_generators_loss_is_the_written_one() -> None:
    method, _, samples = build(relativistic=True)
    loss = method.generator_loss(real(), fast_streams(SIZE, "loss")).loss
    rng = fast_streams(SIZE, "loss")
    at = drawn_noise(method.config, rng, SHAPE)
    own = replace(at, noise=rng.samples.randn(SHAPE).double())
    x0 = real().x0
    assert x0 is not None
    gap = at.noised(samples.x0.detach()).mean(1) - own.noised(x0).mean(1)
    assert float(loss.detach()) == pytest.approx(float(softplus(-gap).mean()), rel=1e-5)


def test_in_the_generators_loss_real_and_fake_have_noise_of_their_own() -> None:
    method, heads, samples = build(relativistic=True)
    batch = real()
    assert batch.x0 is not None
    method.generator_loss(batch, fast_streams(SIZE, "loss"))
    fake, true = heads.asked
    one, other = noise_in(fake, samples.x0.detach()), noise_in(true, batch.x0)
    correlation = (one * other).mean() / one.std() / other.std()
    assert abs(float(correlation)) < 0.15
    assert torch.equal(fake[1], true[1])  # the same level


@pytest.mark.parametrize("relativistic", [False, True])
def test_in_the_discriminators_loss_they_share_their_noise(*, relativistic: bool) -> None:
    method, heads, samples = build(relativistic=relativistic)
    batch = real()
    assert batch.x0 is not None
    method.critic_loss(batch, fast_streams(SIZE, "loss"))
    ((x, sigma),) = heads.asked
    (true, fake), (level, same) = x.chunk(2), sigma.chunk(2)
    assert torch.equal(level, same)
    noise = noise_in((fake, level), samples.x0.detach())
    torch.testing.assert_close(noise_in((true, level), batch.x0), noise, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("relativistic", [False, True])
def test_the_discriminators_loss_is_the_written_one(*, relativistic: bool) -> None:
    method, _, samples = build(relativistic=relativistic)
    batch = real()
    assert batch.x0 is not None
    loss = method.critic_loss(batch, fast_streams(SIZE, "loss")).loss
    at = drawn_noise(method.config, fast_streams(SIZE, "loss"), SHAPE)
    fake, true = (at.noised(x).mean(1) for x in (samples.x0.detach(), batch.x0))
    expected = softplus(-true).mean() + softplus(fake).mean()
    if relativistic:
        expected = softplus(-(true - fake)).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_discriminators_loss_leaves_the_generator_alone() -> None:
    method, _, _ = build(relativistic=False)
    assert not method.critic_loss(real(), fast_streams(SIZE, "loss")).loss.requires_grad


@pytest.mark.parametrize(
    ("backbone", "trained"),
    [
        ("critic", ("generator", "critic", "discriminator")),
        ("teacher", ("generator", "discriminator")),
    ],
)
def test_a_teacher_as_backbone_stays_as_it_is(backbone: str, trained: tuple[str, ...]) -> None:
    needs = GAN.needs(GANConfig(backbone=backbone))  # type: ignore[arg-type]
    assert needs.trained == trained
    assert needs.backbone == backbone

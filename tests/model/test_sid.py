"""SiD's loss and gradient against what they estimate: a Fisher divergence, in closed form.

Where data, samples and both networks are normal, x0 and noise enter the loss squared at most, once
each sample's size is multiplied away; nine samples then take its exact mean (Gauss-Hermite).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from model.base import Parts
from model.matching import Scores
from model.sid import SiD, SiDConfig
from model.types import FULL_ATTENTION, Batch, Conditioning, Context, Denoiser, Prediction, Sample
from tests.gaussian import SHAPE, Samples, correlated, fast_streams, saying
from utils.seeding import SampleRNG, StepRNG

ALPHAS = (0.0, 0.5, 1.0, 1.2)
SIGMA = 0.6
NODES = ((-(3.0**0.5), 1 / 6), (0.0, 2 / 3), (3.0**0.5, 1 / 6))  # of a standard normal variable


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def double_saying(mean: float) -> Conditioning:
    return Conditioning(double(mean).expand(1, 1, 1))


def denoised(x: Tensor, sigma: Tensor | float, mean: Tensor, std: Tensor) -> Tensor:
    """E[x0 | x] where x0 is normal."""
    gain = (1.0 - sigma) * std**2 / ((1.0 - sigma) ** 2 * std**2 + sigma**2)
    return mean + gain * (x - (1.0 - sigma) * mean)


@dataclass(frozen=True, eq=False)
class Normal:
    """The optimal denoiser of one normal variable; the text is added to its mean."""

    mean: Tensor
    std: Tensor

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """Predict from x [B, 1, F, 1, 1]."""
        del context
        level = sigma[:, :, None, None, None]
        x0 = denoised(x, level, self.mean + conditioning.text[..., None, None], self.std)
        return Prediction(x0, (x - x0) / level)


TEACHER = Normal(double(-0.2), double(1.3))
START = Normal(double(0.7), double(0.8))  # of the generator's samples, as the critic knows them


class Generator(nn.Module):
    """Makes mean + text + std z, at one node z of its randomness, behind frames that are given."""

    def __init__(self, node: float, given: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(START.mean.clone())
        self.std = nn.Parameter(START.std.clone())
        self.node, self.given = node, given

    def rollout(self, net: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """A Rollout without randomness."""
        assert grad
        del net, rng
        made = self.mean + batch.conditioning.text[..., None, None] + self.std * self.node
        return Sample(torch.cat([*[made + 3.0] * self.given, made], dim=2), given_frames=self.given)


@dataclass(frozen=True, eq=False)
class Node(SampleRNG):
    """Draws one noise, and the noise level SIGMA where there is no shift."""

    node: float = 0.0

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        return double(SIGMA if function is torch.rand else self.node).expand(1, *shape)


def estimated(config: SiDConfig, *, text: float, given: int) -> Tensor:
    """The mean of SiD's loss times each sample's size, and its gradient in mean and std: [3]."""
    total = torch.zeros(3, dtype=torch.float64)
    batch = Batch(double_saying(text), double_saying(0.0), (1, 1 + given, 1, 1))
    for (z, chance), (noise, likely) in itertools.product(NODES, NODES):
        generator = Generator(z, given)
        networks = {"generator": generator, "critic": START, "teacher": TEACHER}
        sid = SiD(config, Parts(networks, generator.rollout))
        rng = StepRNG(torch.Generator(), Node([torch.Generator()], noise), [0])
        loss = sid.generator_loss(batch, rng).loss
        found = torch.stack([loss, *torch.autograd.grad(loss, list(generator.parameters()))])
        x0 = START.mean + text + START.std * z
        x = (1.0 - SIGMA) * x0 + SIGMA * noise
        x0_teacher = denoised(x, SIGMA, TEACHER.mean + config.cfg_scale * text, TEACHER.std)
        total += chance * likely * (x0 - x0_teacher).abs() * found.detach()
    return total


def divergence(mean: Tensor, std: Tensor, critic: Normal, pulled: float) -> Tensor:
    """E (E[x0 | x] of the teacher - that of the critic)^2 over noised samples N(mean, std^2).

    pulled: what guidance adds to the mean of the teacher.
    """
    centre = (1.0 - SIGMA) * mean
    variance = (1.0 - SIGMA) ** 2 * std**2 + SIGMA**2

    def gap(x: Tensor) -> Tensor:
        teacher = denoised(x, SIGMA, TEACHER.mean + pulled, TEACHER.std)
        return teacher - denoised(x, SIGMA, critic.mean, critic.std)

    slope = gap(centre + 1.0) - gap(centre)
    return gap(centre) ** 2 + slope**2 * variance


def check(alpha: float, *, cfg_scale: float = 1.0, text: float = 0.0, given: int = 0) -> None:
    """Value and gradient of the estimate against those of the divergence.

    Over samples, E gap (x0 - x0_critic) = 0 of a critic that knows them: so the loss's mean is
    (1 - alpha) times the divergence. That E vanishes wherever the samples move, too; differentiated
    it gives what the critic's own movement adds, and at alpha = 1/2 half of the full gradient.
    """
    config = SiDConfig(cfg_scale=cfg_scale, alpha=alpha, timestep_shift=1.0)
    theta = [x.clone().requires_grad_() for x in (START.mean, START.std)]
    samples = (theta[0] + text, theta[1])
    full = divergence(*samples, Normal(*samples), cfg_scale * text)
    still = divergence(*samples, Normal(START.mean + text, START.std), cfg_scale * text)
    gradients = [torch.stack(torch.autograd.grad(f, theta)) for f in (full, still)]
    value = (1.0 - alpha) * full.detach()
    expected = torch.cat([value[None], 0.5 * gradients[0] + (0.5 - alpha) * gradients[1]])
    found = estimated(config, text=text, given=given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_estimates_the_fisher_divergence_of_a_critic_that_knows_the_samples(
    alpha: float,
) -> None:
    check(alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_under_guidance_the_divergence_is_that_from_the_guided_teacher(alpha: float) -> None:
    check(alpha, cfg_scale=4.0, text=0.5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_given_frames_have_no_part_in_it(alpha: float) -> None:
    check(alpha, given=1)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_vanishes_where_critic_and_teacher_are_one(alpha: float) -> None:
    same = correlated(8)
    samples = Samples(fast_streams(4, "samples").samples.randn((2, 2, 2, 1)))
    networks = {"generator": samples, "critic": same, "teacher": same}
    sid = SiD(SiDConfig(cfg_scale=1.0, alpha=alpha), Parts(networks, samples.rollout))
    batch = Batch(saying(0.0, 4), saying(0.0, 4), (2, 2, 2, 1))
    sid.generator_loss(batch, fast_streams(4, "gradient")).loss.backward()
    assert samples.x0.grad is not None
    assert samples.x0.grad.abs().max() < 1e-6


def test_a_sample_is_scaled_by_its_own_size() -> None:
    """What it is weighed by is the mean over its elements, whatever the rest of the batch is."""
    x0 = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    x0_teacher, x0_critic = 2.0 * x0, 3.0 * x0 + 1.0
    alone = [objective(x0[i : i + 1], x0_teacher[i : i + 1], x0_critic[i : i + 1]) for i in (0, 1)]
    assert objective(x0[:2], x0_teacher[:2], x0_critic[:2]) == pytest.approx(sum(alone) / 2)
    grown = [10.0 * x[:1] for x in (x0, x0_teacher, x0_critic)]
    assert objective(*grown) == pytest.approx(10.0 * alone[0], rel=1e-5)


def test_a_sample_that_the_teacher_leaves_as_it_is_gives_a_finite_loss() -> None:
    x0 = torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(0))
    assert objective(x0, x0.clone(), x0.clone()) == 0.0


def objective(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> float:
    """SiD's loss of given scores."""
    samples = Samples(x0)
    networks = {"generator": samples, "critic": START, "teacher": TEACHER}
    sid = SiD(SiDConfig(), Parts(networks, samples.rollout))
    scores = Scores(x0, torch.ones(len(x0), 1), x0, x0_teacher, x0_critic)
    return float(sid.objective(Sample(x0), scores).loss)

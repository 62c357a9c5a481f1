"""SiD's loss and gradient, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.base import Parts, Scores
from model.sid import SiD, SiDConfig
from model.types import Batch, Sample
from tests.gaussian import (
    SHAPE,
    Samples,
    correlated,
    expected_x0,
    fast_streams,
    gain,
    judged,
    saying,
)

SMALL, ELEMENTS, SIZE = (2, 2, 2, 1), 8, 4
TEACHER, CRITIC = correlated(ELEMENTS), correlated(ELEMENTS, seed=5)
ALPHAS = (0.5, 1.0, 1.2)


def random(seed: int) -> Tensor:
    return torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(seed))


def method(config: SiDConfig, samples: Samples) -> SiD:
    networks = {"generator": samples, "critic": CRITIC, "teacher": TEACHER}
    return SiD(config, Parts(networks, samples.rollout))


def objective(config: SiDConfig, x0: Tensor, teacher: Tensor, critic: Tensor) -> Tensor:
    scores = Scores(x0, torch.ones(3, 1), x0, teacher, critic)
    return method(config, Samples(x0)).objective(Sample(x0), scores).loss


def written(
    config: SiDConfig, x0: Tensor, *, given_frames: int, mean: float
) -> tuple[Tensor, Tensor]:
    """Loss, and gradient in x0 [4, D], where both scores are linear: x0_hat = m + G (x - ..).

    With gap = P x + .., error = Q x + .. it is (P' (error - alpha gap) + (Q - alpha P)' gap) per
    size and element; the size has no gradient. P and Q carry the 1 - sigma of x.
    """
    at = judged(config, fast_streams(SIZE, "gradient"), SMALL)
    x, rows, keep = at.noised(x0), x0.double().flatten(1), torch.ones(SMALL, dtype=torch.float64)
    keep[:, :given_frames] = 0.0
    keep = keep.flatten()
    cond, uncond = (expected_x0(TEACHER, x, at.sigma, m) for m in (mean, 0.0))
    teacher = uncond + config.cfg_scale * (cond - uncond)
    gap = teacher - expected_x0(CRITIC, x, at.sigma, mean)
    error = teacher - rows
    size = (error * keep).abs().sum(1, keepdim=True) / keep.sum()
    loss = (keep * gap * (error - config.alpha * gap) / size).sum() / keep.sum() / SIZE
    moves = (1.0 - at.sigma)[:, :, None]
    p = moves * (gain(TEACHER, at.sigma) - gain(CRITIC, at.sigma))
    q = moves * gain(TEACHER, at.sigma) - torch.eye(ELEMENTS)
    gradient = torch.einsum("bde,bd->be", p, keep * (error - config.alpha * gap))
    gradient += torch.einsum("bde,bd->be", q - config.alpha * p, keep * gap)
    return loss, gradient / size / keep.sum() / SIZE


def check(config: SiDConfig, *, given_frames: int = 0, mean: float = 0.0) -> None:
    """Loss and gradient, to a millionth."""
    samples = Samples(fast_streams(SIZE, "samples").samples.randn(SMALL), given_frames=given_frames)
    batch = Batch(saying(mean, SIZE), saying(0.0, SIZE), SMALL)
    loss = method(config, samples).generator_loss(batch, fast_streams(SIZE, "gradient")).loss
    loss.backward()
    assert samples.x0.grad is not None
    x0 = samples.x0.detach()
    value, gradient = written(config, x0, given_frames=given_frames, mean=mean)
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5)
    assert (samples.x0.grad.flatten(1) - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_through_both_scores_is_the_written_one(alpha: float) -> None:
    check(SiDConfig(cfg_scale=1.0, alpha=alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_under_guidance_is_the_written_one(alpha: float) -> None:
    check(SiDConfig(cfg_scale=4.0, alpha=alpha), mean=0.5)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_given_frames_have_no_loss(alpha: float) -> None:
    check(SiDConfig(cfg_scale=1.0, alpha=alpha), given_frames=1)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_is_the_written_one(alpha: float) -> None:
    x0, teacher, critic = random(0), random(1), random(2)
    size = (x0 - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gap = teacher - critic
    expected = (gap * ((teacher - x0) - alpha * gap) / size).mean()
    assert objective(SiDConfig(alpha=alpha), x0, teacher, critic) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_alpha_one_compares_samples_with_the_critic() -> None:
    x0, teacher, critic = random(0), random(1), random(2)
    size = (x0 - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = ((teacher - critic) * (critic - x0) / size).mean()
    assert objective(SiDConfig(), x0, teacher, critic) == pytest.approx(float(expected), rel=1e-4)


def test_the_size_carries_no_gradient() -> None:
    x0, teacher, critic = random(0).requires_grad_(), random(1), random(2)
    found = torch.autograd.grad(objective(SiDConfig(alpha=0.0), x0, teacher, critic), x0)[0]
    size = (x0.detach() - teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(found, (critic - teacher) / size / x0.numel())


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gradient_vanishes_where_critic_and_teacher_are_one(alpha: float) -> None:
    samples = Samples(fast_streams(SIZE, "samples").samples.randn(SMALL))
    networks = {"generator": samples, "critic": TEACHER, "teacher": TEACHER}
    sid = SiD(SiDConfig(cfg_scale=1.0, alpha=alpha), Parts(networks, samples.rollout))
    batch = Batch(saying(0.0, SIZE), saying(0.0, SIZE), SMALL)
    sid.generator_loss(batch, fast_streams(SIZE, "gradient")).loss.backward()
    assert samples.x0.grad is not None
    assert samples.x0.grad.abs().max() < 1e-6


def test_a_sample_that_the_teacher_leaves_as_it_is_gives_a_finite_loss() -> None:
    x0 = random(0)
    assert objective(SiDConfig(), x0, x0.clone(), x0.clone()) == 0.0

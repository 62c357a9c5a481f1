"""DMD's gradient, against the formula of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.base import Parts
from model.dmd import DMD, DMDConfig
from model.matching import Scores
from model.types import LossOutput, Sample
from pipeline.bidirectional import BidirectionalTrainingPipeline
from tests.gaussian import SHAPE, Affine, Exact, batch_of, streams_of_step


def random(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn((3, *SHAPE), generator=torch.Generator().manual_seed(seed))


def method(cfg_scale: float = 1.0) -> DMD:
    networks = {"generator": Affine(), "critic": Exact(2.0), "teacher": Exact(1.0)}
    parts = Parts(networks, BidirectionalTrainingPipeline([1.0]))
    return DMD(DMDConfig(cfg_scale=cfg_scale), parts)


def objective(x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor) -> LossOutput:
    nothing = torch.zeros_like(x0)  # the noisy samples do not enter
    scores = Scores(nothing, torch.ones(len(x0), 1), nothing, x0_teacher, x0_critic)
    return method().objective(Sample(x0), scores)


def test_the_gradient_is_that_of_the_paper() -> None:
    x0, x0_teacher, x0_critic = random(0).requires_grad_(), random(1), random(2)
    objective(x0, x0_teacher, x0_critic).loss.backward()
    weight = (x0.detach() - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = (x0_critic - x0_teacher) / weight / x0.numel()
    assert x0.grad is not None
    assert (x0.grad - expected).norm() < 1e-6 * expected.norm()


def test_each_sample_is_weighted_by_its_own_distance_to_the_teacher() -> None:
    x0, near, far = random(0).requires_grad_(), random(0) + 0.1, random(0) + 0.1
    far[0] += 0.9
    strong = torch.autograd.grad(objective(x0, near, near + 1.0).loss, x0)[0]
    weak = torch.autograd.grad(objective(x0, far, far + 1.0).loss, x0)[0]
    torch.testing.assert_close(weak[0], 0.1 * strong[0], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(weak[1:], strong[1:])


def test_the_gradient_vanishes_where_critic_and_teacher_agree() -> None:
    x0, agreed = random(0).requires_grad_(), random(1)
    objective(x0, agreed, agreed.clone()).loss.backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0))


def test_a_sample_that_the_teacher_leaves_as_it_is_gives_a_finite_gradient() -> None:
    x0 = random(0).requires_grad_()
    objective(x0, x0.detach().clone(), x0.detach().clone()).loss.backward()
    assert torch.equal(x0.grad, torch.zeros_like(x0))


def test_the_loss_is_half_the_mean_square_of_the_gradient() -> None:
    x0, x0_teacher, x0_critic = random(0), random(1), random(2)
    weight = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = 0.5 * ((x0_critic - x0_teacher) / weight).square().mean()
    assert objective(x0, x0_teacher, x0_critic).loss == pytest.approx(float(expected), rel=1e-5)


def test_the_metric_is_the_mean_size_of_the_gradient() -> None:
    x0, x0_teacher, x0_critic = random(0), random(1), random(2)
    weight = (x0 - x0_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    expected = ((x0_critic - x0_teacher) / weight).abs().mean()
    metric = objective(x0, x0_teacher, x0_critic).metrics["dmd_gradient"]
    assert metric == pytest.approx(float(expected), rel=1e-5)
    assert not metric.requires_grad


def test_one_loss_costs_one_critic_and_one_teacher_forward() -> None:
    dmd = method()
    dmd.generator_loss(batch_of(4), streams_of_step(4))
    assert [len(net.calls) for net in (dmd.critic, dmd.teacher)] == [1, 1]


def test_both_scores_are_compared_at_the_same_noise_level() -> None:
    dmd = method()
    dmd.generator_loss(batch_of(4), streams_of_step(4))
    assert dmd.critic.calls == dmd.teacher.calls


def test_guidance_acts_on_the_teacher_alone() -> None:
    dmd = method(cfg_scale=3.0)
    dmd.generator_loss(batch_of(4), streams_of_step(4))
    assert [net.calls[0][0] for net in (dmd.critic, dmd.teacher)] == [4, 8]


def test_noise_levels_stay_within_their_bounds() -> None:
    config = DMDConfig(timestep_shift=1.0, min_sigma=0.4, max_sigma=0.6)
    sigma = config.draw_sigma(streams_of_step(200).samples, torch.zeros(200))
    assert (float(sigma.min()), float(sigma.max())) == pytest.approx((0.4, 0.6))
    assert 0.4 < float(sigma.median()) < 0.6


def test_the_critic_learns_the_velocity_of_noised_samples() -> None:
    dmd = method()
    loss = dmd.critic_loss(batch_of(64), streams_of_step(64, phase="critic")).loss
    # Affine starts at velocity 0, so its sample at sigma 1 is N(0, 1), and so is the data that
    # the critic, exact for a deviation of 2, is asked about: noise - x0 has variance 2.
    rng = streams_of_step(64, phase="critic").samples
    x0 = rng.randn(SHAPE)
    sigma, noise = dmd.config.draw_sigma(rng, x0), rng.randn(SHAPE)
    level = sigma[:, :, None, None, None]
    x = (1.0 - level) * x0 + level * noise
    guess = Exact(2.0)(x, sigma, batch_of(64).conditioning).velocity
    assert loss == pytest.approx(float((guess - (noise - x0)).square().mean()), rel=1e-5)

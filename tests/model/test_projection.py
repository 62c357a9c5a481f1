"""Projected DMD: what it takes away, what it leaves, what that does where a critic is behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.base import Parts
from model.causvid import CausVid, CausVidConfig
from model.dmd import DMD, DMDConfig
from model.flow import add_noise, expand
from model.given import learnt
from model.matching import Comparison, Scores
from model.options.projection import Projection, without
from model.phased_dmd import PhasedDMD, PhasedDMDConfig, further_velocity
from model.sid import SiDConfig
from model.types import Sample
from tests.gaussian import SHAPE, Exact, batch_of, streams_of_step


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_left_along_the_error_and_all_of_what_is_across_it() -> None:
    d, p = numbers(3, *SHAPE), numbers(3, *SHAPE, seed=1)
    left = without(d, p)
    assert (left * p).sum((1, 2, 3, 4)).abs().max() < 1e-5
    across = d - left  # is along p
    cosine = torch.cosine_similarity(across.flatten(1), p.flatten(1)).abs()
    assert torch.allclose(cosine, torch.ones(3), atol=1e-5)


def test_each_sample_has_its_own_error() -> None:
    d, p = numbers(3, *SHAPE), numbers(3, *SHAPE, seed=1)
    alone = torch.cat([without(d[i : i + 1], p[i : i + 1]) for i in range(3)])
    assert torch.allclose(without(d, p), alone, atol=1e-6)


def test_without_an_error_all_is_left() -> None:
    d = numbers(2, *SHAPE)
    assert torch.equal(without(d, torch.zeros_like(d)), d)


# ---- the loss's gradient


def comparison(given_frames: int = 0) -> Comparison:
    x0, noise = numbers(2, *SHAPE).requires_grad_(), numbers(2, *SHAPE, seed=1)
    sigma = torch.full((2, 1), 0.6)
    x = add_noise(x0.detach(), noise, sigma)
    scores = Scores(x, sigma, noise, numbers(2, *SHAPE, seed=2), numbers(2, *SHAPE, seed=3))
    sample = Sample(x0, given_frames=given_frames)
    return Comparison(batch_of(2), streams_of_step(2), sample, scores, x0.detach())


@pytest.mark.parametrize("given_frames", [0, 1])
def test_the_gradient_is_the_written_one_on_frames_that_were_made(given_frames: int) -> None:
    at = comparison(given_frames)
    option = Projection(DMDConfig(project=True), Parts({}))
    d = learnt(at.scores.x0_critic - at.scores.x0_teacher, given_frames)
    p = learnt(at.scores.x0_critic - at.target, given_frames)
    adjust = option.on_generator(at).adjust
    assert adjust is not None
    for i in range(2):
        f, g = d[i].flatten().double(), p[i].flatten().double()
        expected = f - (f @ g) / (g @ g) * g
        assert torch.allclose(adjust(d)[i].flatten().double(), expected, atol=1e-5)


def test_the_normaliser_is_that_of_the_gradient_as_it_was() -> None:
    """DMD's loss at the sample is half the mean square of the gradient, projected or not."""
    found = []
    for project in (False, True):
        config = DMDConfig(5.0, cfg_scale=1.0, project=project)
        networks = {"generator": Exact(), "critic": Exact(0.5), "teacher": Exact(2.0)}
        method = DMD(config, Parts(networks, lambda *_, grad: Sample(numbers(2, *SHAPE)), [1.0]))
        sample, scores = method.simulate(batch_of(2), streams_of_step(2))
        loss = method.generator_loss(batch_of(2), streams_of_step(2)).loss
        size = (sample.x0 - scores.x0_teacher).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = scores.x0_critic - scores.x0_teacher
        if project:
            gradient = without(gradient, scores.x0_critic - sample.x0)
        found.append((float(loss), float(0.5 * (gradient / size).square().mean())))
    assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    assert found[1][0] == pytest.approx(found[1][1], rel=1e-5)
    assert found[1][0] < found[0][0]


def test_it_is_off_unless_asked_and_known_to_dmd_and_what_follows_it() -> None:
    assert not Projection.asked(DMDConfig())
    assert not hasattr(SiDConfig(), "project")
    for method, config in (
        (DMD, DMDConfig),
        (CausVid, CausVidConfig),
        (PhasedDMD, PhasedDMDConfig),
    ):
        assert config(project=True).project
        assert Projection in method.takes


def test_of_a_sample_that_ends_above_0_the_error_is_that_of_what_the_critic_regresses() -> None:
    """At s > 0 the critic learns `further_velocity`, and not the velocity to the student's x0."""
    anchor, noise, sigma = numbers(2, *SHAPE), numbers(2, *SHAPE, seed=1), torch.full((2, 1), 0.95)
    x = numbers(2, *SHAPE, seed=4)
    scores = Scores(x, sigma, noise, x, x)
    method = PhasedDMD(
        PhasedDMDConfig(), Parts({"critic": Exact(), "teacher": Exact(), "generator": Exact()},
                                 lambda *_, grad: Sample(x), [1.0])
    )  # fmt: skip
    ended = Sample(numbers(2, *SHAPE, seed=5), level=0.9, anchor=anchor)
    velocity, _ = further_velocity(anchor, noise, sigma, 0.9)
    assert torch.allclose(method.critic_target(ended, scores), x - expand(sigma) * velocity)
    whole = Sample(numbers(2, *SHAPE, seed=5))
    assert torch.equal(method.critic_target(whole, scores), whole.x0)


# ---- an exact critic, or one that is behind by `lag`: in closed form


@pytest.mark.parametrize(
    ("size", "lag", "along", "across"),
    [
        (2, 0.0, 0.5, 0.5),
        (8, 0.0, 0.875, 0.875),
        (512, 0.0, 0.998, 0.998),
        (512, 8.0, 0.903, 0.998),
    ],
)
def test_the_mean_of_what_is_left(size: int, lag: float, along: float, across: float) -> None:
    """Exact: 1 - 1 / D of the difference. Behind by a vector: less of it along that vector.

    Samples and data are N(., 1); the teacher's mean is apart from the generator's by 1 along the
    lag and by 1 across it.
    """
    sigma, draws, batch = 0.7, 200_000 if size < 512 else 20_000, 2000
    gain = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
    rng = torch.Generator().manual_seed(0)
    behind, apart = torch.zeros(size), torch.zeros(size)
    behind[0], apart[0], apart[1] = lag, 1.0, 1.0
    left, whole = torch.zeros(size), torch.zeros(size)
    for _ in range(draws // batch):
        x0 = torch.randn(batch, size, generator=rng)
        y = (1 - sigma) * x0 + sigma * torch.randn(batch, size, generator=rng)

        def denoised(mean: Tensor, y: Tensor = y) -> Tensor:
            return mean + gain * (y - (1 - sigma) * mean)

        critic, teacher = denoised(behind), denoised(apart)
        left += without(critic - teacher, critic - x0).sum(0)
        whole += (critic - teacher).sum(0)
    share = left / whole
    assert float(share[1]) == pytest.approx(across, abs=0.01)
    if not lag:
        assert float(share[0]) == pytest.approx(along, abs=0.01)
    else:
        assert float(share[0]) == pytest.approx(along, abs=0.02)

"""Whether distillation learns: an exact Gaussian teacher, and a student that starts as noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.dmd import DMD, DMDConfig
from model.flow import step_sigmas
from pipeline.bidirectional import BidirectionalInferencePipeline, BidirectionalTrainingPipeline
from tests.gaussian import SHAPE, Affine, Exact, batch_of, saying, streams, streams_of_step

MEAN, BATCH, STEPS, GENERATOR_EVERY = 2.0, 8, 600, 3
SIGMAS = step_sigmas([1000, 750, 500, 250], 5.0)


def train() -> DMD:
    """Distil N(2, 1) into an affine student of four steps with an affine critic."""
    networks = {"generator": Affine(0), "critic": Affine(100), "teacher": Exact(1.0)}
    method = DMD(DMDConfig(cfg_scale=1.0), networks, BidirectionalTrainingPipeline(SIGMAS))
    rates = {"generator": 3e-3, "critic": 1e-2}
    optimizers = {
        role: torch.optim.Adam(networks[role].parameters(), lr=lr, betas=(0.5, 0.99))
        for role, lr in rates.items()
    }
    for step in range(STEPS):
        losses = {"critic": method.critic_loss}
        if step % GENERATOR_EVERY == 0:
            losses = {"generator": method.generator_loss, **losses}
        for role, loss in losses.items():
            optimizers[role].param_groups[0]["lr"] = rates[role] * (1.0 - step / STEPS)
            optimizers[role].zero_grad()
            loss(batch_of(BATCH, mean=MEAN), streams_of_step(BATCH, step, role)).loss.backward()
            optimizers[role].step()
    return method


@pytest.fixture(scope="module")
def student() -> DMD:
    return train()


def four_steps(generator: Affine) -> Tensor:
    pipeline = BidirectionalInferencePipeline(generator, SIGMAS)
    return pipeline.sample(saying(MEAN, 64), saying(0.0, 64), SHAPE, streams(64))


def test_the_student_starts_at_mean_zero() -> None:
    assert abs(float(four_steps(Affine(0)).mean())) < 0.05


def test_the_four_step_student_reaches_the_teachers_mean(student: DMD) -> None:
    assert float(four_steps(student.generator).mean()) == pytest.approx(MEAN, abs=0.05)


def test_the_students_samples_reach_the_teachers_deviation(student: DMD) -> None:
    # The critic sees samples of all four exits and, being affine, only their pooled variance.
    samples = [
        student.rollout(student.generator, batch_of(64), streams_of_step(64, i), grad=False).x0
        for i in range(40)
    ]
    assert float(torch.cat(samples).std()) == pytest.approx(1.0, abs=0.1)


def test_the_critic_ends_at_the_students_own_velocity(student: DMD) -> None:
    x, sigma = streams(64, seed=1).randn(SHAPE), torch.full((64, 1), 0.8)
    learned = student.critic(x, sigma, saying(MEAN, 64)).velocity
    exact = Exact(1.0)(x, sigma, saying(MEAN, 64)).velocity
    assert (learned - exact).norm() < 0.05 * exact.norm()

"""The few-step loop: which noise levels, how often, with which noise."""

from __future__ import annotations

import pytest
import torch

from model.flow import step_sigmas
from pipeline.few_step import few_step, renoise
from tests.gaussian import SHAPE, Exact, saying, streams

SIGMAS = step_sigmas([1000, 750, 500, 250], 5.0)


def test_four_steps_call_the_network_four_times_at_the_listed_levels() -> None:
    net = Exact()
    few_step(net, streams(3).randn(SHAPE), saying(0.0, 3), SIGMAS, streams(3, seed=1))
    assert [size for size, _ in net.calls] == [3, 3, 3, 3]
    assert [sigma for _, sigma in net.calls] == pytest.approx([1.0, 0.9375, 5 / 6, 0.625])


def test_one_step_is_one_prediction_from_noise() -> None:
    noise = streams(3).randn(SHAPE)
    x0 = few_step(Exact(), noise, saying(2.0, 3), [1.0], streams(3, seed=1))
    assert torch.equal(x0, Exact()(noise, torch.ones(3, 1), saying(2.0, 3)).x0)


def test_each_further_step_starts_from_fresh_noise_on_the_last_prediction() -> None:
    noise = streams(3).randn(SHAPE)
    result = few_step(Exact(), noise, saying(2.0, 3), [1.0, 0.625], streams(3, seed=1))
    first = Exact()(noise, torch.ones(3, 1), saying(2.0, 3)).x0
    x = 0.375 * first + 0.625 * streams(3, seed=1).randn(SHAPE)
    second = Exact()(x, torch.full((3, 1), 0.625), saying(2.0, 3)).x0
    torch.testing.assert_close(result, second)


def test_an_exact_denoiser_of_points_needs_one_step() -> None:
    noise = streams(3).randn(SHAPE)
    x0 = few_step(Exact(std=0.0), noise, saying(2.0, 3), SIGMAS, streams(3, seed=1))
    torch.testing.assert_close(x0, torch.full_like(x0, 2.0))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    def sample(size: int) -> torch.Tensor:
        noise = streams(size).randn(SHAPE)
        return few_step(Exact(), noise, saying(2.0, size), SIGMAS, streams(size, seed=1))

    assert torch.equal(sample(4)[:1], sample(1))


def test_progress_is_told_after_each_step() -> None:
    told: list[tuple[int, int]] = []
    noise = streams(1).randn(SHAPE)
    few_step(
        Exact(), noise, saying(0.0, 1), SIGMAS, streams(1), on_step=lambda *step: told.append(step)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_renoising_mixes_the_prediction_with_each_samples_own_noise() -> None:
    x0 = torch.ones(2, *SHAPE)
    expected = 0.25 * x0 + 0.75 * streams(2, seed=1).randn(SHAPE)
    torch.testing.assert_close(renoise(x0, 0.75, streams(2, seed=1)), expected)

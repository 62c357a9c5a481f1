"""Noise arithmetic: exact round trips and the numbers of the four-step schedule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.flow import (
    add_noise,
    constant_sigma,
    expand,
    shift,
    step_sigmas,
    velocity_to_x0,
    x0_to_score,
    x0_to_velocity,
)

SHAPE = (2, 3, 4, 5, 6)  # [B, C, F, H, W]
PER_SAMPLE = torch.tensor([[0.1], [0.9]])
PER_FRAME = torch.tensor([[0.1, 0.3, 0.6, 1.0], [0.9, 0.5, 0.7, 0.2]])


def random(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_noise_levels_broadcast_over_all_but_samples_and_frames() -> None:
    assert expand(PER_FRAME).shape == (2, 1, 4, 1, 1)


def test_at_level_zero_there_is_no_noise_and_at_level_one_nothing_else() -> None:
    x0, noise = random(0), random(1)
    assert torch.equal(add_noise(x0, noise, torch.zeros(2, 1)), x0)
    assert torch.equal(add_noise(x0, noise, torch.ones(2, 1)), noise)


def test_each_frame_gets_its_own_noise_level() -> None:
    x0, noise = random(0), random(1)
    frame = add_noise(x0, noise, PER_FRAME)[1, :, 2]
    torch.testing.assert_close(frame, 0.3 * x0[1, :, 2] + 0.7 * noise[1, :, 2])


@pytest.mark.parametrize("sigma", [PER_SAMPLE, PER_FRAME])
def test_the_true_velocity_leads_back_to_the_clean_latents(sigma: Tensor) -> None:
    x0, noise = random(0), random(1)
    x = add_noise(x0, noise, sigma)
    torch.testing.assert_close(velocity_to_x0(x, noise - x0, sigma), x0, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("sigma", [PER_SAMPLE, PER_FRAME])
def test_velocity_and_x0_are_two_names_for_one_thing(sigma: Tensor) -> None:
    x, velocity = random(0), random(1)
    there = velocity_to_x0(x, velocity, sigma)
    torch.testing.assert_close(x0_to_velocity(x, there, sigma), velocity, atol=1e-5, rtol=0.0)


def test_half_precision_latents_are_handled_in_single_precision() -> None:
    x0, velocity = random(0).bfloat16(), random(1).bfloat16()
    sigma = torch.full((2, 1), 1e-3)
    result = velocity_to_x0(x0, velocity, sigma)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x0.float() - 1e-3 * velocity.float())


def test_the_score_of_known_data_points_at_its_noise() -> None:
    x0, noise = random(0), random(1)
    x = add_noise(x0, noise, PER_SAMPLE)
    # d log N(x; (1 - sigma) x0, sigma^2) / dx = -noise / sigma
    torch.testing.assert_close(
        x0_to_score(x, x0, PER_SAMPLE), -noise / expand(PER_SAMPLE), atol=1e-4, rtol=1e-5
    )


def test_shift_keeps_both_ends() -> None:
    assert (shift(0.0, 5.0), shift(1.0, 5.0)) == (0.0, 1.0)


def test_shift_one_changes_nothing() -> None:
    assert shift(0.3, 1.0) == 0.3


def test_shift_pushes_levels_toward_noise() -> None:
    assert shift(0.5, 5.0) == pytest.approx(5.0 / 6.0)


def test_shift_treats_tensors_and_numbers_alike() -> None:
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0])
    expected = torch.tensor([shift(float(level), 3.0) for level in levels])
    torch.testing.assert_close(shift(levels, 3.0), expected)


def test_four_steps_have_the_published_noise_levels() -> None:
    assert step_sigmas([1000, 750, 500, 250], 5.0) == pytest.approx(
        [1.0, 0.9375, 5.0 / 6.0, 0.625], abs=1e-12
    )


def test_a_constant_level_is_one_number_per_sample() -> None:
    sigma = constant_sigma(0.625, random(0).bfloat16())
    assert torch.equal(sigma, torch.full((2, 1), 0.625))

"""Samples from noised real videos: the levels, the past that is seen, the gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.causal import CausalLayout
from model.flow import expand
from model.types import Batch
from model.wan.masks import block_causal, teacher_forcing
from pipeline.data import DataRollout
from tests.gaussian import SHAPE, Affine, Called, Watched, batch_of, fast_streams

SIGMAS, SIZE, REAL = [1.0, 0.8, 0.5], 40, 3.0
BLOCKS = CausalLayout(num_frame_per_block=2, independent_first_frame=True)
layouts = pytest.mark.parametrize("layout", [None, BLOCKS], ids=["whole", "blocks"])


def real() -> Batch:
    return replace(batch_of(SIZE), x0=torch.full((SIZE, *SHAPE), REAL))


def roll(
    layout: CausalLayout | None, *, teacher_forcing: bool = False, grad: bool = True
) -> tuple[Called, Tensor]:
    """What the generator is asked, and the sample."""
    net = Watched(Affine())
    rollout = DataRollout(SIGMAS, layout, teacher_forcing=teacher_forcing)
    x0 = rollout(net, real(), fast_streams(SIZE, "data"), grad=grad).x0
    (call,) = net.calls
    return call, x0


@layouts
def test_levels_are_the_listed_ones(layout: CausalLayout | None) -> None:
    assert roll(layout)[0].sigma.unique().tolist() == pytest.approx([0.5, 0.8, 1.0])


def test_each_block_has_a_level_of_its_own() -> None:
    sigma = roll(BLOCKS)[0].sigma
    assert sigma.shape == (SIZE, 3)
    assert torch.equal(sigma[:, 1], sigma[:, 2])
    assert (sigma[:, 0] != sigma[:, 1]).float().mean() > 0.4


def test_a_bidirectional_video_has_one_level() -> None:
    assert roll(None)[0].sigma.shape == (SIZE, 1)


@layouts
def test_the_generator_sees_real_latents_on_the_straight_path_to_noise(
    layout: CausalLayout | None,
) -> None:
    call, _ = roll(layout)
    level = expand(call.sigma)
    noise = (call.x - (1.0 - level) * REAL) / level
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.03)


def test_blocks_see_the_noisy_past() -> None:
    assert roll(BLOCKS)[0].context.mask == block_causal([1, 2])


def test_blocks_see_the_clean_past_under_teacher_forcing() -> None:
    call, x0 = roll(BLOCKS, teacher_forcing=True)
    assert call.context.mask == teacher_forcing([1, 2])
    assert torch.equal(call.x[:, :, :3], torch.full((SIZE, *SHAPE), REAL))
    assert x0.shape == (SIZE, *SHAPE)


@layouts
def test_the_sample_is_what_the_generator_predicts(layout: CausalLayout | None) -> None:
    call, x0 = roll(layout)
    assert torch.equal(x0, Affine()(call.x, call.sigma, call.conditioning).x0)


@pytest.mark.parametrize("grad", [False, True])
@layouts
def test_the_sample_carries_a_gradient_when_asked(
    layout: CausalLayout | None, *, grad: bool
) -> None:
    call, x0 = roll(layout, grad=grad)
    assert (call.grad, x0.requires_grad) == (grad, grad)


def test_no_frame_is_given() -> None:
    rollout = DataRollout(SIGMAS, None, teacher_forcing=False)
    assert rollout(Affine(), real(), fast_streams(SIZE, "data"), grad=True).given_frames == 0

"""Block-causal layouts, and networks that see a whole causal video in one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.base import Parts
from model.causal import (
    BlockCausal,
    CausalLayout,
    TeacherForced,
    count_blocks,
    on_real_video,
    per_block,
)
from model.diffusion import Diffusion, DiffusionConfig
from model.guidance import guided_velocity
from model.types import Batch, Conditioning
from model.wan.masks import block_causal, teacher_forcing
from tests.gaussian import Called, Said, Watched, batch_of, fast_streams, saying

SHAPE, SIZE, FRAMES = (2, 5, 2, 2), 3, 5  # [C, F, H, W]
LAYOUT = CausalLayout(2, independent_first_frame=True, local_attn_size=4, sink_size=1)
SIZES = [1, 2, 2]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- layout ----


@pytest.mark.parametrize(
    ("layout", "frames", "blocks"),
    [
        (CausalLayout(3), 21, [3] * 7),
        (CausalLayout(1), 4, [1] * 4),
        (CausalLayout(2, independent_first_frame=True), 5, [1, 2, 2]),
        (CausalLayout(3, independent_first_frame=True), 31, [1, *[3] * 10]),  # of TI2V-5B
    ],
)
def test_a_video_falls_into_blocks(layout: CausalLayout, frames: int, blocks: list[int]) -> None:
    assert layout.blocks(frames) == blocks
    assert count_blocks(layout, frames) == len(blocks)


def test_a_bidirectional_video_is_one_block() -> None:
    assert count_blocks(None, 21) == 1


@pytest.mark.parametrize(
    ("given", "old", "new"), [(0, [], [1, 2, 2]), (1, [1], [2, 2]), (3, [1, 2], [2])]
)
def test_given_frames_are_whole_blocks(given: int, old: list[int], new: list[int]) -> None:
    assert CausalLayout(2, independent_first_frame=True).split(5, given) == (old, new)


@pytest.mark.parametrize("given", [2, 4, 5, 6])
def test_frames_that_end_within_a_block_or_fill_the_video_are_refused(given: int) -> None:
    with pytest.raises(ValueError) as caught:
        CausalLayout(2, independent_first_frame=True).split(5, given)
    assert str(caught.value) == (
        f"{given} given frames of 5 must end where a block ends: at one of 1, 3"
    )


def test_a_video_of_one_block_takes_no_given_frames() -> None:
    with pytest.raises(ValueError, match="none, the video is one block"):
        CausalLayout(3).split(3, 1)


def test_values_per_block_become_values_per_frame() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    expected = torch.tensor([[1.0, 2.0, 2.0, 3.0, 3.0], [4.0, 5.0, 5.0, 6.0, 6.0]])
    assert torch.equal(per_block(values, LAYOUT, 5), expected)


def test_without_blocks_there_is_one_value() -> None:
    values = torch.tensor([[1.0], [2.0]])
    assert per_block(values, None, 5) is values


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (CausalLayout(2), "causal.num_frame_per_block: a block of 2 frames must divide the 5"),
        (CausalLayout(5, local_attn_size=4), "causal.local_attn_size: a window of 4 frames"),
        (CausalLayout(1, local_attn_size=3, sink_size=3), "causal.local_attn_size: a window of 3"),
        (CausalLayout(1, sink_size=-1), "causal.sink_size: must be at least 0, got -1"),
    ],
)
def test_impossible_layouts_are_named(layout: CausalLayout, problem: str) -> None:
    (found,) = layout.problems(5)
    assert found.startswith(problem)


def test_possible_layouts_have_no_problem() -> None:
    assert not list(LAYOUT.problems(5))


# ---- wrappers ----


def asked(
    *, past: bool, batch: int = SIZE, clean_sigma: Tensor | None = None, image: bool = False
) -> Called:
    """What a network is asked through a wrapper, on x = 1 at levels 0.1 .. 0.5."""
    net = Watched(Said(2.0))
    clean = random(SIZE, *SHAPE)
    wrapped = TeacherForced(net, LAYOUT, clean, clean_sigma) if past else BlockCausal(net, LAYOUT)
    sigma = torch.arange(1, 6).expand(batch, 5) / 10
    frames = random(batch, 20, *SHAPE[1:], seed=3) if image else None
    text = Conditioning(torch.zeros(batch, 1, 1), first_frame=frames)
    prediction = wrapped(torch.ones(batch, *SHAPE), sigma, text)
    assert prediction.x0.shape == prediction.velocity.shape == (batch, *SHAPE)
    (call,) = net.calls
    return call


def test_block_causal_asks_for_the_video_under_its_mask() -> None:
    call = asked(past=False)
    assert call.context.mask == block_causal(SIZES, window=4, sink=1)
    assert call.context.frame_index is None
    assert torch.equal(call.x, torch.ones(SIZE, *SHAPE))


def test_teacher_forcing_asks_for_the_clean_video_and_then_the_noisy_one() -> None:
    call = asked(past=True)
    assert call.context.mask == teacher_forcing(SIZES, window=4, sink=1)
    assert torch.equal(call.x[:, :, :5], random(SIZE, *SHAPE))
    assert torch.equal(call.x[:, :, 5:], torch.ones(SIZE, *SHAPE))


def test_the_clean_half_has_noise_level_zero() -> None:
    expected = torch.tensor([0.0] * 5 + [0.1, 0.2, 0.3, 0.4, 0.5]).expand(SIZE, 10)
    assert torch.equal(asked(past=True).sigma, expected)


def test_both_halves_have_the_same_frames() -> None:
    assert asked(past=True).context.frame_index.tolist() == [0, 1, 2, 3, 4] * 2  # type: ignore[union-attr]


def test_a_noised_past_has_its_own_level() -> None:
    level = torch.tensor([[0.05], [0.06], [0.07]])
    assert torch.equal(asked(past=True, clean_sigma=level).sigma[:, :5], level.expand(-1, 5))


def test_a_guided_batch_sees_the_clean_video_twice() -> None:
    level = torch.tensor([[0.05], [0.06], [0.07]])
    call = asked(past=True, batch=2 * SIZE, clean_sigma=level)
    clean = random(SIZE, *SHAPE)
    assert torch.equal(call.x[:, :, :5], torch.cat([clean, clean]))
    assert torch.equal(call.sigma[:, 0], torch.cat([level, level])[:, 0])


def test_a_first_frame_is_given_to_both_halves() -> None:
    frames = asked(past=True, image=True).conditioning.first_frame
    expected = random(SIZE, 20, *SHAPE[1:], seed=3)
    assert frames is not None
    assert torch.equal(frames, torch.cat([expected, expected], dim=2))


def test_one_level_for_all_frames_will_do() -> None:
    net = Watched(Said())
    x = torch.ones(SIZE, *SHAPE)
    TeacherForced(net, LAYOUT, x)(x, torch.full((SIZE, 1), 0.5), saying(0.0, SIZE))
    assert torch.equal(net.calls[0].sigma[0], torch.tensor([0.0] * 5 + [0.5] * 5))


def test_what_is_predicted_is_that_of_the_noisy_half() -> None:
    x, sigma = random(SIZE, *SHAPE), torch.full((SIZE, 1), 0.5)
    wrapped = TeacherForced(Said(2.0), LAYOUT, torch.zeros(SIZE, *SHAPE))
    torch.testing.assert_close(wrapped(x, sigma, saying(0.0, SIZE)).x0, x - 1.0)


def test_guidance_through_a_wrapper_is_one_batch_of_two() -> None:
    net = Watched(Said(2.0))
    x, sigma = random(SIZE, *SHAPE), torch.full((SIZE, 1), 0.5)
    velocity = guided_velocity(
        TeacherForced(net, LAYOUT, x), x, sigma, saying(1.0, SIZE), saying(0.0, SIZE), cfg_scale=3.0
    )
    assert torch.equal(velocity, torch.full_like(x, 2.0))
    assert [len(call.x) for call in net.calls] == [2 * SIZE]


def test_without_a_layout_the_network_is_used_as_it_is() -> None:
    net = Said()
    assert on_real_video(net, None, None) is net
    assert on_real_video(net, None, random(SIZE, *SHAPE)) is net


# ---- diffusion of causal models ----


def diffusion(config: DiffusionConfig, size: int = SIZE, value: float = 3.0) -> Called:
    net, x0 = Watched(Said()), torch.full((size, *SHAPE), value)
    batch: Batch = replace(batch_of(size), x0=x0)
    parts = Parts({"generator": net}, None, (), LAYOUT)
    Diffusion(config, parts).generator_loss(batch, fast_streams(size, "diffusion"))
    (call,) = net.calls
    return call


def test_diffusion_forcing_shows_each_block_at_a_level_of_its_own() -> None:
    call = diffusion(DiffusionConfig(teacher_forcing=False), size=40)
    assert call.context.mask == block_causal(SIZES, window=4, sink=1)
    first, second, third = call.sigma[:, 0], call.sigma[:, 1], call.sigma[:, 3]
    assert torch.equal(call.sigma, torch.stack([first, second, second, third, third], dim=1))
    assert (first != second).all()
    assert (second != third).all()


def test_teacher_forcing_sees_the_clean_past() -> None:
    call = diffusion(DiffusionConfig())
    assert call.context.mask == teacher_forcing(SIZES, window=4, sink=1)
    assert torch.equal(call.x[:, :, :5], torch.full((SIZE, *SHAPE), 3.0))
    assert torch.equal(call.sigma[:, :5], torch.zeros(SIZE, 5))


def test_the_past_may_be_noised_up_to_a_level() -> None:
    sigma = diffusion(DiffusionConfig(clean_noise=0.2), size=400).sigma[:, :5]
    assert torch.equal(sigma, sigma[:, :1].expand(-1, 5))
    assert 0.0 <= float(sigma.min()) < 0.01
    assert 0.19 < float(sigma.max()) < 0.2
    assert float(sigma.mean()) == pytest.approx(0.1, abs=0.01)


def test_a_noised_past_has_noise_of_its_own() -> None:
    call = diffusion(DiffusionConfig(clean_noise=1.0), size=400, value=0.0)
    past, noisy = call.x.split(5, dim=2)
    levels = call.sigma[:, None, :, None, None].split(5, dim=2)
    one, other = past / levels[0].clamp(min=1e-3), noisy / levels[1]
    assert float(one.std()) == pytest.approx(1.0, abs=0.05)
    assert abs(float((one * other).mean())) < 0.03

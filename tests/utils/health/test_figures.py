"""Figures of clips that are made by hand, so that what they measure is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from utils.health.figures import apart, distance, drift, measure, pooled, spread
from utils.seeding import generator


def clips(count: int = 8, frames: int = 9, side: int = 8, seed: int = 0) -> Tensor:
    """Clips [N, 3, P, S, S] in (0.2, 0.8) in which every frame is drawn afresh."""
    shape = (count, 3, frames, side, side)
    return 0.2 + 0.6 * torch.rand(shape, generator=generator(seed, "clips"))


def test_grey_clips_have_their_brightness_and_nothing_else() -> None:
    found = measure(torch.full((4, 3, 5, 8, 8), 0.25), 2, pixels=True)
    assert found.pop("exposure") == pytest.approx(0.25)
    assert all(value == pytest.approx(0.0, abs=1e-6) for value in found.values())
    assert found.keys() == {
        "contrast", "chroma", "sharpness", "clipped", "motion", "drift", "diversity_seeds",
        "diversity_prompts", "prompt_effect",
    }  # fmt: skip


def test_a_still_clip_has_no_motion_and_an_alternating_one_as_much_as_it_changes() -> None:
    still = clips()[:, :, :1].expand(-1, -1, 9, -1, -1)
    assert measure(still, 2, pixels=True)["motion"] == 0.0
    flicker = torch.zeros(2, 3, 6, 8, 8)
    flicker[:, :, ::2] = 0.5
    assert measure(flicker, 1, pixels=True)["motion"] == pytest.approx(0.5)


def test_grain_finer_than_a_cell_is_hardly_motion() -> None:
    grain = 0.5 + 0.2 * torch.randn((1, 3, 5, 256, 256), generator=generator("grain"))
    motion = measure(grain, 1, pixels=True)["motion"]
    raw = float((grain[:, :, 1:] - grain[:, :, :-1]).abs().mean())
    assert motion == pytest.approx(raw / 8, rel=0.05)  # the mean of 64 pixels


def test_seeds_that_are_all_alike_have_no_diversity_though_prompts_differ() -> None:
    alike = clips(4).repeat_interleave(2, dim=0)
    found = measure(alike, 2, pixels=True)
    assert found["diversity_seeds"] == 0.0
    assert found["diversity_prompts"] == pytest.approx(0.6 / math.sqrt(6.0), rel=0.05)


def test_prompts_that_are_all_alike_have_no_diversity_though_seeds_differ() -> None:
    alike = clips(2).repeat(4, 1, 1, 1, 1)
    found = measure(alike, 2, pixels=True)
    assert found["diversity_prompts"] == 0.0
    assert found["diversity_seeds"] == pytest.approx(0.6 / math.sqrt(6.0), rel=0.05)


def test_what_one_clip_cannot_have_is_left_out() -> None:
    found = measure(clips(1, frames=1), 1, pixels=False)
    assert found.keys() == {"exposure", "contrast", "chroma", "sharpness"}


def test_pixels_at_black_or_white_are_clipped_and_latents_never() -> None:
    found = clips(2)
    found[:, :, :, :4] = 1.0
    found[:, :, :, 4:6] = 0.0
    assert measure(found, 1, pixels=True)["clipped"] == pytest.approx(0.75)
    assert "clipped" not in measure(found, 1, pixels=False)


def test_stronger_colours_have_more_chroma_in_proportion() -> None:
    plain = clips()
    grey = plain.mean(dim=1, keepdim=True)
    garish = grey + 2.0 * (plain - grey)
    ratio = measure(garish, 2, pixels=True)["chroma"] / measure(plain, 2, pixels=True)["chroma"]
    assert ratio == pytest.approx(2.0, rel=1e-4)


def test_blur_lowers_sharpness() -> None:
    sharp = clips(side=16)
    blurred = torch.nn.functional.avg_pool3d(sharp, (1, 3, 3), 1, (0, 1, 1))
    found = [measure(x, 2, pixels=True)["sharpness"] for x in (sharp, blurred)]
    assert found[1] < 0.5 * found[0]


def test_clips_that_all_fade_drift_and_clips_that_fade_either_way_do_not() -> None:
    base = clips(8, frames=16)
    ramp = torch.linspace(0.0, 0.4, 16)[None, None, :, None, None]
    ways = torch.tensor([1.0, -1.0]).repeat(4)[:, None, None, None, None]
    assert float(drift(base + ramp)) > 1.0
    assert float(drift(base + ways * ramp)) < 0.1
    assert float(drift(base)) < 0.1


def test_contrast_that_grows_over_a_clip_is_drift_by_its_logarithm() -> None:
    base = clips(8, frames=16) - 0.5
    factor = torch.ones(16)
    factor[12:] = 3.0
    assert float(drift(base * factor[None, None, :, None, None])) == pytest.approx(
        math.log(3.0), abs=0.05
    )


def test_a_distance_is_the_root_of_the_mean_square() -> None:
    a = torch.zeros(2, 3, 4, 8, 8)
    assert distance(a, a + 0.3) == pytest.approx(0.3)
    assert apart(a, a + torch.tensor([1.0, 2.0])[:, None, None, None, None]).tolist() == [1.0, 2.0]
    assert float(spread(torch.tensor([[[0.0], [1.0], [3.0]]]))) == pytest.approx(2.0)


def test_large_frames_are_compared_in_coarse_cells() -> None:
    assert pooled(torch.zeros(1, 3, 2, 96, 40)).shape == (1, 3, 2, 32, 32)
    small = clips(1, side=16)
    assert pooled(small) is small


def test_figures_of_broken_clips_are_not_finite() -> None:
    found = clips(2)
    found[0, 0, 0, 0, 0] = math.nan
    assert math.isnan(measure(found, 1, pixels=True)["contrast"])

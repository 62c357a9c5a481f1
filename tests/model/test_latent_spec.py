"""How latents relate to pixels and tokens: of Wan2.1, and of a model with other strides."""

from __future__ import annotations

import pytest

from model.types import LatentSpec

WAN = LatentSpec(16, 4, 8, (2, 2))
OTHER = LatentSpec(6, 2, 16, (1, 3))


@pytest.mark.parametrize(
    ("spec", "latent", "pixels"),
    [(WAN, 1, 1), (WAN, 5, 17), (WAN, 21, 81), (OTHER, 1, 1), (OTHER, 21, 41)],
)
def test_the_first_latent_frame_holds_one_pixel_frame(
    spec: LatentSpec, latent: int, pixels: int
) -> None:
    assert spec.pixel_frames(latent) == pixels
    assert spec.latent_frames(pixels) == latent


@pytest.mark.parametrize(("spec", "pixels"), [(WAN, 80), (WAN, 0), (WAN, -3), (OTHER, 4)])
def test_frames_that_latents_do_not_hold_are_refused(spec: LatentSpec, pixels: int) -> None:
    with pytest.raises(ValueError) as caught:
        spec.latent_frames(pixels)
    assert str(caught.value) == (
        f"{pixels} pixel frames: must be 1 + {spec.temporal_stride} k, as latent frames hold them"
    )


def test_sides_are_multiples_of_the_spatial_stride() -> None:
    assert WAN.latent_size((480, 832)) == (60, 104)
    assert OTHER.latent_size((480, 832)) == (30, 52)
    assert OTHER.pixel_size(30, 52) == (480, 832)
    with pytest.raises(ValueError) as caught:
        OTHER.latent_size((480, 840))
    assert str(caught.value) == "480 x 840 pixels: sides must be multiples of 16"


def test_the_least_step_of_a_side_is_the_pixels_of_a_token() -> None:
    assert WAN.pixel_step == (16, 16)
    assert OTHER.pixel_step == (16, 48)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((480, 832), (480, 832)), ((1080, 1920), (480, 848)), ((1000, 1000), (624, 624))],
)
def test_a_size_is_snapped_to_the_area_and_whole_tokens(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert WAN.nearest_size(shape, 480 * 832) == expected


def test_each_side_is_snapped_to_its_own_step() -> None:
    assert OTHER.nearest_size((1000, 1000), 500 * 500) == (496, 480)


def test_the_thinnest_strip_still_has_a_size() -> None:
    assert WAN.nearest_size((1, 5000), 256 * 256) == (16, 18096)


def test_tokens_are_patches_of_each_frame() -> None:
    assert WAN.tokens((16, 21, 60, 104)) == 32_760  # Wan2.1 at 480p
    assert OTHER.tokens((6, 3, 4, 9)) == 3 * 4 * 3


def test_all_that_is_wrong_with_a_shape_is_said() -> None:
    assert list(WAN.problems((16, 5, 4, 4))) == []
    assert list(WAN.problems((6, 5, 3, 4))) == [
        "has 6 channels, the model makes 16",
        "3 x 4 does not divide into patches of 2 x 2",
    ]

"""How latents relate to pixels: the nearest size that a model can make."""

from __future__ import annotations

import pytest

from model.types import LatentSpec

WAN = LatentSpec(channels=16, temporal_stride=4, spatial_stride=8, patch=(2, 2))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((480, 832), (480, 832)), ((1080, 1920), (480, 848)), ((1000, 1000), (624, 624))],
)
def test_the_nearest_size_has_the_area_and_whole_tokens(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert WAN.nearest_size(shape, 480 * 832) == expected


def test_the_thinnest_strip_still_has_a_size() -> None:
    assert WAN.nearest_size((1, 5000), 256 * 256) == (16, 18096)

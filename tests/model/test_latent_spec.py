"""How latents relate to pixels: the nearest size that a model can make."""

from __future__ import annotations

import pytest

from model.types import LatentSpec

WAN = LatentSpec(channels=16, temporal_stride=4, spatial_stride=8, patch=(2, 2))
TI2V = LatentSpec(channels=48, temporal_stride=4, spatial_stride=16, patch=(2, 2))
AREA = 704 * 1280


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


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((704, 1280), (704, 1280)),
        ((1280, 704), (1280, 704)),
        ((1080, 1920), (704, 1248)),  # along the width first: 1.77 is nearer to 1.78 than 1.82
        ((1920, 1080), (1248, 704)),  # along the height first
        ((1000, 1000), (928, 960)),  # both ways are as near: along the height first
        ((480, 640), (800, 1088)),
    ],
)
def test_the_size_of_an_image_is_the_released_rules(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    found = TI2V.size_of_image(shape, AREA)
    assert found == expected
    assert found[0] * found[1] <= AREA
    assert all(side % 32 == 0 for side in found)


def test_the_thinnest_image_still_has_a_size() -> None:
    height, width = TI2V.size_of_image((1, 5000), 256 * 256)
    assert height == 32
    assert width % 32 == 0


@pytest.mark.parametrize("shape", [(h, w) for h in (300, 511, 720, 1333) for w in (333, 640, 1999)])
def test_sizes_of_images_are_those_of_the_written_formula(shape: tuple[int, int]) -> None:
    """Candidate A and B of the release, computed as its code does, in whole numbers of 32."""
    height, width = shape
    ratio = width / height
    ow = (AREA * ratio) ** 0.5
    oh = AREA / ow
    ow1 = int(ow // 32 * 32)
    oh1 = int(AREA / ow1 // 32 * 32)
    oh2 = int(oh // 32 * 32)
    ow2 = int(AREA / oh2 // 32 * 32)
    a, b = ow1 / oh1, ow2 / oh2
    first = max(ratio / a, a / ratio) < max(ratio / b, b / ratio)
    assert TI2V.size_of_image(shape, AREA) == ((oh1, ow1) if first else (oh2, ow2))

"""The tiny world: captions that read back, scenes that stay in the picture, exact areas."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from utils.tiny_world.world import (
    CELLS,
    COLOURS,
    DIRECTIONS,
    FLOOR,
    FLOOR_DEVIATION,
    FLOORS,
    FRAMES,
    MARGIN,
    SHAPES,
    SIDE,
    TRAVEL,
    Caption,
    captions,
    coverage,
    draw_captions,
    draw_scenes,
    render,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_there_are_288_different_captions() -> None:
    assert len({str(caption) for caption in captions()}) == 288


def test_a_caption_reads_as_a_sentence() -> None:
    caption = Caption("red", "bar", "left", "slowly", "dark")
    assert str(caption) == "a red bar moving left slowly on a dark background"


def test_every_caption_reads_back() -> None:
    assert all(Caption.parse(str(caption)) == caption for caption in captions())


def test_outer_space_does_not_matter_to_a_caption() -> None:
    assert Caption.parse(" a red bar moving left slowly on a dark background\n") == captions()[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red bar",
        "a pink bar moving left slowly on a dark background",
        "a red square moving left slowly on a dark background",
        "a red bar going left slowly on a dark background",
        "a red bar moving left slowly on a dark background today",
        "a red  bar moving left slowly on a dark background",
    ],
)
def test_what_is_no_caption_is_answered_with_one(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        Caption.parse(text)
    assert str(caught.value) == (
        f"not a caption of the tiny world: '{text}'; "
        "one is 'a red bar moving left slowly on a dark background'"
    )


def test_indices_are_positions_in_the_vocabularies() -> None:
    assert captions()[0].indices() == (0, 0, 0, 0, 0)
    assert captions()[-1].indices() == (5, 2, 3, 1, 1)


def test_drawn_captions_are_balanced() -> None:
    counts = Counter(draw_captions(2 * 288 + 100, rng()))
    assert len(counts) == 288
    assert set(counts.values()) == {2, 3}


def test_drawn_captions_depend_on_their_generator_alone() -> None:
    assert draw_captions(10, rng(1)) == draw_captions(10, rng(1)) != draw_captions(10, rng(2))


def test_clips_depend_on_their_generator_alone() -> None:
    first, second = (render(draw_scenes(captions()[:3], rng(1))) for _ in range(2))
    assert torch.equal(first, second)


def test_clips_are_seventeen_colour_frames_between_black_and_white() -> None:
    clips = render(draw_scenes(captions()[:4], rng()))
    assert clips.shape == (4, 3, FRAMES, SIDE, SIDE)
    assert 0.0 <= clips.min() <= clips.max() <= 1.0


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_all_shapes_have_the_area_of_their_square(index: int) -> None:
    half = torch.tensor([0.18])
    alpha = coverage(torch.tensor([index]), torch.full((1, 2), 0.5), torch.zeros(1, 2), half)
    area = alpha[0, 0].sum() / SIDE**2
    assert area == pytest.approx(4 * 0.18**2, rel=0.03)


def test_centres_keep_their_distance_from_the_borders() -> None:
    scenes = draw_scenes(captions() * 4, rng())
    path = torch.stack([scenes.start, scenes.start + scenes.travel])
    assert path.min() >= MARGIN - 1e-6
    assert path.max() <= 1.0 - MARGIN + 1e-6


def test_shapes_travel_as_their_captions_say() -> None:
    scenes = draw_scenes(captions(), rng())
    expected = [[TRAVEL[c.speed] * axis for axis in DIRECTIONS[c.direction]] for c in captions()]
    assert torch.equal(scenes.travel, torch.tensor(expected))


def test_shapes_move_by_their_travel() -> None:
    travel = torch.tensor([[0.25, 0.0]])
    alpha = coverage(torch.tensor([1]), torch.tensor([[0.375, 0.5]]), travel, torch.tensor([0.2]))
    assert torch.allclose(alpha[0, 0, :, :-8], alpha[0, -1, :, 8:], atol=1e-5)


def test_the_floor_is_grey_and_the_same_within_a_group_of_frames() -> None:
    scenes = draw_scenes([Caption("red", "circle", "left", "slowly", "dark")], rng())
    alpha = coverage(scenes.shapes(), scenes.start, scenes.travel, scenes.half_size)
    floor = render(scenes)[0][:, :, alpha[0].amax(dim=0) == 0.0]  # [3, P, pixels never covered]
    for frames in (slice(0, 1), slice(1, 5), slice(5, 9), slice(9, 13), slice(13, 17)):
        group = floor[:, frames]
        assert torch.equal(group, group[:1, :1].expand_as(group))


def test_each_latent_frame_sees_a_floor_of_its_own() -> None:
    floors = draw_scenes([Caption("red", "circle", "left", "slowly", "dark")], rng()).floor[0]
    assert floors.shape == (FLOORS, CELLS, CELLS)
    assert torch.corrcoef(floors.flatten(1)).triu(1).abs().max() < 0.5


def test_floors_have_the_mean_grey_of_their_names() -> None:
    for name, grey in FLOOR.items():
        scenes = draw_scenes([Caption("red", "bar", "left", "slowly", name)] * 200, rng())
        assert scenes.floor.mean() == pytest.approx(grey, abs=0.005)


def test_floors_have_the_contrast_that_the_checker_calls_one() -> None:
    scenes = draw_scenes([Caption("red", "bar", "left", "slowly", "dark")] * 200, rng())
    assert scenes.floor.std() == pytest.approx(FLOOR_DEVIATION, rel=0.1)


def test_the_middle_of_a_shape_has_its_colour() -> None:
    for colour, rgb in COLOURS.items():
        scenes = draw_scenes([Caption(colour, "circle", "left", "slowly", "light")], rng())
        x, y = (scenes.start[0] * SIDE).long().tolist()
        assert render(scenes)[0, :, 0, y, x].tolist() == pytest.approx(rgb)

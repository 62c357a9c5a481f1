"""Attention masks as functions of frame counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.wan.masks import FrameMask, block_causal, frame_blocks, past_spans, teacher_forcing


def picture(mask: FrameMask) -> list[str]:
    """One line per frame that looks, # where it sees."""
    return ["".join(".#"[seen] for seen in row) for row in mask.visible().int().tolist()]


def test_blocks_cover_all_frames() -> None:
    assert frame_blocks(6, 2) == [2, 2, 2]


def test_an_independent_first_frame_is_a_block_of_its_own() -> None:
    assert frame_blocks(7, 3, independent_first_frame=True) == [1, 3, 3]


def test_an_independent_first_frame_may_be_the_only_one() -> None:
    assert frame_blocks(1, 3, independent_first_frame=True) == [1]


@pytest.mark.parametrize("block", [0, -1, 2, 4])
def test_a_block_that_does_not_divide_the_frames_is_refused(block: int) -> None:
    with pytest.raises(ValueError) as caught:
        frame_blocks(3, block)
    assert str(caught.value) == f"a block of {block} frames must divide the 3 latent frames"


@pytest.mark.parametrize("block", [0, 4, 7])
def test_a_block_that_does_not_divide_what_follows_the_first_frame_is_refused(block: int) -> None:
    with pytest.raises(ValueError) as caught:
        frame_blocks(7, block, independent_first_frame=True)
    assert str(caught.value) == (
        f"a block of {block} frames must divide the 6 latent frames after the first"
    )


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="must divide the 0 latent frames"):
        frame_blocks(0, 1)


def test_each_block_sees_itself_and_what_came_before() -> None:
    assert picture(block_causal([2, 2, 2])) == [
        "##....",
        "##....",
        "####..",
        "####..",
        "######",
        "######",
    ]


def test_blocks_of_one_frame_are_plain_causality() -> None:
    assert torch.equal(block_causal([1] * 5).visible(), torch.ones(5, 5).tril().bool())


def test_one_block_of_all_frames_hides_nothing() -> None:
    assert block_causal([3]).visible().all()


def test_an_independent_first_frame_sees_itself_alone() -> None:
    assert picture(block_causal([1, 3, 3])) == [
        "#......",
        "####...",
        "####...",
        "####...",
        "#######",
        "#######",
        "#######",
    ]


def test_a_window_counts_the_frames_of_the_block_itself() -> None:
    assert picture(block_causal([2, 2, 2, 2], window=4)) == [
        "##......",
        "##......",
        "####....",
        "####....",
        "..####..",
        "..####..",
        "....####",
        "....####",
    ]


def test_a_window_may_begin_inside_a_block() -> None:
    assert picture(block_causal([2, 2, 2], window=3)) == [
        "##....",
        "##....",
        ".###..",
        ".###..",
        "...###",
        "...###",
    ]


def test_the_sink_counts_inside_the_window() -> None:
    assert picture(block_causal([1] * 6, window=3, sink=1)) == [
        "#.....",
        "##....",
        "###...",
        "#.##..",
        "#..##.",
        "#...##",
    ]


def test_a_sink_may_leave_the_window_to_the_block_alone() -> None:
    assert picture(block_causal([1, 2, 2, 2], window=3, sink=1)) == [
        "#......",
        "###....",
        "###....",
        "#..##..",
        "#..##..",
        "#....##",
        "#....##",
    ]


def test_a_sink_and_recent_frames_fill_the_window_together() -> None:
    assert picture(block_causal([1, 2, 2, 2], window=5, sink=2)) == [
        "#......",
        "###....",
        "###....",
        "#####..",
        "#####..",
        "##..###",
        "##..###",
    ]


@pytest.mark.parametrize("blocks", [[2, 2, 2], [1, 2, 2], [5]])
@pytest.mark.parametrize("sink", [0, 1, 3])
def test_a_window_as_long_as_the_video_changes_nothing(blocks: list[int], sink: int) -> None:
    assert block_causal(blocks, window=sum(blocks), sink=sink) == block_causal(blocks)


@pytest.mark.parametrize("sink", [0, 1, 2])
@pytest.mark.parametrize("window", [4, 5, 6, 7])
def test_no_frame_sees_more_than_the_window(window: int, sink: int) -> None:
    seen = block_causal([2] * 6, window=window, sink=sink).visible().sum(dim=1)
    assert seen.max() == window


def test_noisy_blocks_see_the_clean_past_and_themselves() -> None:
    assert picture(teacher_forcing([2, 2])) == [
        "##......",
        "##......",
        "####....",
        "####....",
        "....##..",
        "....##..",
        "##....##",
        "##....##",
    ]


def test_a_noisy_independent_first_frame_sees_itself_alone() -> None:
    assert picture(teacher_forcing([1, 2])) == [
        "#.....",
        "###...",
        "###...",
        "...#..",
        "#...##",
        "#...##",
    ]


def test_noisy_blocks_see_the_clean_past_through_window_and_sink() -> None:
    assert picture(teacher_forcing([1] * 4, window=3, sink=1)) == [
        "#.......",
        "##......",
        "###.....",
        "#.##....",
        "....#...",
        "#....#..",
        "##....#.",
        "#.#....#",
    ]


def test_one_noisy_block_sees_no_clean_frame() -> None:
    mask = teacher_forcing([3]).visible()
    assert torch.equal(mask, torch.block_diag(torch.ones(3, 3), torch.ones(3, 3)).bool())


@pytest.mark.parametrize("make", [block_causal, teacher_forcing])
def test_equal_masks_hash_equal(make: Callable[..., FrameMask]) -> None:
    masks = [make([1, 2, 2], window=4, sink=1), make((1, 2, 2), window=4, sink=1)]
    assert masks[0] == masks[1]
    assert len(set(masks)) == 1


@pytest.mark.parametrize(
    "other",
    [
        block_causal([1, 1, 2]),
        block_causal([2, 2], window=3),
        block_causal([2, 2, 2]),
        teacher_forcing([2, 2]),
        teacher_forcing([2]),
    ],
)
def test_different_masks_differ(other: FrameMask) -> None:
    assert other != block_causal([2, 2])


@pytest.mark.parametrize("make", [block_causal, teacher_forcing])
@pytest.mark.parametrize(("window", "sink", "block"), [(2, 0, 3), (3, 1, 3), (4, 4, 1)])
def test_a_window_smaller_than_a_block_is_refused(
    make: Callable[..., FrameMask], window: int, sink: int, block: int
) -> None:
    with pytest.raises(ValueError) as caught:
        make([block] * 5, window=window, sink=sink)
    assert str(caught.value) == (
        f"a window of {window} frames, {sink} of them the video's first, is smaller than a "
        f"block of {block}"
    )


def test_frames_are_counted_once_for_causal_masks_and_twice_for_teacher_forcing() -> None:
    assert (block_causal([1, 3]).frames, teacher_forcing([1, 3]).frames) == (4, 8)


@pytest.mark.parametrize(
    ("past", "expected"), [(0, []), (2, [(0, 2)]), (3, [(0, 1), (2, 3)]), (9, [(0, 1), (8, 9)])]
)
def test_of_the_past_a_block_sees_the_sink_and_the_latest(
    past: int, expected: list[tuple[int, int]]
) -> None:
    assert past_spans(past, 2, window=4, sink=1) == expected

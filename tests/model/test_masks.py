"""Attention masks as functions of frame counts."""

from __future__ import annotations

import pytest
import torch

from model.wan.masks import block_causal


def test_each_block_sees_itself_and_what_came_before() -> None:
    assert block_causal(4, 2).visible.int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]


def test_blocks_of_one_frame_are_plain_causality() -> None:
    assert torch.equal(block_causal(3, 1).visible, torch.ones(3, 3).tril().bool())


def test_one_block_of_all_frames_hides_nothing() -> None:
    assert block_causal(3, 3).visible.all()


def test_all_tokens_of_a_frame_share_its_row_and_column() -> None:
    mask = block_causal(2, 1)
    assert mask.tokens(2).int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]


@pytest.mark.parametrize("block", [0, -1, 2, 4])
def test_a_block_that_does_not_divide_the_frames_is_refused(block: int) -> None:
    with pytest.raises(ValueError) as caught:
        block_causal(3, block)
    assert str(caught.value) == f"a block of {block} frames must divide the 3 latent frames"

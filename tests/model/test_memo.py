"""What is computed once: kept by all that it depends on, within so many bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.wan.attention import flex_mask
from model.wan.masks import block_causal
from model.wan.memo import Memo, bytes_of


def made(calls: list[str], name: str, size: int = 1) -> Callable[[], Tensor]:
    """Makes `size` floats, and notes that it was asked."""

    def compute() -> Tensor:
        calls.append(name)
        return torch.full((size,), float(ord(name)))

    return compute


def test_a_value_is_computed_once_per_key() -> None:
    memo, calls = Memo(100), []
    found = [float(memo.get(name, made(calls, name))) for name in "abab"]
    assert calls == ["a", "b"]
    assert found == [97.0, 98.0, 97.0, 98.0]


def test_the_longest_unused_value_makes_room() -> None:
    memo, calls = Memo(12), []
    for name in "abcadab":  # d drops b, which nobody asked for since
        memo.get(name, made(calls, name))
    assert calls == ["a", "b", "c", "d", "b"]
    assert memo.bytes_held() == 12


def test_a_value_beyond_the_limit_is_not_kept_and_drops_no_other() -> None:
    memo, calls = Memo(8), []
    for name, size in (("a", 2), ("b", 3), ("a", 2), ("b", 3)):
        memo.get(name, made(calls, name, size))
    assert calls == ["a", "b", "b"]


def test_a_view_counts_with_all_that_it_holds_in_memory() -> None:
    assert bytes_of(torch.zeros(100)[:1]) == 400


def test_the_bytes_of_flex_attentions_masks_count() -> None:
    assert bytes_of(flex_mask(block_causal([2, 2]), 128, torch.device("cpu"))) > 4 * 4 * 4


def test_a_mask_as_spans_of_frames_takes_no_memory() -> None:
    assert bytes_of(block_causal([2, 2])) == 0


def test_values_of_other_memos_are_not_shared() -> None:
    calls: list[str] = []
    for memo in (Memo(100), Memo(100)):
        memo.get("a", made(calls, "a"))
    assert calls == ["a", "a"]

"""A sink that takes up what leaves the window: its closed form, its frames, its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.wan.cache import KeyValue, KVCache
from model.wan.transformer import WanTransformer
from pipeline.blocks import CausalConfig
from tests.model.test_cache import TOKENS, commit, frames_seen, joined, key_value
from tests.pipeline.test_causal import BLOCKS, infer, roll, wan

DECAY = 0.999
LONG = CausalConfig(1, local_attn_size=4, sink_size=1, relative_positions=True)


def constant(value: float, frames: int, dtype: torch.dtype = torch.float32) -> KeyValue:
    keys = torch.full((1, frames * TOKENS, 2, 3), value, dtype=dtype)
    return keys, -keys


def cache_with(decay: float, *, sink: int = 3, window: int = 9) -> KVCache:
    return KVCache(window=window, sink=sink, relative_positions=True, sink_decay=decay)


def sink_of(cache: KVCache, sink: int = 3) -> Tensor:
    """The sink's keys, one number per frame."""
    return joined(cache.past(torch.tensor([99999])))[0][0, : sink * TOKENS : TOKENS, 0, 0]


def evicted(times: int, dtype: torch.dtype) -> KVCache:
    """A cache of ones from which blocks of three frames of zeros were dropped so many times."""
    cache, block = cache_with(DECAY), torch.arange(3)
    with torch.no_grad():
        cache.commit(block, [constant(1.0, 3, dtype)])
        for number in range(times + 2):  # two blocks fill the window
            cache.commit(block + 3 * (number + 1), [constant(0.0, 3, dtype)])
    return cache


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-9)])
def test_n_equal_evictions_leave_their_closed_form(dtype: torch.dtype, tolerance: float) -> None:
    """decay^n s + (1 - decay^n) k, also where one of them is less than bf16 can tell."""
    for times, left in ((1, 0.999), (2, 0.998001), (1000, 0.3677)):
        assert left == pytest.approx(DECAY**times, abs=5e-5)
        found = sink_of(evicted(times, dtype)).float()
        assert found.tolist() == pytest.approx([DECAY**times] * 3, abs=tolerance)


def test_keys_and_values_are_both_taken_up() -> None:
    keys, values = joined(evicted(10, torch.float32).past(torch.tensor([9])))
    assert torch.equal(keys, -values)


def test_frame_j_of_what_leaves_goes_to_frame_j_of_the_sink() -> None:
    cache = cache_with(0.5)
    commit(cache, [0, 1, 2], [10, 20, 30], [4, 5, 6], [7, 8, 9])
    assert sink_of(cache).tolist() == [5.0, 10.5, 16.0]


def test_a_block_that_is_longer_than_the_sink_goes_round_it_in_order() -> None:
    cache = cache_with(0.5, sink=2, window=8)
    commit(cache, [0, 1], [8, 16, 32], [5, 6, 7], [11, 12, 13])
    assert sink_of(cache, 2).tolist() == [(0 + 8) / 4 + 16, (1 + 16) / 2]


def test_a_block_that_is_shorter_leaves_the_rest_of_the_sink() -> None:
    cache = cache_with(0.5, sink=3, window=5)
    commit(cache, [0, 1, 2], [7], [8], [9])
    assert sink_of(cache).tolist() == [3.5, 1.0, 2.0]


def test_frames_that_stay_are_not_taken_up_and_reading_changes_nothing() -> None:
    cache = cache_with(0.5)
    commit(cache, [0, 1, 2], [3, 4, 5], [6, 7, 8])
    before = frames_seen(cache, [9, 10, 11])
    assert before == [0, 1, 2, 6, 7, 8]
    assert frames_seen(cache, [9, 10, 11]) == before


def test_what_was_read_before_keeps_its_values() -> None:
    """Passes that are made once more in a backward pass see what they saw."""
    cache = cache_with(0.5)
    commit(cache, [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11])
    past, snapshot = cache.past(torch.tensor([12])), cache.snapshot()
    kept = joined(past)[0].clone()
    commit(cache, [12, 13, 14], [15, 16, 17])
    assert torch.equal(joined(past)[0], kept)
    assert torch.equal(joined(snapshot.past(torch.tensor([12])))[0], kept)
    assert not torch.equal(sink_of(cache), sink_of(snapshot))


def test_a_sink_that_nothing_changes_is_the_sink_bit_for_bit(
    tiny_wan: Callable[..., WanTransformer],
) -> None:
    net = wan(tiny_wan)
    plain = infer(net, LONG, frames=9)
    assert torch.equal(plain, infer(net, replace(LONG, sink_decay=1.0), frames=9))
    taken_up = infer(net, replace(LONG, sink_decay=0.5), frames=9)
    # Frame 1 leaves as frame 4 is remembered, and frame 5 is the first to see it in the sink.
    assert torch.equal(plain[:, :, :5], taken_up[:, :, :5])
    assert not torch.equal(plain[:, :, 5:], taken_up[:, :, 5:])


def test_a_rollout_holds_what_a_stream_holds(tiny_wan: Callable[..., WanTransformer]) -> None:
    net = wan(tiny_wan)
    config = replace(LONG, local_attn_size=3, sink_decay=0.5, last_step_only=True)
    assert torch.equal(roll(net, config, grad=False).x0, infer(net, config))


def test_keys_that_are_rotated_are_not_averaged() -> None:
    with pytest.raises(AssertionError, match="no average"):
        KVCache(window=9, sink=3, sink_decay=0.9)
    assert key_value([1])[0].shape[1] == TOKENS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(LONG, sink_decay=0.0), "must lie in (0, 1], where 1 = off, got 0.0"),
        (replace(LONG, sink_decay=1.5), "must lie in (0, 1], where 1 = off, got 1.5"),
        (
            replace(LONG, sink_decay=0.9, sink_size=0),
            "0.9 has no effect without causal.sink_size",
        ),
        (
            replace(LONG, sink_decay=0.9, relative_positions=False),
            "0.9 averages keys of several frames, which are rotated by their positions; set "
            "causal.relative_positions=true, or causal.sink_decay=1",
        ),
        (
            replace(LONG, sink_decay=0.9, kv_gradient="straight_through"),
            "0.9 mixes frames whose gradients causal.kv_gradient=straight_through would tell "
            "apart; use detach or replayed, or set it to 1",
        ),
    ],
)
def test_settings_that_cannot_work_are_told(config: CausalConfig, message: str) -> None:
    assert list(config.problems(5)) == [f"causal.sink_decay: {message}"]


def test_settings_that_work_are_not() -> None:
    assert list(replace(LONG, sink_decay=0.999).problems(5)) == []
    assert list(replace(BLOCKS, kv_gradient="straight_through").problems(5)) == []

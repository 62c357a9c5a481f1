"""The key-value cache: read freely, written only without autograd, bounded by its window."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.wan.cache import KeyValue, KVCache, Past, TextKeys

TOKENS = 2  # per frame


def key_value(frames: list[int], layer: int = 0) -> KeyValue:
    """Keys and values [B = 1, N, heads = 2, head_dim = 3] that name frame and layer."""
    keys = torch.tensor(frames).float().repeat_interleave(TOKENS) + 1000.0 * layer
    keys = keys.view(1, -1, 1, 1).expand(1, -1, 2, 3).contiguous()
    return keys, -keys


def commit(cache: KVCache, *blocks: list[int], layers: int = 1) -> None:
    for frames in blocks:
        with torch.no_grad():
            cache.commit(torch.tensor(frames), [key_value(frames, i) for i in range(layers)])


def joined(past: Past, layer: int = 0) -> KeyValue:
    assert past.rooms is None, "the last piece lies in the room"
    keys, values = zip(*past.layers[layer], strict=True)
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


def frames_seen(cache: KVCache, new: list[int]) -> list[int]:
    """Which frames the new ones find in the cache, read off the keys."""
    past = cache.past(torch.tensor(new))
    return [] if not past.layers else joined(past)[0][0, ::TOKENS, 0, 0].int().tolist()


def rolled(blocks: list[list[int]], **options: Any) -> KVCache:
    """A cache after some blocks were committed."""
    cache = KVCache(**options)
    commit(cache, *blocks)
    return cache


def test_an_empty_cache_has_no_past() -> None:
    cache = KVCache()
    assert cache.frames == 0
    assert not cache.past(torch.arange(2)).layers


def test_the_past_is_in_order() -> None:
    assert frames_seen(rolled([[0], [1, 2], [3, 4]]), [5]) == [0, 1, 2, 3, 4]


def test_keys_and_values_are_those_that_were_committed() -> None:
    past = rolled([[0, 1], [2]]).past(torch.tensor([3]))
    for found, expected in zip(joined(past), key_value([0, 1, 2]), strict=True):
        assert torch.equal(found, expected)


def test_layers_do_not_share_their_past() -> None:
    cache = KVCache()
    commit(cache, [0], [1], layers=2)
    past = cache.past(torch.tensor([2]))
    assert joined(past, layer=1)[0][0, ::TOKENS, 0, 0].tolist() == [1000.0, 1001.0]


def test_reading_does_not_write() -> None:
    cache = rolled([[0], [1]], window=3)
    for _ in range(3):
        assert frames_seen(cache, [2, 3]) == [1]
    assert cache.frames == 2


def storages(past: Past) -> set[int]:
    return {x.untyped_storage().data_ptr() for layer in past.layers for pair in layer for x in pair}


def test_reading_does_not_copy() -> None:
    cache = rolled([[0, 1, 2]], frames=6)
    before = storages(cache.past(torch.tensor([3])))
    commit(cache, [3])
    assert storages(cache.past(torch.tensor([4, 5]))) == before


def written(cache: KVCache, new: list[int]) -> Past:
    """A pass over new frames that writes its keys and values into the cache's rooms."""
    with torch.no_grad():
        past = cache.past(torch.tensor(new))
        assert past.rooms is not None
        for room, own in zip(past.rooms, [key_value(new)], strict=True):
            for place, values in zip(room, own, strict=True):
                place[:, -values.shape[1] :] = values
    return past


def with_rooms(past: Past) -> list[int]:
    """The frames that a pass sees, its own included, read off the keys."""
    assert past.rooms is not None
    pieces = [*past.layers[0], past.rooms[0]]
    return torch.cat([k for k, _ in pieces], dim=1)[0, ::TOKENS, 0, 0].int().tolist()


OPTIONS: list[dict[str, Any]] = [
    {}, {"frames": 40}, {"window": 6}, {"window": 7, "sink": 1}, {"window": 8, "sink": 3},
    {"window": 6, "sink": 4}, {"window": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_a_pass_writes_in_its_room_is_what_the_next_one_sees(options: dict[str, Any]) -> None:
    """Over many blocks: the same as keys that are handed to `commit`."""
    roomy, handed = rolled([[0]], **options), rolled([[0]], **options)
    for first in range(1, 41, 2):
        new = [first, first + 1]
        expected = [*frames_seen(handed, new), *new]
        for _ in range(3):  # the steps of a block, each over the last one's keys
            assert with_rooms(written(roomy, new)) == expected
        with torch.no_grad():
            roomy.commit(torch.tensor(new), [])
        commit(handed, new)
        assert frames_seen(roomy, [99]) == frames_seen(handed, [99])


def test_a_pass_under_autograd_or_with_relative_positions_has_no_room() -> None:
    assert rolled([[0]]).past(torch.tensor([1])).rooms is None
    with torch.no_grad():
        assert rolled([[0]], relative_positions=True).past(torch.tensor([1])).rooms is None


def test_a_past_that_autograd_saved_may_be_used_after_more_was_written() -> None:
    cache = rolled([[0, 1]], frames=6)
    keys, _ = joined(cache.past(torch.tensor([2, 3])))
    weight = torch.ones_like(keys, requires_grad=True)
    loss = (weight * keys).sum()
    for new in ([2, 3], [4, 5]):
        written(cache, new)
        with torch.no_grad():
            cache.commit(torch.tensor(new), [])
    assert torch.equal(torch.autograd.grad(loss, weight)[0], key_value([0, 1])[0])


@pytest.mark.parametrize("window", [4, 8])
def test_storage_stays_within_a_part_of_the_window_however_long_the_video(window: int) -> None:
    cache = KVCache(window=window)
    for first in range(0, 60, 2):
        commit(cache, [first, first + 1])
    assert cache.past(torch.tensor([60])).layers[0][0][0].untyped_storage().nbytes() <= (
        (window + 4) * TOKENS * 2 * 3 * 4
    )


def test_positions_are_those_in_the_video() -> None:
    past = rolled([[0], [1, 2]]).past(torch.tensor([3, 4]))
    assert past.key_positions.tolist() == [0, 1, 2]
    assert past.query_positions.tolist() == [3, 4]


def test_a_past_that_was_read_stays_while_the_cache_moves_on() -> None:
    cache = rolled([[0, 1], [2, 3]], window=4)
    past = cache.past(torch.tensor([4, 5]))
    before = joined(past)[0].clone()
    commit(cache, [4, 5], [6, 7], [8, 9])
    assert torch.equal(joined(past)[0], before)


@pytest.mark.parametrize(
    ("new", "seen"), [([6], [3, 4, 5]), ([6, 7], [4, 5]), ([6, 7, 8], [5]), ([6, 7, 8, 9], [])]
)
def test_a_block_and_what_it_sees_fill_the_window(new: list[int], seen: list[int]) -> None:
    cache = rolled([[0, 1], [2, 3], [4, 5]], window=4)
    past = cache.past(torch.tensor(new))
    assert past.key_positions.tolist() == seen


@pytest.mark.parametrize(("new", "seen"), [([6], [0, 3, 4, 5]), ([6, 7, 8], [0, 5])])
def test_the_sink_is_always_seen(new: list[int], seen: list[int]) -> None:
    assert frames_seen(rolled([[0, 1], [2, 3], [4, 5]], window=5, sink=1), new) == seen


def test_a_sink_may_span_blocks() -> None:
    cache = rolled([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], window=7, sink=3)
    assert frames_seen(cache, [10, 11]) == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("sink", [0, 1, 2, 3])
def test_no_more_than_the_window_is_kept(sink: int) -> None:
    cache = KVCache(window=6, sink=sink)
    kept = []
    for first in range(0, 60, 2):
        commit(cache, [first, first + 1])
        kept.append(cache.frames)
    assert kept == [2, 4] + [6] * 28


def test_without_a_window_everything_is_kept() -> None:
    assert rolled([[i] for i in range(20)]).frames == 20


def test_a_block_that_is_larger_than_the_window_is_refused() -> None:
    cache = rolled([[0, 1]], window=3, sink=1)
    with pytest.raises(ValueError) as caught:
        cache.past(torch.tensor([2, 3, 4]))
    assert str(caught.value) == (
        "a window of 3 frames, 1 of them the video's first, is smaller than a block of 3"
    )


def test_relative_positions_are_absolute_ones_until_something_is_dropped() -> None:
    past = rolled([[0], [1, 2]], window=5, relative_positions=True).past(torch.tensor([3, 4]))
    assert past.key_positions.tolist() == [0, 1, 2]
    assert past.query_positions.tolist() == [3, 4]


def test_relative_positions_close_the_gap_behind_the_sink() -> None:
    cache = rolled([[i] for i in range(9)], window=5, sink=1, relative_positions=True)
    past = cache.past(torch.tensor([9, 10]))
    assert joined(past)[0][0, ::TOKENS, 0, 0].tolist() == [0, 7, 8]
    assert past.key_positions.tolist() == [0, 1, 2]
    assert past.query_positions.tolist() == [3, 4]


@pytest.mark.parametrize("sink", [0, 2])
def test_relative_positions_stay_below_the_window_however_long_the_video(sink: int) -> None:
    cache, largest = KVCache(window=6, sink=sink, relative_positions=True), []
    for first in range(0, 60, 2):
        past = cache.past(torch.tensor([first, first + 1]))
        if past.layers:
            largest.append(int(past.query_positions.max()))
        commit(cache, [first, first + 1])
    assert largest == [3] + [5] * 28


def test_writing_under_autograd_is_refused() -> None:
    cache = KVCache()
    with pytest.raises(RuntimeError, match=r"written only under torch.no_grad\(\)"):
        cache.commit(torch.tensor([0]), [key_value([0])])
    assert cache.frames == 0


def weighted(past: Past | None, layer: int = 0) -> Tensor:
    """A loss in which every key and value of the past has a weight of its own."""
    return sum(
        (torch.arange(x.numel()).view_as(x).float() * x).sum() * scale
        for x, scale in zip(joined(past, layer), (1.0, 0.5), strict=True)
    )  # type: ignore[return-value]


def live(frames: list[int], layer: int = 0) -> KeyValue:
    """Keys and values that want gradients and differ from the committed ones."""
    keys, values = (x.clone() + 0.125 for x in key_value(frames, layer))
    return keys.requires_grad_(), values.requires_grad_()


def test_a_graft_changes_no_value() -> None:
    cache = rolled([[0, 1], [2]])
    cache.graft([live([2])])
    past = cache.past(torch.tensor([3]))
    for found, expected in zip(joined(past), key_value([0, 1, 2]), strict=True):
        assert torch.equal(found, expected)


def test_a_graft_passes_gradients_to_the_last_chunk_as_if_it_were_the_values() -> None:
    cache, graft = rolled([[0, 1], [2]]), live([2])
    cache.graft([graft])
    found = torch.autograd.grad(weighted(cache.past(torch.tensor([3]))), graft)
    explicit = [
        torch.cat([c[:, :4], c[:, 4:] + g - g.detach()], dim=1)
        for c, g in zip(key_value([0, 1, 2]), graft, strict=True)
    ]
    past = Past([[(explicit[0], explicit[1])]], torch.arange(3), torch.arange(1))
    expected = torch.autograd.grad(weighted(past), graft)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_graft_outlives_the_next_commits() -> None:
    cache, graft = rolled([[0, 1]], window=6), live([0, 1])
    cache.graft([graft])
    commit(cache, [2, 3])
    gradients = torch.autograd.grad(weighted(cache.past(torch.tensor([4, 5]))), graft)
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_graft_needs_a_pair_for_every_layer() -> None:
    cache = KVCache()
    commit(cache, [0], layers=2)
    with pytest.raises(AssertionError, match="for every layer"):
        cache.graft([live([0])])


def test_a_graft_reaches_the_last_chunk_in_the_smallest_window_too() -> None:
    cache, graft = rolled([[0], [1, 2], [3, 4]], window=3, sink=1), live([3, 4])
    cache.graft([graft])
    gradients = torch.autograd.grad(weighted(cache.past(torch.tensor([5]))), graft)
    assert all(g[:, TOKENS:].abs().sum() > 0 for g in gradients)


def test_a_graft_reaches_a_sink_that_is_part_of_a_chunk() -> None:
    cache, graft = rolled([[0, 1]], window=4, sink=1), live([0, 1])
    cache.graft([graft])
    commit(cache, [2, 3], [4, 5])
    assert frames_seen(cache, [6, 7]) == [0, 5]
    gradients = torch.autograd.grad(weighted(cache.past(torch.tensor([6, 7]))), graft)
    assert all(g[:, :TOKENS].abs().sum() > 0 for g in gradients)


def test_the_first_block_must_fit_into_the_window_too() -> None:
    with pytest.raises(ValueError, match="is smaller than a block of 3"):
        KVCache(window=2).past(torch.arange(3))


def text_keys(value: float) -> TextKeys:
    return torch.full((1,), value), torch.full((1,), -value)


def test_text_is_kept_per_layer() -> None:
    cache = KVCache()
    with torch.no_grad():
        assert cache.text is None
        cache.keep_text([text_keys(1.0), text_keys(2.0)])
        assert cache.text is not None
        assert [float(keys) for keys, _ in cache.text] == [1.0, 2.0]


def test_kept_text_is_not_shown_under_autograd() -> None:
    """Its keys carry no gradient, so the weights that they came from would not learn."""
    cache = KVCache()
    with torch.no_grad():
        cache.keep_text([text_keys(1.0)])
    assert cache.text is None


def test_keeping_text_under_autograd_is_refused() -> None:
    cache = KVCache()
    with pytest.raises(RuntimeError, match=r"written only under torch.no_grad\(\)"):
        cache.keep_text([text_keys(1.0)])
    with torch.no_grad():
        assert cache.text is None

"""The first frame after a change of prompt: kept in the window until the next one's leaves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.wan.cache import KVCache
from model.wan.transformer import WanTransformer
from pipeline.blocks import CausalConfig
from pipeline.causal import CausalDiffusionInferencePipeline, CausalInferencePipeline
from pipeline.prompts import ChangingPrompts
from pipeline.protocol import InferencePipeline, sample
from pipeline.teacher import SamplingConfig
from tests.gaussian import Said, Watched
from tests.model.test_cache import commit, frames_seen
from tests.pipeline.test_causal import SIGMAS, infer, streams, text, wan

LONG = CausalConfig(1, local_attn_size=5, sink_size=1, relative_positions=True)
PIN = replace(LONG, pin=True)


def cache_with(*, sink: int = 1, pins: bool = True, decay: float = 1.0) -> KVCache:
    return KVCache(window=5, sink=sink, relative_positions=True, pins=pins, sink_decay=decay)


def changed_at(cache: KVCache, *changes: int, until: int) -> list[list[int]]:
    """What each frame sees, where the prompt changes before some of them."""
    found = []
    for frame in range(until):
        if frame in changes:
            cache.new_prompt()
        found.append(frames_seen(cache, [frame]))
        commit(cache, [frame])
    return found


def test_the_first_frame_of_a_prompt_stays_beside_the_sink() -> None:
    seen = changed_at(cache_with(), 3, until=12)
    assert seen[3:] == [
        [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4], [0, 3, 4, 5],
        [0, 3, 5, 6], [0, 3, 6, 7], [0, 3, 7, 8], [0, 3, 8, 9], [0, 3, 9, 10],
    ]  # fmt: skip


def test_no_frame_sees_more_than_the_window_and_none_loses_the_pin_for_a_while() -> None:
    for change in range(1, 12):
        seen = changed_at(cache_with(), change, until=24)
        assert all(len(frames) <= 4 for frames in seen)
        assert all(change in frames for frames in seen[change + 1 :])


def test_the_next_prompts_first_frame_takes_its_place() -> None:
    seen = changed_at(cache_with(), 3, 8, until=16)
    assert seen[8] == [0, 3, 6, 7]
    assert seen[10] == [0, 3, 8, 9]
    assert seen[11:14] == [[0, 8, 9, 10], [0, 8, 10, 11], [0, 8, 11, 12]]
    assert all(8 in frames for frames in seen[9:])


def test_a_window_without_a_sink_keeps_it_too() -> None:
    seen = changed_at(cache_with(sink=0), 2, until=10)
    assert seen[9] == [2, 6, 7, 8]


@pytest.mark.parametrize("sink", [0, 1])
def test_without_a_pin_or_a_change_nothing_is_kept_that_was_not(sink: int) -> None:
    plain = changed_at(cache_with(sink=sink, pins=False), 3, until=12)
    assert plain == changed_at(cache_with(sink=sink), until=12)
    assert plain[11] == ([0, 8, 9, 10] if sink else [7, 8, 9, 10])


def test_what_is_pinned_does_not_flow_into_the_sink() -> None:
    cache = cache_with(decay=0.5)
    changed_at(cache, 3, until=10)
    # Of the sink's frame 0 and those that left, 1, 2, 4, 5 and 6, the last one weighs a half.
    value = 0.0
    for frame in (1, 2, 4, 5, 6):
        value = (value + frame) / 2
    found = cache.past(torch.tensor([10])).layers[0][0][0][0, 0, 0, 0]
    assert float(found) == pytest.approx(value)


def test_a_snapshot_does_not_see_a_later_pin() -> None:
    cache = cache_with()
    changed_at(cache, 3, until=6)
    snapshot = cache.snapshot()
    before = frames_seen(snapshot, [6])
    commit(cache, [6], [7], [8])
    assert frames_seen(snapshot, [6]) == before


# ---- streams ----


def prompts(at: int = 4) -> ChangingPrompts:
    return ChangingPrompts(text(1).text, changes=((at, text(5).text),))


def pipelines(net: object, config: CausalConfig) -> list[InferencePipeline]:
    many = SamplingConfig(2, 3.0, 5.0, "euler")
    return [
        CausalInferencePipeline(net, SIGMAS, config),  # type: ignore[arg-type]
        CausalDiffusionInferencePipeline(net, many, config),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("kind", [0, 1], ids=["few steps", "many steps"])
@pytest.mark.parametrize("change", [4, 3])
def test_blocks_follow_the_prompt_of_their_first_frame(kind: int, change: int) -> None:
    net = Watched(Said())
    config = replace(LONG, num_frame_per_block=2, sink_size=0)
    sample(pipelines(net, config)[kind], prompts(change), text(2), (16, 8, 4, 4), streams())
    for call in net.calls:
        first = int(call.context.frame_index[0])  # type: ignore[index]
        expected = text(1 if first < 4 else 5).text
        assert torch.equal(call.conditioning.text[:2], expected)
        assert len(call.conditioning.text) in (2, 4)


@pytest.mark.parametrize("kind", [0, 1], ids=["few steps", "many steps"])
def test_a_stream_whose_prompt_changes_reads_the_keys_of_the_new_one(
    tiny_wan: Callable[..., WanTransformer], kind: int
) -> None:
    """A change to the same words is no change; to others, it is one from the next block on."""
    net, shape = wan(tiny_wan), (16, 6, 4, 4)
    plain, same, other = (
        sample(pipelines(net, LONG)[kind], asked, text(2), shape, streams())
        for asked in (
            text(1),
            ChangingPrompts(text(1).text, changes=((4, text(1).text),)),
            prompts(),
        )
    )
    torch.testing.assert_close(same, plain, atol=1e-6, rtol=0.0)
    assert torch.equal(other[:, :, :4], plain[:, :, :4])
    assert float((other[:, :, 4] - plain[:, :, 4]).abs().max()) > 1e-3


def test_a_pin_changes_what_comes_once_its_frame_would_have_left(
    tiny_wan: Callable[..., WanTransformer],
) -> None:
    net, shape = wan(tiny_wan), (16, 11, 4, 4)
    plain, pinned = (
        sample(CausalInferencePipeline(net, [1.0], config), prompts(), text(2), shape, streams())
        for config in (LONG, PIN)
    )
    # Frame 8 sees the sink, 5, 6 and 7; with the pin 4 in the place of 5.
    assert torch.equal(pinned[:, :, :8], plain[:, :, :8])
    assert not torch.equal(pinned[:, :, 8], plain[:, :, 8])


def test_a_pin_changes_no_bit_where_no_prompt_changes(
    tiny_wan: Callable[..., WanTransformer],
) -> None:
    net = wan(tiny_wan)
    assert torch.equal(infer(net, LONG, frames=9), infer(net, PIN, frames=9))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CausalConfig(1, pin=True),
            "has no effect without local_attn_size, where no frame is dropped",
        ),
        (
            replace(PIN, local_attn_size=2),
            "the sink, the pinned frame and a block are 3 frames, more than "
            "causal.local_attn_size=2; make it larger, or set causal.pin=false",
        ),
        (
            replace(PIN, relative_positions=False),
            "needs causal.relative_positions=true; with others keys lie side by side in the window",
        ),
    ],
)
def test_settings_that_cannot_work_are_told(config: CausalConfig, message: str) -> None:
    assert list(config.problems(5)) == [f"causal.pin: {message}"]

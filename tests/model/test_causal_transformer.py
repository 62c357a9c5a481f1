"""One transformer under a mask, with a cache, and over clean context: the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from model.wan.attention import attend
from model.wan.cache import KeyValue, KVCache, Past
from model.wan.config import WanConfig
from model.wan.context import FULL_ATTENTION, Context, Taps
from model.wan.masks import block_causal, teacher_forcing
from model.wan.rope import rotary_table, rotate
from model.wan.transformer import WanTransformer
from utils.recompute import recompute_blocks

WanFactory = Callable[..., WanTransformer]

# Without coordinate channels: such a network knows time by rotary positions alone.
ROTARY = WanConfig(
    dim=48, ffn_dim=96, num_heads=2, num_layers=2, freq_dim=32, text_len=12, text_dim=20
)
I2V = replace(ROTARY, model_type="i2v", in_dim=36, image_dim=24)


@dataclass(frozen=True)
class Mode:
    """How a video is cut into blocks, and how far a block sees."""

    blocks: tuple[int, ...]
    window: int | None = None
    sink: int = 0

    def cache(self, *, relative_positions: bool = False) -> KVCache:
        return KVCache(window=self.window, sink=self.sink, relative_positions=relative_positions)

    def spans(self) -> Iterator[Tensor]:
        """The frames of each block."""
        for first, last in pairwise(accumulate(self.blocks, initial=0)):
            yield torch.arange(first, last)


MODES = {
    "blocks": Mode((2, 2, 2)),
    "blocks of one": Mode((1,) * 5),
    "independent first frame": Mode((1, 2, 2)),
    "window": Mode((2,) * 4, window=4),
    "window inside a block": Mode((2,) * 4, window=5),
    "window and sink": Mode((1,) * 7, window=3, sink=1),
    "window inside a block, and sink": Mode((2,) * 5, window=5, sink=1),
    "window of sink and block": Mode((1, 2, 2, 2), window=3, sink=1),
    "one block": Mode((4,)),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
several_blocks = pytest.mark.parametrize(
    "mode",
    [mode for mode in MODES.values() if mode.blocks[1:]],
    ids=[name for name, mode in MODES.items() if mode.blocks[1:]],
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(
    model: WanTransformer, x: Tensor, timestep: Tensor, context: Context = FULL_ATTENTION
) -> Tensor:
    """One pass with random text, and a random image where the model wants one."""
    config = model.config
    text = random(len(x), config.text_len, config.text_dim, seed=1)
    clip = 3.0 * random(len(x), 1, config.image_dim, seed=2) + random(len(x), 257, config.image_dim)
    return model(x, timestep, text, clip if config.model_type == "i2v" else None, context=context)


def video(model: WanTransformer, mode: Mode, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Latents [2, C, F, 4, 4], and another noise level for each block, [2, F]."""
    channels = model.config.in_dim - 10 * model.config.absolute_positions
    levels = [
        1000.0 * torch.rand(2, 1, generator=torch.Generator().manual_seed(seed + i)).expand(2, f)
        for i, f in enumerate(mode.blocks)
    ]
    return random(2, channels, sum(mode.blocks), 4, 4, seed=seed), torch.cat(levels, dim=1)


@torch.no_grad()
def masked(model: WanTransformer, x: Tensor, timestep: Tensor, mode: Mode) -> Tensor:
    mask = block_causal(mode.blocks, window=mode.window, sink=mode.sink)
    return call(model, x, timestep, Context(mask=mask))


@torch.no_grad()
def streamed(
    model: WanTransformer, x: Tensor, timestep: Tensor, mode: Mode, *, relative: bool = False
) -> Tensor:
    cache, parts = mode.cache(relative_positions=relative), []
    for frames in mode.spans():
        context = Context(cache=cache, commit=True, frame_index=frames)
        parts.append(call(model, x[:, :, frames], timestep[:, frames], context))
    return torch.cat(parts, dim=2)


def same(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0.0)


@every_mode
def test_the_mask_equals_block_by_block_with_a_cache(tiny_wan: WanFactory, mode: Mode) -> None:
    model = tiny_wan()
    x, timestep = video(model, mode)
    same(streamed(model, x, timestep, mode), masked(model, x, timestep, mode))


@every_mode
def test_teacher_forcing_equals_noisy_blocks_that_read_a_clean_cache(
    tiny_wan: WanFactory, mode: Mode
) -> None:
    model = tiny_wan()
    noisy, timestep = video(model, mode)
    clean, zero = video(model, mode, seed=50)[0], torch.zeros_like(timestep)
    frames = torch.arange(sum(mode.blocks))
    context = Context(
        mask=teacher_forcing(mode.blocks, window=mode.window, sink=mode.sink),
        frame_index=torch.cat([frames, frames]),
    )
    cache, parts = mode.cache(), []
    with torch.no_grad():
        both = call(model, torch.cat([clean, noisy], 2), torch.cat([zero, timestep], 1), context)
        for block in mode.spans():
            reading = Context(cache=cache, frame_index=block)
            parts.append(call(model, noisy[:, :, block], timestep[:, block], reading))
            writing = replace(reading, commit=True)
            call(model, clean[:, :, block], zero[:, block], writing)
    same(both[:, :, len(frames) :], torch.cat(parts, dim=2))


@every_mode
def test_teacher_forcing_on_the_video_itself_equals_the_causal_mask_twice(
    tiny_wan: WanFactory, mode: Mode
) -> None:
    model = tiny_wan()
    x, timestep = video(model, mode)
    frames = torch.arange(sum(mode.blocks))
    mask = teacher_forcing(mode.blocks, window=mode.window, sink=mode.sink)
    context = Context(mask=mask, frame_index=torch.cat([frames, frames]))
    with torch.no_grad():
        both = call(model, torch.cat([x, x], dim=2), torch.cat([timestep, timestep], 1), context)
    once = masked(model, x, timestep, mode)
    same(both, torch.cat([once, once], dim=2))


def test_one_block_under_a_mask_is_the_bidirectional_network(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(), MODES["one block"]
    x, timestep = video(model, mode)
    with torch.no_grad():
        expected = call(model, x, timestep)
    same(masked(model, x, timestep, mode), expected)
    same(streamed(model, x, timestep, mode), expected)


def test_several_blocks_differ_from_the_bidirectional_network(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(), MODES["blocks"]
    x, timestep = video(model, mode)
    with torch.no_grad():
        difference = masked(model, x, timestep, mode) - call(model, x, timestep)
    assert difference[:, :, :2].abs().max() > 1e-2


def changes(
    forward: Callable[..., Tensor], model: WanTransformer, mode: Mode, frame: int
) -> Tensor:
    """How much each frame's output changes, [F], when one frame's input does."""
    x, timestep = video(model, mode)
    other = x.clone()
    other[:, :, frame] += 1.0
    before, after = (forward(model, v, timestep, mode) for v in (x, other))
    return (after - before).abs().amax(dim=(0, 1, 3, 4))


@several_blocks
@pytest.mark.parametrize("forward", [masked, streamed])
def test_a_later_frame_never_changes_an_earlier_block(
    tiny_wan: WanFactory, mode: Mode, forward: Callable[..., Tensor]
) -> None:
    last_block = sum(mode.blocks[:-1])
    assert changes(forward, tiny_wan(), mode, last_block)[:last_block].max() == 0.0


@several_blocks
@pytest.mark.parametrize("forward", [masked, streamed])
def test_an_earlier_frame_changes_its_own_block_and_the_next_ones_that_see_it(
    tiny_wan: WanFactory, mode: Mode, forward: Callable[..., Tensor]
) -> None:
    seen = block_causal(mode.blocks, window=mode.window, sink=mode.sink).visible()[:, 0]
    assert changes(forward, tiny_wan(), mode, 0)[seen].min() > 1e-3


@several_blocks
@pytest.mark.parametrize("forward", [masked, streamed])
def test_one_layer_reads_exactly_what_the_mask_shows(
    tiny_wan: WanFactory, tiny_config: WanConfig, mode: Mode, forward: Callable[..., Tensor]
) -> None:
    model = tiny_wan(replace(tiny_config, num_layers=1))
    visible = block_causal(mode.blocks, window=mode.window, sink=mode.sink).visible()
    columns = [changes(forward, model, mode, frame) > 0.0 for frame in range(sum(mode.blocks))]
    assert torch.equal(torch.stack(columns, dim=1), visible)


@pytest.mark.parametrize(
    "mode",
    [Mode((2, 2, 2)), Mode((1, 2, 2)), Mode((2, 2, 2), window=6, sink=1)],
    ids=["blocks", "independent first frame", "window as long as the video"],
)
@pytest.mark.parametrize("coordinates", [False, True])
def test_relative_positions_are_absolute_ones_while_nothing_is_dropped(
    tiny_wan: WanFactory, tiny_config: WanConfig, mode: Mode, *, coordinates: bool
) -> None:
    model = tiny_wan(tiny_config if coordinates else ROTARY)
    x, timestep = video(model, mode)
    relative = streamed(model, x, timestep, mode, relative=True)
    same(relative, streamed(model, x, timestep, mode))


def test_relative_positions_without_a_sink_only_move_the_origin(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(ROTARY), Mode((2,) * 6, window=4)
    x, timestep = video(model, mode)
    same(streamed(model, x, timestep, mode, relative=True), masked(model, x, timestep, mode))


def test_relative_positions_bring_the_sink_nearer(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(ROTARY), Mode((1,) * 6, window=3, sink=1)
    x, timestep = video(model, mode)
    relative = streamed(model, x, timestep, mode, relative=True)
    change = (relative - masked(model, x, timestep, mode)).abs().amax(dim=(0, 1, 3, 4))
    assert change[:3].max() < 1e-5
    assert change[3:].min() > 1e-3


def spied(calls: list[tuple[Tensor, Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which notes its first argument and result."""

    def spy(first: Tensor, *args: Any) -> Any:
        result = function(first, *args)
        calls.append((first, result))
        return result

    return spy


@pytest.mark.parametrize("sink", [0, 1])
def test_a_rollout_of_ten_windows_turns_no_token_further_than_the_window(
    tiny_wan: WanFactory, monkeypatch: pytest.MonkeyPatch, sink: int
) -> None:
    calls: list[tuple[Tensor, Any]] = []
    monkeypatch.setattr("model.wan.transformer.rotary_table", spied(calls, rotary_table))
    model, mode = tiny_wan(ROTARY), Mode((2,) * 20, window=4, sink=sink)
    output = streamed(model, *video(model, mode), mode, relative=True)
    assert output.isfinite().all()
    assert max(int(positions.max()) for positions, _ in calls) == 3


@pytest.mark.parametrize(("sink", "relative"), [(0, True), (1, True), (1, False)])
def test_a_rollout_of_ten_windows_keeps_as_much_as_one_of_two(
    tiny_wan: WanFactory, sink: int, *, relative: bool
) -> None:
    model, mode = tiny_wan(ROTARY), Mode((2,) * 20, window=4, sink=sink)
    (x, timestep), kept = video(model, mode), []
    cache = mode.cache(relative_positions=relative)
    with torch.no_grad():
        for frames in mode.spans():
            context = Context(cache=cache, commit=True, frame_index=frames)
            call(model, x[:, :, frames], timestep[:, frames], context)
            kept.append(cache.frames)
    assert kept == [2] + [4] * 19


def count_calls(*modules: nn.Module) -> list[int]:
    """How often each module has run; counted from now on."""
    counts = [0] * len(modules)
    for i, module in enumerate(modules):

        def count(*_: Any, i: int = i) -> None:
            counts[i] += 1

        module.register_forward_hook(count)
    return counts


def text_modules(model: WanTransformer) -> list[nn.Module]:
    return [model.text_embedding, *(b.cross_attn.k for b in model.blocks)]  # type: ignore[union-attr]


def test_text_is_read_once_per_video(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(), MODES["blocks"]
    counts = count_calls(*text_modules(model))
    streamed(model, *video(model, mode), mode)
    assert counts == [1, 1, 1]


def test_text_is_read_again_for_the_next_video(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(), MODES["blocks"]
    counts = count_calls(*text_modules(model))
    for _ in range(2):
        streamed(model, *video(model, mode), mode)
    assert counts == [2, 2, 2]


def first_frames(model: WanTransformer, frames: int = 2) -> KVCache:
    """A cache that holds the first frames of a video, at noise level zero."""
    cache, x = KVCache(), random(1, 16, frames, 4, 4, seed=3)
    with torch.no_grad():
        call(model, x, torch.zeros(1, 1), Context(cache=cache, commit=True))
    return cache


NEXT = torch.arange(2, 4)


def next_block(model: WanTransformer, cache: KVCache) -> Tensor:
    x = random(1, 16, 2, 4, 4, seed=4)
    return call(model, x, torch.full((1, 1), 600.0), Context(cache=cache, frame_index=NEXT))


@pytest.mark.parametrize("recompute", [False, True])
def test_text_weights_learn_although_the_text_was_cached(
    tiny_wan: WanFactory, *, recompute: bool
) -> None:
    model = tiny_wan()
    if recompute:
        recompute_blocks(model.blocks)
    next_block(model, first_frames(model)).square().sum().backward()
    for module in text_modules(model):
        for weight in module.parameters():
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0.0


@every_mode
def test_an_image_model_equals_itself_block_by_block(tiny_wan: WanFactory, mode: Mode) -> None:
    model = tiny_wan(I2V)
    x, timestep = video(model, mode)
    same(streamed(model, x, timestep, mode), masked(model, x, timestep, mode))


def test_an_image_is_read_once_per_video(tiny_wan: WanFactory) -> None:
    model, mode = tiny_wan(I2V), MODES["blocks"]
    counts = count_calls(model.img_emb, *(block.cross_attn.k_img for block in model.blocks))
    streamed(model, *video(model, mode), mode)
    assert counts == [1, 1, 1]


def test_a_cache_that_is_only_read_stays_as_it_is(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    cache = first_frames(model)
    with torch.no_grad():
        outputs = [next_block(model, cache) for _ in range(2)]
    assert cache.frames == 2
    assert torch.equal(*outputs)


def test_committing_under_autograd_is_refused(tiny_wan: WanFactory) -> None:
    cache = KVCache()
    with pytest.raises(RuntimeError, match=r"written only under torch.no_grad\(\)"):
        call(
            tiny_wan(), random(1, 16, 1, 4, 4), torch.ones(1, 1), Context(cache=cache, commit=True)
        )
    assert cache.frames == 0


def test_committing_to_nothing_is_refused(tiny_wan: WanFactory) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="commit needs a cache to write to"):
        call(tiny_wan(), random(1, 16, 1, 4, 4), torch.ones(1, 1), Context(commit=True))


def test_a_mask_beside_a_cache_is_refused(tiny_wan: WanFactory) -> None:
    context = Context(mask=block_causal([1, 1]), cache=KVCache())
    with pytest.raises(ValueError) as caught:
        call(tiny_wan(), random(1, 16, 2, 4, 4), torch.ones(1, 1), context)
    assert str(caught.value) == (
        "a mask of 2 frames needs as many and no cache, got 2 frames and a cache"
    )


def test_a_mask_for_another_length_is_refused(tiny_wan: WanFactory) -> None:
    context = Context(mask=block_causal([2, 2]))
    with pytest.raises(ValueError) as caught:
        call(tiny_wan(), random(1, 16, 2, 4, 4), torch.ones(1, 1), context)
    assert str(caught.value) == "a mask of 4 frames needs as many and no cache, got 2 frames"


def test_gradients_do_not_reach_the_cached_past(tiny_wan: WanFactory) -> None:
    model, x = tiny_wan(), random(1, 16, 2, 4, 4, seed=3).requires_grad_()
    cache = KVCache()
    with torch.no_grad():
        call(model, x, torch.zeros(1, 1), Context(cache=cache, commit=True))
    output = next_block(model, cache)
    assert torch.autograd.grad(output.sum(), x, allow_unused=True) == (None,)


def live_keys(model: WanTransformer, x: Tensor) -> list[KeyValue]:
    """Keys and values of a noisy first block, with gradients."""
    keys: list[KeyValue] = []
    call(model, x, torch.full((1, 1), 300.0), Context(keys=keys))
    return keys


def test_a_graft_changes_no_output(tiny_wan: WanFactory) -> None:
    model = tiny_wan()
    cache = first_frames(model)
    before = next_block(model, cache)
    cache.graft(live_keys(model, random(1, 16, 2, 4, 4, seed=6)))
    assert torch.equal(next_block(model, cache), before)


class Seen(KVCache):
    """A cache of which every pass sees the same."""

    def __init__(self, past: Past) -> None:
        super().__init__()
        self._past = past

    def past(self, frame_index: Tensor) -> Past:
        del frame_index
        return self._past


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_reach_what_was_grafted_as_in_the_straight_through_formula(
    tiny_wan: WanFactory, *, recompute: bool
) -> None:
    model, x = tiny_wan(), random(1, 16, 2, 4, 4, seed=6).requires_grad_()
    if recompute:
        recompute_blocks(model.blocks)
    inputs = [x, *(p for name, p in model.named_parameters() if "self_attn" in name)]
    grafted = first_frames(model)
    grafted.graft(live_keys(model, x))
    clean = first_frames(model).past(NEXT)
    layers = [
        [(k + gk - gk.detach(), v + gv - gv.detach())]
        for ((k, v),), (gk, gv) in zip(clean.layers, live_keys(model, x), strict=True)
    ]
    explicit = Seen(replace(clean, layers=layers))
    found, expected = (
        torch.autograd.grad(next_block(model, cache).square().sum(), inputs)
        for cache in (grafted, explicit)
    )
    assert found[0].abs().max() > 1e-3
    for a, b in zip(found, expected, strict=True):
        same(a / b.abs().max(), b / b.abs().max())


def test_recomputing_blocks_beside_a_cache_that_has_grown_since_is_exact(
    tiny_wan: WanFactory,
) -> None:
    model, found = tiny_wan(), []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(model.blocks)
        cache = KVCache(window=5, sink=1)
        with torch.no_grad():
            x = random(1, 16, 2, 4, 4, seed=3)
            call(model, x, torch.zeros(1, 1), Context(cache=cache, commit=True))
        loss = next_block(model, cache).square().sum()
        for later in (NEXT, NEXT + 2, NEXT + 4) if recompute else ():
            with torch.no_grad():
                context = Context(cache=cache, commit=True, frame_index=later)
                call(model, random(1, 16, 2, 4, 4, seed=7), torch.zeros(1, 1), context)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pass_that_waits_for_its_backward_does_not_hold_the_cache_once_more(
    tiny_wan: WanFactory,
) -> None:
    model, joined = tiny_wan(), []
    cache = first_frames(model)

    def noting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        joined.extend(StorageWeakRef(x.untyped_storage()) for x in (k, v))
        return attend(q, k, v, **options)

    for block in model.blocks:
        block.self_attn.attend = noting  # type: ignore[union-attr, assignment]
    output = next_block(model, cache)
    assert output.requires_grad
    assert [storage.expired() for storage in joined] == [True] * 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
def test_taps_collect_what_leaves_the_layers_asked_for(
    tiny_wan: WanFactory, layers: tuple[int, ...], *, recompute: bool
) -> None:
    model, left, taps = tiny_wan(), [], Taps(layers)
    if recompute:
        recompute_blocks(model.blocks)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: left.append(output[0]))
    call(model, random(1, 16, 2, 4, 4), torch.ones(1, 1), Context(taps=taps))
    assert len(taps.tokens) == len(layers)
    assert all(torch.equal(t, left[i]) for t, i in zip(taps.tokens, layers, strict=True))


def test_taps_let_gradients_through(tiny_wan: WanFactory) -> None:
    model, taps, x = tiny_wan(), Taps((0,)), random(1, 16, 2, 4, 4).requires_grad_()
    call(model, x, torch.ones(1, 1), Context(taps=taps))
    assert torch.autograd.grad(taps.tokens[0].square().sum(), x)[0].abs().max() > 0.0


def test_a_pass_reports_one_pair_of_keys_and_values_per_layer(tiny_wan: WanFactory) -> None:
    model, keys = tiny_wan(), []
    call(model, random(2, 16, 3, 4, 4), torch.ones(2, 1), Context(keys=keys))
    assert [[tuple(x.shape) for x in pair] for pair in keys] == [[(2, 12, 2, 16)] * 2] * 2


def test_the_keys_that_a_pass_reports_are_those_that_it_commits(tiny_wan: WanFactory) -> None:
    model, cache, keys = tiny_wan(), KVCache(), []
    with torch.no_grad():
        context = Context(cache=cache, commit=True, keys=keys)
        call(model, random(1, 16, 2, 4, 4), torch.ones(1, 1), context)
    past = cache.past(NEXT)
    assert past is not None
    assert all(
        torch.equal(a, b)
        for (stored,), reported in zip(past.layers, keys, strict=True)
        for a, b in zip(stored, reported, strict=True)
    )


def reported(model: WanTransformer, cache: KVCache, first: int) -> Tensor:
    """The first layer's keys of two frames from `first` on, as a pass beside `cache` reports."""
    keys: list[KeyValue] = []
    context = Context(keys=keys, cache=cache, frame_index=torch.arange(first, first + 2))
    call(model, random(1, 16, 2, 4, 4), torch.ones(1, 1), context)
    return keys[0][0]


def test_keys_beside_relative_positions_are_not_turned(tiny_wan: WanFactory) -> None:
    cache = KVCache(relative_positions=True)
    found = [reported(tiny_wan(ROTARY), cache, first) for first in (0, 7)]
    assert torch.equal(*found)


def test_keys_beside_absolute_positions_are_turned_by_them(tiny_wan: WanFactory) -> None:
    model = tiny_wan(ROTARY)
    plain = reported(model, KVCache(relative_positions=True), 0)
    table = rotary_table(torch.arange(7, 9), 2, 2, ROTARY.head_dim)
    assert torch.equal(reported(model, KVCache(), 7), rotate(plain, table))

"""The self-forcing rollout and its inference twins: values, gradients, caches, streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.flow import add_noise, constant_sigma
from model.types import Batch, Conditioning, Context, Denoiser, Prediction, Sample
from model.wan.cache import KeyValue, KVCache, Past
from model.wan.transformer import WanTransformer
from model.wan_wrapper import WanDiffusionWrapper
from pipeline.bidirectional import BidirectionalInferencePipeline
from pipeline.blocks import CausalConfig
from pipeline.build import Sampling, few_step_sampler, many_step_sampler
from pipeline.causal import (
    CausalDiffusionInferencePipeline,
    CausalInferencePipeline,
)
from pipeline.protocol import InferencePipeline, sample
from pipeline.self_forcing import SelfForcingTrainingPipeline
from pipeline.teacher import SamplingConfig, TeacherInferencePipeline
from tests.gaussian import CPU, Said, Watched
from tests.memory import Live
from utils.seeding import SampleRNG, StepRNG, generator, sample_rng
from utils.tiny_world.codec import FILE_NAME, PatchCodec

WanFactory = Callable[..., WanTransformer]

FRAMES, SIZE = 5, 2
SHAPE = (16, FRAMES, 4, 4)  # [C, F, H, W]
SIGMAS = [1.0, 0.8, 0.5]
BLOCKS = CausalConfig(num_frame_per_block=2, independent_first_frame=True)  # 1, 2, 2
SPANS = [(0, 1), (1, 3), (3, 5)]
MODES = {
    "plain": BLOCKS,
    "context noise": replace(BLOCKS, context_noise=100.0),
    "window and sink": replace(BLOCKS, local_attn_size=3, sink_size=1),
    "relative": replace(BLOCKS, local_attn_size=3, sink_size=1, relative_positions=True),
}
every_mode = pytest.mark.parametrize("config", MODES.values(), ids=MODES.keys())
both_kinds = pytest.mark.parametrize("kv_gradient", ["detach", "straight_through"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wan(tiny_wan: WanFactory) -> WanDiffusionWrapper:
    return WanDiffusionWrapper(tiny_wan())


def text(seed: int, size: int = SIZE) -> Conditioning:
    return Conditioning(random(size, 12, 64, seed=seed))


def batch(shape: tuple[int, int, int, int] = SHAPE, *, begins: bool = False) -> Batch:
    """begins: whether samples begin with the first frame of the data."""
    x0 = random(SIZE, *shape, seed=3)
    return Batch(text(1), text(2), shape, x0=x0, given=x0[:, :, :1] if begins else None)


def streams(size: int = SIZE) -> SampleRNG:
    return sample_rng(0, "test", range(size), CPU)


def streams_of_step(step: int = 0, samples: SampleRNG | None = None) -> StepRNG:
    """`step` decides what ranks share; samples have the same noise at all steps."""
    return StepRNG(generator("shared", step), samples or streams(), range(SIZE))


def roll(
    net: Denoiser,
    config: CausalConfig = BLOCKS,
    sigmas: Sequence[float] = SIGMAS,
    *,
    step: int = 0,
    grad: bool = True,
    samples: SampleRNG | None = None,
    vae: PatchCodec | None = None,
    first: Sequence[float] | None = None,
) -> Sample:
    pipeline = SelfForcingTrainingPipeline(sigmas, config, vae, first_sigmas=first)
    given = batch(begins=config.given_first_frame)
    return pipeline(net, given, streams_of_step(step, samples), grad=grad)


def infer(
    net: Denoiser,
    config: CausalConfig = BLOCKS,
    sigmas: Sequence[float] = SIGMAS,
    *,
    frames: int = FRAMES,
    rng: SampleRNG | None = None,
    initial: Tensor | None = None,
    first: Sequence[float] | None = None,
) -> Tensor:
    pipeline = CausalInferencePipeline(net, sigmas, config, first_sigmas=first)
    shape = (16, frames, 4, 4)
    return sample(pipeline, text(1), text(2), shape, rng or streams(), initial=initial)


def exits(config: CausalConfig, step: int) -> list[int]:
    """How many passes each block of the rollout of `step` takes before it is remembered, less 1."""
    net = Watched(Said())
    roll(net, config, step=step)
    counts: dict[int, int] = {}
    for call in net.calls:
        assert call.context.frame_index is not None
        first = int(call.context.frame_index[0])
        counts[first] = counts.get(first, -1) + (not call.context.commit)
    return list(counts.values())


def step_with(exit_step: int) -> int:
    return next(step for step in range(100) if exits(BLOCKS, step) == [exit_step] * 3)


# ---- values ----


@every_mode
@pytest.mark.parametrize("exit_step", range(3))
def test_a_rollout_holds_what_inference_holds_at_its_exit(
    tiny_wan: WanFactory, config: CausalConfig, exit_step: int
) -> None:
    net = wan(tiny_wan)
    made = roll(net, config, step=step_with(exit_step)).x0
    assert torch.equal(made, infer(net, config, SIGMAS[: exit_step + 1]))


@both_kinds
def test_a_gradient_changes_no_sample(tiny_wan: WanFactory, kv_gradient: Any) -> None:
    net, config = wan(tiny_wan), replace(BLOCKS, kv_gradient=kv_gradient)
    with_gradient, without = (roll(net, config, grad=grad).x0 for grad in (True, False))
    assert with_gradient.requires_grad
    assert not without.requires_grad
    torch.testing.assert_close(with_gradient, without, atol=1e-5, rtol=0.0)


def test_all_blocks_exit_together() -> None:
    found = [exits(BLOCKS, step) for step in range(40)]
    assert {tuple(steps) for steps in found} == {(0, 0, 0), (1, 1, 1), (2, 2, 2)}


def test_or_each_block_exits_by_itself() -> None:
    config = replace(BLOCKS, same_step_across_blocks=False)
    found = [exits(config, step) for step in range(60)]
    for block in range(3):
        assert {steps[block] for steps in found} == {0, 1, 2}
    assert len({tuple(steps) for steps in found}) > 10


def test_or_all_blocks_run_to_the_last_step() -> None:
    config = replace(BLOCKS, last_step_only=True)
    assert [exits(config, step) for step in range(5)] == [[2, 2, 2]] * 5


def test_ranks_with_other_samples_make_as_many_passes() -> None:
    config = replace(BLOCKS, same_step_across_blocks=False)
    for step in range(10):
        lengths = set()
        for rank in range(2):
            net = Watched(Said())
            own = sample_rng(0, "test", [2 * rank, 2 * rank + 1], CPU)
            roll(net, config, step=step, samples=own)
            lengths.add(len(net.calls))
        assert len(lengths) == 1


@pytest.mark.parametrize("make", [roll, infer])
@pytest.mark.parametrize("context_noise", [0.0, 100.0])
def test_the_past_is_remembered_with_the_context_noise(
    make: Callable[..., Any], context_noise: float
) -> None:
    net = Watched(Said(2.0))
    made = make(net, replace(BLOCKS, context_noise=context_noise, last_step_only=True))
    x0 = made if isinstance(made, Tensor) else made.x0
    remembered = [call for call in net.calls if call.context.commit]
    sigma = context_noise / 1000.0
    for call, span in zip(remembered, SPANS[:2], strict=True):
        assert torch.equal(call.sigma, torch.full((SIZE, 1), sigma))
        noise = call.x - (1.0 - sigma) * x0[:, :, slice(*span)]
        assert float(noise.std()) == pytest.approx(sigma, rel=0.2)
        assert not call.grad


def test_the_last_block_is_not_remembered() -> None:
    for make in (roll, infer):
        net = Watched(Said())
        make(net)
        frames = [call.context.frame_index for call in net.calls if call.context.commit]
        assert [index.tolist() for index in frames if index is not None] == [[0], [1, 2]]


def test_blocks_of_an_image_model_get_their_part_of_the_first_frame() -> None:
    net, frames = Watched(Said()), random(SIZE, 20, *SHAPE[1:])
    asked = replace(batch(), conditioning=replace(text(1), first_frame=frames))
    SelfForcingTrainingPipeline([1.0], BLOCKS)(net, asked, streams_of_step(), grad=True)
    for call in net.calls:
        assert torch.equal(call.conditioning.first_frame, frames[:, :, call.context.frame_index])  # type: ignore[arg-type, index]


# ---- gradients ----


@dataclass(frozen=True, eq=False)
class Leaves(SampleRNG):
    """Streams that keep each draw, as a leaf whose gradient can be asked for."""

    drawn: list[Tensor] = field(default_factory=list)

    def _draw(self, function: Callable[..., Tensor], shape: Sequence[int]) -> Tensor:
        self.drawn.append(super()._draw(function, shape).requires_grad_())
        return self.drawn[-1]


def leaves() -> Leaves:
    return Leaves(streams().generators)


@pytest.mark.parametrize("block", range(3))
def test_a_blocks_loss_reaches_its_own_noise_and_no_earlier_one(
    tiny_wan: WanFactory, block: int
) -> None:
    rng = leaves()
    x0 = roll(wan(tiny_wan), sigmas=[1.0], samples=rng).x0
    loss = x0[:, :, slice(*SPANS[block])].square().sum()
    found = torch.autograd.grad(loss, rng.drawn, allow_unused=True)
    moved = [g is not None and bool(g.abs().max() > 0.0) for g in found]
    assert moved == [i == block for i in range(3)]


@pytest.mark.parametrize("block", range(3))
def test_straight_through_reaches_the_noise_of_all_earlier_blocks(
    tiny_wan: WanFactory, block: int
) -> None:
    rng = leaves()
    config = replace(BLOCKS, kv_gradient="straight_through")
    x0 = roll(wan(tiny_wan), config, sigmas=[1.0], samples=rng).x0
    loss = x0[:, :, slice(*SPANS[block])].square().sum()
    found = torch.autograd.grad(loss, rng.drawn, allow_unused=True)
    moved = [g is not None and bool(g.abs().max() > 1e-4) for g in found]
    assert moved == [i <= block for i in range(3)]


class Joined(KVCache):
    """A cache without storage: what was committed, as it was given, joined at every read."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[Tensor, Sequence[KeyValue]]] = []

    def past(self, frame_index: Tensor) -> Past:
        index = torch.cat([frame_index[:0], *(index for index, _ in self.given)])
        layers = [list(pieces) for pieces in zip(*(given for _, given in self.given), strict=True)]
        return Past(layers, index, frame_index)

    def commit(self, frame_index: Tensor, layers: Sequence[KeyValue]) -> None:
        self.given.append((frame_index, layers))


def by_hand(net: Denoiser, sigmas: Sequence[float], *, straight_through: bool) -> Tensor:
    """The same rollout to the last step, with the cache written explicitly."""
    cache, rng, conditioning, parts = Joined(), streams(), text(1), []
    for first, last in SPANS:
        index, keys, clean = torch.arange(first, last), [], []
        x = x0 = rng.randn((16, last - first, 4, 4))
        for step, sigma in enumerate(sigmas):
            if step:
                x = add_noise(x0, rng.randn(x0.shape[1:]), constant_sigma(sigma, x0))
            final = step == len(sigmas) - 1
            with torch.set_grad_enabled(final):
                context = Context(cache=cache, frame_index=index, keys=keys if final else None)
                x0 = net(x, constant_sigma(sigma, x), conditioning, context=context).x0
        parts.append(x0)
        with torch.no_grad():
            context = Context(cache=cache, frame_index=index, keys=clean)
            net(x0, constant_sigma(0.0, x0), conditioning, context=context)
        layers: list[KeyValue] = clean
        if straight_through:
            layers = [
                (c + g - g.detach(), d + h - h.detach())
                for (c, d), (g, h) in zip(clean, keys, strict=True)
            ]
        cache.commit(index, layers)
    return torch.cat(parts, dim=2)


@both_kinds
@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 0.6]])
def test_the_gradient_equals_that_of_a_rollout_by_hand(
    tiny_wan: WanFactory, kv_gradient: Any, sigmas: list[float]
) -> None:
    net = wan(tiny_wan)
    config = replace(BLOCKS, kv_gradient=kv_gradient, last_step_only=True)
    explicit = by_hand(net, sigmas, straight_through=kv_gradient == "straight_through")
    made = roll(net, config, sigmas).x0
    torch.testing.assert_close(made, explicit, atol=1e-5, rtol=0.0)
    weights = list(net.parameters())
    found, expected = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x0.square().sum(), weights)])
        for x0 in (made, explicit)
    )
    assert (found - expected).norm() < 1e-4 * expected.norm()


def test_the_two_kinds_of_gradient_differ(tiny_wan: WanFactory) -> None:
    net, found = wan(tiny_wan), []
    for straight_through in (False, True):
        loss = by_hand(net, [1.0], straight_through=straight_through).square().sum()
        found.append(torch.autograd.grad(loss, net.model.blocks[0].self_attn.k.weight)[0])  # type: ignore[union-attr, arg-type]
    assert (found[0] - found[1]).norm() > 0.01 * found[0].norm()


@pytest.mark.parametrize(
    ("gradient_frames", "learns"),
    [(None, [0, 1, 2]), (5, [0, 1, 2]), (4, [1, 2]), (3, [2]), (2, [2]), (1, [])],
)
def test_only_blocks_within_the_last_frames_learn(
    gradient_frames: int | None, learns: list[int]
) -> None:
    net = Watched(Said())
    roll(net, replace(BLOCKS, gradient_frames=gradient_frames))
    firsts = [int(call.context.frame_index[0]) for call in net.calls if call.grad]  # type: ignore[index]
    assert firsts == [SPANS[block][0] for block in learns]


@both_kinds
def test_blocks_that_do_not_learn_get_no_gradient_from_later_ones(
    tiny_wan: WanFactory, kv_gradient: Any
) -> None:
    rng, config = leaves(), replace(BLOCKS, gradient_frames=2, kv_gradient=kv_gradient)
    x0 = roll(wan(tiny_wan), config, [1.0], samples=rng).x0
    found = torch.autograd.grad(x0.square().sum(), rng.drawn, allow_unused=True)
    assert [g is not None and bool(g.any()) for g in found] == [False, False, True]


def test_only_exit_steps_run_under_autograd() -> None:
    net = Watched(Said())
    roll(net, replace(BLOCKS, last_step_only=True))
    assert [call.grad for call in net.calls] == [False, False, True, False] * 2 + [
        False, False, True,
    ]  # fmt: skip


# ---- frames that are given, and rollouts that are longer than what is scored ----

GIVEN = replace(BLOCKS, given_first_frame=True)


def test_the_given_first_frame_begins_the_sample_and_is_not_scored() -> None:
    made = roll(Said(), GIVEN)
    x0 = batch().x0
    assert x0 is not None
    assert torch.equal(made.x0[:, :, :1], x0[:, :, :1])
    assert made.given_frames == 1
    assert made.x0.shape == (SIZE, *SHAPE)


@every_mode
def test_a_rollout_from_a_given_frame_holds_what_inference_makes_of_it(
    tiny_wan: WanFactory, config: CausalConfig
) -> None:
    net, x0 = wan(tiny_wan), batch().x0
    assert x0 is not None
    made = roll(net, replace(config, given_first_frame=True, last_step_only=True)).x0
    assert torch.equal(made, infer(net, config, initial=x0[:, :, :1]))


def test_without_a_given_frame_all_are_scored() -> None:
    assert roll(Said()).given_frames == 0


@pytest.fixture(scope="module")
def codec(tiny_root: Path) -> PatchCodec:
    return PatchCodec.load(tiny_root / "wan_models" / "Wan2.1-T2V-Tiny" / FILE_NAME)


LONG = replace(BLOCKS, rollout_frames=9, last_step_only=True)


def frames_made(config: CausalConfig, step: int) -> int:
    pipeline = SelfForcingTrainingPipeline(SIGMAS, config)
    return pipeline.draw_frames(FRAMES, generator("shared", step))


def test_long_rollouts_have_any_number_of_whole_blocks() -> None:
    found = [frames_made(LONG, step) for step in range(90)]
    assert {n: found.count(n) > 15 for n in found} == {5: True, 7: True, 9: True}


def test_a_limit_within_a_block_is_not_exceeded() -> None:
    found = {frames_made(replace(LONG, rollout_frames=8), step) for step in range(40)}
    assert found == {5, 7}


def test_ranks_make_as_many_frames() -> None:
    for step in range(6):
        lengths = set()
        for rank in range(2):
            net = Watched(Said())
            own = sample_rng(0, "test", [2 * rank, 2 * rank + 1], CPU)
            pipeline = SelfForcingTrainingPipeline([1.0], LONG, NoCodec())
            pipeline(net, batch(), streams_of_step(step, own), grad=True)
            lengths.add(len(net.calls))
        assert len(lengths) == 1


class NoCodec:
    """A codec that keeps latents as they are."""

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        return latents

    encode_to_latent = decode_to_pixel

    def stream_decoder(self) -> Any:
        raise AssertionError("nothing streams in training")


def test_of_a_long_rollout_the_last_frames_are_scored(
    tiny_wan: WanFactory, codec: PatchCodec
) -> None:
    """They begin with an image: the last pixel frame before them, encoded as a video's first."""
    net = wan(tiny_wan)
    step = next(step for step in range(50) if frames_made(LONG, step) == 9)
    made = roll(net, LONG, step=step, vae=codec)
    whole = infer(net, LONG, frames=9)
    assert made.x0.shape == (SIZE, *SHAPE)
    assert torch.equal(made.x0[:, :, 1:], whole[:, :, 5:])
    pixels = codec.decode_to_pixel(whole[:, :, :5])
    assert pixels.shape[2] == 17
    assert torch.equal(made.x0[:, :, :1], codec.encode_to_latent(pixels[:, :, 16:]))
    assert made.given_frames == 1


def test_the_image_before_the_scored_frames_carries_no_gradient(
    tiny_wan: WanFactory, codec: PatchCodec
) -> None:
    rng, step = leaves(), next(s for s in range(50) if frames_made(LONG, s) == 7)
    x0 = roll(wan(tiny_wan), LONG, [1.0], step=step, samples=rng, vae=codec).x0
    found = torch.autograd.grad(x0[:, :, :1].sum(), rng.drawn, allow_unused=True)
    assert all(g is None or not g.any() for g in found)


@pytest.mark.parametrize("first", [False, True])
def test_a_rollout_as_long_as_what_is_scored_is_left_as_it_is(*, first: bool) -> None:
    config = replace(LONG, given_first_frame=first)
    step = next(step for step in range(50) if frames_made(config, step) == FRAMES)
    short = roll(Said(), replace(config, rollout_frames=None), step=step)
    made = roll(Said(), config, step=step)
    assert torch.equal(made.x0, short.x0)
    assert made.given_frames == int(first)


# ---- streaming ----


def pipelines(net: Denoiser) -> dict[str, InferencePipeline]:
    solver = SamplingConfig(3, 4.0, 5.0, "euler")
    return {
        "few steps": CausalInferencePipeline(net, SIGMAS, BLOCKS),
        "many steps": CausalDiffusionInferencePipeline(net, solver, BLOCKS),
    }


@pytest.mark.parametrize("name", ["few steps", "many steps"])
def test_a_block_is_handed_out_before_the_next_is_begun(name: str) -> None:
    net = Watched(Said())
    calls = []
    for piece in pipelines(net)[name].stream(text(1), text(2), SHAPE, streams()):
        calls.append((piece.shape[2], len(net.calls)))
    # Three steps per block; the pass that remembers a block comes after it was handed out.
    assert calls == [(1, 3), (2, 7), (2, 11)]


@pytest.mark.parametrize("name", ["few steps", "many steps"])
def test_a_stream_is_the_sample_in_pieces(tiny_wan: WanFactory, name: str) -> None:
    pipeline = pipelines(wan(tiny_wan))[name]
    pieces = list(pipeline.stream(text(1), text(2), SHAPE, streams()))
    assert torch.equal(torch.cat(pieces, 2), sample(pipeline, text(1), text(2), SHAPE, streams()))


@pytest.mark.parametrize("name", ["few steps", "many steps"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_continuing_a_video_equals_making_it_in_one_go(
    tiny_wan: WanFactory, name: str, blocks: int
) -> None:
    pipeline, rng = pipelines(wan(tiny_wan))[name], streams()
    whole = sample(pipeline, text(1), text(2), SHAPE, streams())
    pieces = pipeline.stream(text(1), text(2), SHAPE, rng)
    initial = torch.cat([next(pieces) for _ in range(blocks)], dim=2)
    assert initial.shape[2] == (1, 3)[blocks - 1]
    continued = sample(pipeline, text(1), text(2), SHAPE, rng, initial=initial)
    torch.testing.assert_close(continued, whole, atol=1e-5, rtol=0.0)


def test_the_first_piece_repeats_the_frames_that_are_given() -> None:
    initial = random(SIZE, 16, 3, 4, 4)
    pieces = pipelines(Said())["few steps"].stream(
        text(1), text(2), SHAPE, streams(), initial=initial
    )
    assert torch.equal(next(pieces), initial)


def test_frames_that_end_within_a_block_are_refused() -> None:
    with pytest.raises(ValueError, match="2 given frames of 5 must end where a block ends"):
        infer(Said(), initial=random(SIZE, 16, 2, 4, 4))


@pytest.mark.parametrize("name", ["few steps", "many steps"])
def test_progress_is_told_once_per_step(name: str) -> None:
    told: list[tuple[int, int]] = []
    pipeline = pipelines(Said())[name]
    sample(pipeline, text(1), text(2), SHAPE, streams(), on_step=lambda *s: told.append(s))
    assert told == [(i, 9) for i in range(1, 10)]
    assert pipeline.steps(FRAMES) == 9


def test_decoding_a_stream_equals_decoding_the_whole_bit_for_bit(
    tiny_wan: WanFactory, codec: PatchCodec
) -> None:
    pipeline, decoder = pipelines(wan(tiny_wan))["few steps"], codec.stream_decoder()
    pieces = pipeline.stream(text(1), text(2), SHAPE, streams())
    pixels = [decoder.decode(piece) for piece in pieces]
    assert [piece.shape[2] for piece in pixels] == [1, 8, 8]
    whole = codec.decode_to_pixel(sample(pipeline, text(1), text(2), SHAPE, streams()))
    assert torch.equal(torch.cat(pixels, dim=2), whole)


@pytest.mark.parametrize("sink", [0, 1])
def test_ten_times_as_many_frames_need_no_larger_cache(tiny_wan: WanFactory, sink: int) -> None:
    net, kept = wan(tiny_wan), []

    def noting(x: Tensor, sigma: Tensor, asked: Conditioning, *, context: Context) -> Prediction:
        assert context.cache is not None
        kept.append(context.cache.frames)
        return net(x, sigma, asked, context=context)

    config = CausalConfig(2, True, local_attn_size=5, sink_size=sink, relative_positions=True)
    x0 = infer(noting, config, [1.0], frames=51)
    assert len(kept) == 51
    assert max(kept) == 5
    assert x0.isfinite().all()
    assert 0.2 < float(x0[:, :, -10:].std() / x0[:, :, :10].std()) < 5.0


# ---- many steps with guidance ----


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_video_of_one_block_is_the_bidirectional_teachers(
    tiny_wan: WanFactory, cfg_scale: float, solver: Any
) -> None:
    net, sampling = wan(tiny_wan), SamplingConfig(4, cfg_scale, 5.0, solver)
    causal = CausalDiffusionInferencePipeline(net, sampling, CausalConfig(FRAMES))
    found, expected = (
        sample(pipeline, text(1), text(2), SHAPE, streams())
        for pipeline in (causal, TeacherInferencePipeline(net, sampling))
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize(("cfg_scale", "copies"), [(1.0, 1), (4.0, 2)])
def test_a_guided_cache_holds_the_past_under_both_prompts(cfg_scale: float, copies: int) -> None:
    net = Watched(Said())
    sampling = SamplingConfig(2, cfg_scale, 5.0, "euler")
    x0 = sample(
        CausalDiffusionInferencePipeline(net, sampling, BLOCKS), text(1), text(2), SHAPE, streams()
    )
    prompts = torch.cat([text(1).text, text(2).text])[: copies * SIZE]
    assert all(torch.equal(call.conditioning.text, prompts) for call in net.calls)
    remembered = [call.x for call in net.calls if call.context.commit]
    for x, span in zip(remembered, SPANS[:2], strict=True):
        assert torch.equal(x, x0[:, :, slice(*span)].repeat(copies, 1, 1, 1, 1))


def test_guidance_block_by_block_equals_two_videos_by_hand(tiny_wan: WanFactory) -> None:
    net, sampling = wan(tiny_wan), SamplingConfig(2, 4.0, 5.0, "euler")
    found = sample(
        CausalDiffusionInferencePipeline(net, sampling, BLOCKS), text(1), text(2), SHAPE, streams()
    )
    caches, rng, parts = (KVCache(), KVCache()), streams(), []
    with torch.no_grad():
        for span in SPANS:
            index = torch.arange(*span)
            x = rng.randn((16, len(index), 4, 4))
            for sigma, after in pairwise([1.0, 5.0 * 0.5 / (1.0 + 4.0 * 0.5), 0.0]):
                cond, uncond = (
                    net(
                        x,
                        constant_sigma(sigma, x),
                        prompt,
                        context=Context(cache=c, frame_index=index),
                    )
                    for prompt, c in zip((text(1), text(2)), caches, strict=True)
                )
                velocity = uncond.velocity + 4.0 * (cond.velocity - uncond.velocity)
                x = x + (after - sigma) * velocity
            parts.append(x)
            for prompt, c in zip((text(1), text(2)), caches, strict=True):
                context = Context(cache=c, frame_index=index, commit=True)
                net(x, constant_sigma(0.0, x), prompt, context=context)
    torch.testing.assert_close(found, torch.cat(parts, dim=2), atol=1e-4, rtol=1e-4)


# ---- counts ----


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("causal", [None, BLOCKS], ids=["whole", "causal"])
def test_evaluations_of_many_steps_are_counted_right(
    causal: CausalConfig | None, cfg_scale: float, solver: Any
) -> None:
    net = Watched(Said())
    pipeline = many_step_sampler(
        net, Sampling(causal=causal, many_step=SamplingConfig(4, cfg_scale, 5.0, solver))
    )
    assert isinstance(pipeline, TeacherInferencePipeline) == (causal is None)
    sample(pipeline, text(1), text(2), SHAPE, streams())
    counted = sum(len(call.x) for call in net.calls) / SIZE
    assert pipeline.network_evaluations(FRAMES) == counted


@pytest.mark.parametrize("causal", [None, BLOCKS], ids=["whole", "causal"])
def test_evaluations_of_few_steps_are_counted_right(causal: CausalConfig | None) -> None:
    net = Watched(Said())
    pipeline = few_step_sampler(net, Sampling(SIGMAS, causal))
    assert isinstance(pipeline, BidirectionalInferencePipeline) == (causal is None)
    sample(pipeline, text(1), text(2), SHAPE, streams())
    assert pipeline.network_evaluations(FRAMES) == len(net.calls)


# ---- memory ----


def held(net: Denoiser, blocks: int, kv_gradient: Any) -> int:
    """Bytes that a rollout of so many blocks holds until its backward pass."""
    config = CausalConfig(1, last_step_only=True, kv_gradient=kv_gradient)
    pipeline = SelfForcingTrainingPipeline([1.0], config)
    with Live() as live:
        made = pipeline(net, batch((16, blocks, 4, 4)), streams_of_step(), grad=True)
        assert made.x0.requires_grad
        return live.bytes()


@both_kinds
def test_memory_of_a_rollout_grows_with_its_blocks_and_not_with_their_square(
    tiny_wan: WanFactory, kv_gradient: Any
) -> None:
    """Each further block costs the same, to 5 %: the cache is not held once more per block.

    It would be 33 % here. What is left are the rotary tables of the past, one per block.
    """
    net = wan(tiny_wan)
    few, more, many = (held(net, blocks, kv_gradient) for blocks in (8, 16, 32))
    assert many - more == pytest.approx(2 * (more - few), rel=0.05)


# ---- settings that cannot work ----


def test_gradient_frames_within_the_last_block_are_refused() -> None:
    """No block would learn, and the generator's loss would have no gradient at all."""
    assert list(replace(BLOCKS, gradient_frames=1).problems(FRAMES))


def test_a_long_rollout_of_which_one_frame_is_scored_is_refused() -> None:
    """All that is scored would be the encoded image, which carries no gradient."""
    assert list(CausalConfig(1, rollout_frames=3).problems(1))

"""Block-by-block samples of a causal generator: the self-forcing rollout and its inference twins.

Each block is made on a cache of the clean blocks before it (arXiv:2506.08009). Letters as in
model/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from model.encoders.vae import VideoVAE
from model.flow import TIMESTEPS
from model.guidance import concatenate
from model.types import Batch, Conditioning, Context, Denoiser, Sample
from model.wan.cache import KeyValue, KVCache
from pipeline.blocks import BlockSigmas, CausalConfig
from pipeline.few_step import OnStep, backward_simulation, few_step, predict_x0, renoise
from pipeline.protocol import refuse_adjusting
from pipeline.teacher import SamplingConfig, adjusted, evaluations_per_step, integrate
from utils.seeding import SampleRNG, StepRNG


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a video in the making."""

    frames: tuple[int, int]  # first .. last, the last one not included
    conditioning: Conditioning  # its part
    context: Context  # the cache, and where the block lies

    @property
    def size(self) -> int:
        """How many frames."""
        return self.frames[1] - self.frames[0]


def starts(sizes: Sequence[int], first: int = 0) -> list[int]:
    """The frames at which successive blocks begin, the first of them at `first`."""
    return list(accumulate(sizes, initial=first))[:-1]


def lay_out(
    sizes: Sequence[int], first: int, conditioning: Conditioning, cache: KVCache
) -> Iterator[Block]:
    """Successive blocks of a video, the first of them at frame `first`."""
    for begin, size in zip(starts(sizes, first), sizes, strict=True):
        span = (begin, begin + size)
        index = torch.arange(*span)
        yield Block(span, conditioning.frames(*span), Context(cache=cache, frame_index=index))


@torch.no_grad()
def remember(net: Denoiser, block: Block, x0: Tensor, rng: SampleRNG, context_noise: float) -> None:
    """Put a finished block into the cache: one pass over it, clean but for the context noise.

    x0: [B, C, f, H, W]; a block whose conditioning is for a multiple of B takes it repeatedly.
    """
    sigma = context_noise / TIMESTEPS
    x = renoise(x0, sigma, rng) if sigma else x0
    x = x.repeat(len(block.conditioning.text) // len(x), 1, 1, 1, 1)
    predict_x0(net, x, sigma, block.conditioning, replace(block.context, commit=True))


class SelfForcingTrainingPipeline:
    """Rolls a causal generator out as inference will, block by block on what it made itself.

    Each block runs up to an exit step, which alone carries a gradient; then its clean frames enter
    the cache without one. `kv_gradient: straight_through` gives later blocks' losses a way back:
    values are the clean pass's, gradients reach the keys and values of the exit step.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        config: CausalConfig,
        vae: VideoVAE | None = None,
        *,
        first_sigmas: Sequence[float] | None = None,
    ) -> None:
        """vae: for rollouts longer than what is scored. first_sigmas: of the first block."""
        self.sigmas = BlockSigmas(sigmas, first_sigmas)
        self.config = config
        self.vae = vae

    def __call__(self, generator: Denoiser, batch: Batch, rng: StepRNG, *, grad: bool) -> Sample:
        """x0 [B, C, F, H, W] of `batch.conditioning`."""
        config, conditioning = self.config, batch.conditioning
        channels, scored, *area = batch.latent_shape
        frames = self.draw_frames(scored, rng.shared)
        pieces = self.given(batch)
        old, new = config.split(frames, sum(piece.shape[2] for piece in pieces))
        exits = self.draw_exits(len(new), rng.shared, begins=not old)
        cache = config.new_cache(frames)
        for block, x0 in zip(lay_out(old, 0, conditioning, cache), pieces, strict=True):
            remember(generator, block, x0, rng.samples, config.context_noise)
        for block, exit_step in zip(
            lay_out(new, sum(old), conditioning, cache), exits, strict=True
        ):
            learns = grad and block.frames[0] >= frames - (config.gradient_frames or scored)
            keys: list[KeyValue] | None = (
                [] if learns and config.kv_gradient == "straight_through" else None
            )
            x0 = backward_simulation(
                generator,
                rng.samples.randn((channels, block.size, *area)),
                block.conditioning,
                self.sigmas.of(block.frames[0])[: exit_step + 1],
                rng.samples,
                context=block.context,
                grad=learns,
                keys=keys,
            )
            pieces.append(x0)
            if block.frames[1] < frames:
                remember(generator, block, x0, rng.samples, config.context_noise)
                if keys is not None:
                    cache.graft(keys)
        return self.scored(torch.cat(pieces, dim=2), scored, given=sum(old))

    def given(self, batch: Batch) -> list[Tensor]:
        """The blocks that the video begins with."""
        return [] if batch.given is None else [batch.given]

    def draw_frames(self, scored: int, shared: torch.Generator) -> int:
        """How many frames to make: `scored`, or more in whole blocks up to rollout_frames."""
        longest = self.config.rollout_frames
        if longest is None:
            return scored
        block = self.config.num_frame_per_block
        more = int(torch.randint((longest - scored) // block + 1, (), generator=shared))
        return scored + more * block

    def draw_exits(self, blocks: int, shared: torch.Generator, *, begins: bool) -> list[int]:
        """The exit step of each block, the same on all ranks: forwards must pair up.

        begins: whether the first of them is the video's, which may have steps of its own; then its
        exit is drawn by itself.
        """
        alone = 1 if begins and self.sigmas.first is not None else 0
        counts = [len(self.sigmas.of(frame)) for frame in (0, 1)]
        first = self._exits(counts[0], alone, shared)
        return [*first, *self._exits(counts[1], blocks - alone, shared)]

    def _exits(self, steps: int, blocks: int, shared: torch.Generator) -> list[int]:
        """Those of blocks of as many steps."""
        if self.config.last_step_only or not blocks:
            return [steps - 1] * blocks
        draws = 1 if self.config.same_step_across_blocks else blocks
        drawn = torch.randint(steps, (draws,), generator=shared).tolist()
        return drawn if draws == blocks else drawn * blocks

    def scored(self, x0: Tensor, frames: int, *, given: int) -> Sample:
        """The last `frames` of a rollout, as a video that begins with a frame of its own.

        A first latent frame holds one pixel frame and any other four: so the frames before the
        scored ones are decoded, and the last pixel frame of them encoded as a first frame.
        """
        if x0.shape[2] == frames:
            return Sample(x0, given_frames=given)
        assert self.vae is not None, "rollouts longer than what is scored need the VAE"
        kept = frames - 1
        with torch.no_grad():
            pixels = self.vae.decode_to_pixel(x0[:, :, :-kept])[:, :, -1:]
            image = self.vae.encode_to_latent(pixels).to(x0.dtype)
        return Sample(torch.cat([image, x0[:, :, -kept:]], dim=2), given_frames=1)


class BlockwiseInference(ABC):
    """Makes one block after the other on a cache; a subclass says how a block is made."""

    def __init__(self, net: Denoiser, config: CausalConfig) -> None:
        self.net = net
        self.config = config

    @abstractmethod
    def steps_of_block(self, frame: int) -> int:
        """How often `on_step` is called for the block that begins at `frame`."""

    @property
    @abstractmethod
    def evaluations_per_step(self) -> int:
        """How often the network runs per step."""

    @abstractmethod
    def make(
        self,
        block: Block,
        unconditional: Conditioning,
        noise: Tensor,
        rng: SampleRNG,
        on_step: OnStep,
    ) -> Tensor:
        """The clean latents of a block from its noise [B, C, f, H, W]."""

    def remembered(self, conditioning: Conditioning, unconditional: Conditioning) -> Conditioning:
        """The conditioning of the videos in the cache: one per sample, or two under guidance."""
        del unconditional
        return conditioning

    def steps(self, frames: int) -> int:
        """See pipeline.protocol.InferencePipeline."""
        return sum(map(self.steps_of_block, starts(self.config.blocks(frames))))

    def network_evaluations(self, frames: int) -> int:
        """Those of the steps, and one pass per block but the last to remember it."""
        passes = len(self.config.blocks(frames)) - 1
        return self.evaluations_per_step * (self.steps(frames) + passes)

    def stream(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        latent_shape: Sequence[int],
        rng: SampleRNG,
        *,
        initial: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Tensor]:
        """Block after block, each handed out before the next is begun."""
        channels, frames, *area = latent_shape
        given = 0 if initial is None else initial.shape[2]
        old, new = self.config.split(frames, given)
        cache = self.config.new_cache(frames)
        kept = self.remembered(conditioning, unconditional)
        if initial is not None:
            yield initial
            parts = torch.split(initial, old, dim=2)
            for block, part in zip(lay_out(old, 0, kept, cache), parts, strict=True):
                self.remember(block, part, rng)
        own = lay_out(new, given, conditioning, cache)
        counts = [self.steps_of_block(frame) for frame in starts(new, given)]
        before = accumulate(counts, initial=0)
        for block, past, done in zip(own, lay_out(new, given, kept, cache), before, strict=False):
            noise = rng.randn((channels, block.size, *area))
            count = _counter(on_step, done, sum(counts))
            with torch.no_grad():
                x0 = self.make(block, unconditional.frames(*block.frames), noise, rng, count)
            yield x0
            if block.frames[1] < frames:
                self.remember(past, x0, rng)

    def remember(self, block: Block, x0: Tensor, rng: SampleRNG) -> None:
        """Put finished frames [B, C, f, H, W] into the cache."""
        remember(self.net, block, x0, rng, self.config.context_noise)


class CausalInferencePipeline(BlockwiseInference):
    """Few steps per block without guidance: a distilled generator."""

    evaluations_per_step = 1

    def __init__(
        self,
        net: Denoiser,
        sigmas: Sequence[float],
        config: CausalConfig,
        *,
        first_sigmas: Sequence[float] | None = None,
    ) -> None:
        """first_sigmas: of the block that a video begins with; None = as of all others."""
        super().__init__(net, config)
        self.sigmas = BlockSigmas(sigmas, first_sigmas)

    def adjusted(
        self, *, steps: int | None = None, cfg_scale: float | None = None
    ) -> CausalInferencePipeline:
        """See pipeline.protocol.InferencePipeline; there is nothing to adjust."""
        refuse_adjusting(steps, cfg_scale)
        return self

    def steps_of_block(self, frame: int) -> int:
        """One per noise level."""
        return len(self.sigmas.of(frame))

    def make(
        self,
        block: Block,
        unconditional: Conditioning,
        noise: Tensor,
        rng: SampleRNG,
        on_step: OnStep,
    ) -> Tensor:
        """See BlockwiseInference; a distilled generator needs no negative prompt."""
        del unconditional
        return few_step(
            self.net,
            noise,
            block.conditioning,
            self.sigmas.of(block.frames[0]),
            rng,
            context=block.context,
            on_step=on_step,
        )


class CausalDiffusionInferencePipeline(BlockwiseInference):
    """Many steps per block with guidance: a model trained by teacher or diffusion forcing.

    Guided, the cache holds the past of every video twice, under its prompt and under the negative.
    """

    def __init__(self, net: Denoiser, sampling: SamplingConfig, config: CausalConfig) -> None:
        super().__init__(net, config)
        self.sampling = sampling

    def adjusted(
        self, *, steps: int | None = None, cfg_scale: float | None = None
    ) -> CausalDiffusionInferencePipeline:
        """See pipeline.protocol.InferencePipeline."""
        sampling = adjusted(self.sampling, steps, cfg_scale)
        return CausalDiffusionInferencePipeline(self.net, sampling, self.config)

    def steps_of_block(self, frame: int) -> int:
        """Those of the solver."""
        del frame
        return self.sampling.steps

    @property
    def evaluations_per_step(self) -> int:
        """Two where it is guided."""
        return evaluations_per_step(self.sampling)

    def remembered(self, conditioning: Conditioning, unconditional: Conditioning) -> Conditioning:
        """The prompts, and behind them the negative prompt, where it is used."""
        if self.evaluations_per_step == 1:
            return conditioning
        return concatenate(conditioning, unconditional)

    def make(
        self,
        block: Block,
        unconditional: Conditioning,
        noise: Tensor,
        rng: SampleRNG,
        on_step: OnStep,
    ) -> Tensor:
        """See BlockwiseInference."""
        del rng  # the path is fixed by its noise
        return integrate(
            self.net,
            noise,
            block.conditioning,
            unconditional,
            self.sampling,
            context=block.context,
            on_step=on_step,
        )


def _counter(on_step: OnStep | None, before: int, total: int) -> OnStep:
    """Steps of one block as steps of the whole video."""

    def count(done: int, _: int) -> None:
        if on_step is not None:
            on_step(before + done, total)

    return count

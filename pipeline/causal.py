"""Block-by-block samples of a causal generator: the self-forcing rollout and its inference twins.

Each block is made on a cache of the clean blocks before it (arXiv:2506.08009). Letters as in
model/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from model.encoders.vae import VideoVAE
from model.guidance import concatenate
from model.types import Batch, Conditioning, Denoiser, Sample
from model.wan.cache import KeyValue
from pipeline.blocks import (
    Block,
    BlockSigmas,
    CausalConfig,
    as_past,
    commit,
    lay_out,
    remember,
    starts,
)
from pipeline.few_step import OnStep, exit_input, few_step, predict_x0
from pipeline.protocol import refuse_adjusting
from pipeline.teacher import SamplingConfig, adjusted, evaluations_per_step, integrate
from utils.seeding import SampleRNG, StepRNG


class SelfForcingTrainingPipeline:
    """Rolls a causal generator out as inference will, block by block on what it made itself.

    Each block runs up to an exit step, which alone carries a gradient; then its clean frames enter
    the cache without one, or with `remember: last_step` the exit step's own keys and values do.
    `kv_gradient: straight_through` gives later blocks' losses a way back: values are those of the
    cache, gradients reach the keys and values of the exit step.
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
            past = as_past(x0, rng.samples, config.context_noise)
            remember(generator, block, past, config.context_noise)
        for block, exit_step in zip(
            lay_out(new, sum(old), conditioning, cache), exits, strict=True
        ):
            learns = grad and block.frames[0] >= frames - (config.gradient_frames or scored)
            noise = rng.samples.randn((channels, block.size, *area))
            sigmas = self.sigmas.of(block.frames[0])[: exit_step + 1]
            last = block.frames[1] == frames
            pieces.append(
                self.make(generator, block, noise, sigmas, rng.samples, learns=learns, last=last)
            )
        return self.scored(torch.cat(pieces, dim=2), scored, given=sum(old))

    def make(
        self,
        generator: Denoiser,
        block: Block,
        noise: Tensor,
        sigmas: Sequence[float],
        rng: SampleRNG,
        *,
        learns: bool,
        last: bool,
    ) -> Tensor:
        """A block after `sigmas`, [B, C, f, H, W], which is in the cache unless it is the last."""
        config, text, context = self.config, block.conditioning, block.context
        x = exit_input(generator, noise, text, sigmas, rng, context=context)
        grafts = learns and config.kv_gradient == "straight_through"
        keeps = config.remember == "last_step" and not last
        keys: list[KeyValue] | None = [] if grafts or (keeps and learns) else None
        at = replace(context, keys=keys, commit=keeps and not learns)
        with torch.set_grad_enabled(learns):
            x0 = predict_x0(generator, x, sigmas[-1], text, at)
        if last:
            return x0
        if config.remember == "clean":
            past = as_past(x0, rng, config.context_noise)
            remember(generator, block, past, config.context_noise)
        elif keys is not None:
            commit(block, keys)
        if grafts and keys is not None and context.cache is not None:
            context.cache.graft(keys)
        return x0

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

    @property
    def passes_to_remember(self) -> bool:
        """Whether a finished block enters the cache by a pass of its own."""
        return True

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
        """Those of the steps, and those that remember each block but the last."""
        passes = (len(self.config.blocks(frames)) - 1) * self.passes_to_remember
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
        counts = [self.steps_of_block(frame) for frame in starts(new, given)]
        before = accumulate(counts, initial=0)
        laid = (lay_out(new, given, whose, cache) for whose in (conditioning, kept))
        for block, past, done in zip(*laid, before, strict=False):
            noise = rng.randn((channels, block.size, *area))
            count = _counter(on_step, done, sum(counts))
            goes_on = block.frames[1] < frames
            at = replace(block.context, commit=goes_on and not self.passes_to_remember)
            own = replace(block, context=at)
            with torch.no_grad():
                x0 = self.make(own, unconditional.frames(*block.frames), noise, rng, count)
            yield x0
            if goes_on and self.passes_to_remember:
                self.remember(past, x0, rng)

    def remember(self, block: Block, x0: Tensor, rng: SampleRNG) -> None:
        """Put finished frames [B, C, f, H, W] into the cache."""
        noise = self.config.context_noise
        remember(self.net, block, as_past(x0, rng, noise), noise)


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

    @property
    def passes_to_remember(self) -> bool:
        """See BlockwiseInference; what the last step of a block commits needs none."""
        return self.config.remember == "clean"

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
        assert config.remember == "clean", "many steps end with a pass over the clean block"
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

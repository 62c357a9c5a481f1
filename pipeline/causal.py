"""Block-by-block samples of a causal generator, as streams: in few steps and in many.

Each block is made on a cache of the blocks before it. Letters as in model/types.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from model.guidance import concatenate
from model.types import Conditioning, Denoiser
from pipeline.blocks import (
    Block,
    BlockSigmas,
    CausalConfig,
    as_past,
    lay_out,
    remember,
    starts,
)
from pipeline.few_step import OnStep, few_step
from pipeline.protocol import refuse_adjusting
from pipeline.teacher import SamplingConfig, adjusted, evaluations_per_step, integrate
from utils.seeding import SampleRNG


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
        begins = conditioning.frames(0, frames)
        kept = self.remembered(begins, unconditional)
        if initial is not None:
            yield initial
            parts = torch.split(initial, old, dim=2)
            for block, part in zip(lay_out(old, 0, kept, cache), parts, strict=True):
                self.remember(block, part, rng)
        counts = [self.steps_of_block(frame) for frame in starts(new, given)]
        before = accumulate(counts, initial=0)
        text = begins.text
        for block, done in zip(lay_out(new, given, conditioning, cache), before, strict=False):
            if block.conditioning.text is not text:
                cache.new_prompt()
                text = block.conditioning.text
            negative = unconditional.frames(*block.frames)
            noise = rng.randn((channels, block.size, *area))
            count = _counter(on_step, done, sum(counts))
            goes_on = block.frames[1] < frames
            at = replace(block.context, commit=goes_on and not self.passes_to_remember)
            own = replace(block, context=at)
            with torch.no_grad():
                x0 = self.make(own, negative, noise, rng, count)
            yield x0
            if goes_on and self.passes_to_remember:
                past = self.remembered(block.conditioning, negative)
                self.remember(replace(block, conditioning=past), x0, rng)

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

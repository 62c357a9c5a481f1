"""The self-forcing rollout: samples in blocks that a causal generator makes on its own past.

Each block is made on a cache of the blocks before it (arXiv:2506.08009), as streams are
(pipeline/causal.py). Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.encoders.vae import VideoVAE
from model.flow import TIMESTEPS
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
)
from pipeline.few_step import predict_x0, state_at
from pipeline.replay import LastStep, Past, in_parallel, replayed
from utils.seeding import SampleRNG, StepRNG


class SelfForcingTrainingPipeline:
    """Rolls a causal generator out as inference will, block by block on what it made itself.

    Each block runs up to an exit step, which alone carries a gradient; then its clean frames enter
    the cache without one, or with `remember: last_step` the exit step's own keys and values do.
    `kv_gradient: straight_through` gives later blocks' losses a way back: values are those of the
    cache, gradients reach the keys and values of the exit step. `replayed` and `parallel` make all
    blocks without gradient first: see pipeline/replay.py.
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
        steps = [
            self.given_step(generator, block, x0, rng.samples)
            for block, x0 in zip(lay_out(old, 0, conditioning, cache), pieces, strict=True)
        ]
        learns_from = max(sum(old), frames - (config.gradient_frames or scored))
        replays = grad and config.kv_gradient == "replayed"
        later = replays or config.kv_gradient == "parallel"  # once all blocks are there
        for block, exit_step in zip(
            lay_out(new, sum(old), conditioning, cache), exits, strict=True
        ):
            learns = grad and not later and block.frames[0] >= learns_from
            noise = rng.samples.randn((channels, block.size, *area))
            sigmas = self.sigmas.of(block.frames[0])[: exit_step + 1]
            last = block.frames[1] == frames
            seen = cache.snapshot() if replays else None
            step = self.make(generator, block, noise, sigmas, rng.samples, learns=learns, last=last)
            steps.append(step.on(seen))
        x0 = torch.cat([step.x0 for step in steps], dim=2)
        if grad and later:
            x0 = self.made_to_learn(x0, generator, steps, conditioning, learns_from)
        return self.scored(x0, scored, given=sum(old))

    def given_step(self, generator: Denoiser, block: Block, x0: Tensor, rng: SampleRNG) -> LastStep:
        """A block that the video begins with, which is in the cache then."""
        past = as_past(x0, rng, self.config.context_noise)
        remember(generator, block, past, self.config.context_noise)
        return LastStep(block, x0, 0.0, x0, past)

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
    ) -> LastStep:
        """A block after `sigmas`, which is in the cache then unless it is the last."""
        config, text, context = self.config, block.conditioning, block.context
        cache = context.cache
        assert cache is not None, "blocks are made on a cache"
        x = state_at(generator, noise, text, sigmas, rng, context=context)
        grafts = learns and config.kv_gradient == "straight_through"
        keeps = config.remember == "last_step" and not last
        keys: list[KeyValue] | None = [] if grafts or (keeps and learns) else None
        at = replace(context, keys=keys, commit=keeps and not learns)
        with torch.set_grad_enabled(learns):
            x0 = predict_x0(generator, x, sigmas[-1], text, at)
        past = None
        if not last and config.remember == "clean":
            past = as_past(x0, rng, config.context_noise)
            remember(generator, block, past, config.context_noise)
        elif not last and keys is not None:
            commit(block, keys)
        if grafts and keys is not None and not last:
            cache.graft(keys)
        return LastStep(block, x, sigmas[-1], x0, past)

    def made_to_learn(
        self,
        x0: Tensor,
        generator: Denoiser,
        steps: Sequence[LastStep],
        conditioning: Conditioning,
        first: int,
    ) -> Tensor:
        """x0 [B, C, F, H, W] of `steps`, whose blocks from frame `first` on carry a gradient."""
        config = self.config
        learning = [step for step in steps if step.block.frames[0] >= first]
        if config.kv_gradient == "replayed":
            return replayed(generator, learning, x0)
        past = Past(config, config.remember == "clean", config.context_noise / TIMESTEPS)
        made = in_parallel(generator, steps, conditioning, past)
        begin = learning[0].block.frames[0]
        return torch.cat([x0[:, :, :begin], made[:, :, begin:]], dim=2)

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

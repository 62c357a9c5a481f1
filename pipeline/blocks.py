"""How videos are made block by block: settings, noise levels, blocks, and how caches get them.

Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from model.causal import CausalLayout
from model.flow import TIMESTEPS
from model.types import Conditioning, Context, Denoiser
from model.wan.cache import KeyValue, KVCache
from pipeline.few_step import predict_x0, renoise
from utils.seeding import SampleRNG

# Settings that only rollouts follow in training.
ROLLOUT_KEYS = (
    "remember",
    "kv_gradient", "same_step_across_blocks", "last_step_only", "gradient_frames",
    "rollout_frames", "given_first_frame",
)  # fmt: skip


@dataclass(frozen=True)
class CausalConfig(CausalLayout):
    """The layout, and how a generator is rolled out over it in training."""

    context_noise: float = 0.0  # timestep in [0, 1000) of the noise on the past, also in inference
    # How a block that is made enters the cache: by a pass over it clean but for the context noise,
    # or by the keys and values of its last step, without a further pass; also in inference.
    remember: Literal["clean", "last_step"] = "clean"
    # The gradient into earlier blocks. detach: none; replayed: none, and one block's activations
    # at a time; straight_through: by what exit steps compute for what the cache holds; parallel:
    # the whole one through the past, all of which one more pass encodes with a gradient.
    kv_gradient: Literal["detach", "straight_through", "replayed", "parallel"] = "detach"
    same_step_across_blocks: bool = True  # one exit step for all blocks, or one for each
    last_step_only: bool = False  # always run all steps
    gradient_frames: int | None = None  # only blocks within the last so many; None = the scored
    rollout_frames: int | None = None  # make up to so many, score the last latent_shape[1] of them
    given_first_frame: bool = False  # begin with the data's first latent frame, or its image

    def problems(self, frames: int) -> Iterator[str]:
        """What is impossible about these settings for videos of `frames` latent frames."""
        found = list(super().problems(frames))
        yield from found
        if not 0.0 <= self.context_noise < TIMESTEPS:
            yield f"causal.context_noise: must lie in [0, 1000), got {self.context_noise}"
        if self.context_noise and self.remember == "last_step":
            yield (
                f"causal.context_noise: {self.context_noise} has no effect with causal.remember: "
                f"last_step, where no pass over clean blocks is made; set it to 0"
            )
        if found:
            return
        yield from self.gradient_problems(frames)
        last = self.blocks(frames)[-1]
        if self.gradient_frames is not None and self.gradient_frames < last:
            yield (
                f"causal.gradient_frames: must hold the last block, {last} or more, or be null, "
                f"got {self.gradient_frames}"
            )
        if self.rollout_frames is not None and self.rollout_frames < frames:
            yield (
                f"causal.rollout_frames: must be at least the {frames} frames of latent_shape, "
                f"got {self.rollout_frames}"
            )
        elif self.rollout_frames is not None and self.rollout_frames > frames == 1:
            yield "causal.rollout_frames: must be null or 1 if one frame is scored (latent_shape)"
        elif self.rollout_frames is not None:
            try:
                self.blocks(self.rollout_frames)
            except ValueError as error:
                yield f"causal.rollout_frames: {error}"
        if self.given_first_frame:
            try:
                self.split(frames, 1)
            except ValueError as error:
                yield (
                    f"causal.given_first_frame: {error}; set causal.independent_first_frame=true"
                )

    def drops(self, frames: int) -> bool:
        """Whether rollouts for so many scored frames are longer than what a block sees."""
        longest = self.rollout_frames or frames
        return self.local_attn_size is not None and longest > self.local_attn_size

    def gradient_problems(self, frames: int) -> Iterator[str]:
        """Pasts that one pass over a video would not see as its stream did."""
        if self.kv_gradient == "parallel" and self.relative_positions and self.drops(frames):
            yield (
                f"causal.kv_gradient: parallel counts positions from the video's start, but "
                f"rollouts of {self.rollout_frames or frames} frames drop some "
                f"(causal.local_attn_size={self.local_attn_size}) and causal.relative_positions "
                f"counts from those that are kept; use replayed, detach or straight_through, or "
                f"keep all frames"
            )
        if self.sink_decay < 1.0 and self.kv_gradient == "straight_through" and self.drops(frames):
            yield (
                f"causal.sink_decay: {self.sink_decay} mixes frames whose gradients "
                f"causal.kv_gradient=straight_through would tell apart; use detach or replayed, or "
                f"set it to 1"
            )


@dataclass(frozen=True)
class BlockSigmas:
    """Noise levels of the steps of each block, descending from 1."""

    later: Sequence[float]
    first: Sequence[float] | None = None  # of the block that a video begins with; None = as later

    def of(self, frame: int) -> list[float]:
        """Those of the block that begins at `frame` of its video."""
        return list(self.later if frame or self.first is None else self.first)


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
def as_past(x0: Tensor, rng: SampleRNG, context_noise: float) -> Tensor:
    """A finished block [B, C, f, H, W] as later ones see it: clean but for the context noise."""
    return renoise(x0, context_noise / TIMESTEPS, rng) if context_noise else x0


@torch.no_grad()
def remember(net: Denoiser, block: Block, x: Tensor, context_noise: float) -> None:
    """Put a finished block, `as_past` made it, into the cache: one pass over it.

    x: [B, C, f, H, W]; a block whose conditioning is for a multiple of B takes it repeatedly.
    """
    x = x.repeat(len(block.conditioning.text) // len(x), 1, 1, 1, 1)
    sigma = context_noise / TIMESTEPS
    predict_x0(net, x, sigma, block.conditioning, replace(block.context, commit=True))


@torch.no_grad()
def commit(block: Block, keys: Sequence[KeyValue]) -> None:
    """Put a finished block into the cache by the keys and values of a pass over it."""
    cache, index = block.context.cache, block.context.frame_index
    assert cache is not None and index is not None, "blocks are made on a cache"
    cache.commit(index, [(k.detach(), v.detach()) for k, v in keys])

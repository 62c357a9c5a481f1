"""Block-causal videos: how frames fall into blocks, and a network that sees them in one pass.

Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from model.flow import constant_sigma, on_device
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction
from model.wan.cache import KVCache
from model.wan.masks import block_causal, frame_blocks, past_spans, teacher_forcing
from utils.errors import UserError


@dataclass(frozen=True)
class CausalLayout:
    """How the frames of a video fall into blocks that are made one after the other."""

    num_frame_per_block: int = 3  # latent frames
    independent_first_frame: bool = False  # whether frame 0 is a block of its own
    local_attn_size: int | None = None  # frames that a block sees at most, itself included
    sink_size: int = 0  # of these, how many are the video's first ones
    relative_positions: bool = False  # with a cache, count positions from its first kept frame
    # How much of the sink is left when a frame leaves the window, which gives the rest; 1 = all.
    sink_decay: float = 1.0
    pin: bool = False  # in the window, also keep the first frame after the last change of prompt

    def blocks(self, frames: int) -> list[int]:
        """Block sizes of a video of `frames`. Raises ValueError unless they come out even."""
        return frame_blocks(
            frames,
            self.num_frame_per_block,
            independent_first_frame=self.independent_first_frame,
        )

    def split(self, frames: int, given: int) -> tuple[list[int], list[int]]:
        """Blocks that are given at the start of a video, and those that are left to make.

        Raises ValueError if the given frames end within a block, or fill the video.
        """
        blocks = self.blocks(frames)
        ends = list(accumulate(blocks, initial=0))
        if given not in ends[:-1]:
            raise UserError(
                f"{given} given frames of {frames} must end where a block ends: at one of "
                f"{', '.join(map(str, ends[1:-1])) or 'none, the video is one block'}"
            )
        count = ends.index(given)
        return blocks[:count], blocks[count:]

    def new_cache(self, frames: int) -> KVCache:
        """An empty cache for one batch of videos of `frames` latent frames."""
        return KVCache(
            window=self.local_attn_size,
            sink=self.sink_size,
            relative_positions=self.relative_positions,
            sink_decay=self.sink_decay,
            pins=self.pin,
            frames=frames,
        )

    def problems(self, frames: int) -> Iterator[str]:
        """What is impossible about these settings for videos of `frames` latent frames."""
        if self.local_attn_size is not None and self.local_attn_size < 1:
            yield (
                f"causal.local_attn_size: must be at least 1, or null for all frames, "
                f"got {self.local_attn_size}"
            )
            return
        if self.sink_size < 0:
            yield f"causal.sink_size: must be at least 0, got {self.sink_size}"
            return
        if self.sink_size and self.local_attn_size is None:
            yield f"causal.sink_size: {self.sink_size} has no effect without local_attn_size"
        yield from self.sink_problems()
        yield from self.pin_problems()
        try:
            blocks = self.blocks(frames)
        except ValueError as error:
            yield f"causal.num_frame_per_block: {error}"
            return
        try:
            for size in {*blocks, self.num_frame_per_block}:
                past_spans(10**6, size, window=self.local_attn_size, sink=self.sink_size)
        except ValueError as error:
            yield f"causal.local_attn_size: {error}"

    def sink_problems(self) -> Iterator[str]:
        """What is impossible about a sink that takes up what leaves the window."""
        decay = self.sink_decay
        if not 0.0 < decay <= 1.0:
            yield f"causal.sink_decay: must lie in (0, 1], where 1 = off, got {decay}"
        elif decay < 1.0 and not self.sink_size:
            yield f"causal.sink_decay: {decay} has no effect without causal.sink_size"
        elif decay < 1.0 and not self.relative_positions:
            yield (
                f"causal.sink_decay: {decay} averages keys of several frames, which are rotated by "
                f"their positions; set causal.relative_positions=true, or causal.sink_decay=1"
            )

    def pin_problems(self) -> Iterator[str]:
        """What is impossible about keeping the first frame of a prompt."""
        if not self.pin:
            return
        window, least = self.local_attn_size, self.sink_size + 1 + self.num_frame_per_block
        if window is None:
            yield "causal.pin: has no effect without local_attn_size, where no frame is dropped"
        elif window < least:
            yield (
                f"causal.pin: the sink, the pinned frame and a block are {least} frames, more than "
                f"causal.local_attn_size={window}; make it larger, or set causal.pin=false"
            )
        elif not self.relative_positions:
            yield (
                "causal.pin: needs causal.relative_positions=true; with others keys lie side by "
                "side in the window"
            )


def per_block(values: Tensor, layout: CausalLayout | None, frames: int) -> Tensor:
    """One value per block, [B, blocks], as one per frame, [B, F]; without blocks, [B, 1]."""
    if layout is None:
        return values
    sizes = on_device(layout.blocks(frames), values.device)
    return values.repeat_interleave(sizes, dim=1, output_size=frames)


def count_blocks(layout: CausalLayout | None, frames: int) -> int:
    """How many blocks a video has; a bidirectional network sees it as one."""
    return 1 if layout is None else len(layout.blocks(frames))


@dataclass(frozen=True, eq=False)
class BlockCausal:
    """A Denoiser whose blocks see themselves and the noisy blocks before them."""

    net: Denoiser
    layout: CausalLayout

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W]; sigma: [B, 1] or [B, F]."""
        layout = self.layout
        mask = block_causal(
            layout.blocks(x.shape[2]), window=layout.local_attn_size, sink=layout.sink_size
        )
        return self.net(x, sigma, conditioning, context=replace(context, mask=mask))


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """A Denoiser whose blocks see themselves and the clean blocks before them, in one pass.

    What streaming inference computes block by block with a cache, if `clean` is what it made: the
    network sees 2 F frames, the clean ones first. clean: [B, C, F, H, W], noised to `clean_sigma`
    [B, 1] or [B, F] by the caller; None = it is clean. A batch that is a multiple of B, as
    guidance makes, sees `clean` repeated.
    """

    net: Denoiser
    layout: CausalLayout
    clean: Tensor
    clean_sigma: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W]; sigma: [B, 1] or [B, F]."""
        batch, frames = x.shape[0], x.shape[2]
        clean = self.clean.repeat(batch // len(self.clean), 1, 1, 1, 1)
        level = self.clean_sigma
        if level is None:
            level = constant_sigma(0.0, self.clean)
        level = level.repeat(batch // len(level), 1)
        mask = teacher_forcing(
            self.layout.blocks(frames),
            window=self.layout.local_attn_size,
            sink=self.layout.sink_size,
        )
        if conditioning.first_frame is not None:
            doubled = torch.cat([conditioning.first_frame] * 2, dim=2)
            conditioning = replace(conditioning, first_frame=doubled)
        both = self.net(
            torch.cat([clean.to(x.dtype), x], dim=2),
            torch.cat([level.expand(-1, frames), sigma.expand(-1, frames)], dim=1),
            conditioning,
            context=replace(context, mask=mask, frame_index=torch.arange(frames).repeat(2)),
        )
        return Prediction(both.x0[:, :, frames:], both.velocity[:, :, frames:])


def on_real_video(net: Denoiser, layout: CausalLayout | None, clean: Tensor | None) -> Denoiser:
    """`net` as a training pass over a real video uses it.

    layout None: the whole video at once. Otherwise block-causal, on the past that it is given
    noisy (diffusion forcing), or on the `clean` one (teacher forcing).
    """
    if layout is None:
        return net
    return BlockCausal(net, layout) if clean is None else TeacherForced(net, layout, clean)

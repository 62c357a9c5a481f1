"""What clips take at least, told before a weight is read, so that absurd sizes are refused."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.causal import CausalLayout
from model.types import LatentSpec


@dataclass(frozen=True)
class Memory:
    """Bytes, of what there is or of what is needed."""

    host: int
    device: int | None = None  # None = the host's memory is the device's

    def times(self, count: int) -> Memory:
        """Of `count` as many."""
        return Memory(count * self.host, None if self.device is None else count * self.device)


@dataclass(frozen=True)
class Footprint:
    """What the memory of clips depends on beside their shape. All estimates are lower bounds."""

    width: int  # of the transformer
    layers: int
    number_bytes: int  # of a number within it
    available: Memory
    context: int = 1  # ranks that share the tokens

    def needed(
        self, shape: Sequence[int], latent: LatentSpec, layout: CausalLayout | None
    ) -> Memory:
        """Of one clip of latents [C, F, H, W]: its pixels; latents, tokens and the cache.

        Weights and temporary values come on top.
        """
        channels, frames, height, width = shape
        rows, columns = latent.pixel_size(height, width)
        pixels = 3 * latent.pixel_frames(frames) * rows * columns
        latents = 2 * 4 * channels * frames * height * width  # fp32: the noise and the clean ones
        tokens = latent.tokens((channels, 1, height, width))  # of one frame
        together, kept = frames, 0
        if layout is not None:
            together = min(frames, layout.num_frame_per_block)
            kept = min(frames, layout.local_attn_size or frames)
        # Hidden states, queries, keys and values; of the past, keys and values of each layer.
        numbers = self.width * tokens * (4 * together + 2 * self.layers * kept) // self.context
        device = latents + self.number_bytes * numbers
        if self.available.device is None:
            return Memory(4 * pixels + device)  # pixels are fp32 until they are written
        return Memory(4 * pixels, device)

    def problem(
        self,
        shape: Sequence[int],
        latent: LatentSpec,
        layout: CausalLayout | None,
        *,
        clips: int = 1,
    ) -> str | None:
        """Why clips of latents [C, F, H, W] can never be made here; None if they may fit.

        clips: how many at a time.
        """
        needed = self.needed(shape, latent, layout).times(clips)
        there = self.available
        faults = [
            f"{in_words(wanted)} of {kind}, and this machine has {in_words(had)}"
            for kind, wanted, had in (
                ("memory", needed.host, there.host),
                ("GPU memory", needed.device, there.device),
            )
            if wanted is not None and had is not None and wanted > had
        ]
        if not faults:
            return None
        _, frames, height, width = shape
        rows, columns = latent.pixel_size(height, width)
        what, smaller = ("a clip", "a shorter or a smaller one")
        if clips > 1:
            what, smaller = (
                f"a batch of {clips} clips",
                "fewer at a time, shorter or smaller ones",
            )
        return (
            f"{what} of {latent.pixel_frames(frames)} frames of {rows} x {columns} takes at least "
            f"{'; '.join(faults)}; ask for {smaller}"
        )


def available_memory(device: torch.device) -> Memory:
    """All memory of this machine, in use or not."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type != "cuda":
        return Memory(host)
    return Memory(host, torch.cuda.get_device_properties(device).total_memory)


def in_words(count: int) -> str:
    """Bytes for a reader: 1.5 GiB."""
    value = float(min(count, 2**100))
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"

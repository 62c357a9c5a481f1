"""Attention masks as pure functions of frame counts. F latent frames, n tokens per frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FrameMask:
    """Which frames see which: all tokens of a frame share one row and one column."""

    visible: Tensor  # [F, F] bool; row = the frame that looks, column = the frame looked at

    def tokens(self, per_frame: int) -> Tensor:
        """The same mask between tokens, [F n, F n] bool, for `per_frame` = n tokens a frame."""
        rows = self.visible.repeat_interleave(per_frame, dim=0)
        return rows.repeat_interleave(per_frame, dim=1)


def block_causal(frames: int, block: int, *, device: torch.device | str = "cpu") -> FrameMask:
    """Each block of `block` frames sees itself and every earlier block.

    Raises ValueError unless `block` divides `frames`.
    """
    if block < 1 or frames % block:
        raise ValueError(f"a block of {block} frames must divide the {frames} latent frames")
    number = torch.arange(frames, device=device) // block
    return FrameMask(number[:, None] >= number[None, :])

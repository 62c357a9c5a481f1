"""Which frames see which: attention masks as pure functions of frame counts, without a tensor.

All tokens of a frame share one row and one column, so a mask over F frames is a few spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from utils.errors import UserError

Span = tuple[int, int]  # frames first .. last, the last one not included


@dataclass(frozen=True)
class FrameGroup:
    """Consecutive frames that see the same frames."""

    queries: Span
    keys: tuple[Span, ...]  # ascending and apart


@dataclass(frozen=True)
class FrameMask:
    """A mask between the frames of one forward pass; equal masks compare and hash equal."""

    groups: tuple[FrameGroup, ...]  # in the order of their queries, all frames once

    @property
    def frames(self) -> int:
        """How many frames the mask is for."""
        return self.groups[-1].queries[1]

    def visible(self, device: torch.device | str = "cpu") -> Tensor:
        """The dense mask [F, F] bool; row = the frame that looks, column = the frame looked at."""
        dense = torch.zeros(self.frames, self.frames, dtype=torch.bool)
        for group in self.groups:
            for first, last in group.keys:
                dense[slice(*group.queries), first:last] = True
        return dense.to(device)


def frame_blocks(frames: int, block: int, *, independent_first_frame: bool = False) -> list[int]:
    """Block sizes that cover `frames`: [block, ...], after a block of 1 if the first is alone.

    Raises ValueError unless they come out even.
    """
    alone = 1 if independent_first_frame else 0
    if block < 1 or frames < 1 or (frames - alone) % block:
        rest = (
            f"the {frames - alone} latent frames after the first"
            if alone
            else (f"the {frames} latent frames")
        )
        raise UserError(f"a block of {block} frames must divide {rest}")
    return [1] * alone + [block] * ((frames - alone) // block)


def block_causal(blocks: Sequence[int], *, window: int | None = None, sink: int = 0) -> FrameMask:
    """Each block sees itself and every earlier block.

    blocks: frames per block. window: how many frames a block sees at most, its own and the `sink`
    first frames of the video included; None = all. Raises ValueError if a block does not fit in.
    """
    groups = [
        FrameGroup(span, _join([*_past(span, window, sink), span])) for span in _spans(blocks)
    ]
    return FrameMask(tuple(groups))


def teacher_forcing(
    blocks: Sequence[int], *, window: int | None = None, sink: int = 0
) -> FrameMask:
    """2 F frames, a clean video and then a noisy one: each noisy block sees the clean past.

    Clean blocks see clean blocks as in `block_causal`; a noisy block sees the clean blocks before
    it and itself, and no other noisy block (arXiv:2412.07772 calls it teacher forcing).
    """
    frames = sum(blocks)
    clean = block_causal(blocks, window=window, sink=sink).groups
    noisy = []
    for span in _spans(blocks):
        own = (span[0] + frames, span[1] + frames)
        noisy.append(FrameGroup(own, (*_join(_past(span, window, sink)), own)))
    return FrameMask((*clean, *noisy))


def past_spans(past: int, new: int, *, window: int | None, sink: int) -> list[Span]:
    """Of `past` frames, those that `new` frames after them see: the sink and the latest."""
    if window is None or past + new <= window:
        return [(0, past)] if past else []
    if window - sink < new:
        raise UserError(
            f"a window of {window} frames, {sink} of them the video's first, is smaller than a "
            f"block of {new}"
        )
    return [span for span in ((0, sink), (past + new - window + sink, past)) if span[0] < span[1]]


def _past(block: Span, window: int | None, sink: int) -> list[Span]:
    return past_spans(block[0], block[1] - block[0], window=window, sink=sink)


def _spans(blocks: Sequence[int]) -> Iterator[Span]:
    return pairwise(accumulate(blocks, initial=0))


def _join(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same frames with touching spans made one."""
    joined: list[Span] = []
    for first, last in spans:
        if joined and joined[-1][1] >= first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined)

"""Keys and values of frames that are already clean, kept between the forward passes of one video.

Letters as in model/types.py; n tokens per frame. Keys are kept before rotation, and rotated when
they are read: so positions may be counted from the start of the video or of the window.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.wan.masks import past_spans

KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, heads, head_dim] each
TextKeys = tuple[Tensor, ...]  # those of the text, and behind them of the images, of one layer
TimeStates = tuple[Tensor, Tensor]  # of a noise level: states [B, T, D], modulation [B, T, 6, D]


@dataclass(frozen=True, eq=False)
class Past:
    """What a forward pass sees of a cache. Positions are on the CPU."""

    layers: list[list[KeyValue]]  # per layer, the pieces in order, not copied; empty = no past
    key_positions: Tensor  # [m] rotary time positions of the m frames in `layers`
    query_positions: Tensor  # [f] of the f new frames


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Frames that were committed together; never changed after that."""

    frame_index: Tensor  # [f] positions in the video
    layers: Sequence[KeyValue]

    @property
    def frames(self) -> int:
        return len(self.frame_index)

    def part(self, first: int, last: int) -> _Chunk:
        """Some of the frames, as views."""
        if (first, last) == (0, self.frames):
            return self
        n = self.layers[0][0].shape[1] // self.frames
        layers = [(k[:, first * n : last * n], v[:, first * n : last * n]) for k, v in self.layers]
        return _Chunk(self.frame_index[first:last], layers)


class KVCache:
    """The clean past of one batch of videos, layer by layer, and the keys of their text.

    It serves one set of weights: whoever changes them begins with an empty cache.

    window: frames that a block sees at most, its own and the `sink` first ones included; what no
    later block can see is dropped, so memory is bounded. None = everything is kept.
    relative_positions: count rotary positions from the first frame that is still kept, so that
    they stay inside the window's range however long the video grows.

    Reading is free. Writing is allowed only without autograd, and outside the layers: activation
    checkpointing runs them twice. Chunks are never changed in place, so a pass that is recomputed
    later sees what it saw.
    """

    def __init__(
        self, *, window: int | None = None, sink: int = 0, relative_positions: bool = False
    ) -> None:
        self.window, self.sink = window, sink
        self.relative_positions = relative_positions
        self._chunks: list[_Chunk] = []
        self._text: list[TextKeys] = []
        self._time: dict[Hashable, TimeStates] = {}

    @property
    def frames(self) -> int:
        """How many frames are kept."""
        return sum(chunk.frames for chunk in self._chunks)

    def past(self, frame_index: Tensor) -> Past:
        """What new frames at `frame_index` [f] see, and where they and it lie."""
        chunks = self._select(len(frame_index))
        positions = torch.cat([frame_index[:0], *(chunk.frame_index for chunk in chunks)])
        if self.relative_positions:
            kept = len(positions)
            positions = torch.arange(kept, device=frame_index.device)
            frame_index = kept + torch.arange(len(frame_index), device=frame_index.device)
        depth = len(chunks[0].layers) if chunks else 0
        layers = [[chunk.layers[i] for chunk in chunks] for i in range(depth)]
        return Past(layers, positions, frame_index)

    def commit(self, frame_index: Tensor, layers: Sequence[KeyValue]) -> None:
        """Append frames at `frame_index` [f]: unrotated keys and values of every layer."""
        if torch.is_grad_enabled():
            raise RuntimeError("a KV cache is written only under torch.no_grad()")
        with torch.enable_grad():  # a grafted chunk that is cut stays grafted
            kept = self._select(len(frame_index))
        self._chunks = [*kept, _Chunk(frame_index, list(layers))]

    def graft(self, layers: Sequence[KeyValue]) -> None:
        """Let gradients of whoever reads the last chunk flow into `layers`; values stay.

        The straight-through estimate c + g - stopgrad(g) of each key and value.
        """
        last = self._chunks[-1]
        grafted = [
            (k + (gk - gk.detach()), v + (gv - gv.detach()))
            for (k, v), (gk, gv) in zip(last.layers, layers, strict=True)
        ]
        self._chunks[-1] = _Chunk(last.frame_index, grafted)

    @property
    def text(self) -> list[TextKeys] | None:
        """Per layer, what `keep_text` was given; None before that, and always under autograd.

        Keys that were computed without a gradient would hide the weights that they came from.
        """
        return self._text if self._text and not torch.is_grad_enabled() else None

    def keep_text(self, layers: Sequence[TextKeys]) -> None:
        """Keep keys and values of the text for every layer; they serve until the video's end."""
        if torch.is_grad_enabled():
            raise RuntimeError("a KV cache is written only under torch.no_grad()")
        self._text = list(layers)

    def time(self, key: Hashable, compute: Callable[[], TimeStates]) -> TimeStates:
        """Time states of a noise level and shape, computed once per video; under autograd anew."""
        if torch.is_grad_enabled():
            return compute()
        if key not in self._time:
            self._time[key] = compute()
        return self._time[key]

    def _select(self, new: int) -> list[_Chunk]:
        """The chunks, or parts of them, that `new` further frames see."""
        parts, begin = [], 0
        spans = past_spans(self.frames, new, window=self.window, sink=self.sink)
        for chunk in self._chunks:
            for first, last in spans:
                inside = max(first - begin, 0), min(last - begin, chunk.frames)
                if inside[0] < inside[1]:
                    parts.append(chunk.part(*inside))
            begin += chunk.frames
        return parts

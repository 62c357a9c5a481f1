"""What a forward pass attends to beside its own tokens, and what it reports: as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from model.wan.cache import KeyValue, KVCache
from model.wan.heads import Spans
from model.wan.masks import FrameMask

Side = Literal["high", "low"]  # of two experts that divide the noise levels


@dataclass(frozen=True, eq=False)
class Taps:
    """Collects the tokens that leave some layers, for networks that read another one's features."""

    layers: Sequence[int]
    tokens: list[Tensor] = field(default_factory=list)  # [B, N, D] each, filled by the pass


@dataclass(frozen=True, eq=False)
class Context:
    """How one transformer serves bidirectional, block-causal and streaming use."""

    mask: FrameMask | None = None  # None = every token sees every token
    # The clean past, never beside a mask; and what passes over one video share, so that one to
    # which nothing is committed changes no result, and may be ignored.
    cache: KVCache | None = None
    commit: bool = False  # append this call's keys and values to the cache; no_grad only
    frame_index: Tensor | None = None  # [F] on the CPU, rotary time positions; None = 0 .. F-1
    # The noise level in [0, 1] of all frames, where the host knows it: the cache keeps what the
    # network computes from one that comes again. None = it is computed.
    level: float | None = None
    # Of two experts, the one that is asked; None = the one of the noise levels. One network
    # ignores it.
    side: Side | None = None
    taps: Taps | None = None
    adapters: tuple[str, ...] = ()  # names of the additions to linear layers that are on
    # Of a network with a head for each step of a grid, those that are asked; None = its plain one.
    spans: Spans | None = None
    skips: tuple[int, ...] = ()  # blocks that are left out; never beside a cache
    # Filled with each layer's keys and values, which are rotated where a cache keeps them so.
    keys: list[KeyValue] | None = None


FULL_ATTENTION = Context()

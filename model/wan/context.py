"""What a forward pass attends to beside its own tokens: the mask and the cache, as arguments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from model.wan.cache import KVCache
from model.wan.masks import FrameMask


@dataclass(frozen=True, eq=False)
class Context:
    """How one transformer serves bidirectional, block-causal and streaming use."""

    mask: FrameMask | None = None  # None = every token sees every token
    cache: KVCache | None = None  # the clean past; read in any mode
    commit: bool = False  # append this call's keys and values to the cache; no_grad only
    frame_index: Tensor | None = None  # [F] rotary time positions; None = 0 .. F-1


FULL_ATTENTION = Context()

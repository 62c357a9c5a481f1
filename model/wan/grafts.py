"""Gradients for keys and values that were computed without: the straight-through estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.wan.masks import Span

KeyValue = tuple[Tensor, Tensor]  # keys and values of one layer, [B, N, heads, head_dim] each


@dataclass(frozen=True, eq=False)
class Graft:
    """Keys and values with a gradient, which stand for those of some frames in the storage."""

    frames: Span  # counted from the first frame that was ever committed
    layers: Sequence[KeyValue]

    def part(self, layer: int, frames: Span, per_frame: int) -> KeyValue:
        """Those of some of its frames."""
        a, b = (per_frame * (frame - self.frames[0]) for frame in frames)
        keys, values = self.layers[layer]
        return keys[:, a:b], values[:, a:b]


def straight_through(values: Tensor, spans: tuple[Span, ...], live: Sequence[Tensor]) -> Tensor:
    """`values` [B, N, ...] as they are; the gradient of spans of their tokens goes to `live`."""
    result: Tensor = _StraightThrough.apply(values, spans, *live)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, spans: tuple[Span, ...], *live: Tensor) -> Tensor:
        del live
        ctx.spans = spans
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grads[0][:, a:b] for a, b in ctx.spans)

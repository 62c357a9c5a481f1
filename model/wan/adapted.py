"""Low-rank additions to linear layers: y = W x + bias + the sum of b (a x) over those that are on.

A layer keeps its adapters in a child of its own, so that its weight keeps its name:
`<layer>.adapters.<name>.a` and `.b`. Which are on is an argument of each call, never a state: a
block that is run again in the backward pass sees what it saw (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHILD = "adapters"  # of a layer that has some


class LowRankPair(nn.Module):
    """One addition to one layer. Its weights are fp32 whatever the layer's are."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_features, dtype=torch.float32))
        self.b = nn.Parameter(torch.empty(out_features, rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out], computed in the dtype of x."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


class _Down(torch.autograd.Function):
    """x and a x; what comes back through a is added in place to what comes back through x.

    Else a feed-forward's widest gradient would be there twice at the peak of a block's backward
    pass. For rows x [N, in] that one layer alone reads, whose gradient belongs to nobody else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        return x, F.linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        x, a = ctx.saved_tensors
        whole, low = gradients
        return whole.addmm_(low, a), low.T @ x if ctx.needs_input_grad[1] else None


def linear(layer: nn.Module, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """layer(x) with its adapters of these names; it need not have all of them. x: [..., in].

    Nothing as large as the result is held twice, neither here nor in the backward pass.
    """
    y: Tensor
    on = _pairs(layer, adapters)
    if not on:
        y = layer(x)
        return y
    rows, lows = x.flatten(0, -2) if x.ndim > 2 else x, []
    for pair in on:
        a = pair.a.to(x.dtype)
        if x.requires_grad and not torch.compiler.is_compiling():
            rows, low = down(rows, a)
        else:
            low = F.linear(rows, a)
        lows.append(low)
    y = layer(rows)
    for pair, low in zip(on, lows, strict=True):
        y = y.addmm_(low, pair.b.to(x.dtype).T)
    return y.view(*x.shape[:-1], y.shape[-1])


def down(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, in] for one layer alone to read, and a x [N, r]; see _Down."""
    rows, low = _Down.apply(x, a)  # type: ignore[no-untyped-call]
    return rows, low


def with_adapters(layer: nn.Module, x: Tensor, y: Tensor, adapters: Sequence[str]) -> Tensor:
    """y = layer(x), and what the layer's adapters of these names add to it."""
    for pair in _pairs(layer, adapters):
        y = y + pair(x)
    return y


def _pairs(layer: nn.Module, adapters: Sequence[str]) -> list[LowRankPair]:
    """Those of a layer that are on, in their order."""
    if not adapters or not hasattr(layer, CHILD):
        return []
    pairs = layer.get_submodule(CHILD)
    assert isinstance(pairs, nn.ModuleDict)
    found = [pairs[name] for name in adapters if name in pairs]
    return [pair for pair in found if isinstance(pair, LowRankPair)]


def sequential(layers: nn.Sequential, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """`layers` one after the other, each with its adapters of these names."""
    if not adapters:
        plain: Tensor = layers(x)
        return plain
    for layer in layers:
        x = linear(layer, x, adapters)
    return x


def add_pair(layer: nn.Module, name: str, rank: int) -> None:
    """Give a linear layer a pair without values, on the device of its weight."""
    if not hasattr(layer, CHILD):
        layer.add_module(CHILD, nn.ModuleDict())
    pairs = layer.get_submodule(CHILD)
    assert isinstance(pairs, nn.ModuleDict) and isinstance(layer, nn.Linear)
    with layer.weight.device:
        pairs[name] = LowRankPair(layer.in_features, layer.out_features, rank)

"""Low-rank additions to linear layers: y = W x + bias + the sum of b (a x) over those that are on.

A layer keeps its adapters in a child of its own, so that its weight keeps its name:
`<layer>.adapters.<name>.a` and `.b`. Which are on is an argument of each call, never a state: a
block that is run again in the backward pass sees what it saw (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def linear(layer: nn.Module, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """layer(x) with its adapters of these names; it need not have all of them. x: [..., in]."""
    if not adapters or x.ndim < 3:
        y: Tensor = layer(x)
        return with_adapters(layer, x, y, adapters)
    # As rows, all that read x give gradients that own their memory, so that autograd adds them up
    # in the first one's; views of them it would add up in a tensor of its own.
    rows = x.flatten(0, -2)
    added = with_adapters(layer, rows, layer(rows), adapters)
    return added.view(*x.shape[:-1], added.shape[-1])


def with_adapters(layer: nn.Module, x: Tensor, y: Tensor, adapters: Sequence[str]) -> Tensor:
    """y = layer(x), and what the layer's adapters of these names add to it."""
    if not adapters or not hasattr(layer, CHILD):
        return y
    pairs = layer.get_submodule(CHILD)
    assert isinstance(pairs, nn.ModuleDict)
    for name in adapters:
        if name in pairs:
            y = y + pairs[name](x)
    return y


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

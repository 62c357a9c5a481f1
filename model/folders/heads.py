"""Weights of networks with a head for each part of their path: begun, fused, and told from others.

See model/wan/heads.py for what the heads say.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.wan.heads import BIAS, PLAIN_BIAS, PLAIN_WEIGHT, WEIGHT, count_heads, mixed, shares
from utils.errors import UserError
from utils.weights import Weights, WeightsError

Shapes = dict[str, tuple[int, ...]]
_PLAIN = {WEIGHT: PLAIN_WEIGHT, BIAS: PLAIN_BIAS}


class CopiedHead:
    """Weights with so many copies of their head: where the heads of a path begin."""

    def __init__(self, weights: Weights, heads: int, *, plain: bool) -> None:
        """plain: whether the one that is copied stays beside them."""
        self.path = weights.path
        self._weights, self._heads, self._plain = weights, heads, plain

    def shapes(self) -> Shapes:
        """The shape of each tensor, without reading it."""
        shapes = self._weights.shapes()
        copies = {new: (self._heads, *shapes[old]) for new, old in _PLAIN.items() if old in shapes}
        if not self._plain:
            shapes = {name: shape for name, shape in shapes.items() if name not in _PLAIN.values()}
        return shapes | copies

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        if name not in _PLAIN:
            return self._weights.read(name, rows)
        count = len(range(*rows.indices(self._heads)))
        value = self._weights.read(_PLAIN[name]).float()
        return value.expand(count, *value.shape)


class GivenHeads:
    """Weights with heads that were trained elsewhere, beside or in the place of their own."""

    def __init__(self, weights: Weights, heads: Mapping[str, Tensor], *, plain: bool) -> None:
        """heads: the two tensors of a bank, by name. plain: whether the own head stays."""
        self.path = weights.path
        self._weights, self._heads, self._plain = weights, heads, plain

    def shapes(self) -> Shapes:
        """The shape of each tensor, without reading it."""
        shapes = self._weights.shapes()
        if not self._plain:
            shapes = {name: shape for name, shape in shapes.items() if name not in _PLAIN.values()}
        return shapes | {name: tuple(value.shape) for name, value in self._heads.items()}

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        return self._heads[name][rows] if name in self._heads else self._weights.read(name, rows)


class FusedHeads:
    """Weights with one head per call, each the mean of those of the part that it walks."""

    def __init__(self, weights: Weights, calls: int, shift: float) -> None:
        """shift: of the grid's noise levels. Raises UserError unless calls divide the heads."""
        self.path = weights.path
        self._weights, self._calls, self._shift = weights, calls, shift
        check_calls(weights, calls)

    def shapes(self) -> Shapes:
        """The shape of each tensor, without reading it."""
        shapes = self._weights.shapes()
        fused = {name: (self._calls, *shapes[name][1:]) for name in _PLAIN}
        return {
            name: fused.get(name, shape)
            for name, shape in shapes.items()
            if name not in _PLAIN.values()
        }

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of one tensor along its first dimension."""
        if name not in _PLAIN:
            return self._weights.read(name, rows)
        return fused(self._weights.read(name), self._calls, self._shift)[rows]


def fused(values: Tensor, calls: int, shift: float) -> Tensor:
    """Weights or biases of heads [n, ...] as those of equal calls [m, ...], fp32."""
    edges = torch.arange(calls + 1, dtype=torch.float64) / calls
    spans = torch.stack([edges[:-1], edges[1:]], dim=-1)
    with torch.no_grad():
        return mixed(values.float(), shares(spans, len(values), shift))


def check_calls(weights: Weights, calls: int) -> None:
    """Raise UserError unless a path of so many calls can be walked with these weights' heads."""
    heads = count_heads(weights.shapes())
    if not heads:
        raise WeightsError(
            f"{weights.path}: has one head for all noise levels, and nothing to fuse; give a run "
            f"of method pdd, or the weights of one"
        )
    if calls < 1 or heads % calls:
        allowed = [n for n in range(1, heads + 1) if heads % n == 0]
        raise UserError(
            f"{weights.path}: its {heads} heads cannot be walked in {calls} calls; use a divisor: "
            f"{', '.join(map(str, allowed))}"
        )


def refuse_heads(weights: Weights, *, who: str) -> None:
    """Raise WeightsError if a network that is used as any other has a head per part of a path."""
    heads = count_heads(weights.shapes())
    if heads:
        raise WeightsError(
            f"{who}: {weights.path} has {heads} heads, one for each part of a path (method pdd), "
            f"which only a student of that method is asked for; use distribution_loss: pdd, or "
            f"give weights with one head"
        )

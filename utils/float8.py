"""Frozen linear layers whose weights are stored in eight bits, and computed with in the input's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED = torch.float8_e4m3fn
LARGEST = torch.finfo(STORED).max
SMALLEST = torch.finfo(torch.float32).tiny  # of a row of zeros the scale is of no importance


def store_float8(network: nn.Module) -> None:
    """Store the weights of all linear layers within `blocks` as float8_e4m3fn. In place.

    They must be whole, and frozen for good. Names stay; biases, norms and all else stay as it is.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks" in name.split("."):
            network.set_submodule(name, Float8Linear(layer))


class Float8Linear(nn.Module):
    """A frozen nn.Linear with a byte per weight, and a scale per row.

    Scales are powers of two: a weight that is put back is exact in bf16, so that the rounding to
    eight bits (at most 1/16 of a weight) is all that is lost.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        stored, scale = quantise(linear.weight.detach())
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.bias = linear.bias
        for name, child in linear.named_children():  # what is added to what it computes
            self.add_module(name, child)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]. Returns [..., out] in its dtype; the gradient reaches x alone."""
        product: Tensor = _Product.apply(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias.to(x.dtype)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] as float8_e4m3fn, and its scales [out, 1], fp32, powers of two."""
    wide = weight.float()
    largest = wide.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST)
    scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    return (wide / scale).clamp(-LARGEST, LARGEST).to(STORED), scale


def restored(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix that `quantise` stored."""
    return stored.to(dtype) * scale.to(dtype)


class _Product(torch.autograd.Function):
    """x W^T whose backward pass puts W back anew: kept in x's dtype it would take twice as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return F.linear(x, restored(stored, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        stored, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ restored(stored, scale, gradient.dtype), None, None

"""The toy's denoiser: depthwise convolutions, and the text by its mean; no Wan transformer.

Letters as in model/types.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.flow import velocity_to_x0
from model.types import FULL_ATTENTION, Conditioning, Context, Prediction


class ToyNetwork(nn.Module):
    """Latents to velocities. `blocks` is what parallelism wraps."""

    blocks: nn.ModuleList

    def __init__(self, channels: int, width: int, layers: int, text_width: int) -> None:
        super().__init__()
        self.patch = nn.Conv3d(channels, width, 1)
        self.blocks = nn.ModuleList(Block(width, text_width) for _ in range(layers))
        self.head = nn.Conv3d(width, channels, 1)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, context: Context) -> Tensor:
        """x: [B, C, F, H, W]; sigma: [B, 1] or [B, F]; text: [B, L, width]. Returns [B, C, ...]."""
        states = self.patch(x)
        level = sigma[:, None, :, None, None].to(states.dtype)
        mean = text.to(states.dtype).sum(1) / (text.abs().sum(-1) > 0).sum(1).clamp(min=1)[:, None]
        for layer, block in enumerate(self.blocks):
            states = block(states, level, mean)
            if context.taps is not None and layer in context.taps.layers:
                context.taps.tokens.append(states.flatten(2).transpose(1, 2))
        return self.head(states)


class Block(nn.Module):
    """A residual step: what is near in space and time, the noise level, and the text."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.near = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.level = nn.Parameter(torch.empty(2, width))
        self.text = nn.Linear(text_width, width)
        self.out = nn.Conv3d(width, width, 1)

    def forward(self, states: Tensor, level: Tensor, text: Tensor) -> Tensor:
        """states: [B, D, F, H, W]; level: [B, 1, 1 or F, 1, 1]; text: [B, text width]."""
        offset, slope = self.level[:, None, :, None, None, None].unbind(0)
        inner = self.near(states) + offset + slope * level + self.text(text)[:, :, None, None, None]
        return states + self.out(F.silu(inner))


class ToyDenoiser(nn.Module):
    """A Denoiser: whole videos only."""

    model: ToyNetwork

    def __init__(self, model: ToyNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """See model.types.Denoiser."""
        if context.mask is not None or context.commit:
            raise ValueError("the toy makes whole videos; it has no causal form")
        dtype = self.model.patch.weight.dtype
        velocity = self.model(x.to(dtype), sigma, conditioning.text, context).float()
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)


def initial_value(name: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """The starting value of a weight: no bias, and normal of the size that keeps activations."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=rng) / math.sqrt(max(1, shape[1:].numel()))

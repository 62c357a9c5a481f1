"""Two networks that divide the noise levels, as one Denoiser (Wan2.2's A14B)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction, Side

SIDES: tuple[Side, Side] = ("high", "low")


def side_of(sigma: float, boundary: float) -> Side:
    """The expert of a noise level: the high one from the boundary on, which is its own.

    Compared in fp32, as levels of tensors are.
    """
    level, bound = torch.tensor([sigma, boundary]).tolist()
    return "high" if level >= bound else "low"


def side_of_all(sigma: Tensor, boundary: float) -> Side:
    """The expert of all samples of a batch at noise levels [B, 1] or [B, F]. Waits for the device.

    A sample with several levels is at its largest: those of given frames are 0. Raises ValueError
    unless all samples are on one side.
    """
    sides = {"high" if high else "low" for high in (sigma.amax(dim=1) >= boundary).tolist()}
    if len(sides) > 1:
        levels = ", ".join(f"{level:.4g}" for level in sigma.amax(dim=1).tolist())
        raise ValueError(
            f"noise levels {levels} lie on both sides of the experts' boundary {boundary:g}; "
            f"draw one expert per micro-batch"
        )
    return "high" if "high" in sides else "low"


class ExpertPair(nn.Module):
    """One Denoiser of two: the expert of high noise levels, and that of low ones.

    A pass is one expert's alone. Which one it is, `Context.side` says; else `Context.level`; else
    the noise levels of the batch, which are read from their device then.
    """

    model: nn.ModuleDict  # the transformers, by side

    def __init__(self, high: nn.Module, low: nn.Module, boundary: float) -> None:
        """high, low: Denoisers whose weights are all in their `model`; boundary: a sigma."""
        super().__init__()
        if not 0.0 < boundary < 1.0:
            raise ValueError(f"the boundary of two experts must lie in (0, 1), got {boundary}")
        experts: dict[Side, nn.Module] = {"high": high, "low": low}
        self.model = nn.ModuleDict({side: _weights(expert) for side, expert in experts.items()})
        self.boundary = boundary
        self._experts = experts  # no module of its own: each weight has one name

    def expert(self, side: Side) -> Denoiser:
        """One of the two, with the pair's own weights."""
        found: Denoiser = self._experts[side]
        return found

    def side(self, sigma: Tensor, context: Context) -> Side:
        """Whose pass it is at noise levels [B, 1] or [B, F]."""
        if context.side is not None:
            return context.side
        if context.level is not None:
            return side_of(context.level, self.boundary)
        return side_of_all(sigma, self.boundary)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W] at noise level sigma [B, 1] or [B, F]; see model.types.Denoiser.

        Raises ValueError for batches on both sides, and for a past, which would be one expert's.
        """
        cache = context.cache
        if context.commit or (cache is not None and cache.frames):
            raise ValueError(
                "two experts make whole videos: keys of a past belong to one network, so a causal "
                "model of two experts would need every block remembered twice"
            )
        side = self.side(sigma, context)
        own = None if cache is None else cache.beside(side)
        return self.expert(side)(x, sigma, conditioning, context=replace(context, cache=own))


def is_pair(weights: nn.Module) -> bool:
    """Whether the `model` of a network is that of two experts, under adapters or not."""
    return isinstance(weights, nn.ModuleDict) and set(weights) == set(SIDES)


def _weights(expert: nn.Module) -> nn.Module:
    """The module that holds all weights of a Denoiser."""
    model = expert.model
    assert isinstance(model, nn.Module), "a network keeps its weights in `model`"
    outside = len(list(expert.parameters())) - len(list(model.parameters()))
    assert not outside, f"{outside} weights of an expert are not in its `model`"
    return model

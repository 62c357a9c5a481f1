"""Frames that a video begins with: in place, clean, known to the network, and out of every loss.

How TI2V models begin with an image: the first latent frame is the image itself, at noise level 0.
Letters as in model/types.py; g given frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction


@dataclass(frozen=True, eq=False)
class OnGiven:
    """A Denoiser that sees the first frames as they are given, and has nothing to say about them.

    given: [B, C, g, H, W], whatever x holds there. level: their noise levels [B, 1], if the caller
    has noised them; None = they are clean. There x0 is what was given and the velocity is 0, so no
    gradient leaves them. A batch that is a multiple of B, as guidance makes, sees `given` repeated.
    """

    net: Denoiser
    given: Tensor
    level: Tensor | None = None

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W] at noise level sigma [B, 1] or [B, F] behind the given frames."""
        times = len(x) // len(self.given)
        count, frames = self.given.shape[2], x.shape[2]
        given = self.given.repeat(times, 1, 1, 1, 1)
        level = sigma.new_zeros(len(sigma), 1)
        if self.level is not None:
            level = self.level.to(sigma).repeat(times, 1)
        sigma = torch.cat([level.expand(-1, count), sigma.expand(-1, frames)[:, count:]], dim=1)
        # Frames differ in their levels now, so none of them is that of all.
        context = replace(context, level=None)
        found = self.net(begin_with(given, x), sigma, conditioning, context=context)
        still = torch.zeros_like(given, dtype=found.velocity.dtype)
        return Prediction(begin_with(given, found.x0), begin_with(still, found.velocity))


def on_given(net: Denoiser, given: Tensor | None, level: Tensor | None = None) -> Denoiser:
    """`net` on videos that begin with `given`, see OnGiven; None = with nothing, so as it is."""
    return net if given is None else OnGiven(net, given, level)


def begin_with(given: Tensor | None, x: Tensor) -> Tensor:
    """Videos [B, C, F, H, W] with the first frames [B, C, g, H, W] in the place of their own."""
    if given is None:
        return x
    return torch.cat([given.to(x), x[:, :, given.shape[2] :]], dim=2)


def count_given(given: Tensor | None) -> int:
    """How many frames are given."""
    return 0 if given is None else given.shape[2]


def both_given(real: Tensor, given: Tensor | None) -> Tensor | None:
    """What real videos, and generated ones behind them, begin with: each with its own."""
    return None if given is None else torch.cat([real[:, :, : given.shape[2]].to(given), given])


def learnt(x: Tensor, given: int) -> Tensor:
    """What losses and figures are about: videos [B, C, F, H, W] without their given frames."""
    return x[:, :, given:] if given else x

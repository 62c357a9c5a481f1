"""A network with a head for each part of its path, as a few-step sampler calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Prediction
from model.wan.heads import Spans


@dataclass(frozen=True, eq=False)
class OnPath:
    """A Denoiser: at each of a few noise levels, what leads from there to the next of them.

    sigmas: where the calls begin, equal steps of the grid before `shift`, from 1 down.
    """

    net: Denoiser
    sigmas: Sequence[float]
    shift: float

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        context: Context = FULL_ATTENTION,
    ) -> Prediction:
        """x: [B, C, F, H, W] at one of the noise levels, sigma [B, 1], or of given frames 0."""
        levels = torch.tensor(self.sigmas, device=sigma.device)
        call = (sigma.amax(dim=1, keepdim=True) - levels).abs().argmin(dim=1)
        spans = Spans(path_spans(call, len(self.sigmas))[:, None], self.shift)
        return self.net(x, sigma, conditioning, context=replace(context, spans=spans))


def path_spans(step: Tensor, steps: int) -> Tensor:
    """Where steps [...] of `steps` equal ones begin and end on the grid: [..., 2], fp64."""
    return torch.stack([step, step + 1], dim=-1).double() / steps

"""Wan2.1's transformer as a Denoiser: noise levels and fp32 latents outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.flow import TIMESTEPS, velocity_to_x0
from model.types import FULL_ATTENTION, Conditioning, Context, Prediction
from model.wan.transformer import WanTransformer


class WanDiffusionWrapper(nn.Module):
    """A Denoiser: speaks noise levels and fp32 latents outside, Wan's timesteps inside."""

    model: WanTransformer

    def __init__(self, model: WanTransformer) -> None:
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
        """x: [B, C, F, H, W] at noise level sigma [B, 1] or [B, F]; see model.types.Denoiser."""
        if x.ndim != 5 or sigma.ndim != 2 or sigma.shape[1] not in (1, x.shape[2]):
            raise ValueError(
                f"expected latents [B, C, F, H, W] and sigma [B, 1] or [B, F], "
                f"got {tuple(x.shape)} and {tuple(sigma.shape)}"
            )
        inputs = x
        if conditioning.first_frame is not None:
            inputs = torch.cat([x, conditioning.first_frame.to(x.dtype)], dim=1)
        velocity = self.model(
            inputs, TIMESTEPS * sigma.float(), conditioning.text, conditioning.clip, context=context
        ).float()
        return Prediction(velocity_to_x0(x, velocity, sigma), velocity)

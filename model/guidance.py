"""Classifier-free guidance, in the standard convention: 1 is off (arXiv:2207.12598)."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser


def guided_velocity(
    net: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning,
    *,
    cfg_scale: float,
    context: Context = FULL_ATTENTION,
    batched: bool = True,
) -> Tensor:
    """uncond + cfg_scale (cond - uncond), as velocity [B, C, F, H, W], fp32.

    x: [B, C, F, H, W]; sigma: [B, 1] or [B, F]. At cfg_scale 1 the network sees one batch of B;
    otherwise one batch of 2 B, so that sharded weights are gathered once, or if not `batched` two
    of B. Guidance is linear, so guiding the velocity and guiding x0 are the same thing. A cache in
    `context` must hold the past of the same batch: of 2 B videos, those of the negative prompt
    behind, if guided. Blocks that `context` skips are left out for the negative prompt alone, so
    that passes are not batched.
    """
    whole = replace(context, skips=()) if context.skips else context
    if cfg_scale == 1.0:
        return net(x, sigma, conditioning, context=whole).velocity
    if context.skips or not batched:
        assert context.cache is None, "a cache holds the past of both passes: batch them"
        cond = net(x, sigma, conditioning, context=whole).velocity
        uncond = net(x, sigma, unconditional, context=context).velocity
        return uncond + cfg_scale * (cond - uncond)
    both = concatenate(conditioning, unconditional)
    velocity = net(torch.cat([x, x]), torch.cat([sigma, sigma]), both, context=context).velocity
    cond, uncond = velocity.chunk(2)
    return uncond + cfg_scale * (cond - uncond)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings as one batch; both must have the same optional parts."""
    parts: dict[str, Tensor | None] = {}
    for field in fields(Conditioning):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if (a is None) != (b is None):
            raise ValueError(f"only one of the two conditionings has '{field.name}'")
        parts[field.name] = None if a is None else torch.cat([a, b])
    text = parts.pop("text")
    assert text is not None
    return Conditioning(text, **parts)

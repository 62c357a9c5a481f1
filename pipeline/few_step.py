"""The few-step loop: predict clean latents, noise them again, predict again. Nothing else renoises.

This is the multistep consistency sampling of arXiv:2303.01469 (algorithm 1), with the noise levels
of a denoising_step_list. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.flow import add_noise, constant_sigma
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser
from model.wan.cache import KVCache
from utils.seeding import SampleRNG

OnStep = Callable[[int, int], None]  # called with (steps done, steps in total)


def few_step(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    rng: SampleRNG,
    *,
    context: Context = FULL_ATTENTION,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run all of `sigmas` (descending, the first is 1). Returns x0 [B, C, F, H, W], fp32.

    noise: [B, C, F, H, W], standard normal. Costs one network evaluation per sigma; of a context
    that commits only the last one does.
    """
    x, context = noise, remembering(context)
    for step, value in enumerate(sigmas):
        if step:
            x = renoise(x, value, rng)
        commits = context.commit and step + 1 == len(sigmas)
        x = predict_x0(net, x, value, conditioning, replace(context, commit=commits))
        if on_step is not None:
            on_step(step + 1, len(sigmas))
    return x


def backward_simulation(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    rng: SampleRNG,
    *,
    context: Context = FULL_ATTENTION,
    grad: bool,
) -> Tensor:
    """What inference would hold after `sigmas`, with a gradient through the last step alone.

    DMD2 (arXiv:2405.14867) sec. 4.5. Returns x0 [B, C, F, H, W], fp32.
    """
    x = exit_input(net, noise, conditioning, sigmas, rng, context=context)
    with torch.set_grad_enabled(grad):
        return predict_x0(net, x, sigmas[-1], conditioning, context)


@torch.no_grad()
def exit_input(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    rng: SampleRNG,
    *,
    context: Context = FULL_ATTENTION,
) -> Tensor:
    """What the last of `sigmas` is read at in `few_step`: [B, C, F, H, W], at its noise level."""
    if not sigmas[1:]:
        return noise
    before = replace(context, commit=False)
    x = few_step(net, noise, conditioning, sigmas[:-1], rng, context=before)
    return renoise(x, sigmas[-1], rng)


def remembering(context: Context) -> Context:
    """`context` for several passes over one video: what they read of the text is computed once."""
    alone = context.cache is None and context.mask is None
    return replace(context, cache=KVCache()) if alone else context


def predict_x0(
    net: Denoiser, x: Tensor, sigma: float, conditioning: Conditioning, context: Context
) -> Tensor:
    """One evaluation of x [B, C, F, H, W], all of it at noise level `sigma`. Returns x0, fp32."""
    at_level = replace(context, level=sigma)
    return net(x, constant_sigma(sigma, x), conditioning, context=at_level).x0


def renoise(x0: Tensor, sigma: float, rng: SampleRNG) -> Tensor:
    """Fresh noise on a prediction: [B, C, F, H, W] at noise level `sigma`."""
    return add_noise(x0, rng.randn(x0.shape[1:]).to(x0.device), constant_sigma(sigma, x0))

"""The few-step loop: predict clean latents, go to the next noise level, predict again.

By fresh noise this is the multistep consistency sampling of arXiv:2303.01469 (algorithm 1), with
the noise levels of a denoising_step_list, and nothing else renoises; along the velocity it is
Euler's method. A student is sampled as it was trained. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.flow import add_noise, constant_sigma
from model.types import FULL_ATTENTION, Conditioning, Context, Denoiser, Walk
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


def euler_steps(
    net: Denoiser,
    x: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    end: float = 0.0,
    *,
    context: Context = FULL_ATTENTION,
    on_step: OnStep | None = None,
) -> Tensor:
    """Move x [B, C, F, H, W] from the first of falling `sigmas` over all of them to `end`, fp32.

    x_next = x + (sigma_next - sigma) velocity; no fresh noise. Returns x at `end`, so clean at 0.
    """
    context = remembering(context)
    for step, (sigma, following) in enumerate(zip(sigmas, [*sigmas[1:], end], strict=True)):
        x0 = predict_x0(net, x, sigma, conditioning, context)
        x = toward(x, x0, sigma, following)
        if on_step is not None:
            on_step(step + 1, len(sigmas))
    return x


def toward(x: Tensor, x0: Tensor, sigma: float, level: float) -> Tensor:
    """x at `sigma`, moved straight toward x0 to a lower `level`: x + (level - sigma) velocity."""
    return x0 if level == 0.0 else x0 + (level / sigma) * (x - x0)


@torch.no_grad()
def state_at(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    rng: SampleRNG,
    *,
    walk: Walk = "renoise",
    context: Context = FULL_ATTENTION,
) -> Tensor:
    """What the step at the last of `sigmas` begins with, [B, C, F, H, W], after all before it."""
    done, sigma = sigmas[:-1], sigmas[-1]
    if not done:
        return noise
    context = replace(context, commit=False)  # the step that follows may
    if walk == "euler":
        return euler_steps(net, noise, conditioning, done, end=sigma, context=context)
    return renoise(few_step(net, noise, conditioning, done, rng, context=context), sigma, rng)


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

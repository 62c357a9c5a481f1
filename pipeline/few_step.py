"""The few-step loop: predict clean latents, noise them again, predict again. Nothing else renoises.

This is the multistep consistency sampling of arXiv:2303.01469 (algorithm 1), with the noise levels
of a denoising_step_list. Letters as in model/types.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from model.flow import add_noise, constant_sigma
from model.types import Conditioning, Denoiser
from utils.seeding import SampleRNG


def few_step(
    net: Denoiser,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Sequence[float],
    rng: SampleRNG,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Run all of `sigmas` (descending, the first is 1). Returns x0 [B, C, F, H, W], fp32.

    noise: [B, C, F, H, W], standard normal. Costs one network evaluation per sigma.
    `on_step(done, total)` is called after each.
    """
    x = noise
    for step, value in enumerate(sigmas):
        if step:
            x = renoise(x, value, rng)
        x = net(x, constant_sigma(value, x), conditioning).x0
        if on_step is not None:
            on_step(step + 1, len(sigmas))
    return x


def renoise(x0: Tensor, sigma: float, rng: SampleRNG) -> Tensor:
    """Fresh noise on a prediction: [B, C, F, H, W] at noise level `sigma`."""
    return add_noise(x0, rng.randn(x0.shape[1:]).to(x0.device), constant_sigma(sigma, x0))

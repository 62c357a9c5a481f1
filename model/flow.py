"""Noise arithmetic along the straight path, once for all networks, in fp32.

x_sigma = (1 - sigma) x0 + sigma noise (rectified flow, arXiv:2209.03003); velocity = noise - x0.
Letters as in model/types.py; sigma is [B, 1] or [B, F], latents are [B, C, F, H, W].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

TIMESTEPS = 1000.0  # Wan's time embedding reads 1000 sigma


def expand(sigma: Tensor) -> Tensor:
    """Per-frame noise levels [B, F] as [B, 1, F, 1, 1], to broadcast over latents."""
    return sigma.float()[:, None, :, None, None]


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Move clean latents to noise level `sigma`. Returns [B, C, F, H, W], fp32."""
    level = expand(sigma)
    return (1.0 - level) * x0.float() + level * noise.float()


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents that `velocity` points at from `x`. Returns [B, C, F, H, W], fp32."""
    return x.float() - expand(sigma) * velocity.float()


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """The velocity that leads from `x` at `sigma` > 0 to `x0`. Returns [B, C, F, H, W], fp32."""
    return (x.float() - x0.float()) / expand(sigma)


def x0_to_score(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Gradient of the log density of x at `sigma` > 0: -(x - (1 - sigma) x0) / sigma^2, fp32."""
    level = expand(sigma)
    return ((1.0 - level) * x0.float() - x.float()) / level.square()


@overload
def shift(sigma: float, factor: float) -> float: ...
@overload
def shift(sigma: Tensor, factor: float) -> Tensor: ...
def shift(sigma: float | Tensor, factor: float) -> float | Tensor:
    """Push uniform noise levels toward 1: k s / (1 + (k - 1) s), Wan's resolution shift."""
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


def unshift(sigma: float, factor: float) -> float:
    """The noise level that `shift` moves to `sigma`."""
    return sigma / (factor - (factor - 1.0) * sigma)


def step_sigmas(denoising_step_list: Sequence[float], timestep_shift: float) -> list[float]:
    """Noise levels of a list of unshifted steps in (0, 1000].

    [1000, 750, 500, 250] with shift 5 gives [1, 0.9375, 0.8333, 0.625], exactly, with no table.
    """
    return [shift(step / TIMESTEPS, timestep_shift) for step in denoising_step_list]


def on_device(values: Sequence[float], device: torch.device) -> Tensor:
    """A few numbers as a tensor [n], copied without waiting for the device."""
    return torch.tensor(values).to(device, non_blocking=True)


def constant_sigma(value: float, like: Tensor) -> Tensor:
    """One noise level for a whole batch: [B, 1], fp32, on the device of `like`."""
    return torch.full((like.shape[0], 1), value, device=like.device)


def step_problems(key: str, steps: Sequence[int]) -> Iterator[str]:
    """What is impossible about a setting that lists few steps, from noise down; a line each."""
    falling = sorted(set(steps), reverse=True)
    if not steps or any(not 0 < step <= 1000 for step in steps) or steps != falling:
        yield f"{key}: must fall strictly within (0, 1000], got {steps}"
    elif steps[0] != 1000:
        yield f"{key}: must begin at 1000, pure noise, got {steps}"

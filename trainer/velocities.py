"""What networks say to a few fixed inputs: how far weights that were changed are from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.families.base import Model
from model.folders.loading import Placement
from model.types import Conditioning
from utils.seeding import generator
from utils.weights import Weights

USUAL_SIGMAS = (1.0, 0.9375, 0.8333, 0.625)  # of four steps with shift 5
FRAMES, TOKENS = 3, 8  # latent frames, and tokens along each side, of an input


@dataclass(frozen=True, eq=False)
class Input:
    """One noisy clip and what it is conditioned on; random numbers all."""

    x: Tensor  # [1, C, F, H, W]
    sigma: float
    conditioning: Conditioning


def fixed_inputs(model: Model, count: int, sigmas: Sequence[float] = ()) -> list[Input]:
    """`count` inputs, the same in every call; their noise levels are `sigmas` in turn."""
    levels = list(sigmas) or list(USUAL_SIGMAS)
    return [_input(model, number, levels[number % len(levels)]) for number in range(count)]


def _input(model: Model, number: int, sigma: float) -> Input:
    draws = generator(0, "velocities", str(number))

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draws)

    latent, images, clip, first_frame = model.latent, model.images, None, None
    place = (FRAMES, TOKENS * latent.patch[0], TOKENS * latent.patch[1])
    if images is not None and images.how == "channels":
        mask = torch.zeros(1, latent.temporal_stride, *place)
        mask[:, :, 0] = 1.0
        first_frame = torch.cat([mask, noise(latent.channels, *place)], dim=1)
        clip = noise(images.tokens * images.count, images.width) if images.clip else None
    text = noise(model.text.length, model.text.width)
    x = noise(latent.channels, *place)
    return Input(x, sigma, Conditioning(text, clip, first_frame))


@torch.no_grad()
def velocities(
    model: Model, weights: Weights, inputs: Sequence[Input], device: torch.device, *, what: str
) -> Tensor:
    """What the network with `weights` says to each input, [count, C, F, H, W], fp32, on the CPU.

    Loads it in fp32 and lets go of it.
    """
    network = model.load_network(weights, Placement(device), what=what)
    return torch.cat([_say(network, given, device) for given in inputs])


def _say(network: torch.nn.Module, given: Input, device: torch.device) -> Tensor:
    def here(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    held = given.conditioning
    moved = Conditioning(held.text.to(device), here(held.clip), here(held.first_frame))
    sigma = torch.full((1, 1), given.sigma, device=device)
    velocity: Tensor = network(given.x.to(device), sigma, moved).velocity
    return velocity.float().cpu()


def relative(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """How much of the change from `base` to `wanted` is missed by `found`, in norms."""
    change = float((wanted - base).norm())
    return float((found - wanted).norm()) / change if change else 0.0

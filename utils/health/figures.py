"""What clips look like, in closed form: no network judges here.

Letters: N clips, C channels, P frames, H W sides, K prompts, S clips of each prompt. Clips are
pixels in [0, 1], or latents where no codec is at hand: figures are compared with those of the
teacher's clips, so that their units cancel. Clip number n is of prompt n // S.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = 32  # a side's most cells where clips or frames are compared: grain is neither motion nor
# diversity
CLIPPED = 1.5 / 255.0  # so near to black or white a pixel has lost what it showed


def measure(clips: Tensor, seeds: int, *, pixels: bool) -> dict[str, float]:
    """All figures of clips [N, C, P, H, W], `seeds` of them to a prompt.

    pixels: they are pixels in [0, 1], of which some may be clipped; else latents.
    """
    clips = clips.detach().float()
    coarse = pooled(clips)
    figures = {
        "exposure": clips.mean(),
        "contrast": clips.flatten(1).std(dim=1).mean(),
        "chroma": clips.std(dim=1, correction=0).mean(),
        "sharpness": sharpness(clips),
    }
    if pixels:
        figures["clipped"] = ((clips <= CLIPPED) | (clips >= 1.0 - CLIPPED)).float().mean()
    if clips.shape[2] > 1:
        figures["motion"] = (coarse[:, :, 1:] - coarse[:, :, :-1]).abs().mean()
        figures["drift"] = drift(clips)
    by_prompt = coarse.unflatten(0, (-1, seeds))  # [K, S, ...]
    if seeds > 1:
        figures["diversity_seeds"] = spread(by_prompt)
    if len(by_prompt) > 1:
        figures["diversity_prompts"] = spread(by_prompt.transpose(0, 1))
    if seeds > 1 and len(by_prompt) > 1:  # a student that no longer reads its prompts is near 1
        across = figures["diversity_seeds"].clamp(min=1e-3)
        figures["prompt_effect"] = figures["diversity_prompts"] / across
    return {name: float(value) for name, value in figures.items()}


def pooled(clips: Tensor) -> Tensor:
    """Clips [N, C, P, H, W] in at most CELLS x CELLS cells a frame."""
    height, width = clips.shape[3:]
    size = (min(CELLS, height), min(CELLS, width))
    if size == (height, width):
        return clips
    flat = clips.flatten(1, 2)
    return F.adaptive_avg_pool2d(flat, size).unflatten(1, clips.shape[1:3])


def sharpness(clips: Tensor) -> Tensor:
    """Mean absolute difference of neighbours within a frame, of clips [N, C, P, H, W]; scalar."""
    pairs = [
        clips.narrow(dim, 1, clips.shape[dim] - 1) - clips.narrow(dim, 0, clips.shape[dim] - 1)
        for dim in (3, 4)
        if clips.shape[dim] > 1
    ]
    return sum((pair.abs().mean() for pair in pairs), clips.new_zeros(()))


def spread(groups: Tensor) -> Tensor:
    """Mean RMS distance of two clips of a group, over all groups [G, M, ...] of M clips; scalar."""
    pairs = combinations(range(groups.shape[1]), 2)
    return torch.stack([apart(groups[:, a], groups[:, b]).mean() for a, b in pairs]).mean()


def apart(a: Tensor, b: Tensor) -> Tensor:
    """RMS distance of clips [N, ...] from those at the same place in another batch, [N]."""
    return (a - b).flatten(1).square().mean(dim=1).sqrt()


def distance(a: Tensor, b: Tensor) -> float:
    """Mean RMS distance of clips [N, C, P, H, W] from their counterparts, in coarse cells."""
    return float(apart(pooled(a.float()), pooled(b.float())).mean())


def drift(clips: Tensor) -> Tensor:
    """How far clips [N, C, P, H, W] wander alike from their first quarter to the last; scalar.

    The largest of three: exposure, in units of the clips' contrast; and the logarithms of contrast
    and chroma. What one clip does alone, as a sun that sets, is averaged away.
    """
    frames = clips.shape[2]
    quarter = max(1, frames // 4)
    first, last = clips[:, :, :quarter], clips[:, :, frames - quarter :]
    contrast = clips.flatten(1).std(dim=1).clamp(min=1e-6)
    exposure = ((last - first).flatten(1).mean(dim=1) / contrast).mean().abs()

    def grown(size: Tensor, before: Tensor) -> Tensor:
        return (size.clamp(min=1e-6) / before.clamp(min=1e-6)).log().mean().abs()

    spreads = [part.flatten(1).std(dim=1) for part in (last, first)]
    chromas = [part.std(dim=1, correction=0).flatten(1).mean(dim=1) for part in (last, first)]
    return torch.stack([exposure, grown(*spreads), grown(*chromas)]).amax()

"""A clip's pixels cut into the groups that each make a latent frame."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from utils.errors import UserError


def frame_groups(pixels: Tensor, strides: tuple[int, int], *, started: bool) -> Iterator[Tensor]:
    """The pixels of one latent frame after the other: [B, 3, 1, H, W] at first, then whole groups.

    strides: pixel frames to a latent frame, and pixels to a latent row or column. started: the
    clip's first frame came earlier. Raises UserError for pixels [B, 3, P, H, W] whose frames or
    sides cannot be grouped.
    """
    temporal, spatial = strides
    frames, height, width = pixels.shape[2:]
    if (frames - (not started)) % temporal or not frames:
        wanted = "every later piece of a clip must have" if started else "a clip must have 1 +"
        raise UserError(f"{wanted} {temporal} k frames, got {frames}")
    if height % spatial or width % spatial:
        raise UserError(
            f"the sides of a clip must be multiples of {spatial}, got {height} x {width}"
        )
    groups = [] if started else [1]
    return iter(pixels.split(groups + [temporal] * (frames // temporal), dim=2))

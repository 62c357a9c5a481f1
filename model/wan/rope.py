"""Rotary positions over (frame, row, column), computed from the shape; no module state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many rotated pairs each axis takes; a head of 128 has 22 | 21 | 21."""
    pairs = head_dim // 2
    side = pairs // 3
    return pairs - 2 * side, side, side


def rotary_table(frame_index: Tensor, height: int, width: int, head_dim: int) -> Tensor:
    """Rotations [F height width, 1, head_dim / 2, 2] as pairs (cos, sin), fp32.

    frame_index: [F] time positions. Angles are taken in fp64 and rounded once. Source: the
    rotary embedding of arXiv:2104.09864, one per axis, as Wan2.1 arranges them.
    """
    device = frame_index.device
    positions = (
        frame_index,
        torch.arange(height, device=device),
        torch.arange(width, device=device),
    )
    shape = (len(frame_index), height, width)
    parts = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        exponent = torch.arange(pairs, device=device, dtype=torch.float64) / pairs
        angles = position.double()[:, None] * torch.exp(-math.log(THETA) * exponent)
        view = [1, 1, 1, pairs]
        view[axis] = shape[axis]
        parts.append(angles.view(view).expand(*shape, pairs))
    angles = torch.cat(parts, dim=-1).flatten(0, 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()[:, None]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [B, N, heads, head_dim] by `table`, in fp32; dtype kept."""
    pairs = x.float().unflatten(-1, (-1, 2))
    # Compilers know no complex numbers; without one, a single complex kernel is several times
    # faster than its four products (tests/model/test_rope.py holds both to the same bits).
    turn = turn_pairs if torch.compiler.is_compiling() else _turn_complex
    return turn(pairs, table).flatten(-2).to(x.dtype)


def turn_pairs(pairs: Tensor, table: Tensor) -> Tensor:
    """(a, b) to (a cos - b sin, a sin + b cos) along the last axis of size 2, broadcast."""
    (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _turn_complex(pairs: Tensor, table: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))


def coordinate_channels(frame_index: Tensor, height: int, width: int) -> Tensor:
    """Ten constant channels [10, F, height, width] that tell a network where it is, fp32.

    Rotary positions are relative, so a small network cannot find the first frame or the borders.
    Channels: is this frame 0, time / 8, and sin, cos of one and two half-turns across each side.
    """
    device = frame_index.device
    time = frame_index.float()[:, None, None].expand(-1, height, width)
    channels = [(time == 0).float(), time / 8.0]
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    for turns in (1.0, 2.0):
        for place, view in ((rows, (1, -1, 1)), (columns, (1, 1, -1))):
            angle = (math.pi * turns * place).view(view).expand_as(time)
            channels += [angle.sin(), angle.cos()]
    return torch.stack(channels)

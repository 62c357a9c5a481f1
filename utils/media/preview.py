"""Small videos for a page, and moving pictures for a README: few pixels, clips side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from utils.files import replaced_atomically
from utils.media.video import to_bytes

SIDE = 128  # the longer side of a clip, in pixels; smaller ones are enlarged by a whole factor
GAP = 4  # pixels between clips
MAX_S = 6.0  # more of a clip is not shown


def save_preview(clips: Tensor, path: Path, *, fps: float) -> None:
    """Write clips [S, 3, P, H, W] in [0, 1] side by side as one mp4; whole or not at all."""
    frames = side_by_side([small(to_bytes(clip[:, : int(MAX_S * fps)])) for clip in clips])
    with replaced_atomically(path) as part:
        iio.imwrite(
            part,
            frames,
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", "20", "-movflags", "+faststart"],
        )


def small(frames: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 [P, H, W, 3] with its longer side at about `side` pixels."""
    height, width = frames.shape[1:3]
    longer = max(height, width)
    if longer <= side:
        factor = side // longer
        return frames.repeat(factor, axis=1).repeat(factor, axis=2)
    size = (max(2, round(width * side / longer)), max(2, round(height * side / longer)))
    kind = Image.Resampling.LANCZOS
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, kind)) for frame in frames])


def side_by_side(clips: list[np.ndarray]) -> np.ndarray:
    """Clips uint8 [P, H, W, 3] of one size in a row with grey gaps; sides are even."""
    gap = np.full((*clips[0].shape[:2], GAP, 3), 128, dtype=np.uint8)
    parts = [part for clip in clips for part in (clip, gap)][:-1]
    row = np.concatenate(parts, axis=2)
    spare = (row.shape[1] % 2, row.shape[2] % 2)
    return np.pad(row, ((0, 0), (0, spare[0]), (0, spare[1]), (0, 0)), mode="edge")


def save_animation(
    rows: Sequence[Sequence[Tensor]], labels: Sequence[str], path: Path, *, fps: float
) -> None:
    """Write rows of clips [3, P, H, W] in [0, 1] under labels of columns as an animated WebP."""
    lines = [side_by_side([small(to_bytes(clip)) for clip in row]) for row in rows]
    gap = np.full((len(lines[0]), GAP, *lines[0].shape[2:]), 255, dtype=np.uint8)
    frames = np.concatenate([part for line in lines for part in (line, gap)][:-1], axis=1)
    images = [_labelled(frame, labels) for frame in frames]
    with replaced_atomically(path) as part:
        images[0].save(
            part,
            format="WEBP",
            save_all=True,
            append_images=images[1:],
            duration=round(1000.0 / fps),
            loop=0,
            quality=80,
            method=6,
        )


def _labelled(frame: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """A frame under the names of its columns, each of the same width."""
    top, step = 18, (frame.shape[1] + GAP) // len(labels)
    image = Image.new("RGB", (frame.shape[1], frame.shape[0] + top), "white")
    draw = ImageDraw.Draw(image)
    for column, label in enumerate(labels):
        draw.text((column * step + 2, 3), label, fill="black")
    image.paste(Image.fromarray(frame), (0, top))
    return image

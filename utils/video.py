"""Clips on disk and on paper: mp4 through imageio, contact sheets as PNG.

Clips here are [3, P, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from utils.files import replaced_atomically

MIN_SIDE = 256  # smaller clips are enlarged by a whole factor, or players blur them


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as pixels in [0, 1]."""
    return (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_bytes(clip: Tensor) -> np.ndarray:
    """[3, P, H, W] in [0, 1] as uint8 [P, H, W, 3]."""
    return (clip.cpu() * 255.0).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def enlarge(frames: np.ndarray, min_side: int = MIN_SIDE) -> np.ndarray:
    """Repeat pixels of uint8 [P, H, W, 3] until the shorter side has `min_side`."""
    factor = -(-min_side // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def save_mp4(clip: Tensor, path: Path, *, fps: float) -> None:
    """Write one H.264 mp4 that any browser plays; the file appears whole or not at all."""
    with replaced_atomically(path) as part:
        iio.imwrite(
            part,
            enlarge(to_bytes(clip)),
            fps=fps,
            codec="libx264",
            pixelformat="yuv420p",
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", "16"],
        )


def contact_sheet(
    clips: Sequence[Tensor],
    labels: Sequence[str],
    *,
    columns: int = 1,
    frames: int = 6,
    side: int = 96,
) -> Image.Image:
    """Clips as labelled strips of `frames` evenly spaced frames, `columns` strips to a row.

    A frame's longer side becomes `side` pixels; smaller frames are enlarged by a whole factor.
    """
    gap, text = 4, 14
    strips = [_strip(clip, frames, side, gap) for clip in clips]
    width = max(strip.width for strip in strips) + 3 * gap
    height = max(strip.height for strip in strips) + text + gap
    rows = -(-len(strips) // columns)
    sheet = Image.new("RGB", (width * columns, height * rows + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (strip, label) in enumerate(zip(strips, labels, strict=True)):
        left, top = number % columns * width + gap, number // columns * height + gap
        draw.text((left, top), label[: strip.width // 6], fill="black")
        sheet.paste(strip, (left, top + text))
    return sheet


def _strip(clip: Tensor, frames: int, side: int, gap: int) -> Image.Image:
    pixels = to_bytes(clip)
    longer = max(pixels.shape[1:3])
    scale = side // longer if longer <= side else side / longer
    size = (round(pixels.shape[2] * scale), round(pixels.shape[1] * scale))
    kind = Image.Resampling.NEAREST if longer <= side else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (frames * (size[0] + gap) - gap, size[1]), "white")
    for column, index in enumerate(np.linspace(0, len(pixels) - 1, frames).round().astype(int)):
        frame = Image.fromarray(pixels[index]).resize(size, kind)
        strip.paste(frame, (column * (size[0] + gap), 0))
    return strip


def save_png(image: Image.Image, path: Path) -> None:
    """Write one PNG; the file appears whole or not at all."""
    with replaced_atomically(path) as part:
        image.save(part, format="PNG")

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
    clips: Sequence[Tensor], labels: Sequence[str], *, frames: int = 6, side: int = 96
) -> Image.Image:
    """One row per clip: `frames` evenly spaced frames, under the clip's label."""
    row_height, margin = side + 16, 4
    width = max(1, frames) * (side + margin) + margin
    sheet = Image.new("RGB", (width, row_height * len(clips) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, label) in enumerate(zip(clips, labels, strict=True)):
        pixels = to_bytes(clip)
        top = row * row_height + margin
        draw.text((margin, top), label[: width // 6], fill="black")
        chosen = np.linspace(0, len(pixels) - 1, frames).round().astype(int)
        for column, index in enumerate(chosen):
            image = Image.fromarray(pixels[index])
            image.thumbnail((side, side)) if max(image.size) > side else None
            if max(image.size) < side:
                factor = side // max(image.size)
                image = image.resize(
                    (image.width * factor, image.height * factor), Image.Resampling.NEAREST
                )
            sheet.paste(image, (margin + column * (side + margin), top + 12))
    return sheet


def save_png(image: Image.Image, path: Path) -> None:
    """Write one PNG; the file appears whole or not at all."""
    with replaced_atomically(path) as part:
        image.save(part, format="PNG")

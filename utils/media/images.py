"""Pictures of any kind as RGB tensors, and frames brought to the size that a model takes.

Letters: frames [..., 3, H, W], uint8. Sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from utils.errors import NotFoundError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Whatever a suffix says, the bytes must be of one of these: Pillow would run a program for others
# (PostScript), and parsers that nobody uses are where faults are found.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 2**26  # 8192 x 8192, for which reading takes up to 1.5 GB of memory
Scale = Literal["bicubic", "lanczos"]
# What Pillow raises for files that are torn or damaged.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError)


def read_image(path: Path) -> Tensor:
    """One picture as uint8 [3, H, W], turned as its EXIF data tell.

    Grey and palette become RGB, transparency is laid over white, an animation gives its first
    picture. Raises FileNotFoundError, or ValueError with the file's name if it cannot be read, is
    of none of FORMATS or has more than MAX_PIXELS, which is seen before anything is decoded.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such image")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(_too_large(path, f"{image.height} x {image.width}"))
            pixels = np.array(_rgb(ImageOps.exif_transpose(image)))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(_too_large(path, "too many")) from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not readable as an image: its content is none of {', '.join(FORMATS)}"
        ) from error
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0].replace(f" {str(path)!r}", "")
        raise UserError(f"{path}: not readable as an image: {reason}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _too_large(path: Path, size: str) -> str:
    return f"{path}: has {size} pixels; at most {MAX_PIXELS} are read, scale it down"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        grey += 128  # 257 steps to one of 8 bits: no value lies half way between two
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 pixels as models take them: fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def fit(frames: Tensor, size: tuple[int, int], scale: Scale = "bicubic") -> Tensor:
    """Scale frames to cover `size`, keeping their aspect ratio, and crop them at the centre.

    frames: uint8 [..., 3, H, W]. Returns uint8 [..., 3, *size]; antialiased.
    """
    height, width = size
    scaled = _covering((frames.shape[-2], frames.shape[-1]), size)
    if scaled != tuple(frames.shape[-2:]):
        flat = frames.reshape(-1, *frames.shape[-3:])
        flat = SCALES[scale](flat, scaled)
        frames = flat.reshape(*frames.shape[:-2], *scaled)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return frames[..., top : top + height, left : left + width].contiguous()


def _bicubic(frames: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)


def _lanczos(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """As TI2V-5B's release scales images, by Pillow."""
    pictures = (Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames)
    scaled = [np.array(p.resize(size[::-1], Image.Resampling.LANCZOS)) for p in pictures]
    return torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).to(frames.device)


SCALES: dict[Scale, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "bicubic": _bicubic,
    "lanczos": _lanczos,
}  # of uint8 frames [n, 3, H, W]


def _covering(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the aspect ratio of `shape` that has `size` inside."""
    height, width = size
    if height * shape[1] >= width * shape[0]:
        return height, max(width, round(shape[1] * height / shape[0]))
    return max(height, round(shape[0] * width / shape[1])), width


def describe_fit(shape: tuple[int, int], size: tuple[int, int]) -> str:
    """What `fit` does to frames of `shape`, in words."""
    scaled = _covering(shape, size)
    steps = [] if scaled == tuple(shape) else [f"scaled to {_words(scaled)}"]
    steps += [] if scaled == tuple(size) else [f"cropped to {_words(size)}"]
    return f"{_words(shape)} {', '.join(steps) or 'kept'} (height x width)"


def _words(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

"""Clips on disk and on paper: mp4 through imageio, frames from any video, contact sheets as PNG.

Clips here are [3, P, H, W] in [0, 1]; frames that are read are uint8 [3, H, W].
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO

import imageio.v3 as iio
import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw
from torch import Tensor

from utils.config import ConfigError
from utils.errors import NotFoundError, UserError
from utils.files import replaced_atomically

MIN_SIDE = 256  # smaller clips are enlarged by a whole factor, or players blur them
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v")
# A video is a file, never a list that names others; nothing is fetched on its behalf.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif"  # whatever a file's suffix says
FPS_RANGE = (0.1, 1000.0)  # frames per second of any video that is meant to be looked at
FFMPEG = ("-nostdin", "-hide_banner", "-protocol_whitelist", "file")


def check_fps(fps: float, flag: str = "--fps") -> None:
    """Raise ConfigError unless videos can be read and written at such a rate."""
    least, most = FPS_RANGE
    if not least <= fps <= most:  # nor is NaN
        raise ConfigError(
            f"{flag}: must lie between {least:g} and {most:g} frames per second, got {fps:g}"
        )


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


def read_frames(
    path: Path, *, fps: float | None = None, limit: int | None = None
) -> Generator[Tensor, None, None]:
    """The frames of a video one by one, uint8 [3, H, W], upright and with square pixels.

    fps: the rate at which the video is sampled, by its time stamps, whatever its own rate is; None
    = every frame as it is. limit: the most frames to give. Nothing is decoded beyond what is asked
    for, and little is held in memory; close the iterator to stop early. Raises FileNotFoundError,
    or ValueError with the file's name: at once if it is no video, at its end if it is torn.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such video")
    rate = [] if fps is None else [f"fps={fps}"]
    filters = ",".join([*rate, "scale=round(iw*sar):ih", "setsar=1"])
    words = [*_input(path, "-xerror", "-v", "error"), "-map", "0:V:0", "-vf", filters]
    words += [] if limit is None else ["-frames:v", str(limit)]
    words += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "image2pipe", "-c:v", "ppm"]
    words.append("-")
    count = 0
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=messages) as decoder,
    ):
        assert decoder.stdout is not None
        try:
            while (frame := _next_frame(decoder.stdout)) is not None:
                yield frame
                count += 1
            decoder.wait()
        finally:
            decoder.kill()
        messages.seek(0)
        fault = _fault(path, messages.read().decode(errors="replace"))
    if fault is not None or not count:
        raise UserError(f"{path}: {fault or 'holds no frame'} ({count} frames could be read)")


def read_video(path: Path) -> Tensor:
    """A whole video as [3, P, H, W] in [0, 1]. Raises what `read_frames` raises."""
    return torch.stack(list(read_frames(path)), dim=1).float() / 255.0


def frame_rate(path: Path) -> float | None:
    """The average frames per second that a video's header tells; None if it does not.

    Raises FileNotFoundError, or ValueError with the file's name if it is no video.
    """
    if not path.is_file():
        raise NotFoundError(f"{path}: no such video")
    done = subprocess.run(_input(path), capture_output=True, check=False)
    text = done.stderr.decode(errors="replace")
    streams = [line for line in text.splitlines() if re.match(r"\s*Stream #\S+: Video:", line)]
    streams = [line for line in streams if "(attached pic)" not in line]
    if not streams:
        found = _fault(path, "" if "Stream #" in text else text)
        raise UserError(f"{path}: {found or 'holds no video'}")
    rate = re.search(r"([\d.]+)(k?) fps", streams[0])
    return float(rate[1]) * (1000.0 if rate[2] else 1.0) if rate else None


def _input(path: Path, *options: str) -> list[str]:
    containers = ("-format_whitelist", CONTAINERS)
    return [get_ffmpeg_exe(), *FFMPEG, *containers, *options, "-i", f"file:{path}"]


def _next_frame(stream: IO[bytes]) -> Tensor | None:
    """The next portable pixmap of a stream; None at its end, or where it breaks off."""
    kind, size, depth = (stream.readline() for _ in range(3))
    if (kind, depth) != (b"P6\n", b"255\n"):
        return None
    width, height = map(int, size.split())
    content = bytearray(stream.read(3 * height * width))
    if len(content) < 3 * height * width:
        return None
    return torch.frombuffer(content, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)


def _fault(path: Path, messages: str) -> str | None:
    """What ffmpeg complains of first, in words; None if nothing."""
    if not path.stat().st_size:
        return "an empty file"
    if "matches no streams" in messages:
        return "holds no video"
    first = re.sub(r"^(\[[^\]]*\] *)+", "", messages.strip().partition("\n")[0])
    return f"not readable as a video: {first}" if first else None

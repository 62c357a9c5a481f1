"""Clips on disk and on paper: mp4 through ffmpeg, frames from any video, contact sheets as PNG.

Clips here are [3, P, H, W] in [0, 1]; frames that are read are uint8 [3, H, W].
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw
from torch import Tensor

from utils.config import ConfigError
from utils.errors import NotFoundError, UserError
from utils.files import replaced_atomically
from utils.hashes import content_hash
from utils.media.images import MAX_PIXELS

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


@dataclass(frozen=True)
class Extent:
    """How much a video holds."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height} x {self.width}"


class BrokenClipError(UserError):
    """A clip that is not what was written."""


def written_extent(frames: int, height: int, width: int) -> Extent:
    """What `save_mp4` makes of a clip: small ones are enlarged, sides become even."""
    factor = -(-MIN_SIDE // min(height, width))
    height, width = height * factor, width * factor
    return Extent(frames, height + height % 2, width + width % 2)


def save_mp4(clip: Tensor, path: Path, *, fps: float, parts: Path | None = None) -> str:
    """Write one H.264 mp4 that any browser plays; returns the file's SHA-256.

    The file appears when ffmpeg has ended well and what it wrote reads back whole, or not at all:
    raises OSError if the disk takes no more, UserError if something else is wrong. parts: see
    `replaced_atomically`.
    """
    assert clip.ndim == 4 and len(clip) == 3, f"clips are [3, P, H, W], got {tuple(clip.shape)}"
    frames = enlarge(to_bytes(clip))
    with replaced_atomically(path, parts) as part:
        _encode(frames, part, path, fps)
        check_clip(part, written_extent(*clip.shape[1:]), told_as=path)
        return content_hash(part)


def _encode(frames: np.ndarray, part: Path, path: Path, fps: float) -> None:
    """Let ffmpeg write uint8 [P, H, W, 3] to `part`; raises UserError, of `path`, if it fails."""
    height, width = frames.shape[1:3]
    even = written_extent(len(frames), height, width)
    words = [get_ffmpeg_exe(), "-y", "-hide_banner", "-v", "error", "-f", "rawvideo"]
    words += ["-s", f"{width}x{height}", "-pix_fmt", "rgb24"]
    words += ["-r", str(Fraction(fps).limit_denominator()), "-i", "-", "-an"]
    words += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]
    if (even.height, even.width) != (height, width):
        words += ["-vf", f"scale={even.width}:{even.height}"]
    words += ["-f", "mp4", f"file:{part}"]
    with (
        tempfile.TemporaryFile() as messages,
        # A group of its own: Ctrl-C is this process's to answer.
        subprocess.Popen(words, stdin=subprocess.PIPE, stderr=messages, process_group=0) as encoder,
    ):
        assert encoder.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it died, and its status tells
                for frame in frames:
                    encoder.stdin.write(frame.data)
            with contextlib.suppress(BrokenPipeError):
                encoder.stdin.close()
            status = encoder.wait()
        finally:
            encoder.kill()
            with contextlib.suppress(BrokenPipeError):
                encoder.stdin.close()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip().splitlines()
    if status:
        reason = _plain(said[0]) if said else "without a word"
        raise BrokenClipError(
            f"{path}: could not be written: ffmpeg ended with status {status}: {reason}"
        )


def check_clip(path: Path, expected: Extent, *, told_as: Path | None = None) -> None:
    """Raise UserError unless a video can be read to its end and holds what is expected.

    told_as: another name for the file in that error.
    """
    told = path if told_as is None else told_as
    try:
        found = video_extent(path)
    except UserError as error:
        raise BrokenClipError(str(error).replace(str(path), str(told))) from error
    if found != expected:
        raise BrokenClipError(f"{told}: holds {found}, expected {expected}")


def video_extent(path: Path) -> Extent:
    """How much a video holds, decoded to its end. Raises what `read_frames` raises."""
    if not path.is_file():
        raise NotFoundError(f"{path}: no such video")
    words = [*_input(path, "-xerror", "-v", "error"), "-map", "0:V:0"]
    words += ["-fps_mode", "passthrough", "-f", "framecrc", "-"]
    done = subprocess.run(words, capture_output=True, check=False)
    lines = done.stdout.decode(errors="replace").splitlines()
    frames = sum(not line.startswith("#") for line in lines)
    sizes = [size for line in lines if (size := re.match(r"#dimensions 0: (\d+)x(\d+)$", line))]
    fault = _fault(path, done.stderr.decode(errors="replace"))
    if fault is None and done.returncode:
        fault = f"not readable as a video: ffmpeg ended with status {done.returncode}"
    if fault is not None or not frames or not sizes:
        raise UserError(f"{path}: {fault or 'holds no frame'} ({frames} frames could be read)")
    return Extent(frames, height=int(sizes[0][2]), width=int(sizes[0][1]))


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
    """Write one PNG; the file appears whole, read back as it is, or not at all."""
    with replaced_atomically(path) as part:
        image.save(part, format="PNG")
        try:
            with Image.open(part, formats=["PNG"]) as written:
                written.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: does not read back: {type(error).__name__}") from error


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
    limits = ("-format_whitelist", CONTAINERS, "-max_pixels", str(MAX_PIXELS))
    return [get_ffmpeg_exe(), *FFMPEG, *limits, *options, "-i", f"file:{path}"]


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
    first = _plain(messages.strip().partition("\n")[0])
    return f"not readable as a video: {first}" if first else None


def _plain(line: str) -> str:
    """What ffmpeg says, without which part of it speaks."""
    return re.sub(r"^(\[[^\]]*\] *)+", "", line)

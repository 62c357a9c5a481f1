"""Small videos for tests, drawn by ffmpeg: of any container, rate and length, whole or torn."""

from __future__ import annotations

import subprocess
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe

LOSSLESS = ("-c:v", "libx264", "-preset", "ultrafast", "-qp", "0", "-pix_fmt", "yuv444p")


def ffmpeg(*words: str | Path) -> None:
    """Run ffmpeg; its complaint fails the test."""
    line = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_video(
    path: Path, *options: str, frames: int = 17, fps: float = 8, size: tuple[int, int] = (32, 32)
) -> Path:
    """A video of `frames` frames that differ, grey level 8 n in frame n; size: height, width.

    The container follows the suffix; `options` go to ffmpeg in front of the output.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"color=c=black:s={size[1]}x{size[0]}:r={fps}:d={frames / fps}"
    drawn = f"{source},format=yuv444p,geq=lum=16+mod(7*N\\,220):cb=128:cr=128"
    codec = () if path.suffix == ".webm" else LOSSLESS
    ffmpeg("-f", "lavfi", "-i", drawn, *codec, "-frames:v", str(frames), *options, path)
    return path


def make_split_video(path: Path, *options: str, frames: int = 17, fps: float = 8) -> Path:
    """A video of 32 x 64, white in its left half and black in its right one."""
    source = f"color=c=white:s=32x32:r={fps}:d={frames / fps},format=yuv444p,pad=64:32:0:0:black"
    ffmpeg("-f", "lavfi", "-i", source, *LOSSLESS, *options, path)
    return path


def make_long_video(path: Path, minutes: int) -> Path:
    """A video of 8 frames per second that lasts `minutes`: one minute, repeated as it is."""
    minute = make_video(path.with_name(f"minute{path.suffix}"), frames=480)
    ffmpeg("-stream_loop", str(minutes - 1), "-i", minute, "-c", "copy", path)
    minute.unlink()
    return path


def make_sound(path: Path) -> Path:
    """A file with sound alone."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", path)
    return path


def tear(path: Path, left: float = 0.5) -> Path:
    """Cut a file off after a share of its bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content))])
    return path

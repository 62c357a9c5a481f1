"""A clip under its final name is whole: full disks, and writers that die or lie half way."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.disks import largest_file, on_small_disk
from tests.videos import make_video, tear
from utils.errors import UserError, words
from utils.media import video
from utils.media.video import (
    Extent,
    check_clip,
    enlarge,
    save_mp4,
    save_png,
    to_bytes,
    video_extent,
    written_extent,
)


def noise(frames: int = 17, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(3, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (257, 259), (300, 256)])
@pytest.mark.parametrize("fps", [8, 29.97])
def test_the_bytes_are_those_that_imageio_writes(
    height: int, width: int, fps: float, tmp_path: Path
) -> None:
    clip = noise(5, height, width)
    digest = save_mp4(clip, tmp_path / "ours.mp4", fps=fps)
    iio.imwrite(
        tmp_path / "theirs.mp4", enlarge(to_bytes(clip)), fps=fps, codec="libx264",
        pixelformat="yuv420p", macro_block_size=2, ffmpeg_log_level="error",
        output_params=["-crf", "16"],
    )  # fmt: skip
    ours = (tmp_path / "ours.mp4").read_bytes()
    assert ours == (tmp_path / "theirs.mp4").read_bytes()
    assert digest == hashlib.sha256(ours).hexdigest()
    assert video_extent(tmp_path / "ours.mp4") == written_extent(5, height, width)


@pytest.mark.parametrize("size", [2**9, 2**14, 2**17])
def test_a_disk_that_fills_up_while_a_clip_is_written_leaves_none(
    size: int, tmp_path: Path
) -> None:
    with largest_file(size), pytest.raises(OSError, match="File too large") as caught:
        save_mp4(noise(), tmp_path / "a.mp4", fps=8)
    assert caught.value.filename == str(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_was_there_stays_where_the_disk_takes_no_other(tmp_path: Path) -> None:
    save_mp4(noise(5), tmp_path / "a.mp4", fps=8)
    before = (tmp_path / "a.mp4").read_bytes()
    with largest_file(2**14), pytest.raises(OSError):
        save_mp4(noise(17), tmp_path / "a.mp4", fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_device_without_space_holds_whole_clips_alone(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from PIL import Image
from utils.errors import words
from utils.media.video import Extent, check_clip, save_mp4, save_png
folder = Path(sys.argv[1])
clip = torch.rand(3, 9, 64, 64)
made = 0
try:
    while True:
        save_mp4(clip, folder / f"{made}.mp4", fps=8)
        made += 1
except OSError as error:
    print(words(error))
try:
    save_png(Image.effect_noise((900, 900), 50), folder / "sheet.png")
except OSError as error:
    print(words(error))
for path in sorted(folder.iterdir()):
    check_clip(path, Extent(9, 256, 256))
print(0 < made == len(list(folder.iterdir())))
"""
    told = on_small_disk(code, tmp_path, "700k").splitlines()
    room = "no space left on device; make room, then run the same command again"
    assert told[0].endswith(f".mp4: {room}")
    assert told[1:] == [f"{tmp_path}/sheet.png: {room}", "True"]


def fake_ffmpeg(folder: Path, then: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode half of the frames and then do as told; whatever else is asked of it, do it well."""
    real = video.get_ffmpeg_exe()
    script = folder / "ffmpeg"
    half = f'head -c 1769472 | "{real}" "$@"'
    script.write_text(
        f'#!/bin/sh\ncase "$*" in\n*libx264*) {half}; {then};;\n*) exec "{real}" "$@";;\nesac\n',
        encoding="utf-8",
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(video, "get_ffmpeg_exe", lambda: str(script))


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("exit 228", "could not be written: ffmpeg ended with status 228: without a word"),
        ("echo '[mp4 @ 0x1] no' >&2; exit 1", "written: ffmpeg ended with status 1: no"),
        ("kill -9 $$", "could not be written: ffmpeg ended with status -9: without a word"),
        ("exit 0", "holds 9 frames of 256 x 256, expected 17 frames of 256 x 256"),
        (': > "${last#file:}"; exit 0', "an empty file (0 frames could be read)"),
        ('cp "$0" "${last#file:}"; exit 0', "not readable as a video: "),
    ],
)
def test_a_writer_that_dies_or_lies_publishes_nothing(
    then: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clips").mkdir()
    fake_ffmpeg(tmp_path, f"for last; do :; done; {then}", monkeypatch)
    with pytest.raises(UserError) as caught:
        save_mp4(noise(), tmp_path / "clips" / "a.mp4", fps=8)
    assert str(caught.value).startswith(f"{tmp_path}/clips/a.mp4: ")
    assert said in str(caught.value)
    assert len((words(caught.value) or "").splitlines()) == 1
    assert list((tmp_path / "clips").iterdir()) == []


def test_a_writer_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "check_clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_mp4(noise(1), tmp_path / "a.mp4", fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0.0, 0.3, 0.9, 0.999])
def test_a_clip_that_is_cut_off_is_found(left: float, tmp_path: Path) -> None:
    save_mp4(noise(9), tmp_path / "a.mp4", fps=8)
    tear(tmp_path / "a.mp4", left)
    with pytest.raises(UserError, match=r"a\.mp4: (an empty file|not readable as a video: )"):
        check_clip(tmp_path / "a.mp4", Extent(9, 256, 256))


@pytest.mark.parametrize("expected", [Extent(8, 32, 48), Extent(9, 32, 32), Extent(9, 48, 32)])
def test_a_clip_of_another_length_or_size_is_found(expected: Extent, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=9, size=(32, 48))
    check_clip(path, Extent(9, 32, 48))
    with pytest.raises(UserError, match=f"holds 9 frames of 32 x 48, expected {expected}"):
        check_clip(path, expected)


def test_a_full_disk_leaves_no_half_picture(tmp_path: Path) -> None:
    picture = Image.effect_noise((300, 300), 50)
    with largest_file(2**12), pytest.raises(OSError, match="File too large") as caught:
        save_png(picture, tmp_path / "a.png")
    assert caught.value.filename == str(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_does_not_read_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.effect_noise((64, 64), 50)
    save = Image.Image.save

    def torn(self: Image.Image, path: Path, **words: str) -> None:
        save(self, path, **words)
        tear(path)

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(UserError, match=r"a\.png: does not read back: "):
        save_png(picture, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
